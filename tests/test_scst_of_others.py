"""SCST from a ViT-GPT2 captioner of the shape that others have on the Hub."""

import pytest
import torch
from safetensors.torch import load_file
from small_captioners import IMAGES, WORDS, word_tokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import train_scst
from modeling.captioner import Captioner

END = 2  # id of the token that begins, ends and, for some, pads


@pytest.fixture(params=["nlpconnect", "distilvit"])
def others(request, tmp_path) -> str:
    """A folder of the shape of nlpconnect/vit-gpt2-image-captioning or Mozilla/distilvit: no processor, one special token.

    The second's distilgpt2 has no padding token, and its encoder a pooler.
    """
    torch.manual_seed(0)
    folder = tmp_path / request.param
    sizes = {"image_size": 32, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    encoder = ViTModel(ViTConfig(**sizes, intermediate_size=64), add_pooling_layer=request.param == "distilvit")
    special = {"bos_token_id": END, "eos_token_id": END}
    gpt2 = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=len(WORDS), add_cross_attention=True, **special)
    gpt2.is_decoder = True
    model = VisionEncoderDecoderModel(encoder=encoder, decoder=GPT2LMHeadModel(gpt2))
    ids = {**special, "pad_token_id": END, "decoder_start_token_id": END}
    model.config.update(ids)
    model.generation_config.update(**ids, max_length=10)
    model.save_pretrained(folder)
    tokens = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if request.param == "nlpconnect":
        tokens["pad_token"] = "</s>"
    raw = word_tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=raw, **tokens).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def fine_tune(small_scenes, tmp_path):
    """Trains for three steps, and gives the folder."""

    def run(script, start: str, *more: str):
        folder = tmp_path / "run"
        where = ["--model_name_or_path", start, "--dataset_name", str(small_scenes), "--output_dir", str(folder)]
        small = ["--max_steps", "3", "--max_eval_samples", "4", "--max_length", "8", "--report_to", "none"]
        script.main([*where, *small, *more])
        return folder

    return run


def changed(start: str, folder) -> set[str]:
    """First two parts of the names of the weights that differ."""
    before, after = load_file(f"{start}/model.safetensors"), load_file(f"{folder}/model.safetensors")
    names = {name for name in before if not name.startswith("encoder.pooler.")}
    assert names == {name for name in after if not name.startswith("encoder.pooler.")}
    return {".".join(name.split(".")[:2]) for name in names if not torch.equal(before[name], after[name])}


@pytest.mark.slow
def test_scst_fine_tunes_the_decoder_of_a_captioner_of_others(others, fine_tune):
    folder = fine_tune(train_scst, others, "--eval_on_start", "false", "--learning_rate", "1e-2")
    assert {name.split(".")[0] for name in changed(others, folder)} == {"decoder"}
    loaded = Captioner.load(folder)
    assert loaded.start_token_ids == [END] and len(loaded.tokenizer) == len(WORDS)
    pixels = loaded.image_processor(images=IMAGES[:2], return_tensors="pt").pixel_values
    assert len(loaded.generate({"pixel_values": pixels})) == 2
