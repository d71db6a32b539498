"""Laws of serve.py: OpenAI's own client and Ollama's requests get the model's captions; what is refused, and in whose words."""

import base64
import copy
import io
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from PIL import Image
from serving import serving_folder
from small_captioners import IMAGES, build

import serve

fastapi = pytest.importorskip("fastapi", reason="needs FastAPI (pip install fastapi uvicorn)")
uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn (pip install fastapi uvicorn)")


def png(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


@pytest.fixture(scope="module")
def captioner():
    return build("vit_gpt2")


@pytest.fixture(scope="module")
def wanted(captioner) -> list[str]:
    captions = []
    for image in IMAGES:
        pixels = captioner.processor(images=[image], return_tensors="pt")["pixel_values"]
        captions += [made["caption"] for made in captioner.generate({"pixel_values": pixels})]
    assert len(set(captions)) > 2
    return captions


@pytest.fixture(scope="module")
def start(captioner):
    servers = []

    def start(**options) -> str:
        app = serve.build_server(captioner, serve.ServeArguments("folder/tiny", **options))
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            thread.join(0.01)
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(start) -> str:
    return start()


def message(*urls: str) -> list[dict]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, *images]}]


@pytest.mark.slow
def test_openais_client_gets_the_captions(address, wanted):
    openai = pytest.importorskip("openai", reason="needs OpenAI's client (pip install openai)")
    client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0)
    name = client.models.list().data[0].id
    urls = [f"data:image/png;base64,{png(image)}" for image in IMAGES]
    answer = client.chat.completions.create(model=name, messages=message(urls[0]))
    assert answer.choices[0].message.content == wanted[0] and answer.model == name == "tiny"
    answer = client.chat.completions.create(model=name, messages=message(*urls[:2]))
    assert answer.choices[0].message.content == "\n".join(wanted[:2])
    stream = client.chat.completions.create(model=name, messages=message(urls[1]), stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == wanted[1] and chunks[-1].finish_reason
    short = client.chat.completions.create(model=name, messages=message(urls[0]), max_tokens=2).choices[0]
    assert wanted[0].startswith(short.message.content) and short.finish_reason == "length"
    for bad in (
        message(),
        message("https://example.org/x.png"),
        message("data:image/png;base64,AAAA"),
        message("data:,x"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=name, messages=bad)
        assert refused.value.body["message"]


def test_ollamas_requests(address, wanted):
    body = {"model": "any", "prompt": "Caption", "images": [png(IMAGES[2])]}
    answer = requests.post(address + "/api/generate", json={**body, "stream": False}).json()
    assert answer["response"] == wanted[2] and answer["done"] is True
    lines = [json.loads(line) for line in requests.post(address + "/api/generate", json=body).text.splitlines()]
    assert "".join(line["response"] for line in lines) == wanted[2] and [line["done"] for line in lines] == [
        False,
        True,
    ]
    refused = requests.post(address + "/api/generate", json={**body, "images": ["?"]})
    assert refused.status_code == 400 and "base64" in refused.json()["error"]
    assert requests.get(address + "/api/tags").json()["models"][0]["name"] == "tiny"


def test_base64_in_lines_is_taken_and_refusals_name_what_was_sent(address, wanted):
    content = png(IMAGES[2])
    lines = "\r\n".join(content[start : start + 76] for start in range(0, len(content), 76))
    answer = requests.post(address + "/api/generate", json={"images": [lines], "stream": False}).json()
    assert answer["response"] == wanted[2]

    def ask(**part) -> str:
        body = {"messages": [{"role": "user", "content": [{"type": "image_url", **part}]}]}
        return requests.post(address + "/v1/chat/completions", json=body).json()["error"]["message"]

    assert "base64" in ask(image_url={"url": "data:image/png,x"})
    body = {"images": [content], "options": {"num_predict": "all"}}
    assert "num_predict" in requests.post(address + "/api/generate", json=body).json()["error"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/generate"])
@pytest.mark.parametrize("body", [b"{no JSON", b"[1]", b""])
def test_a_body_that_is_no_object_is_refused_in_the_apis_form(address, path, body):
    refused = requests.post(address + path, data=body, headers={"Content-Type": "application/json"})
    error = refused.json()["error"]
    assert refused.status_code == 400 and "JSON object" in (error if path == "/api/generate" else error["message"])


def test_requests_at_the_same_time_are_captioned_together(address, captioner, wanted, monkeypatch):
    sizes, generate = [], captioner.generate

    def watched(inputs, **options):
        sizes.append(len(inputs["pixel_values"]))
        return generate(inputs, **options)

    monkeypatch.setattr(captioner, "generate", watched)
    monkeypatch.setattr("captioning.batching.SECONDS_TO_GATHER", 0.3)

    def ask(place: int) -> str:
        body = {"images": [png(IMAGES[place % 5])], "stream": False}
        return requests.post(address + "/api/generate", json=body).json()["response"]

    with ThreadPoolExecutor(10) as executor:
        answers = list(executor.map(ask, range(10)))
    assert answers == wanted * 2
    assert sum(sizes) == 10 and max(sizes) > 1


def test_an_error_of_the_model_is_the_requests_and_the_server_goes_on(address, captioner, wanted, monkeypatch):
    body = {"images": [png(IMAGES[0])], "stream": False}
    with monkeypatch.context() as patch:
        patch.setattr(captioner, "generate", lambda *_, **__: 1 / 0)
        assert requests.post(address + "/api/generate", json=body).status_code == 500
    assert requests.post(address + "/api/generate", json=body).json()["response"] == wanted[0]


def test_limits(start, monkeypatch):
    address = start(requests_per_minute=4)
    body = {"images": [png(IMAGES[0])] * (serve.MAX_IMAGES + 1)}
    assert requests.post(address + "/api/generate", json=body).status_code == 400
    with monkeypatch.context() as patch:
        patch.setattr(serve, "MAX_BODY_BYTES", 1000)
        assert requests.post(address + "/api/generate", data=b"x" * 1001).status_code == 413
        chunks = (b"x" * 100 for _ in range(100))  # of no declared length
        assert requests.post(address + "/api/generate", data=chunks).status_code == 413
    with monkeypatch.context() as patch:
        patch.setattr(serve, "MAX_WAITING", 0)
        assert requests.post(address + "/api/generate", json={}).status_code == 429
    codes = [requests.post(address + "/api/generate", json={}).status_code for _ in range(5)]
    assert codes[0] == 400 and codes[-1] == 429


@pytest.mark.parametrize(
    "decoding",
    [{}, {"num_beams": 3, "length_penalty": 1.5}, {"top_p": 0.9}, {"max_length": 8, "min_length": 5}],
    ids=str,
)
def test_max_tokens_lowers_the_max_length_without_a_warning(decoding, address, captioner, monkeypatch, recwarn):
    config = copy.deepcopy(captioner.model.generation_config)
    monkeypatch.setattr(captioner.model, "generation_config", config)
    captioner.set_decoding(**decoding)
    own = config.max_length - len(captioner.start_token_ids)
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)

    def ask(limit: int | None) -> tuple[str, str]:
        body = {"messages": message(f"data:image/png;base64,{png(IMAGES[2])}"), "max_tokens": limit}
        choice = requests.post(address + "/v1/chat/completions", json=body).json()["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]

    answers = {limit: ask(limit) for limit in (None, 2, own, own + 1, 10**9)}
    logger.removeHandler(handler)
    assert not [text for text in logged if "length" in text or "tokens" in text]
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]
    assert len(answers[2][0].split()) <= 2 and all(len(text.split()) <= own for text, _ in answers.values())
    if "top_p" not in decoding:
        assert answers[None] == answers[own] == answers[own + 1] == answers[10**9]


def test_urls_are_fetched_only_where_allowed(start, wanted, tmp_path):
    IMAGES[1].save(tmp_path / "x.png")
    with serving_folder(tmp_path) as address:
        url = f"{address}/x.png"
        body = {"messages": message(url)}
        assert requests.post(start() + "/v1/chat/completions", json=body).status_code == 400
        allowed = start(allow_urls=True)
        answer = requests.post(allowed + "/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == wanted[1]
        for bad in ("file:///etc/passwd", url + ".none"):
            assert requests.post(allowed + "/v1/chat/completions", json={"messages": message(bad)}).status_code == 400
