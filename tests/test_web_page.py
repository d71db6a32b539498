"""The static page captions in a browser as onnxruntime does in Python, and a token's text is what the tokenizer decodes."""

from contextlib import ExitStack

import numpy as np
import pytest
from PIL import Image
from serving import serving_folder
from small_captioners import build, word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import export_onnx
from captioning.onnx_decoding import ExportedCaptioner
from data_scripts.train_tokenizer import train_tokenizer
from modeling import onnx_page
from modeling.onnx_page import token_pieces

TEXTS = ["a red dog on the left", "ein Bär läuft 走る 🐕 on it", "the blue cats run"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(dict(zip(pre_tokenizers.ByteLevel.alphabet(), range(256), strict=True)), []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize("tokenizer", [word_tokenizer(), train_tokenizer(TEXTS * 5, 150), byte_tokenizer()])
def test_pieces_add_up_to_the_text_of_the_tokenizer(tokenizer):
    pieces = token_pieces(tokenizer)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        joined = "".join(pieces[number] for number in ids).encode("latin-1").decode()
        assert joined.strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_tokens_whose_texts_depend_on_each_other_are_refused():
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Replace("a the", "the")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("dogcat", "animals")])
    with pytest.raises(ValueError, match="depend on each other"):
        token_pieces(tokenizer)


@pytest.mark.usefixtures("exporter")
def test_a_missing_runtime_is_one_sentence_and_nothing_is_left(starts, tmp_path, capsys, monkeypatch):
    def export(captioner, folder, suffixes):
        for name in ("preprocess", "encoder", "step"):
            (folder / f"{name}.onnx").touch()

    monkeypatch.setattr("modeling.onnx_export.export_captioner", export)
    monkeypatch.setattr(onnx_page.shutil, "which", lambda name: None)
    for more in ([], ["--onnxruntime_web", str(tmp_path)]):
        with pytest.raises(SystemExit) as stopped:
            export_onnx.main([starts["lstm"], str(tmp_path / "page"), "--web", *more])
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stopped.value.code == 2 and len(errors) == 1 and "onnxruntime-web" in errors[0]
        assert not (tmp_path / "page").exists()


@pytest.mark.usefixtures("exporter")
def test_the_page_is_pushed_as_a_static_space(starts, tmp_path, hub, monkeypatch):
    def export(captioner, folder, args):
        (folder / "index.html").write_text("page")
        (folder / "README.md").write_text(onnx_page.SPACE_CARD.format(title="page"))

    monkeypatch.setattr(export_onnx, "write_export", export)
    options = ["--web", "--push_to_hub", "--hub_model_id", "me/page", "--hub_private_repo", "true"]
    export_onnx.main([starts["lstm"], str(tmp_path / "page"), *options])
    space = hub.repositories["space", "me/page"]
    assert space.private and set(space.files("main")) >= {"index.html", "README.md"}
    assert b"sdk: static" in space.files("main")["README.md"].content


@pytest.fixture
def served():
    """Serve a folder on the loopback address for one test."""
    with ExitStack() as servers:
        yield lambda folder: servers.enter_context(serving_folder(folder)) + "/"


@pytest.mark.usefixtures("exporter")
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "prompt"), [("lstm", "attention"), ("vit_gpt2", "a big")])
def test_the_page_captions_as_onnxruntime_does_in_python(kind, prompt, browser, node_modules, served, tmp_path):
    from playwright.sync_api import expect

    captioner = build(kind, prompt, num_layers=2 if kind == "lstm" else 1)
    rules = {"no_repeat_ngram_size": 2, "min_length": 5, "max_length": 14, "sequence_bias": [[[2], 3.0]]}
    captioner.model.generation_config.update(num_beams=3, length_penalty=3.0, **rules)
    captioner.save(tmp_path / "model")
    runtime = f"{node_modules}/onnxruntime-web"
    export_onnx.main([str(tmp_path / "model"), str(tmp_path / "page"), "--web", "--onnxruntime_web", runtime])
    noise, sizes = np.random.default_rng(0), ((32, 32), (128, 200), (70, 40))
    images = {f"{number}.png": noise.integers(0, 256, (*size, 3), dtype=np.uint8) for number, size in enumerate(sizes)}
    for name, image in images.items():
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "text.png").write_text("no image")
    page, outside, wrong = browser.new_page(), [], []
    url = served(tmp_path / "page")
    page.on("request", lambda request: outside.append(request.url) if not request.url.startswith((url, "blob:")) else 0)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(url + "?device=wasm")
    page.wait_for_selector("#controls", state="visible", timeout=120_000)
    assert page.locator("#beams").input_value() == "3"  # the saved decoding
    exported = ExportedCaptioner(tmp_path / "page")
    for num_beams in (3, 1):
        expected = {}
        for name, image in images.items():
            (ids,) = exported.generate(exported.preprocess(image), num_beams=num_beams)
            expected[name] = captioner.tokenizer.decode(ids, skip_special_tokens=True).strip()
        page.select_option("#beams", str(num_beams))
        page.evaluate("document.getElementById('cards').replaceChildren()")
        page.set_input_files("#files", [tmp_path / name for name in images])
        expect(page.locator(".done")).to_have_count(len(images), timeout=120_000)
        captions = dict(
            zip(
                page.locator("img").evaluate_all("all => all.map((one) => one.alt)"),
                map(str.strip, page.locator(".caption").all_text_contents()),
                strict=True,
            )
        )
        assert captions == expected
    page.locator(".token").first.hover()
    expect(page.locator("canvas").first).to_be_visible()
    page.set_input_files("#files", tmp_path / "text.png")
    expect(page.locator(".failed .foot")).to_contain_text("does not decode")
    assert not outside and not wrong
    page.close()
