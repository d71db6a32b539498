"""Laws of `--trim_vocabulary`: captions have the tokens they had, other text comes back whole, the decoder says the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from fresh import run_fresh
from PIL import Image
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderModel,
)
from transformers.modeling_outputs import BaseModelOutput

import train_vit_gpt2
from data_scripts.caption_table import FEATURES
from data_scripts.trim_vocabulary import trim_tokenizer
from modeling.vit_gpt2 import build_vit_gpt2, encoder_config

COLORS = {"red": (220, 30, 30), "green": (30, 170, 40), "blue": (30, 50, 220), "white": (250, 250, 250)}
CAPTIONS = [f"A naïve image, all {name} from one side to the other ." for name in COLORS]
OTHERS = [
    "Zwölf Boxkämpfer 한국어 글 👨‍👩‍👧 ❤️ Ω\n\ttab",
    "the thermometer that bothers others, painting images",
    "żółć  <s> ",
]
END = "<|endoftext|>"


def byte_level_bpe(kind: str) -> PreTrainedTokenizerFast:
    """Trained on more than the captions. GPT-2's own has one special token; the others have three, behind the rest."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = [END] if kind == "gpt2" else []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    texts = [*CAPTIONS, *OTHERS, *(f" {caption}" for caption in CAPTIONS), Path(__file__).read_text()]
    raw.train_from_iterator(texts, trainer)
    if kind == "gpt2":
        return GPT2TokenizerFast(tokenizer_object=raw, bos_token=END, eos_token=END, unk_token=END, pad_token=END)
    raw.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<pad>")])
    ends = [(token, raw.token_to_id(token)) for token in ("</s>", "<s>")]
    raw.post_processor = {
        "template": processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends),
        "roberta": processors.Sequence([processors.RobertaProcessing(*ends, add_prefix_space=False)]),
    }[kind]
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize("kind", ["gpt2", "template", "roberta"])
def test_captions_have_the_same_tokens_and_other_text_comes_back(kind, tmp_path):
    whole = byte_level_bpe(kind)
    trimmed, token_ids = trim_tokenizer(whole, CAPTIONS)
    trimmed.save_pretrained(tmp_path)
    for tokenizer in (trimmed, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == len(token_ids) < len(whole) - 50
        assert tokenizer.convert_ids_to_tokens(range(len(token_ids))) == whole.convert_ids_to_tokens(token_ids)
        for caption in CAPTIONS:  # with the special tokens that the tokenizer adds
            ids = tokenizer(caption).input_ids
            assert tokenizer.convert_ids_to_tokens(ids) == whole.convert_ids_to_tokens(whole(caption).input_ids)
        for text in OTHERS:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            expected = whole.decode(whole(text, add_special_tokens=False).input_ids)
            assert tokenizer.decode(ids) == expected == text
        for name in ("bos", "eos", "pad"):
            assert getattr(tokenizer, f"{name}_token") == getattr(whole, f"{name}_token")
            assert token_ids[getattr(tokenizer, f"{name}_token_id")] == getattr(whole, f"{name}_token_id")
        padded = tokenizer([CAPTIONS[0], "a"], padding=True).input_ids[1]
        assert padded[-1] == tokenizer.pad_token_id


@pytest.mark.parametrize("kind", ["gpt2", "template"])
def test_special_tokens_that_a_caption_names_are_text(kind):
    whole = byte_level_bpe(kind)
    text = f"a sign that says {END} and </s> in red"
    trimmed, _ = trim_tokenizer(whole, [text])
    ids, expected = (
        part(text, add_special_tokens=False, split_special_tokens=True).input_ids for part in (trimmed, whole)
    )
    assert trimmed.convert_ids_to_tokens(ids) == whole.convert_ids_to_tokens(expected)
    assert trimmed.eos_token_id not in ids and trimmed.decode(ids, skip_special_tokens=True) == text


def test_nothing_is_kept_that_is_neither_used_nor_on_the_way():
    """Each token kept is a byte, is special, is one of a caption's, or is part of another that is kept."""
    whole = byte_level_bpe("gpt2")
    trimmed, _ = trim_tokenizer(whole, CAPTIONS)
    used = {token for caption in CAPTIONS for token in whole.tokenize(caption)}
    kept = trimmed.get_vocab().keys()
    merges = [tuple(pair) for pair in json.loads(trimmed.backend_tokenizer.to_str())["model"]["merges"]]
    parts = {part for pair in merges for part in pair}
    assert kept == used | parts | set(pre_tokenizers.ByteLevel.alphabet()) | {END}
    assert {"".join(pair) for pair in merges} <= kept


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_the_whole_models_at_the_tokens_kept(tied, tmp_path):
    whole = byte_level_bpe("gpt2")
    trimmed, token_ids = trim_tokenizer(whole, CAPTIONS)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(whole), add_cross_attention=True, **sizes)).save_pretrained(tmp_path)
    logits = []
    states = BaseModelOutput(last_hidden_state=torch.randn(1, 5, 32))
    for tokenizer, kept in ((whole, None), (trimmed, token_ids)):
        model = build_vit_gpt2(encoder_config(32, 16, 32, 1, 2), str(tmp_path), tokenizer, "A", token_ids=kept).eval()
        start_ids = model.generation_config.decoder_start_token_id[0]
        ids = torch.tensor([start_ids + tokenizer(CAPTIONS[0], add_special_tokens=False).input_ids])
        logits.append(model(encoder_outputs=states, decoder_input_ids=ids).logits)
        embeddings, head = model.decoder.get_input_embeddings(), model.decoder.get_output_embeddings()
        assert (embeddings.weight is head.weight) == tied
    assert model.config.decoder.vocab_size == len(embeddings.weight) == len(trimmed)
    torch.testing.assert_close(logits[1], logits[0][..., token_ids], rtol=0, atol=1e-6)
    for config in (model.config, model.config.decoder, model.generation_config):
        assert config.bos_token_id == config.eos_token_id == config.pad_token_id == trimmed.eos_token_id
    assert model.generation_config.decoder_start_token_id[0] == [trimmed.bos_token_id, *trimmed("A").input_ids]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Runs the script on images of one color with a saved decoder, in a folder that it gives."""
    folder = tmp_path_factory.mktemp("trimmed")
    rows = [
        {"image": Image.new("RGB", (40, 30), color), "image_id": name, "captions": [caption], "content_hash": name}
        for (name, color), caption in zip(COLORS.items(), CAPTIONS, strict=True)
    ]
    table = Dataset.from_list(rows).cast(FEATURES)
    DatasetDict({"train": table, "validation": table}).save_to_disk(folder / "data")
    tokenizer = byte_level_bpe("gpt2")
    tokenizer.save_pretrained(folder / "decoder")
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "decoder")
    fixed = {"dataset_name": folder / "data", "decoder": folder / "decoder", "pretrained_encoder": "false"}
    fixed |= {"image_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    fixed |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
    fixed |= {"disable_tqdm": "true", "trim_vocabulary": "true", "load_best_model_at_end": "false"}

    def run(name: str, **options) -> Path:
        options = {**fixed, "output_dir": folder / name, **options}
        train_vit_gpt2.main([word for option, value in options.items() for word in (f"--{option}", str(value))])
        return folder / name

    return run


@pytest.mark.slow
def test_trained_resumed_and_loaded_elsewhere(train, tmp_path):
    undisturbed = train("undisturbed", num_train_epochs=3)
    resumed = undisturbed.with_name("resumed")
    resumed.mkdir()
    shutil.copytree(undisturbed / "checkpoint-2", resumed / "checkpoint-2")
    train("resumed", num_train_epochs=3, resume_from_checkpoint="last")
    there, here = (load_file(path / "model.safetensors") for path in (undisturbed, resumed))
    assert all(torch.equal(here[name], there[name]) for name in there)

    written = [json.loads(line)["caption"] for line in (undisturbed / "captions.jsonl").read_text().splitlines()]
    model = VisionEncoderDecoderModel.from_pretrained(undisturbed)
    assert len(AutoTokenizer.from_pretrained(undisturbed)) == model.config.decoder.vocab_size < 600
    code = """
import json, sys
from PIL import Image
from transformers import AutoProcessor, VisionEncoderDecoderModel
model, processor = (part.from_pretrained(sys.argv[1]) for part in (VisionEncoderDecoderModel, AutoProcessor))
images = [Image.new("RGB", (40, 30), tuple(color)) for color in json.loads(sys.argv[2])]
made = model.generate(**processor(images=images, return_tensors="pt"))
skip = len(model.generation_config.decoder_start_token_id[0])
print(json.dumps([text.strip() for text in processor.batch_decode(made[:, skip:], skip_special_tokens=True)]))
"""
    printed = run_fresh(code, undisturbed, json.dumps(list(COLORS.values())), folder=tmp_path / "elsewhere")
    assert json.loads(printed.splitlines()[-1]) == written and any(written)


def test_another_tokenizer_is_refused_in_one_sentence(train, capsys):
    with pytest.raises(SystemExit) as ended:
        train("refused", pretrained_decoder="false")  # its tokenizer is SentencePiece's, trained on the captions
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1 and "--trim_vocabulary" in lines[0]
