"""Serve a captioner to programs that speak OpenAI's API, or Ollama's.

    python serve.py outputs/demo/lstm

POST /v1/chat/completions takes images as OpenAI's clients send them (image_url, a data URL), POST /api/generate as Ollama's do
(images, base64). The text of a request is ignored: a captioner captions, and a third-party model by --prompt. Requests that arrive
together are captioned together. It listens on this machine alone and fetches nothing, unless options say otherwise.
"""

import base64
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning.batching import BatchingCaptioner
from data_scripts.images import MAX_IMAGE_BYTES, BadImage, decode_image
from system.errors import UserError, one_line_errors
from system.request_rate import RequestRate
from training.arguments import GenerationArguments, option, parse_recipe

if TYPE_CHECKING:
    from fastapi import FastAPI

    from captioning.onnx_captioner import OnnxCaptioner
    from modeling.captioner import Captioner

# What takes seconds to import is imported where it is used, so that `--help` and a wrong option answer at once.

MAX_IMAGES = 32  # of a request
MAX_BODY_BYTES = 2 * MAX_IMAGE_BYTES + 2**20  # the largest image in base64, or many small ones
MAX_WAITING = 64  # requests at once; more are refused
MAX_DOWNLOAD_SECONDS = 20.0
SECONDS_TO_CAPTION = 600.0


@dataclass
class ServeArguments:
    model_name_or_path: str = option(
        help="Folder or Hub id of a captioner, trained here or third-party; or folder of export_onnx.py.",
        positional=None,
    )
    prompt: str | None = option(
        None, "Prompt of a third-party model: request of a chat model, or text to continue; by its kind if not given."
    )
    port: int = option(8000, "Port.", min=1, max=65535)
    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 lets other machines connect.")
    batch_size: int = option(16, "Images captioned together at most.", min=1)
    allow_urls: bool = option(
        False, "Fetch images from http(s) URLs, private addresses included: for callers you trust."
    )
    requests_per_minute: int = option(600, "Max requests of each address per minute; more are refused.", min=1)
    device: str | None = option(None, "Device: cpu, cuda, mps; cuda if not given and available, else cpu.")


class BadRequest(ValueError):
    """What is wrong with a request, in one sentence."""


def main(argv: list[str] | None = None) -> None:
    args, generation_args = parse_recipe((ServeArguments, GenerationArguments), argv, __doc__)
    with one_line_errors():
        if missing := [name for name in ("fastapi", "uvicorn", "limits") if find_spec(name) is None]:
            raise UserError(f"the server needs {' and '.join(missing)}: pip install --editable '.[serve]'")
        if generation_args.num_return_sequences not in (None, 1):
            raise UserError("--num_return_sequences: the server answers with one caption for each image")
        import uvicorn

        from captioning.onnx_captioner import is_exported, load_exported

        if is_exported(args.model_name_or_path):
            captioner = load_exported(args.model_name_or_path, args, generation_args, **generation_args.settings())
        else:
            captioner = load_captioner(args, generation_args)
        app = build_server(captioner, args)
        print(f"OpenAI: http://{args.host}:{args.port}/v1  Ollama: http://{args.host}:{args.port}", flush=True)
        uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


def load_captioner(args: ServeArguments, generation_args: GenerationArguments) -> "Captioner":
    """The captioner, on its device and with the decoding settings of the command line."""
    import torch
    import transformers

    from modeling.image_text_to_text import load_captioner as load

    transformers.logging.disable_progress_bar()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    captioner = load(args.model_name_or_path, args.prompt).to(device, "auto")
    captioner.set_decoding(**generation_args.settings())
    return captioner


def build_server(captioner: "Captioner | OnnxCaptioner", args: ServeArguments) -> "FastAPI":
    """The server of one captioner."""
    from fastapi import FastAPI
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    name = Path(args.model_name_or_path).name
    batching = BatchingCaptioner(captioner, args.batch_size)
    app = FastAPI(title="showtell", docs_url=None, redoc_url=None)
    app.add_middleware(RequestRate, rates=lambda: (f"{args.requests_per_minute} per minute",) * 2)
    app.add_middleware(RequestSize)

    def answer(caption_request: Callable[[dict], Any], error: Callable[[str], dict], request: dict):
        try:
            return caption_request(request)
        except BadRequest as problem:
            return JSONResponse(error(str(problem)), 400)

    def captions_of(images: list[bytes], max_new_tokens: Any = None) -> list[dict]:
        return caption_images(batching, images, max_new_tokens)

    @app.exception_handler(RequestValidationError)
    async def refuse_body(request, _):
        text = "the request is no JSON object"
        return JSONResponse({"error": text} if request.url.path == "/api/generate" else openai_error(text), 400)

    # Not async: FastAPI calls these in threads, where images are decoded while others are captioned.
    @app.post("/v1/chat/completions")
    def chat_completions(request: dict):
        return answer(lambda request: openai_answer(request, name, captions_of, args.allow_urls), openai_error, request)

    @app.post("/api/generate")
    def generate(request: dict):
        return answer(lambda request: ollama_answer(request, name, captions_of), lambda text: {"error": text}, request)

    @app.get("/v1/models")
    def models():
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "showtell"}]}

    @app.get("/api/tags")
    def tags():
        return {"models": [{"name": name, "model": name, "details": {"families": ["captioner"]}}]}

    return app


class RequestSize:
    """ASGI middleware that refuses requests over a limit in bytes, before they are in memory, and those over a number at once."""

    def __init__(self, app):
        self.app = app
        self.num_running = 0

    async def __call__(self, scope, receive, send):
        from starlette.responses import JSONResponse

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if self.num_running >= MAX_WAITING:
            refusal = JSONResponse(openai_error("The server is busy: try again."), 429, {"Retry-After": "1"})
            return await refusal(scope, receive, send)
        self.num_running += 1
        try:
            await self._read_and_answer(scope, receive, send)
        finally:
            self.num_running -= 1

    async def _read_and_answer(self, scope, receive, send):
        from starlette.responses import JSONResponse

        chunks, size, more = [], 0, scope["method"] == "POST"
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the sender is gone
                return
            chunks.append(message.get("body", b""))
            size, more = size + len(chunks[-1]), message.get("more_body", False)
            if size > MAX_BODY_BYTES:
                refusal = f"The request is larger than {MAX_BODY_BYTES // 2**20} MiB."
                return await JSONResponse(openai_error(refusal), 413)(scope, receive, send)
        messages = iter([{"type": "http.request", "body": b"".join(chunks), "more_body": False}])

        async def replay():
            return next(messages, None) or await receive()

        await self.app(scope, replay, send)


def caption_images(batching: BatchingCaptioner, images: list[bytes], max_new_tokens: Any = None) -> list[dict]:
    """The captions of a request's images.

    Raises:
        BadRequest: There is none, there are too many, or one cannot be used.
    """
    if not 0 < len(images) <= MAX_IMAGES:
        raise BadRequest(f"{len(images)} images: give 1 to {MAX_IMAGES}")
    if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 1):
        raise BadRequest(f"max_tokens or num_predict {max_new_tokens!r}: give a number from 1 on")
    try:
        decoded = [decode_image(content) for content in images]
    except BadImage as error:
        raise BadRequest(str(error)) from error
    futures = [batching.submit(batching.captioner.prepare(image), max_new_tokens) for image in decoded]
    try:
        return [future.result(SECONDS_TO_CAPTION) for future in futures]
    except UserError as error:
        raise BadRequest(f"an image cannot be captioned: {error}") from error


def from_base64(text: Any) -> bytes:
    """The bytes of an image that is sent as text."""
    if not isinstance(text, str):
        raise BadRequest("an image is not base64")
    try:
        return base64.b64decode("".join(text.split()), validate=True)  # some programs wrap it
    except ValueError as error:
        raise BadRequest("an image is not base64") from error


# ---- OpenAI ---------------------------------------------------------------------------------------------------------


def openai_answer(request: dict, name: str, captions_of: Callable[..., list[dict]], allow_urls: bool):
    """The answer to a chat completion: the captions of the last message with images, a line each."""
    from fastapi.responses import StreamingResponse

    if request.get("n") not in (None, 1):
        raise BadRequest("n: the server answers with one choice")
    images = [read_image_url(url, allow_urls) for url in image_urls(request.get("messages"))]
    captions = captions_of(images, request.get("max_completion_tokens") or request.get("max_tokens"))
    text = "\n".join(caption["caption"] for caption in captions)
    reason = "stop" if all(caption["ended"] for caption in captions) else "length"
    about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    if not request.get("stream"):
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return {**about, "object": "chat.completion", "choices": [choice]}

    def events() -> Iterator[str]:
        for delta, finish_reason in (({"role": "assistant", "content": text}, None), ({}, reason)):
            choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
            yield f"data: {json.dumps({**about, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def openai_error(text: str) -> dict:
    return {"error": {"message": text, "type": "invalid_request_error", "param": None, "code": None}}


def image_urls(messages: Any) -> list[str]:
    """The images of the last message that has any."""
    for message in reversed(messages if isinstance(messages, list) else []):
        content = message.get("content") if isinstance(message, dict) else None
        parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
        urls = [part.get("image_url") for part in parts if part.get("type") == "image_url"]
        if urls:
            return [url.get("url") if isinstance(url, dict) else url for url in urls]
    raise BadRequest('no message has an image: send {"type": "image_url", "image_url": {"url": "data:image/..."}}')


def read_image_url(url: Any, allow_urls: bool) -> bytes:
    """The bytes of a data URL, or of one that is fetched, where that is allowed."""
    if not isinstance(url, str):
        raise BadRequest("image_url has no url")
    if url.startswith("data:"):
        _, is_base64, content = url.partition(";base64,")
        if not is_base64:
            raise BadRequest("a data URL is not base64: send data:image/...;base64,...")
        return from_base64(content)
    if not allow_urls:
        raise BadRequest("images are taken as data URLs alone: the server was not started with --allow_urls")
    from system.downloads import download

    with tempfile.TemporaryDirectory() as folder:
        try:
            download(url, Path(folder) / "image", MAX_IMAGE_BYTES, MAX_DOWNLOAD_SECONDS)
        except UserError as error:
            raise BadRequest(str(error)) from error
        return (Path(folder) / "image").read_bytes()


# ---- Ollama ---------------------------------------------------------------------------------------------------------


def ollama_answer(request: dict, name: str, captions_of: Callable[..., list[dict]]):
    """The answer to Ollama's generate: as lines of JSON unless `stream` is false."""
    from fastapi.responses import StreamingResponse

    images, options = request.get("images"), request.get("options")
    if not isinstance(images, list):
        raise BadRequest("images: send a list of images in base64")
    limit = options.get("num_predict") if isinstance(options, dict) else None
    captions = captions_of([from_base64(image) for image in images], None if limit in (-1, -2) else limit)
    text = "\n".join(caption["caption"] for caption in captions)
    reason = "stop" if all(caption["ended"] for caption in captions) else "length"
    about = {"model": name, "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    done = {"done": True, "done_reason": reason}
    if request.get("stream") is False:
        return {**about, "response": text, **done}
    lines = ({**about, "response": text, "done": False}, {**about, "response": "", **done})
    return StreamingResponse((json.dumps(line) + "\n" for line in lines), media_type="application/x-ndjson")


if __name__ == "__main__":
    main()
