"""Laws of what fits into a ViT-GPT2: encoders of timm, decoders of other kinds, and what is refused."""

import json
from importlib.metadata import version

import pytest
import timm
import torch
from fresh import run_fresh
from packaging.version import Version
from safetensors.torch import save_file
from small_captioners import WORDS, word_tokenizer
from transformers import (
    BartConfig,
    BertConfig,
    BigBirdConfig,
    Gemma3Config,
    GemmaConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MBartConfig,
    MegatronBertConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    Qwen2Config,
    TrOCRConfig,
    ViTConfig,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
    WhisperConfig,
    XGLMConfig,
    XmodConfig,
)

import train_vit_gpt2
from modeling.caption_loss import teacher_forcing_loss
from modeling.captioner import Captioner
from modeling.processing import build_processor
from modeling.vit_gpt2 import build_vit_gpt2, decoder_config, encoder_config, load_encoder
from system.errors import UserError
from training.encoder_training import freeze_unused

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {**SIZES, "vocab_size": len(WORDS), "intermediate_size": 64, "max_position_embeddings": 64}
SQUARE = {"height": 32, "width": 32}
SEQ2SEQ = {"vocab_size": len(WORDS), "d_model": 32, "max_position_embeddings": 64}
LAYERS = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
DECODERS = {
    "distilgpt2": GPT2Config(vocab_size=len(WORDS), n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=9),
    "bart": BartConfig(**SEQ2SEQ, **LAYERS, encoder_layers=1, forced_bos_token_id=7, decoder_start_token_id=8),
    "mbart": MBartConfig(**SEQ2SEQ, **LAYERS, encoder_layers=3, forced_bos_token_id=7),
    "xglm": XGLMConfig(**SEQ2SEQ, num_layers=2, attention_heads=4, ffn_dim=64),
    "trocr": TrOCRConfig(**SEQ2SEQ, **LAYERS),
}
UNFIT = {
    "opt": OPTConfig(vocab_size=len(WORDS), **SIZES, ffn_dim=64, word_embed_proj_dim=32),
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON, num_key_value_heads=4),
    "gemma": GemmaConfig(**COMMON, num_key_value_heads=4, head_dim=8),
    "gpt_neox": GPTNeoXConfig(**COMMON),
    "modernbert-decoder": ModernBertDecoderConfig(**COMMON),
    "gpt_bigcode": GPTBigCodeConfig(vocab_size=len(WORDS), n_embd=32, n_layer=1, n_head=4, n_positions=64),
    "gemma3": Gemma3Config(text_config={**COMMON, "num_key_value_heads": 4, "head_dim": 8}, vision_config=SIZES),
    "vit": ViTConfig(**SIZES),
}
# They have cross attention, and end in an error of their own as soon as they are trained or generate.
BROKEN = {
    "big_bird": BigBirdConfig(**COMMON, attention_type="original_full"),
    "megatron-bert": MegatronBertConfig(**COMMON),
    "xmod": XmodConfig(**COMMON),
    "whisper": WhisperConfig(**LAYERS, vocab_size=len(WORDS), d_model=32, max_target_positions=64, encoder_layers=1),
}
FRESH_PROCESS = """
import sys, json, torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
AutoImageProcessor.from_pretrained(sys.argv[1])
pixels = torch.linspace(-1, 1, 3 * 96 * 96).sin().reshape(1, 3, 96, 96)
with torch.inference_mode():
    print(json.dumps(model.encoder(pixels).last_hidden_state.sum(-1).tolist()))
    print(json.dumps(model.generate(pixel_values=pixels, max_length=8, num_beams=2).tolist()))
"""


def timm_folder(folder, architecture: str) -> str:
    """A folder as `timm.save_for_hf` writes it, with random weights and statistics."""
    torch.manual_seed(0)
    model = timm.create_model(architecture)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    about = {"input_size": [3, 96, 96], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    about |= {"num_classes": 1000, **{name: model.pretrained_cfg[name] for name in ("classifier", "first_conv")}}
    config = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": about}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def captioner_of(encoder, image_processor, **options) -> Captioner:
    tokenizer = word_tokenizer()
    model = build_vit_gpt2(encoder, decoder_config(len(tokenizer), **SIZES), tokenizer, **options)
    return Captioner(model, build_processor(image_processor, tokenizer))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["test_vit4", "test_efficientnet", "test_convnext"])
def test_a_timm_encoder_gives_timms_own_states_and_what_it_does_not_read_is_frozen(tmp_path, architecture):
    source = timm_folder(tmp_path / "timm", architecture)
    size = {"img_size": 96} if "vit" in architecture else {}
    reference = timm.create_model(f"local-dir:{source}", pretrained=True, num_classes=0, **size).eval()
    captioner = captioner_of(*load_encoder(source, image_size=96), freeze_encoder=False)
    encoder, pixels = captioner.model.encoder.eval(), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        states = encoder(pixels).last_hidden_state
        if "vit" in architecture:
            expected = reference.forward_features(pixels)
        else:
            maps = timm.create_model(f"local-dir:{source}", pretrained=True, features_only=True).eval()(pixels)
            expected = maps[-1].flatten(2).transpose(1, 2)
            expected = torch.nn.functional.layer_norm(expected, expected.shape[-1:], eps=1e-6)
            states = states[:, 1:]  # without the class token
    torch.testing.assert_close(states, expected)
    freeze_unused(captioner)
    encoder(pixels).last_hidden_state.square().sum().backward()
    assert all(parameter.requires_grad == (parameter.grad is not None) for parameter in encoder.parameters())


@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_vit"])
@pytest.mark.slow
def test_a_captioner_with_a_timm_encoder_loads_in_a_fresh_process_without_remote_code(tmp_path, architecture):
    captioner = captioner_of(*load_encoder(timm_folder(tmp_path / "timm", architecture), image_size=96))
    captioner.save(tmp_path / "saved")
    made = run_fresh(FRESH_PROCESS, tmp_path / "saved", folder=tmp_path / "elsewhere")
    pixels = torch.linspace(-1, 1, 3 * 96 * 96).sin().reshape(1, 3, 96, 96)
    model = Captioner.load(tmp_path / "saved").model
    for one in (model, captioner.model.eval()):
        states, ids = map(json.loads, made.splitlines())
        with torch.inference_mode():
            torch.testing.assert_close(one.encoder(pixels).last_hidden_state.sum(-1), torch.tensor(states))
            assert one.generate(pixel_values=pixels, max_length=8, num_beams=2).tolist() == ids


def test_vit_mae_masks_nothing_and_is_the_same_each_time(tmp_path):
    config = ViTMAEConfig(**SIZES, intermediate_size=64, image_size=32, patch_size=8)
    mae = ViTMAEModel(config).eval()
    mae.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    encoder, _ = load_encoder(str(tmp_path))
    pixels = torch.randn(1, 3, 32, 32)
    states = encoder.eval()(pixels).last_hidden_state
    mae.config.mask_ratio = 0.0
    order = torch.arange(16.0)[None]  # noise by which the patches are sorted
    torch.testing.assert_close(states, mae(pixels, noise=order).last_hidden_state)


def test_an_image_size_that_does_not_fit_and_large_features_are_named(tmp_path, caplog, monkeypatch):
    source = timm_folder(tmp_path / "timm", "test_vit")
    with pytest.raises(UserError, match="--image_size 100"):
        load_encoder(source, image_size=100)
    monkeypatch.setattr("modeling.encoders.LARGE_FEATURES", 1000)
    load_encoder(source, image_size=96)
    assert "--image_size" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder_trains_saves_loads_and_captions(tmp_path, kind):
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    encoder = encoder_config(32, 16, **SIZES)
    model = build_vit_gpt2(encoder, DECODERS[kind], tokenizer, dropout=0.0)
    captioner = Captioner(model, build_processor(ViTImageProcessor(size={"height": 32, "width": 32}), tokenizer))
    caption = "the red dog runs under it"
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(caption).input_ids]])
    pixels = torch.randn(1, 3, 32, 32)
    batch = {"pixel_values": pixels, "decoder_input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        teacher_forcing_loss(model, model, batch).backward()
        optimizer.step()
    captioner.set_decoding(max_length=12)
    captioner.save(tmp_path)
    loaded = Captioner.load(tmp_path)
    for options in ({}, {"num_beams": 2}, {"inspect": True}):
        for one in (captioner, loaded):
            one.model.eval()
            (made,) = one.generate({"pixel_values": pixels}, **options)
            assert (made["caption"], made["ended"]) == (caption, True)


@pytest.mark.parametrize("kind", UNFIT | BROKEN)
def test_a_decoder_that_does_not_fit_is_refused(kind):
    if kind == "megatron-bert" and Version(version("transformers")) < Version("5.17"):
        pytest.skip("it trains with transformers 5.5; with 5.17 it does not")
    with pytest.raises(UserError, match=f"{kind}.*GPT-2"):
        build_vit_gpt2(encoder_config(32, 16, **SIZES), (UNFIT | BROKEN)[kind], word_tokenizer())


@pytest.mark.parametrize("part", ["encoder", *UNFIT])
def test_parts_that_do_not_fit_are_refused_before_the_data_are_looked_for(tmp_path, capsys, part):
    option, config = ("encoder", BertConfig(**COMMON)) if part == "encoder" else ("decoder", UNFIT[part])
    config.save_pretrained(tmp_path / "part")  # and neither weights nor a tokenizer
    other = {"encoder": "decoder", "decoder": "encoder"}[option]
    options = [
        f"--{option}",
        str(tmp_path / "part"),
        f"--pretrained_{other}",
        "false",
        "--dataset_name",
        "no/such/data",
    ]
    with pytest.raises(SystemExit) as ended:
        train_vit_gpt2.main([*options, "--output_dir", str(tmp_path / "run")])
    sentence = capsys.readouterr().err
    assert ended.value.code == 2 and config.model_type in sentence and "no/such/data" not in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_parts_saved_in_half_precision_are_trained_in_float32(tmp_path, part):
    tokenizer = word_tokenizer()
    whole = build_vit_gpt2(encoder_config(32, 16, **SIZES), decoder_config(len(tokenizer), **SIZES), tokenizer)
    folder = str(tmp_path / part)
    getattr(whole, part).half().save_pretrained(folder)
    parts = {"encoder": encoder_config(32, 16, **SIZES), "decoder": decoder_config(len(tokenizer), **SIZES)}
    model = build_vit_gpt2(**parts | {part: folder}, tokenizer=tokenizer)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    captioner = Captioner(model.half(), build_processor(ViTImageProcessor(size=SQUARE), tokenizer))
    captioner.save(tmp_path / "saved")
    assert {parameter.dtype for parameter in Captioner.load(tmp_path / "saved").model.parameters()} == {torch.float32}


def test_trying_a_decoder_changes_no_random_number_and_no_weight():
    states = []
    for broken in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if broken:
                patch.setattr("modeling.vit_gpt2._try_decoder", lambda *_: None)
            torch.manual_seed(0)
            model = build_vit_gpt2(
                encoder_config(32, 16, **SIZES), decoder_config(len(WORDS), **SIZES), word_tokenizer()
            )
        states.append((model.state_dict(), torch.rand(3), model.generation_config.to_dict(), model.decoder.training))
    torch.testing.assert_close(states[0][:2], states[1][:2], rtol=0, atol=0)
    assert states[0][2:] == states[1][2:]


def test_berts_head_trains():
    model = build_vit_gpt2(encoder_config(32, 16, **SIZES), BertConfig(**COMMON), word_tokenizer())
    ids = torch.randint(4, len(WORDS), (2, 5))
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "decoder_input_ids": ids, "labels": ids}
    teacher_forcing_loss(model, model, batch).backward()
    trained = {name for name, parameter in model.decoder.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[0] for name in trained} == {"bert", "cls"}
    assert "cls.predictions.transform.dense.weight" in trained
