"""Laws of the app: what is clicked in a browser, and what is refused."""

import io
import json
import re
import socket
import time
from itertools import pairwise
from pathlib import Path

import pytest
import requests
import torch
from fresh import run_fresh
from PIL import Image

import app
from data_scripts import scenes
from data_scripts.train_tokenizer import train_tokenizer
from modeling import InceptionLSTMConfig, InceptionLSTMForConditionalGeneration
from modeling.captioner import Captioner
from modeling.processing import build_processor, timm_image_processor
from modeling.vit_gpt2 import build_vit_gpt2, decoder_config, encoder_config, vit_image_processor
from reporting.model_card import TrainingData

HOSTILE = "<img src=x onerror=document.title=1>.png"


@pytest.fixture(scope="module", autouse=True)
def gr():
    """Gradio; it takes seconds to import."""
    return pytest.importorskip("gradio", reason="needs Gradio (pip install 'gradio>=6')")


@pytest.fixture(scope="module")
def captioners():
    """Both systems, small and with random weights: captions of nonsense, the same for the same image."""
    torch.manual_seed(0)
    words = ["a red dog on the left", "the blue cats run", "a green image of nothing"]
    tokenizer = train_tokenizer(words * 5, 120)
    config = InceptionLSTMConfig("test_efficientnet", vocab_size=len(tokenizer), image_embed_dim=32, hidden_size=32)
    lstm = InceptionLSTMForConditionalGeneration(config)
    encoder = encoder_config(32, 16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    decoder = decoder_config(len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    vit_gpt2 = build_vit_gpt2(encoder, decoder, tokenizer, "the dog")
    made = {
        "one": Captioner(lstm, build_processor(timm_image_processor(lstm.encoder.backbone), tokenizer)),
        "<b>two": Captioner(vit_gpt2, build_processor(vit_image_processor(encoder), tokenizer)),
    }
    for captioner in made.values():  # words, not one token for ever
        captioner.model.eval().generation_config.update(max_length=30, no_repeat_ngram_size=1)
    return made


@pytest.fixture
def serve():
    """Serve an app on the loopback address for one test."""
    served = []

    def serve_app(captioners: dict, **training_data: TrainingData) -> str:
        unknown = dict.fromkeys(captioners, TrainingData())
        served.append(app.build_app(captioners, unknown | training_data))
        return app.launch(served[-1], server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)[1]

    yield serve_app
    for blocks in served:
        blocks.server.force_exit = True  # without waiting for seconds until the browser has closed its connections
        blocks.close(verbose=False)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, color in (("red.png", "red"), (HOSTILE, "blue")):
        Image.new("RGB", (60, 40), color).save(folder / name)
    return folder


def captions_of(captioners: dict, path, **generation) -> dict[str, str]:
    image = Image.open(path).convert("RGB")
    captions = {}
    for name, captioner in captioners.items():
        inputs = dict(captioner.processor(images=[image], return_tensors="pt"))
        captions[name] = captioner.generate(inputs, num_beams=1, **generation)[0]["caption"]
    return captions


def test_from_image_to_caption_with_a_click(browser, serve, captioners, images):
    page = browser.new_page(accept_downloads=True)
    outside = []
    page.on("request", lambda request: outside.append(request.url) if "//127.0.0.1" not in request.url else None)
    page.goto(serve(captioners))
    page.wait_for_selector("#caption")
    page.set_input_files("input[type=file]:not([webkitdirectory])", [images / "red.png", images / HOSTILE])
    page.wait_for_function("document.querySelectorAll('.grid-wrap img').length == 2")
    # What has stood under the image of the moment, as it stood there.
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
          const now = [...document.querySelectorAll("#current dd")].map((word) => word.textContent);
          if (now.length) window.seen.push([document.querySelector("#current img").alt, ...now]);
        }).observe(document.querySelector("#current"), {subtree: true, childList: true, characterData: true}); }"""
    )
    page.click("#caption")
    page.wait_for_selector("#download", state="visible", timeout=60_000)
    names = [page.locator("#current img").get_attribute("alt"), page.locator("#done img").get_attribute("alt")]
    wanted = [captions_of(captioners, images / name) for name in (HOSTILE, "red.png")]
    told = [
        dict(zip(captioners, page.locator(f"{place} dd").all_text_contents(), strict=True))
        for place in ("#current", "#done")
    ]
    assert told == wanted
    assert names[1] == "red.png" and "<" not in names[0]  # Gradio keeps no such name
    assert page.locator("#current dt").all_inner_texts() == list(captioners)
    seen = page.evaluate("window.seen")
    for column in (1, 2):
        growing = list(dict.fromkeys(row[column] for row in seen if row[0] == "red.png"))
        assert len(growing) > 2
        assert all(later.startswith(earlier) for earlier, later in pairwise(growing))
    with page.expect_download() as download:
        page.click("#download")
    lines = [json.loads(line) for line in download.value.path().read_text(encoding="utf-8").splitlines()]
    assert [(line["model"], line["caption"]) for line in lines] == [*wanted[1].items(), *wanted[0].items()]
    assert [line["image_id"] for line in lines][:2] == ["red.png"] * 2
    assert not [url for url in outside if not url.startswith(("data:", "blob:"))]
    page.close()


def test_a_model_of_scenes_has_scenes_to_try_and_a_note_beside_any_other_image(
    browser, serve, captioners, images, monkeypatch
):
    from playwright.sync_api import expect

    monkeypatch.setattr(scenes, "NUM_SCENES", {"train": 40, "validation": 8, "test": 9})
    page = browser.new_page()
    page.goto(serve(captioners, one=TrainingData("scenes", is_scenes=True)))
    expect(page.locator("#examples img")).to_have_count(app.NUM_EXAMPLES)
    told = page.locator("li").all_inner_texts()
    assert "one, trained on scenes" in told[0] and "<b>two, trained on unknown data" in told[1]

    def captioned() -> str:
        page.click("#caption")
        page.wait_for_selector("#download", state="visible", timeout=60_000)
        return page.locator("#current img").get_attribute("alt")

    page.locator("#examples img").first.click()
    page.wait_for_function("document.querySelectorAll('.grid-wrap img').length == 1")
    assert page.locator(".grid-wrap img").bounding_box()["height"] < 300  # whole, not cut off by the gallery
    name = captioned()
    drawn = next(row for row in scenes.scene_rows() if row.image_id == Path(name).stem)
    assert drawn.split == "test" and name in app.example_scenes()
    assert page.locator("#current .note").count() == 0

    page.reload()
    page.set_input_files("input[type=file]:not([webkitdirectory])", images / "red.png")
    page.wait_for_function("document.querySelectorAll('.grid-wrap img').length == 1")
    assert captioned() == "red.png"
    note = page.locator("#current .note").inner_text()
    assert note.startswith("one knows drawn shapes only") and f"python app.py {app.PHOTOGRAPH_MODEL}" in note
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("datasets", "rich"), [(["rich_scenes", "rich_scenes"], True), (["scenes", "rich_scenes"], False)]
)
def test_models_of_rich_scenes_have_rich_scenes_to_try(datasets, rich, captioners, monkeypatch):
    drawn = []
    monkeypatch.setattr(scenes, "NUM_RICH_SCENES", {"train": 40, "validation": 8, "test": 9})
    monkeypatch.setattr(
        app, "example_scenes", lambda *of, made=app.example_scenes: drawn.append(made(*of)) or drawn[-1]
    )
    data = {name: TrainingData(dataset, is_scenes=True) for name, dataset in zip(captioners, datasets, strict=True)}
    app.build_app(captioners, data)
    sizes = {Image.open(io.BytesIO(content)).size for content in drawn[0].values()}
    assert sizes == {(80, 80) if rich else (64, 64)} and len(drawn[0]) == app.NUM_EXAMPLES


def test_models_of_no_scenes_have_no_scenes_to_try_and_no_note(browser, serve, captioners, images):
    page = browser.new_page()
    page.goto(serve(captioners, one=TrainingData("flickr8k")))
    page.wait_for_selector("#caption")
    assert page.locator("#examples").count() == 0
    assert "trained on flickr8k" in page.locator("li").all_inner_texts()[0]
    page.close()
    cards = [card for card, *_ in app.caption_files(captioners, [str(images / "red.png")], {}) if isinstance(card, str)]
    assert cards and "note" not in cards[-1]


@pytest.mark.slow
def test_an_address_that_sends_too_much_waits_and_others_do_not(serve, captioners, monkeypatch):
    url = serve(captioners)

    def send(address: str = "127.0.0.1") -> requests.Response:
        # uvicorn believes a proxy on its own machine, and nobody else, whom a request comes from.
        return requests.post(url + "gradio_api/queue/join", json={}, headers={"X-Forwarded-For": address})

    monkeypatch.setattr(app, "SENT", "3 per minute")
    assert [send().status_code for _ in range(3)] == [422] * 3  # let through, and found empty
    refused = send()
    seconds = int(refused.headers["Retry-After"])
    assert refused.status_code == 429 and 50 < seconds <= 60
    assert refused.json() == {
        "detail": f"Too many requests from your address, 3 a minute at most: try again in {seconds} seconds."
    }
    upload = requests.post(url + "gradio_api/upload", files={"files": b"x"})
    assert (upload.status_code, upload.text[:32]) == (429, refused.json()["detail"][:32])
    assert send("192.0.2.7").status_code == 422
    assert requests.get(url).status_code == 200  # who may not send may still read

    monkeypatch.setattr(app, "SENT", "1 per 2 seconds")  # one in two seconds
    assert [send().status_code for _ in range(2)] == [422, 429]
    time.sleep(int(send().headers["Retry-After"]))
    assert send().status_code == 422

    monkeypatch.setattr(app, "FETCHED", "2 per minute")
    assert [requests.get(url + "config").status_code for _ in range(3)] == [200, 200, 429]


def test_the_page_says_when_to_try_again(browser, serve, captioners, images, monkeypatch):
    from playwright.sync_api import expect

    page = browser.new_page()
    monkeypatch.setattr(app, "SENT", "1 per minute")
    page.goto(serve(captioners))
    choose = "input[type=file]:not([webkitdirectory])"
    page.wait_for_selector(choose, state="attached")
    page.set_input_files(choose, images / "red.png")
    page.wait_for_function("document.querySelectorAll('.grid-wrap img').length == 1")
    page.click("#caption")
    sentence = r"Too many requests from your address, 1 a minute at most: try again in \d+ seconds\.$"
    expect(page.get_by_text(re.compile(f"^{sentence}"))).to_be_visible(timeout=30_000)
    page.reload()  # which has every file of the page again
    page.set_input_files(choose, images / "red.png")
    expect(page.get_by_text(re.compile(f"^HTTP 429: {sentence}"))).to_be_visible(timeout=30_000)
    page.close()


def test_names_and_captions_are_text_in_the_page():
    card = app.image_card("data:image/png;base64,", f"/x/{HOSTILE}", {"<i>": "</dd><script>"}, "captions")
    assert "<script" not in card and "<i>" not in card and card.count("<img") == 1


@pytest.mark.slow
def test_a_file_that_is_named_by_address_is_not_fetched(serve, captioners, monkeypatch):
    import gradio_client
    from gradio import processing_utils

    fetched = []

    async def fetch(url, *_, **__):
        fetched.append(url)
        raise ValueError("fetched")

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", fetch)
    client = gradio_client.Client(serve(captioners), verbose=False)
    image = {"path": "http://127.0.0.1:9/a.png", "url": None, "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(Exception, match="not by address"):
        client.predict([{"image": image, "caption": None}], "greedy", 4, 1.0, api_name="/caption")
    assert not fetched


def test_what_cannot_be_used_is_named_and_the_rest_is_taken(tmp_path, monkeypatch, gr):
    warnings = []
    monkeypatch.setattr(gr, "Warning", warnings.append)
    Image.new("1", (9000, 8000)).save(tmp_path / "bomb.png")
    (tmp_path / "text<b>.png").write_text("no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    paths = [str(tmp_path / name) for name in ("bomb.png", "text<b>.png", "good.png")]
    assert app.usable_images(paths) == paths[2:]
    assert warnings == [
        "bomb.png: image of more than 64,000,000 pixels",
        "text&lt;b&gt;.png: image does not decode",
    ]
    assert len(app.usable_images(paths[2:] * (app.MAX_IMAGES + 5))) == app.MAX_IMAGES
    assert "Only the first" in warnings[-1]


def test_no_image_is_one_sentence(captioners, gr):
    with pytest.raises(gr.Error, match="no image"):
        next(app.caption_files(captioners, [], {}))


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("model default", {}),
        ("greedy", {"do_sample": False, "num_beams": 1}),
        ("beam search", {"do_sample": False, "num_beams": 5}),
        ("sampling", {"do_sample": True, "num_beams": 1, "temperature": 0.7, "top_k": 0}),
    ],
)
def test_what_is_chosen_is_what_generate_is_given(method, wanted):
    assert app.decoding(method, 5, 0.7) == wanted


@pytest.mark.slow
def test_the_app_starts_on_the_demos_models_and_leaves_the_address_to_gradio(
    captioners, tmp_path, monkeypatch, capsys, gr
):
    launched = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: launched.update(options, queue=self.max_size()))
    monkeypatch.setattr(gr.Blocks, "max_size", lambda self: self._queue.max_size, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        app.main([])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: no model is named") and error.count("\n") == 1
    captioners["one"].save(app.DEMO_MODELS[0])
    assert app.demo_models() == [app.DEMO_MODELS[0]]
    app.main([])
    assert (launched["server_name"], launched["server_port"], launched["share"]) == (None, None, None)
    assert launched["max_file_size"] == app.MAX_IMAGE_BYTES and launched["queue"] == app.MAX_WAITING


# The app serves until it is ended; a thread beside it asks for a file as soon as there is an answer, and ends it.
SERVED = f"""
import os, sys, threading, time
import requests
sys.path.insert(0, {str(Path(app.__file__).parent)!r})
name, port, model = sys.argv[1:]
os.environ.update(GRADIO_SERVER_NAME=name, GRADIO_SERVER_PORT=port)

def ask():
    for _ in range(6000):
        try:
            print(requests.get(f"http://{{name}}:{{port}}/config").status_code, flush=True)
        except requests.ConnectionError:
            time.sleep(0.01)
        else:
            time.sleep(0.5)  # in which the app says where it is
            os._exit(0)
    os._exit(1)

threading.Thread(target=ask, daemon=True).start()
import app
app.main([model])
"""


@pytest.mark.slow
def test_the_environments_address_is_obeyed_and_a_wrong_one_refused(captioners, tmp_path, monkeypatch, capsys):
    captioners["one"].save(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = run_fresh(SERVED, "localhost", str(port), tmp_path / "model", folder=tmp_path / "elsewhere")
    assert "200" in said.splitlines() and f"http://localhost:{port}" in said
    monkeypatch.setenv("GRADIO_SERVER_PORT", "abc")
    with pytest.raises(SystemExit) as stopped:
        app.main([str(tmp_path / "model")])
    assert stopped.value.code == 2 and "GRADIO_SERVER_PORT" in capsys.readouterr().err
