"""An exported model generates the captions of the model it came from, with logits within 1e-4."""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from packaging.version import Version
from PIL import Image
from small_captioners import IMAGES, build
from transformers import GenerationConfig

import app
import caption
import export_onnx
import serve
from captioning.batching import BatchingCaptioner
from captioning.onnx_captioner import load_exported
from captioning.onnx_decoding import SUFFIXES, ExportedCaptioner
from modeling import onnx_files
from modeling.captioner import Captioner
from system.errors import UserError


def reference_captions(captioner: Captioner, pixel_values: torch.Tensor) -> list[list[int]]:
    sequences = captioner.model.generate(pixel_values=pixel_values)
    return sequences[:, len(captioner.start_token_ids) :].tolist()


@pytest.mark.parametrize(("kind", "prompt"), [("lstm", "attention"), ("vit_gpt2", "a big")])
@pytest.mark.usefixtures("exporter")
@pytest.mark.slow
def test_exported_attention_and_prompt_write_the_same_words(kind, prompt, tmp_path, monkeypatch):
    captioner = build(kind, prompt, num_layers=2 if kind == "lstm" else 1)
    captioner.save(tmp_path / "model")
    export_onnx.main([str(tmp_path / "model"), str(tmp_path / "exported")])
    assert_same_words(captioner, tmp_path, monkeypatch)


def test_exported_models_write_the_same_words(exported, tmp_path, monkeypatch):
    captioner, folder = exported
    shutil.copytree(folder, tmp_path / "exported")
    monkeypatch.setattr(captioner.model, "generation_config", copy.deepcopy(captioner.model.generation_config))
    assert_same_words(captioner, tmp_path, monkeypatch)


def test_weights_too_many_for_one_file_stand_beside_it(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "MAX_BYTES_IN_FILE", 0)
    module, pixels = torch.nn.Linear(64, 64), torch.randn(2, 64)
    onnx_files.export_module(module, (pixels,), tmp_path / "layer.onnx", ["x"], ["y"], ({},))
    (tmp_path / "copied").mkdir()
    onnx_files.convert(tmp_path / "layer.onnx", tmp_path / "copied" / "layer.onnx", "fp32")
    (layer,) = onnxruntime.InferenceSession(tmp_path / "copied" / "layer.onnx").run(None, {"x": pixels.numpy()})
    np.testing.assert_allclose(layer, module(pixels).detach(), atol=1e-6)
    assert (tmp_path / "copied" / "layer.onnx.data").stat().st_size >= 4 * 64 * 64

    captioner, folder = exported
    shutil.copytree(folder, tmp_path / "model")
    for name in ("encoder.onnx", "step.onnx"):
        beside = {"save_as_external_data": True, "location": f"{name}.data"}
        onnx.save(onnx.load(folder / name), tmp_path / "model" / name, **beside)
    captions = [
        ExportedCaptioner(place).generate(captioner.processor(images=IMAGES, return_tensors="np")["pixel_values"])
        for place in (folder, tmp_path / "model")
    ]
    assert captions[0] == captions[1]


def assert_same_words(captioner: Captioner, tmp_path: Path, monkeypatch) -> None:
    """Of the captioner, and of what was exported to `tmp_path / "exported"`: the same captions, logits and rules."""
    model, processor = captioner.model, captioner.processor
    for name in ("encoder", "step"):
        onnx.checker.check_model(tmp_path / "exported" / f"{name}.onnx")

    steps, run = [], onnxruntime.InferenceSession.run

    def watched(session, *arguments):
        outputs = run(session, *arguments)
        steps.append(outputs[0])
        return outputs

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", watched)
    pixels = processor(images=IMAGES, return_tensors="pt")["pixel_values"]
    captions = export_onnx.caption_images(tmp_path / "exported", pixels.numpy())
    assert captions == reference_captions(captioner, pixels) and len({*map(tuple, captions)}) > 1

    start = torch.tensor([captioner.start_token_ids] * len(IMAGES))
    assert len(steps) == 1 + len(captions[0])  # the encoder, then once for each word
    for number, logits in enumerate(steps[1:]):
        prefix = torch.cat([start, torch.tensor(captions)[:, :number].long()], dim=1)
        with torch.no_grad():
            expected = model(pixel_values=pixels, decoder_input_ids=prefix).logits[:, -1]
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)

    # The rules of decoding hold as in `generate()`.
    model.generation_config.no_repeat_ngram_size = 2
    captioner.save(tmp_path / "ruled")
    ruled_settings = (tmp_path / "ruled" / "generation_config.json").read_text()
    plain_settings = (tmp_path / "exported" / "generation_config.json").read_text()
    (tmp_path / "exported" / "generation_config.json").write_text(ruled_settings)
    ruled = export_onnx.caption_images(tmp_path / "exported", pixels.numpy())
    assert ruled == reference_captions(captioner, pixels) != captions
    (tmp_path / "exported" / "generation_config.json").write_text(plain_settings)
    model.generation_config.no_repeat_ngram_size = None
    boosts = [[[token], 0.4 * (token % 5)] for token in range(2, model.get_output_embeddings().out_features, 2)]
    settings = json.loads(plain_settings) | {"sequence_bias": boosts}
    (tmp_path / "exported" / "generation_config.json").write_text(json.dumps(settings))
    model.generation_config.sequence_bias = boosts
    boosted = export_onnx.caption_images(tmp_path / "exported", pixels.numpy())
    assert boosted == reference_captions(captioner, pixels) != captions
    (tmp_path / "exported" / "generation_config.json").write_text(plain_settings)
    model.generation_config.sequence_bias = None

    # One caption ends before another, and is padded from there.
    settings = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    words = {word for caption in captions for word in caption} - {settings["eos_token_id"]}
    ends = {word: [[*caption, word].index(word) for caption in captions] for word in words}
    end = min((word for word in words if len(set(ends[word])) > 1), key=lambda word: min(ends[word]))
    (tmp_path / "exported" / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": end}))
    model.generation_config.eos_token_id = end
    ended = export_onnx.caption_images(tmp_path / "exported", pixels.numpy())
    assert ended == reference_captions(captioner, pixels) != captions
    longer = {"eos_token_id": end, "min_length": model.generation_config.max_length - 1}
    (tmp_path / "exported" / "generation_config.json").write_text(json.dumps(settings | longer))
    model.generation_config.min_length = longer["min_length"]
    longest = export_onnx.caption_images(tmp_path / "exported", pixels.numpy())
    assert longest == reference_captions(captioner, pixels) != ended
    (tmp_path / "exported" / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": end}))
    (alone,) = export_onnx.caption_images(tmp_path / "exported", pixels[:1].numpy(), max_length=5)
    assert alone == ended[0][: len(alone)] and len(alone) <= 5 - start.shape[1]

    if hasattr(model, "decoder"):  # ViT-GPT2: the encoder holds nothing that only words need
        encoder = onnx.load(tmp_path / "exported" / "encoder.onnx").graph
        held = sum(np.prod(weight.dims) for weight in encoder.initializer)
        of_cross = sum(block.crossattention.c_attn.weight.numel() for block in model.decoder.transformer.h)
        assert held <= 1.1 * (model.encoder.num_parameters() + of_cross)


@pytest.mark.usefixtures("exporter")
def test_a_model_that_is_none_is_one_sentence_and_nothing_is_left(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        export_onnx.main([str(tmp_path / "nowhere"), str(tmp_path / "exported")])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(told) == 1 and "nowhere" in told[0]
    assert not list(tmp_path.iterdir())


def test_what_must_be_installed_is_said(tmp_path, monkeypatch, capsys):
    find_spec = export_onnx.find_spec
    monkeypatch.setattr(export_onnx, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    with pytest.raises(SystemExit) as ended:
        export_onnx.main([str(tmp_path), str(tmp_path / "exported")])
    assert ended.value.code == 2 and "onnxscript" in capsys.readouterr().err


def test_a_torch_that_exports_no_captioner_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export_onnx, "version", lambda name: {"torch": "2.6.0+cu124"}[name])
    with pytest.raises(SystemExit) as ended:
        export_onnx.main([str(tmp_path), str(tmp_path / "exported")])
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and "torch 2.7" in sentence and not (tmp_path / "exported").exists()


@pytest.fixture(scope="module", params=["lstm", "vit_gpt2"])
def exported(request, exporter, tmp_path_factory):
    captioner, folder = build(request.param, num_layers=1), tmp_path_factory.mktemp(request.param)
    captioner.save(folder / "model")
    dtypes = "fp32,fp16,q8" + ",q4" * (request.param == "vit_gpt2")
    export_onnx.main([str(folder / "model"), str(folder / "exported"), "--dtype", dtypes])
    return captioner, folder / "exported"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_new_tokens": 4},
        {"max_length": 9, "max_new_tokens": 5},
        {"max_length": 12, "min_new_tokens": 8},
        {"max_length": 12, "min_length": 9, "min_new_tokens": 2},
        {"max_length": 12, "eos_token_id": [2, 6, 10], "pad_token_id": None},
        {"max_length": 12, "eos_token_id": None},
        {"max_length": 12, "repetition_penalty": 2.5},
        {"max_length": 12, "repetition_penalty": 0.4, "sequence_bias": [[[7], 3.0], [[9], -2.0]]},
        {"max_length": 12, "suppress_tokens": [4, 6, 10]},
        {"max_length": 12, "bad_words_ids": [[6], [10], [2]]},
        {"num_beams": 3},
        {"max_length": 12, "num_beams": 4, "length_penalty": 2.0, "no_repeat_ngram_size": 2, "min_length": 5},
        {"max_length": 12, "num_beams": 4, "length_penalty": -1.5, "early_stopping": True},
        {"max_length": 12, "num_beams": 2, "early_stopping": "never", "repetition_penalty": 1.5},
        {"max_length": 12, "num_beams": 3, "early_stopping": True, "eos_token_id": [2, 6, 10], "pad_token_id": 3},
        {"max_length": 9, "num_beams": 3, "eos_token_id": None, "pad_token_id": None, "suppress_tokens": [4, 6]},
    ],
    ids=str,
)
def test_every_setting_is_that_of_generate(exported, settings):
    captioner, folder = exported
    pixels = captioner.processor(images=IMAGES, return_tensors="pt")["pixel_values"]
    special_ids = {"decoder_start_token_id": 1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = GenerationConfig(**special_ids | settings)
    config.save_pretrained(folder)
    assert export_onnx.ignored_settings(json.loads((folder / "generation_config.json").read_text())) == {}
    captions = export_onnx.caption_images(folder, pixels.numpy())
    captioner.model.generation_config = config  # given with the call, its gaps would be filled from the model's
    assert captions == captioner.model.generate(pixel_values=pixels)[:, 1:].tolist()


@pytest.mark.parametrize(
    ("dtype", "suffix", "fraction"), [("fp16", "_fp16", 0.51), ("q8", "_quantized", 0.3), ("q4", "_q4", 0.25)]
)
def test_smaller_weights_are_smaller_and_nearly_the_same(exported, dtype, suffix, fraction):
    captioner, folder = exported
    if dtype == "q4" and not (folder / "step_q4.onnx").exists():
        pytest.skip("LSTM captioners have no 4 bits")
    pixels = captioner.processor(images=IMAGES, return_tensors="pt")["pixel_values"]
    model = ExportedCaptioner(folder, dtype)
    start = torch.tensor([captioner.start_token_ids] * len(IMAGES))
    logits, _ = model.step(start.numpy(), 0, model.encode(pixels.numpy()), model.first_state(len(IMAGES)))
    with torch.no_grad():
        expected = captioner.model(pixel_values=pixels, decoder_input_ids=start).logits[:, -1].numpy()
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > {"fp16": 0.99999, "q8": 0.99, "q4": 0.9}[dtype]

    def weights(path) -> dict[str, int]:  # bytes; the tiny models of tests have half of theirs in biases and norms
        graph = onnx.load(path).graph
        return {weight.name: len(weight.raw_data) for weight in graph.initializer if np.prod(weight.dims) >= 512}

    for name in ("encoder", "step"):
        whole, small = weights(folder / f"{name}.onnx"), weights(folder / f"{name}{suffix}.onnx")
        assert sum(small.values()) <= fraction * sum(whole.values())
    operators = {node.op_type for node in onnx.load(folder / f"step{suffix}.onnx").graph.node}
    assert dtype != "q8" or "LSTM" not in operators  # onnxruntime's tool leaves the exporter's in float32


def test_each_data_type_is_scored_and_warned_of_where_it_falls(exported, colors, capsys):
    captioner, folder = exported
    dtypes = [dtype for dtype, suffix in SUFFIXES.items() if (folder / f"step{suffix}.onnx").exists()]
    arguments = ("model", str(folder), "showtell", ",".join(dtypes), colors)
    scores = export_onnx.score_exports(captioner, folder, export_onnx.ExportArguments(*arguments))
    rows = scores["scores"]
    assert list(rows) == ["torch", *dtypes] and rows["fp32"]["cider"] == rows["torch"]["cider"]
    for dtype in dtypes:
        assert 0 < rows[dtype]["megabytes"] <= rows["fp32"]["megabytes"]
        fallen = {name: row | {"cider": 1.0 - 0.021 * (name == dtype)} for name, row in rows.items()}
        export_onnx.print_scores(scores | {"scores": fallen})
        (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        assert dtype in warning


def test_the_exported_image_processor_gives_the_pixels_of_the_captioners_own(exported):
    captioner, folder = exported
    graph = onnx.shape_inference.infer_shapes(onnx.load(folder / "preprocess.onnx")).graph
    # onnxruntime-web's build with WebGPU has no kernels of float64.
    assert all(value.type.tensor_type.elem_type != onnx.TensorProto.DOUBLE for value in graph.value_info)
    model, noise = ExportedCaptioner(folder), np.random.default_rng(0)
    for shape in ((64, 64), (70, 301), (40, 31)):
        image = noise.integers(0, 256, (*shape, 3), dtype=np.uint8)
        expected = captioner.processor(images=[image], return_tensors="np")["pixel_values"]
        step = 1 / 255 / np.array(captioner.image_processor.image_std).reshape(3, 1, 1)  # of a gray level
        differences = np.abs(model.preprocess(image) - expected) / step
        assert differences.max() < 1.01 and (differences > 0.01).mean() < 0.05


@pytest.mark.usefixtures("exporter")
def test_settings_that_are_left_out_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_onnx, "write_export", lambda *_: None)
    captioner = build("lstm", num_layers=1)
    captioner.model.generation_config.update(do_sample=True, top_p=0.7, num_beams=4, bad_words_ids=[[3, 4], [5]])
    captioner.save(tmp_path / "model")
    export_onnx.main([str(tmp_path / "model"), str(tmp_path / "exported")])
    told = capsys.readouterr().err
    assert all(f"{name}=" in told for name in ("do_sample", "top_p", "bad_words_ids of several tokens"))
    assert not any(f"{name}=" in told for name in ("max_length", "eos_token_id", "num_beams"))


@pytest.fixture
def both(exported, tmp_path, monkeypatch) -> dict[str, str]:
    """A captioner and its export in folders of the test's own, and three images."""
    captioner, folder = exported
    shutil.copytree(folder, tmp_path / "exported")
    config = GenerationConfig(decoder_start_token_id=1, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_length=12)
    monkeypatch.setattr(captioner.model, "generation_config", config)
    captioner.save(tmp_path / "model")
    config.save_pretrained(tmp_path / "exported")
    (tmp_path / "images").mkdir()
    for number, image in enumerate(IMAGES[:3]):
        image.save(tmp_path / "images" / f"{number}.png")
    return {name: str(tmp_path / name) for name in ("model", "exported", "images")}


@pytest.mark.parametrize("options", [(), ("--num_beams", "3", "--min_length", "5", "--length_penalty", "2")], ids=len)
def test_caption_py_gives_the_captions_of_the_model_and_resumes(both, options, tmp_path, capsys):
    lines = {}
    for name in ("model", "exported"):
        output = tmp_path / f"{name}.jsonl"
        arguments = ["--model_name_or_path", both[name], both["images"], "--output", str(output), *options]
        caption.main(arguments)
        lines[name] = output.read_text()
        capsys.readouterr()
        caption.main(arguments)
        assert output.read_text() == lines[name] and "0 of 3" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            caption.main([*arguments, "--max_length", "2"])
        assert "max_" in capsys.readouterr().err
    assert lines["exported"] == lines["model"] and lines["model"].count("\n") == 3


@pytest.mark.parametrize("exported", ["lstm"], indirect=True)
def test_a_job_resumes_with_what_another_transformers_has_exported(both, tmp_path, capsys):
    arguments = ["--model_name_or_path", both["exported"], both["images"], "--output", str(tmp_path / "c.jsonl")]
    caption.main(arguments)
    path = Path(both["exported"], "generation_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_version": "6.0.0"}))
    caption.main(arguments)
    assert "0 of 3 images captioned, 3 were captioned before" in capsys.readouterr().err


def test_an_export_captions_without_torch(both):
    arguments = ["--model_name_or_path", both["exported"], both["images"]]
    heavy = {"torch", "transformers", "torchvision", "timm", "datasets", "accelerate", "pyarrow", "onnx"}
    code = f"import sys, caption; caption.main({arguments}); print(sorted({heavy} & sys.modules.keys()))"
    root = Path(caption.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    allowed = ["onnx"] if Version(onnxruntime.__version__) < Version("1.32") else []  # which checks paths of weights
    assert len(done.stdout.splitlines()) == 4 and done.stdout.splitlines()[-1] == str(allowed)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "min_length": 5, "length_penalty": 2.0}], ids=len)
def test_server_and_app_answer_with_an_export_as_with_the_model(both, options):
    loaded = {"model": Captioner.load(both["model"]), "exported": load_exported(both["exported"])}
    paths = sorted(map(str, Path(both["images"]).iterdir()))
    contents, answers = [Path(path).read_bytes() for path in paths], {}
    for name, captioner in loaded.items():
        captioner.set_decoding(**options)
        batching = BatchingCaptioner(captioner, 2)
        answers[name] = [serve.caption_images(batching, contents, limit) for limit in (None, 2, 11, 10**9)]
        batching.close()
    assert answers["exported"] == answers["model"] and answers["model"][1] != answers["model"][0]
    assert len({made["caption"] for made in answers["model"][0]}) > 1
    assert not any(made["ended"] for made in answers["model"][1])
    pytest.importorskip("gradio", reason="needs Gradio (pip install 'gradio>=6')")
    for decoding in ({}, app.decoding("greedy", 4, 1.0), app.decoding("beam search", 4, 1.0)):
        *_, (card, _, _), (_, done, download) = app.caption_files(loaded, paths, decoding)
        pairs = [re.findall("<dd>(.*?)</dd>", text) for text in (card, done)]
        assert all(found and found[::2] == found[1::2] for found in pairs) and download["visible"]
    with pytest.raises(Exception, match="does not sample"):
        list(app.caption_files(loaded, paths, app.decoding("sampling", 4, 1.0)))


@pytest.mark.parametrize("exported", ["lstm"], indirect=True)
def test_server_and_app_of_an_export_need_no_torch(both):
    pytest.importorskip("gradio", reason="needs Gradio (pip install 'gradio>=6')")
    pytest.importorskip("fastapi", reason="needs FastAPI (pip install fastapi uvicorn)")
    code = f"""
import base64, sys, app, serve, uvicorn
image = {both["images"]!r} + "/0.png"
def ask(server, **_):
    (route,) = [route for route in server.routes if route.path == "/api/generate"]
    content = base64.b64encode(open(image, "rb").read()).decode()
    print(route.endpoint({{"images": [content], "stream": False}})["response"])
uvicorn.run = ask
serve.main([{both["exported"]!r}])
print(sorted({{"torch", "transformers", "datasets"}} & sys.modules.keys()))
loaded = app.load_captioners([{both["exported"]!r}], None)
app.build_app(loaded, dict.fromkeys(loaded, __import__("reporting.model_card").model_card.TrainingData()))
print([len(shown) for shown in app.caption_files(loaded, [image], {{}})])
print(sorted({{"torch", "transformers"}} & sys.modules.keys()))
"""
    root = Path(caption.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    _, answer, of_server, shown, of_app = done.stdout.splitlines()
    inputs = Captioner.load(both["model"]).preprocess([Image.open(f"{both['images']}/0.png")])
    assert answer == Captioner.load(both["model"]).generate(inputs)[0]["caption"]
    assert of_server == of_app == "[]" and shown == "[3, 3]"


@pytest.mark.parametrize("option", ["--top_p 0.9", "--device cuda", "--prompt describe"])
@pytest.mark.parametrize("exported", ["lstm"], indirect=True)
def test_what_an_export_cannot_take_is_refused_by_server_and_app(both, option, capsys, monkeypatch):
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: None)
    monkeypatch.setattr(app, "launch", lambda *_, **__: None)
    for script in (serve, app) if "top_p" not in option else (serve,):
        with pytest.raises(SystemExit) as ended:
            script.main([both["exported"], *option.split()])
        assert ended.value.code == 2 and option.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        *(
            "--confidence --output c.jsonl",
            "--top_p 0.9",
            "--num_return_sequences 2",
            "--device cuda",
            "--dtype bfloat16",
        ),
        *("--num_workers 1", "--prompt describe", "--encoder_engine torch", "--length_penalty 2", "--min_length 12"),
    ],
)
@pytest.mark.parametrize("exported", ["lstm"], indirect=True)
def test_an_option_that_an_export_cannot_take_is_refused(both, option, capsys):
    with pytest.raises(SystemExit) as ended:
        caption.main(["--model_name_or_path", both["exported"], both["images"], *option.split()])
    said = capsys.readouterr()
    assert ended.value.code == 2 and option.split()[0].strip("-") in said.err and not said.out


@pytest.mark.parametrize(
    "missing",
    [
        *("preprocess.onnx", "encoder.onnx", "tokenizer.json", "tokenizer_config.json", "processor_config.json"),
        "generation_config.json",
    ],
)
@pytest.mark.parametrize("exported", ["lstm"], indirect=True)
def test_an_export_that_lacks_a_file_is_one_sentence(both, missing, capsys):
    (Path(both["exported"]) / missing).unlink()
    with pytest.raises(SystemExit) as ended:
        caption.main(["--model_name_or_path", both["exported"], both["images"]])
    (sentence,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and missing in sentence


def strange_model(name: str, folder: Path) -> None:
    """An encoder.onnx that adds weights, or an operator's output, to its input."""
    weights, domain = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[2]), ""
    if name == "foreign operator":
        domain, weights = "com.stranger", onnx.numpy_helper.from_array(np.ones(2, dtype=np.float32), "w")
    else:
        weights.data_location = onnx.TensorProto.EXTERNAL
        place = {"outside": "../weights.bin", "absolute": str(folder.parent / "weights.bin")}.get(name, f"{name}.bin")
        weights.external_data.add(key="location", value=place)
    (folder.parent / "weights.bin").write_bytes(bytes(8))
    (folder / "link.bin").symlink_to(folder.parent / "weights.bin")
    x, y = (onnx.helper.make_tensor_value_info(one, onnx.TensorProto.FLOAT, [2]) for one in "xy")
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"], domain=domain)
    graph = onnx.helper.make_graph([node], "strange", [x], [y], [weights])
    imports = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.stranger", 1)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=9)
    (folder / "encoder.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize("name", ["foreign operator", "outside", "absolute", "link", "gone", "damaged", "no file"])
def test_files_of_strangers_are_refused_in_one_sentence(name, tmp_path):
    (tmp_path / "model").mkdir()
    if name == "damaged":
        (tmp_path / "model" / "encoder.onnx").write_bytes(b"no model")
    elif name != "no file":
        strange_model(name, tmp_path / "model")
    with pytest.raises(UserError, match=r"encoder\.onnx") as refused:
        export_onnx.caption_images(tmp_path / "model", np.zeros((1, 3, 8, 8), dtype=np.float32))
    assert "\n" not in str(refused.value)


def test_a_step_of_another_model_is_refused(exported, tmp_path):
    _, folder = exported
    shutil.copytree(folder, tmp_path / "mixed")
    shutil.copy(folder / "encoder.onnx", tmp_path / "mixed" / "step.onnx")
    with pytest.raises(UserError, match=r"step\.onnx"):
        ExportedCaptioner(tmp_path / "mixed")


@pytest.mark.usefixtures("exporter")
@pytest.mark.slow
def test_a_plain_vision_encoder_decoder_model_is_exported(tmp_path):
    """As save_pretrained leaves it: no max_length, no pad token, the start token in config.json alone."""
    captioner = build("vit_gpt2", num_layers=1)
    captioner.model.generation_config = GenerationConfig(decoder_start_token_id=1, bos_token_id=1, eos_token_id=2)
    captioner.model.save_pretrained(tmp_path / "model")
    captioner.processor.save_pretrained(tmp_path / "model")

    export_onnx.main([str(tmp_path / "model"), str(tmp_path / "exported")])
    pixels = captioner.processor(images=IMAGES, return_tensors="pt")["pixel_values"]
    captions = export_onnx.caption_images(tmp_path / "exported", pixels.numpy())
    assert captions == captioner.model.generate(pixel_values=pixels)[:, 1:].tolist()
