"""The benchmarks, run with small captioners: both sides compute the same, and the training scripts take the options they are given."""

import json

import pytest
import torch
from small_captioners import IMAGES, build

from benchmarks import full_size, generate, gpu, onnx_step, train_epoch
from modeling import caption_loss

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


def test_the_check_of_a_card_runs_on_a_cpu(tmp_path, capsys, monkeypatch):
    """Every part, on small captioners; without the tests of a card."""
    monkeypatch.setattr(caption_loss, "chunk_gradients", caption_loss.chunk_gradients)  # as it was, afterwards
    gpu.main(["--device", "cpu", "--tiny", "--json", str(tmp_path / "gpu.json")])
    result = json.loads((tmp_path / "gpu.json").read_text())
    for kind in KINDS:
        assert result[f"training step, {kind}"]["batch_4"]["per_second"] > 0
        assert result[f"encoder, {kind}"]["loaded_and_encoded_per_second"] > 0
        assert result[f"decoding, {kind}"]["per_second_4_beams"] > 0
        assert result[f"loss, {kind}"]["of_ours"]["nats"] == pytest.approx(
            result[f"loss, {kind}"]["plain"]["nats"], rel=1e-5
        )
        assert result[f"adamw, {kind}"]["difference"] < 1e-5
    assert result["training step, vit_gpt2"]["compiled"]["per_second"] > 0
    printed = capsys.readouterr().out
    assert all(f"| {part} |" in printed for part in result)


def test_operations_of_a_training_step_are_those_of_its_products():
    """Of ViT-GPT2's head alone, three products; counted they are more, for the layers below it."""
    captions = ["a red dog", "the small cat sits on it"] * 10
    for kind in KINDS:
        captioner = gpu.tiny_captioner(kind, captions)
        args = gpu.Namespace(device="cpu", tiny=True, sizes=gpu.Namespace(**gpu.SIZES[True]))
        head = captioner.model.get_output_embeddings()
        of_head = 6 * args.sizes.tokens * head.in_features * head.out_features
        assert of_head < gpu.plain_operations(captioner, args) < 50 * of_head


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_check_says_so(capsys):
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2 and "no CUDA card" in capsys.readouterr().err


@pytest.mark.usefixtures("exporter")
def test_a_profile_of_the_exported_step_names_the_lstm_and_its_int8(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_step, "build_captioner", lambda: build("lstm", "attention"))
    onnx_step.main(["--batch_sizes", "2", "--runs", "1", "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["batch 2"]["ratio"] > 0 and result["megabytes"]["q8"] < result["megabytes"]["fp32"]
    shares = result["profile"]["batch 2"]
    assert "LSTM" in shares["fp32"] and "DynamicQuantizeLSTM" in shares["q8"] and "LSTM" not in shares["q8"]
    assert all(90 < sum(of_one.values()) <= 100.5 for of_one in shares.values())


def test_engines_of_an_encoder_have_the_captions_of_torch_but_for_8_bits(small_scenes, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime (pip install onnx onnxruntime)")
    from benchmarks import encoder_engines

    build("lstm", "attention").save(tmp_path / "model")
    small = ["--max_eval_samples", "5", "--num_timed", "2", "--num_calibration", "2", "--num_float", "1", "--runs", "1"]
    small += ["--dataset_name", str(small_scenes)]
    encoder_engines.main([str(tmp_path / "model"), *small, "--json", str(tmp_path / "engines.json")])
    result = json.loads((tmp_path / "engines.json").read_text())
    assert result["images"] == 5
    assert result["onnxruntime"]["same_captions"] == 5
    assert result["onnxruntime"]["difference_of_states"] < 1e-4 < result["8 bits"]["difference_of_states"] < 0.5
    assert result["8 bits"]["images_per_processor_second"] > 0
