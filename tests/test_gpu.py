"""Laws on a CUDA card: what a captioner computes there is what it computes on a CPU. Skipped without a card."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_captioners import COLORS, IMAGES, build

import train_lstm
from modeling.caption_loss import teacher_forcing_loss

DEVICE = "cuda"
KINDS = pytest.mark.parametrize("kind", ["lstm", "vit_gpt2"])
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card: torch.cuda.is_available() is false"),
]
# Relative differences of losses from the CPU's in float32: float32 on a card multiplies in another order, the others round.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch):
    """torch lets cuDNN round float32 to 10 bits by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def loss_on(captioner, device: str, dtype: torch.dtype = torch.float32) -> float:
    """Loss of a batch, with autocast as in training."""
    model = copy.deepcopy(captioner.model).to(device).eval()
    labels = captioner.tokenizer([f"a {color} dog runs" for color in COLORS], return_tensors="pt").input_ids
    pixels = captioner.processor(images=IMAGES, return_tensors="pt").pixel_values
    batch = {"pixel_values": pixels.to(device), "labels": labels.to(device)}
    with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        if not hasattr(model, "decoder"):
            return model(**batch).loss.item()
        ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
        return teacher_forcing_loss(model, model, batch | {"decoder_input_ids": ids}).item()


@KINDS
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_losses_are_the_cpus(kind, dtype):
    captioner = build(kind)
    assert loss_on(captioner, DEVICE, dtype) == pytest.approx(loss_on(captioner, "cpu"), rel=BOUNDS[dtype])


@KINDS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_are_the_cpus(kind, smoothing):
    """Those of captions of several lengths, whose padding has no label, in float32 and bfloat16, of a loss as small as that of one
    caption among thousands: torch's autocast to bfloat16 has LSTMs in float16, where such gradients are zeros."""
    captioner = build(kind)
    captions = ["a dog", "a big black dog runs over the grass", "red", "two dogs"]
    labels = captioner.tokenizer(captions, return_tensors="pt", padding=True).input_ids
    labels = labels.masked_fill(labels == captioner.tokenizer.pad_token_id, -100)
    pixels = captioner.processor(images=IMAGES[:4], return_tensors="pt").pixel_values
    gradients = {}
    for name, device, dtype in (("cpu", "cpu", None), ("float32", DEVICE, None), ("bfloat16", DEVICE, torch.bfloat16)):
        model = copy.deepcopy(captioner.model).to(device).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        batch = {"pixel_values": pixels.to(device), "labels": labels.to(device)}
        with torch.autocast(device, dtype, enabled=dtype is not None):
            if kind == "vit_gpt2":
                ids = model.prepare_decoder_input_ids_from_labels(batch["labels"])
                loss = teacher_forcing_loss(model, model, batch | {"decoder_input_ids": ids}, label_smoothing=smoothing)
            else:
                loss = model(**batch, label_smoothing=smoothing).loss
        (loss * 1e-6).backward()
        gradients[name] = {k: p.grad.cpu() for k, p in model.named_parameters() if p.grad is not None}
    assert gradients["cpu"].keys() == gradients["float32"].keys() == gradients["bfloat16"].keys()
    for name, expected in gradients["cpu"].items():
        size = expected.norm() + 1e-9
        assert (gradients["float32"][name] - expected).norm() <= 1e-3 * size, name
        assert (gradients["bfloat16"][name] - expected).norm() <= 0.1 * size, name


@KINDS
@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions_are_the_cpus(kind, num_beams):
    captioner = build(kind)
    pixels = captioner.processor(images=IMAGES, return_tensors="pt").pixel_values
    here = captioner.generate({"pixel_values": pixels}, num_beams=num_beams, confidence=True)
    there = captioner.to(DEVICE).generate({"pixel_values": pixels.to(DEVICE)}, num_beams=num_beams, confidence=True)
    assert [caption["caption"] for caption in here] == [caption["caption"] for caption in there]
    for one, other in zip(here, there, strict=True):
        assert one["log_probability"] == pytest.approx(other["log_probability"], abs=1e-3)


@KINDS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_captions_in_half_precision_are_mostly_the_cpus(kind, dtype):
    captioner = build(kind)
    pixels = captioner.processor(images=IMAGES, return_tensors="pt").pixel_values
    here = [caption["caption"].split()[:1] for caption in captioner.generate({"pixel_values": pixels})]
    captioner.to(DEVICE, dtype)
    there = captioner.generate({"pixel_values": pixels.to(DEVICE, getattr(torch, dtype))})
    same = sum(one == other["caption"].split()[:1] for one, other in zip(here, there, strict=True))
    assert same >= len(IMAGES) - 1  # the first word; later ones follow it


def test_a_resumed_run_ends_on_the_same_bits(small_scenes, tmp_path: Path):
    options = ["--encoder", "test_efficientnet", "--pretrained_encoder", "false", "--image_size", "64"]
    options += ["--image_embed_dim", "32", "--hidden_size", "32", "--num_hidden_layers", "1"]
    options += ["--vocab_size", "120", "--per_device_train_batch_size", "16", "--report_to", "none"]
    options += ["--dataset_name", small_scenes, "--num_train_epochs", "2", "--save_epochs", "1"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_lstm.main([*options, "--output_dir", str(whole)])
    (first, *_) = sorted(whole.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    train_lstm.main([*options, "--output_dir", str(resumed), "--resume_from_checkpoint", str(first)])
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
