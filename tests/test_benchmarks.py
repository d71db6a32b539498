"""The benchmarks, run with small captioners: both sides compute the same, and the training scripts take the options they are given."""

import json

import pytest
from small_captioners import IMAGES, build

from benchmarks import full_size, generate, train_epoch

KINDS = ("lstm", "vit_gpt2")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_captions_are_those_of_decoding_without_a_cache(kind, tmp_path, monkeypatch):
    captioner = build(kind)
    pixels = captioner.processor(images=IMAGES, return_tensors="pt")["pixel_values"]
    states = captioner.encoder(pixels).last_hidden_state.detach()
    monkeypatch.setattr(generate, "build_captioner", lambda *_: captioner)
    monkeypatch.setattr(generate, "random_states", lambda *_: states)
    generate.main(["--captioners", kind, "--runs", "1", "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())[kind]
    assert result["same_captions"] == len(IMAGES)
    assert result["speedup"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_epoch_has_the_loss_of_the_reference_implementation(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(train_epoch, "build_captioner", lambda *_: build(kind))
    monkeypatch.setattr(train_epoch, "EPOCH_CAPTIONS", 16)
    monkeypatch.setattr(train_epoch, "NUM_IMAGES", {kind: 8})
    monkeypatch.setitem(full_size.BATCH_SIZE, kind, 4)
    monkeypatch.setattr(train_epoch.datasets.config, "HF_DATASETS_CACHE", tmp_path)  # restored after the test
    train_epoch.main(["--captioners", kind, "--runs", "1", "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())[kind]
    assert result["relative_difference_of_losses"] < 1e-5
    assert result["growth"][-1]["images"] == 8
    assert result["seconds_per_caption"]["showtell"][0] >= 0
