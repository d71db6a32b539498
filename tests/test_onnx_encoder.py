"""Laws of an encoder through onnxruntime: it is taken where it is equal and faster, else torch encodes, and a sentence says why."""

import json
import types

import pytest
import torch
from small_captioners import IMAGES, build

import caption
from modeling import onnx_encoder
from modeling.onnx_encoder import FastestEncoder, fastest_encoder

pytest.importorskip("onnxruntime", reason="needs onnxruntime (pip install onnx onnxruntime)")
pytest.importorskip("onnx", reason="needs onnx (pip install onnx onnxruntime)")


@pytest.fixture(params=["lstm", "attention", "vit_gpt2"])
def captioner(request):
    return build("lstm", "attention") if request.param == "attention" else build(request.param)


@pytest.fixture
def faster(monkeypatch):
    """Readings of the clock between which onnxruntime takes one second, and torch as many as are put here."""
    readings = iter([0.0, 1.0, 0.0, 3.0])
    monkeypatch.setattr(onnx_encoder, "time", types.SimpleNamespace(perf_counter=lambda: next(readings)))


def pixels_of(captioner, number: int = 5) -> torch.Tensor:
    return captioner.processor(images=IMAGES[:number], return_tensors="pt")["pixel_values"]


def test_states_and_captions_are_those_of_torch(captioner, faster):
    said = []
    encode = FastestEncoder(captioner.encoder, said.append)
    for number in (5, 2):  # batches of any size after the first
        pixels = pixels_of(captioner, number)
        states = encode(pixels).last_hidden_state
        with torch.inference_mode():
            wanted = captioner.encoder(pixels).last_hidden_state
        assert (states - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        assert captioner.generate({"encoder_outputs": encode(pixels)}) == captioner.generate({"pixel_values": pixels})
    assert not said and encode.encode is not captioner.encoder


def wrong(encoder, pixels):
    return lambda pixels: types.SimpleNamespace(last_hidden_state=encoder(pixels).last_hidden_state * 1.01)


def nan(encoder, pixels):
    return lambda pixels: types.SimpleNamespace(last_hidden_state=encoder(pixels).last_hidden_state * float("nan"))


def broken(encoder, pixels):
    raise RuntimeError("no such operator\nand a page more")


@pytest.mark.parametrize("engine", [wrong, nan, broken])
def test_an_engine_that_differs_or_fails_is_not_taken_and_is_named(engine, faster, monkeypatch):
    captioner, said = build("lstm"), []
    monkeypatch.setattr(onnx_encoder, "onnx_encoder", engine)
    encode = FastestEncoder(captioner.encoder, said.append)
    with torch.inference_mode():
        assert torch.equal(
            encode(pixels_of(captioner)).last_hidden_state, captioner.encoder(pixels_of(captioner)).last_hidden_state
        )
    assert len(said) == 1 and "\n" not in said[0]


def test_a_slower_engine_is_not_taken(monkeypatch):
    readings = iter([0.0, 1.0, 0.0, 0.5])
    monkeypatch.setattr(onnx_encoder, "time", types.SimpleNamespace(perf_counter=lambda: next(readings)))
    captioner, said = build("lstm"), []
    encode = FastestEncoder(captioner.encoder, said.append)
    encode(pixels_of(captioner))
    assert encode.encode is captioner.encoder and len(said) == 1


def test_few_images_are_not_worth_an_export_and_bfloat16_stays_in_torch():
    captioner = build("lstm")
    assert fastest_encoder(captioner.encoder, 1, print) is captioner.encoder
    said, encoder = [], captioner.encoder.to(torch.bfloat16)
    encode = FastestEncoder(encoder, said.append)
    encode(pixels_of(captioner).to(torch.bfloat16))
    assert encode.encode is encoder and not said


def test_a_whole_run_has_the_captions_of_torch(tmp_path, monkeypatch, faster, capsys):
    build("lstm", "attention").save(tmp_path / "model")
    monkeypatch.setattr(onnx_encoder, "MIN_IMAGES", 1)
    chosen, engine = [], onnx_encoder.onnx_encoder
    monkeypatch.setattr(onnx_encoder, "onnx_encoder", lambda *given: chosen.append(1) or engine(*given))
    for place, image in enumerate(IMAGES):
        image.save(tmp_path / f"{place}.png")
    names = [str(tmp_path / f"{place}.png") for place in range(len(IMAGES))]
    captions = {}
    for name in ("auto", "torch"):
        output = str(tmp_path / f"{name}.jsonl")
        options = ["--model_name_or_path", str(tmp_path / "model"), "--output", output, "--encoder_engine", name]
        options += ["--device", "cpu"]
        caption.main([*names, *options, "--batch_size", "2"])
        captions[name] = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert captions["auto"] == captions["torch"] and len(chosen) == 1


def test_cached_features_are_those_of_torch(small_scenes, monkeypatch, tmp_path):
    import datasets

    from data_scripts import load_captions
    from training.arguments import DataArguments
    from training.features import encode_splits

    captioner = build("lstm", "attention").model.requires_grad_(False)
    processor = build("lstm", "attention").image_processor
    found = {}
    for name, fewest in (("torch", 10_000), ("onnxruntime", 1)):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / name)
        monkeypatch.setattr(onnx_encoder, "MIN_IMAGES", fewest)
        readings = iter([0.0, 1.0, 0.0, 3.0])
        monkeypatch.setattr(
            onnx_encoder, "time", types.SimpleNamespace(perf_counter=lambda given=readings: next(given))
        )
        features = encode_splits(load_captions(small_scenes), captioner.get_encoder(), processor, DataArguments())
        found[name] = torch.tensor(features["test"][0][[*range(9)]]["encoder_features"]).float()
        assert (next(readings, None) is None) == (name == "onnxruntime")
    assert (found["torch"] - found["onnxruntime"]).abs().max() <= 1e-3 * found["torch"].abs().max()
