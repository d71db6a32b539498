"""Laws of ViT-GPT2's model: what is built, what a caption is made of, what comes back in another process."""

import json
import math
import re

import datasets
import pytest
import torch
from fresh import run_fresh
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BartConfig,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    ResNetConfig,
    RobertaConfig,
    TimmWrapperConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from transformers.modeling_outputs import BaseModelOutput

from modeling.caption_loss import teacher_forcing_loss
from modeling.captioner import Captioner
from modeling.processing import build_processor
from modeling.vit_gpt2 import (
    build_vit_gpt2,
    decoder_config,
    encoder_config,
    vit_image_processor,
)
from system.errors import UserError
from training.batches import CaptionCollator, CaptionPairs
from training.encoder_training import unfreeze_last_blocks

COLORS = {"red": (220, 30, 30), "green": (30, 170, 40), "blue": (30, 50, 220)}
CAPTIONS = {name: f"an image that is all {name} , {'very ' * length}{name} ." for length, name in enumerate(COLORS)}
PROMPT = "Image Caption:"
END = "<|endoftext|>"
VIT_SIZES = {
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
GPT2_SIZES = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of GPT-2's kind: bytes, one special token that begins, ends and (set by us) pads."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator([*CAPTIONS.values(), *map(" {}".format, CAPTIONS.values()), PROMPT], trainer)
    return GPT2TokenizerFast(tokenizer_object=raw, bos_token=END, eos_token=END, unk_token=END, pad_token=END)


@pytest.fixture
def build(tokenizer):
    """Makes a small captioner with random weights, always the same for the same options."""

    def build_small(prompt: str = PROMPT, freeze_encoder: bool = False, width: int = 32):
        torch.manual_seed(0)
        encoder = encoder_config(32, 16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        decoder = decoder_config(len(tokenizer), hidden_size=width, num_hidden_layers=2, num_attention_heads=4)
        model = build_vit_gpt2(encoder, decoder, tokenizer, prompt, freeze_encoder, dropout=0.0)
        model.generation_config.update(max_length=24)
        return model, build_processor(vit_image_processor(encoder), tokenizer)

    return build_small


@pytest.fixture
def rows():
    images = [Image.new("RGB", (40, 30), color) for color in COLORS.values()]
    texts = [[CAPTIONS[name]] for name in COLORS]
    return datasets.Dataset.from_dict({"image": images, "captions": texts}).cast_column("image", datasets.Image())


def batch_of(rows, processor, model, picked=(0, 1, 2), **options) -> dict:
    pairs = CaptionPairs(rows, processor.tokenizer, start_ids=Captioner(model, processor).start_token_ids, **options)
    batch = CaptionCollator(processor)(pairs.__getitems__(list(picked)))
    return batch


def nats(model, batch: dict) -> torch.Tensor:
    """Loss of each caption, summed over its tokens."""
    labels = batch["labels"]
    logits = model(pixel_values=batch["pixel_values"], decoder_input_ids=batch["decoder_input_ids"]).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(dim=1)


@pytest.mark.slow
def test_shapes_and_sizes_are_the_reports():
    """ViT-base at 224 pixels and GPT-2 small with cross attention, without memory or time for the weights."""

    class Vocabulary:
        bos_token_id = eos_token_id = pad_token_id = 50256

        def __len__(self):
            return 50257

        def __call__(self, text, **options):
            return type("Encoding", (), {"input_ids": [5159, 11]})

    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        model = build_vit_gpt2(encoder_config(224, 16, **sizes), decoder_config(50257, **sizes), Vocabulary(), PROMPT)
        outputs = model(torch.zeros(2, 3, 224, 224), decoder_inputs_embeds=torch.zeros(2, 7, 768))
    assert outputs.encoder_last_hidden_state.shape == (2, 197, 768)
    assert outputs.logits.shape == (2, 7, 50257)
    # google/vit-base-patch16-224 without head and pooler; openai-community/gpt2 and twelve layers of cross attention.
    assert model.encoder.num_parameters() == 85_798_656
    assert model.decoder.num_parameters() == 124_439_808 + 12 * (4 * 768 * 768 + 4 * 768 + 2 * 768)


def test_first_loss_is_log_of_the_vocabulary(build, rows):
    model, processor = build()
    batch = batch_of(rows, processor, model)
    loss = nats(model, batch).sum() / (batch["labels"] != -100).sum()
    assert loss.item() == pytest.approx(math.log(len(processor.tokenizer)), rel=0.03)


@pytest.mark.parametrize("has_cross_attention", [False, True])
def test_pretrained_weights_survive_construction(tmp_path, tokenizer, has_cross_attention):
    vit = ViTModel(ViTConfig(**VIT_SIZES))  # with a pooler, as they are on the Hub
    gpt2 = GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, vocab_size=len(tokenizer), add_cross_attention=has_cross_attention))
    vit.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    gpt2.save_pretrained(tmp_path / "gpt2")
    model = build_vit_gpt2(str(tmp_path / "vit"), str(tmp_path / "gpt2"), tokenizer)
    assert type(model) is VisionEncoderDecoderModel
    assert not [name for name, _ in model.encoder.named_parameters() if "pooler" in name]
    for part, source in ((model.encoder, vit), (model.decoder, gpt2)):
        theirs = source.state_dict()
        shared = [name for name in part.state_dict() if name in theirs]
        assert len(shared) >= len(theirs) - 2  # all but the pooler's two
        for name in shared:
            assert torch.equal(part.state_dict()[name], theirs[name]), name
    assert [name for name in model.state_dict() if "crossattention" in name]
    assert model.enc_to_dec_proj.weight.shape == (48, 32)
    assert vit_image_processor(str(tmp_path / "vit")).size["height"] == 32


def test_a_captioners_decoder_is_taken_with_its_cross_attention(build, tokenizer, tmp_path):
    captioner, processor = build(prompt="")
    Captioner(captioner, processor).save(tmp_path)
    kept = list(range(0, len(tokenizer), 3))
    encoder = encoder_config(32, 8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = build_vit_gpt2(encoder, str(tmp_path), processor.tokenizer, dropout=0.25)
    trimmed = build_vit_gpt2(encoder, str(tmp_path), processor.tokenizer, token_ids=kept)
    theirs = captioner.decoder.state_dict()
    assert any("crossattention" in name for name in theirs)
    for name, value in model.decoder.state_dict().items():
        assert torch.equal(value, theirs[name]), name
        rows = kept if "wte" in name or "lm_head" in name else slice(None)
        assert torch.equal(trimmed.decoder.state_dict()[name], theirs[name][rows]), name
    assert model.config.encoder.patch_size == 8
    assert {layer.p for layer in model.decoder.modules() if isinstance(layer, torch.nn.Dropout)} == {0.25}


def test_caption_is_start_prompt_text_and_end(build, rows):
    model, processor = build()
    tokenizer = processor.tokenizer
    pairs = CaptionPairs(rows, tokenizer, start_ids=Captioner(model, processor).start_token_ids)
    item = pairs.tokens(1)
    assert tokenizer.decode(item["decoder_input_ids"]) == f"{END}{PROMPT} {CAPTIONS['green']}"
    num_prompt = len(tokenizer(PROMPT).input_ids)
    assert item["labels"][:num_prompt] == [-100] * num_prompt
    assert tokenizer.decode(item["labels"][num_prompt:]) == f" {CAPTIONS['green']}{END}"
    whole = CaptionPairs(
        rows, tokenizer, start_ids=Captioner(model, processor).start_token_ids, loss_on_prompt=True
    ).tokens(1)
    assert tokenizer.decode(whole["labels"]) == f"{PROMPT} {CAPTIONS['green']}{END}"
    plain = CaptionPairs(rows, tokenizer).tokens(1)
    assert tokenizer.decode(plain["decoder_input_ids"] + plain["labels"][-1:]) == f"{END}{CAPTIONS['green']}{END}"


def test_end_survives_truncation_and_is_a_target(build, rows):
    model, processor = build()
    pairs = CaptionPairs(rows, processor.tokenizer, max_length=5, start_ids=Captioner(model, processor).start_token_ids)
    assert pairs.lengths.tolist() == [5, 5, 5]
    assert all(pairs.tokens(index)["labels"][-1] == processor.tokenizer.eos_token_id for index in range(3))
    batch = batch_of(rows, processor, model)  # of unequal lengths, the end's id being the pad's too
    ends = (batch["labels"] == processor.tokenizer.eos_token_id).sum(dim=1)
    assert ends.tolist() == [1, 1, 1]


def test_padding_changes_no_captions_loss(build, rows):
    model, processor = build()
    model.eval()
    together = nats(model, batch_of(rows, processor, model))
    alone = torch.cat([nats(model, batch_of(rows, processor, model, [index])) for index in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_captions_packed_into_one_row_have_the_loss_and_gradients_of_captions_apart(build, rows, prompt):
    model, processor = build(prompt=prompt)
    model.eval()
    several = rows.map(lambda row: {"captions": [*row["captions"], "all of one color .", "red"]})
    pairs = CaptionPairs(several, processor.tokenizer, start_ids=Captioner(model, processor).start_token_ids)
    items = pairs.__getitems__([0, 1, 2, 3, 6, 8])  # three captions, one and two
    results = []
    for share_images in ("pack", None):
        batch = CaptionCollator(processor, share_images=share_images)(items)
        assert len(batch["labels"]) == len(batch["pixel_values"]) == (3 if share_images else 6)
        model.zero_grad()
        loss = teacher_forcing_loss(model, model, batch)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for packed, apart in zip(*results, strict=True):
        torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-6)


def test_without_prompt_the_loss_is_transformers_own(build, rows):
    model, processor = build(prompt="")
    batch = batch_of(rows, processor, model)
    ours = nats(model, batch).sum() / (batch["labels"] != -100).sum()
    theirs = model(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss  # shifts the labels itself
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_frozen_encoder_stays_as_it_is_in_train(build, rows):
    model, processor = build(freeze_encoder=True)
    for module in model.encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    pixels = batch_of(rows, processor, model)["pixel_values"]
    first, second = (model.encoder(pixels).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    assert all(parameter.requires_grad for parameter in model.decoder.parameters())


def test_of_a_frozen_encoder_the_last_blocks_may_learn(build):
    model, processor = build(freeze_encoder=True)
    captioner = Captioner(model, processor)
    with pytest.raises(ValueError, match="--num_trainable_encoder_blocks 3: give 2 at most"):
        unfreeze_last_blocks(captioner, 3)
    unfreeze_last_blocks(captioner, 1)
    learns = {name for name, parameter in model.encoder.named_parameters() if parameter.requires_grad}
    last = [name for name, _ in model.encoder.named_parameters() if re.search(r"layers?\.1\.", name)]
    assert last and learns == {*last, "layernorm.weight", "layernorm.bias"}
    with pytest.raises(ValueError, match="wants --freeze_encoder true"):
        unfreeze_last_blocks(captioner, 1)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_memorised_images_come_back_without_the_prompt(build, rows, prompt):
    model, processor = build(prompt=prompt)
    model.generation_config.update(max_length=48)
    batch = batch_of(rows, processor, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        (nats(model, batch).sum() / 30).backward()
        optimizer.step()
    model.eval()
    captioner = Captioner(model, processor)
    generated = captioner.generate({"pixel_values": batch["pixel_values"]})
    assert generated == [{"caption": text, "ended": True} for text in CAPTIONS.values()]
    states = BaseModelOutput(last_hidden_state=model.encoder(batch["pixel_values"]).last_hidden_state)
    assert captioner.generate({"encoder_outputs": states}) == generated


FRESH_PROCESS = """
import sys, json, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, VisionEncoderDecoderModel
processor = AutoProcessor.from_pretrained(sys.argv[1])
inputs = processor(images=Image.new("RGB", (40, 30), (220, 30, 30)), return_tensors="pt")
models = [kind.from_pretrained(sys.argv[1]) for kind in (VisionEncoderDecoderModel, AutoModelForImageTextToText)]
ids = [model.generate(**inputs, **options).tolist() for model in models for options in ({}, {"num_beams": 3})]
print(json.dumps(ids))
"""


@pytest.mark.slow
def test_fresh_process_starts_from_the_prompt_and_captions_the_same(build, tmp_path, rows):
    model, processor = build(width=48)
    Captioner(model, processor).save(tmp_path / "saved")
    made = run_fresh(FRESH_PROCESS, tmp_path / "saved", folder=tmp_path / "elsewhere")
    pixels = batch_of(rows, processor, model, [0])["pixel_values"]
    ours = [model.eval().generate(pixel_values=pixels, **options).tolist() for options in ({}, {"num_beams": 3})]
    assert json.loads(made) == ours * 2
    start_ids = [processor.tokenizer.bos_token_id, *processor.tokenizer(PROMPT).input_ids]
    assert ours[0][0][: len(start_ids)] == start_ids


@pytest.mark.parametrize("has_generation_config", [False, True])
def test_checkpoint_of_the_time_before_processors(tmp_path, tokenizer, has_generation_config):
    """A folder as nlpconnect/vit-gpt2-image-captioning is: three parts, no processor config, ids in config.json."""
    config = VisionEncoderDecoderConfig(
        encoder=ViTConfig(**VIT_SIZES).to_dict(),
        decoder=GPT2Config(
            **GPT2_SIZES, vocab_size=len(tokenizer), is_decoder=True, add_cross_attention=True, bos_token_id=0
        ).to_dict(),
    )
    torch.manual_seed(1)
    model = VisionEncoderDecoderModel(config).eval()
    special_ids = {"decoder_start_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": 0}
    model.config.update(special_ids)
    model.generation_config.update(**special_ids)
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if not has_generation_config:
        (tmp_path / "generation_config.json").unlink()
    assert not (tmp_path / "processor_config.json").exists()

    loaded = Captioner.load(str(tmp_path))
    pixels = loaded.processor(images=Image.new("RGB", (40, 30), (30, 50, 220)), return_tensors="pt")["pixel_values"]
    options = {"max_length": 20, "min_new_tokens": 15, "no_repeat_ngram_size": 1}  # random weights say one thing only
    (generated,) = loaded.generate({"pixel_values": pixels}, **options)
    ids = model.generate(pixel_values=pixels, **options)[0]
    assert generated["caption"] == tokenizer.decode(ids, skip_special_tokens=True).strip() != ""
    assert loaded.start_token_ids == [0]


@pytest.mark.parametrize("kind", [RobertaConfig, BertConfig, BartConfig])
def test_any_decoder_has_the_loss_of_its_logits_and_is_the_same_after_saving(tokenizer, tmp_path, kind):
    """RoBERTa counts positions from the padding id; RoBERTa and BERT have layers between the hidden states and the head."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if kind is BartConfig:
        sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
    torch.manual_seed(0)
    decoder = kind(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    assert decoder.pad_token_id != tokenizer.pad_token_id or kind is BertConfig
    model = build_vit_gpt2(ViTConfig(**VIT_SIZES), decoder, tokenizer).eval()
    ids = torch.randint(3, len(tokenizer), (2, 7))
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "decoder_input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    logits = model(**{name: batch[name] for name in ("pixel_values", "decoder_input_ids")}).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(teacher_forcing_loss(model, model, batch), expected)
    model.save_pretrained(tmp_path)
    loaded = VisionEncoderDecoderModel.from_pretrained(tmp_path).eval()
    again = loaded(**{name: batch[name] for name in ("pixel_values", "decoder_input_ids")}).logits
    torch.testing.assert_close(again, logits)


@pytest.mark.parametrize(
    "encoder",
    [TimmWrapperConfig(architecture="test_vit"), ResNetConfig(), GPT2Config(**GPT2_SIZES)],  # timm's are loaded by name
    ids=lambda config: config.model_type,
)
def test_an_encoder_of_another_kind_is_refused(tokenizer, tmp_path, encoder):
    decoder = GPT2Config(**GPT2_SIZES, vocab_size=len(tokenizer))
    with pytest.raises(UserError, match=f"is of the kind {encoder.model_type}"):
        build_vit_gpt2(encoder, decoder, tokenizer)


def test_tokenizer_larger_than_the_decoder_is_refused(tokenizer):
    small = GPT2Config(**GPT2_SIZES, vocab_size=len(tokenizer) - 1)
    with pytest.raises(ValueError, match="give --tokenizer_name the one the decoder was trained with"):
        build_vit_gpt2(ViTConfig(**VIT_SIZES), small, tokenizer)
