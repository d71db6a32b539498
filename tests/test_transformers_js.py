"""A folder for transformers.js captions as greedy `generate()` does, images many times the model's size included."""

import json
import os
import subprocess

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from small_captioners import build

import export_onnx
from captioning.onnx_decoding import ExportedCaptioner

SCRIPT = """
import { pipeline, env, RawImage } from '@huggingface/transformers';
env.allowRemoteModels = false; env.localModelPath = '';
const [folder, dtype, ...images] = process.argv.slice(2);
const captioner = await pipeline('image-to-text', folder, { dtype });
const captions = [];
for (const image of images) captions.push((await captioner(await RawImage.read(image)))[0].generated_text);
console.log(JSON.stringify(captions));
"""


@pytest.fixture(scope="module")
def exported(exporter, tmp_path_factory, colors):
    folder = tmp_path_factory.mktemp("js")
    captioner = build("vit_gpt2", "a big", num_layers=1)
    captioner.model.generation_config.update(no_repeat_ngram_size=2, min_length=5, num_beams=3, length_penalty=0.5)
    captioner.save(folder / "model")
    options = [
        "--format",
        "transformers.js",
        "--dtype",
        "fp32,q8,q4",
        "--dataset_name",
        colors,
        "--max_eval_samples",
        "3",
    ]
    export_onnx.main([str(folder / "model"), str(folder / "js"), *options])
    noise = np.random.default_rng(0)
    sizes = ((32, 32), (128, 128), (200, 170), (96, 40))
    images = [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    pixels = captioner.processor(images=images, return_tensors="pt")["pixel_values"]
    return captioner, folder / "js", images, pixels


def test_encoder_states_and_greedy_captions_are_torchs(exported):
    captioner, folder, images, pixels = exported
    model = ExportedCaptioner(folder)
    with torch.no_grad():
        expected_states = captioner.encoder(pixels).last_hidden_state.numpy()
    expected = captioner.model.generate(pixel_values=pixels, num_beams=1, length_penalty=None).tolist()
    for image, states, caption in zip(images, expected_states, expected, strict=True):
        raw = model.preprocess(np.asarray(image))
        (found,) = model.encode(raw).values()
        assert np.abs(found[0] - states).max() <= 0.05 * np.abs(states).max()  # some pixels differ by a gray level
        (token_ids,) = model.generate(raw)
        assert [*captioner.start_token_ids, *token_ids] == caption[: len(captioner.start_token_ids) + len(token_ids)]


def test_tensors_have_the_names_of_the_npm_package(exported):
    _, folder, _, _ = exported
    encoder, decoder = (
        onnxruntime.InferenceSession(folder / "onnx" / f"{name}.onnx")
        for name in ("encoder_model", "decoder_model_merged")
    )
    assert [tensor.name for tensor in encoder.get_inputs()] == ["pixel_values"]
    assert [tensor.name for tensor in encoder.get_outputs()] == ["last_hidden_state"]
    cache = ["past_key_values.0.key", "past_key_values.0.value"]
    assert [tensor.name for tensor in decoder.get_inputs()] == ["input_ids", "encoder_hidden_states", *cache]
    assert decoder.get_inputs()[2].shape[0] == "batch_size"  # the name that it replaces; others become 0
    assert [tensor.name for tensor in decoder.get_outputs()] == ["logits", "present.0.key", "present.0.value"]


def test_the_settings_are_greedy_and_keep_prompt_and_rules(exported):
    captioner, folder, _, _ = exported
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["num_beams"] == 1 and not settings["do_sample"] and "length_penalty" not in settings
    assert settings["no_repeat_ngram_size"] == 2 and settings["min_length"] == 5
    assert np.ravel(settings["decoder_start_token_id"]).tolist() == captioner.start_token_ids


def test_both_preprocessors_hand_over_pixels_as_they_are(exported):
    _, folder, _, _ = exported
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings == json.loads((folder / "processor_config.json").read_text())["image_processor"]
    assert not any(settings[f"do_{step}"] for step in ("resize", "rescale", "normalize"))


def test_captions_are_scored_beside_torchs(exported, capsys):
    _, folder, _, _ = exported
    saved = json.loads((folder / "scores.json").read_text())
    assert (saved["split"], saved["num_images"]) == ("validation", 3)
    assert list(saved["scores"]) == ["torch", "torch, greedy", "fp32", "q8", "q4"]  # the saved decoding has beams
    assert saved["scores"]["fp32"]["cider"] == saved["scores"]["torch, greedy"]["cider"]
    card = (folder / "README.md").read_text()
    for name, row in {"torch, saved decoding": saved["scores"]["torch"], "q8": saved["scores"]["q8"]}.items():
        assert f"| {name} | {row['cider']:.3f} |" in card
    size = sum(path.stat().st_size for path in (folder / "onnx").glob("*_quantized.onnx"))
    assert saved["scores"]["q8"]["megabytes"] == round(size / 1e6, 2)
    for fall, warns in ((0.01, False), (0.03, True)):
        scores = {"torch": {"cider": 1.0, "milliseconds": 1.0}, "q8": saved["scores"]["q8"] | {"cider": 1.0 - fall}}
        export_onnx.print_scores(saved | {"scores": scores})
        assert ("q8" in capsys.readouterr().err) == warns


@pytest.mark.usefixtures("exporter")
def test_an_lstm_captioner_and_what_it_cannot_have_are_refused(tmp_path, capsys):
    build("lstm").save(tmp_path / "model")
    for options in (["--format", "transformers.js"], ["--dtype", "fp32,int3"], ["--dtype", "q4"]):
        with pytest.raises(SystemExit) as exit_:
            export_onnx.main([str(tmp_path / "model"), str(tmp_path / "js"), *options])
        assert exit_.value.code == 2 and not (tmp_path / "js").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "q8", "q4"])
def test_the_npm_package_captions_as_the_files_say(exported, node_modules, tmp_path, dtype):
    captioner, folder, images, _ = exported
    os.symlink(node_modules, tmp_path / "node_modules")
    (tmp_path / "caption.mjs").write_text(SCRIPT)
    paths = [tmp_path / f"{number}.png" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    command = ["node", "caption.mjs", str(folder), dtype, *map(str, paths)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    model = ExportedCaptioner(folder, dtype)
    token_ids = [model.generate(model.preprocess(np.asarray(image)))[0] for image in images]
    expected = [captioner.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in token_ids]
    prompt = captioner.tokenizer.decode(captioner.start_token_ids, skip_special_tokens=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [f"{prompt} {caption}".strip() for caption in expected]
