"""Caption images in a browser, with several captioners side by side.

    python app.py outputs/demo/lstm outputs/demo/vit_gpt2

Without a model it takes those of `make demo`. It listens on this machine alone, and fetches nothing.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from markupsafe import Markup

from data_scripts.row_checks import MAX_IMAGE_BYTES, BadImage, decode_image
from modeling.captioner import Captioner
from reporting.page import image_data_uri
from system.errors import UserError, one_line_errors

try:
    import gradio as gr
    from limits import RateLimitItemPerMinute
    from limits.storage import MemoryStorage
    from limits.strategies import MovingWindowRateLimiter
    from starlette.middleware import Middleware
    from starlette.responses import JSONResponse, PlainTextResponse
except ImportError:
    print("error: the app needs Gradio and limits: pip install --editable '.[app]'", file=sys.stderr)
    raise SystemExit(2) from None

DEMO_MODELS = ("outputs/demo/lstm", "outputs/demo/vit_gpt2")
WAYS = ("the model's own way", "greedy", "beam search", "sampling")  # its own are the settings it was saved with
MAX_IMAGES = 32  # at once
MAX_WAITING = 16  # requests in the queue; one is served at a time, the others wait or are turned away
# In any minute, of each address: uploads, captionings and all else that is sent; and what is fetched, a page being some 100 files.
SENT, FETCHED = RateLimitItemPerMinute(60, namespace="sent"), RateLimitItemPerMinute(3000, namespace="fetched")
CSS = """
.told { display: flex; flex-wrap: wrap; gap: .9rem 1.5rem; padding: .9rem 0; border-top: 1px solid var(--border-color-primary); }
.told img { width: 11rem; height: 8.25rem; object-fit: contain; border-radius: 6px; background: var(--background-fill-secondary); }
.told dl { flex: 1 1 18rem; display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .6rem 1.5rem; margin: 0; }
.told dl { align-content: start; overflow-wrap: anywhere; }
.told dt { opacity: .7; font-size: .85rem; }
.told dd { margin: 0; min-height: 1.6em; font-size: 1.05rem; font-weight: 600; line-height: 1.35; }
.told.now { flex-direction: column; border: 0; padding-top: 0; }
.told.now img { width: 100%; height: min(24rem, 80vw); }
.told.now dl { flex: none; }
.told.now dd { font-size: 1.3rem; min-height: 3.6rem; }
"""


def main(argv: list[str] | None = None) -> None:
    # ---- Arguments --------------------------------------------------------------------------------------------------
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders or Hub ids of captioners of either kind")
    parser.add_argument("--port", type=int, help="the first free one from 7860 on if not given")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    parser.add_argument("--share", action="store_true", help="open a public address through Gradio's servers as well")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    args = parser.parse_args(argv)
    if args.port is not None and not 0 < args.port < 2**16:
        parser.error(f"--port {args.port}: it must be from 1 to {2**16 - 1}")
    transformers.logging.disable_progress_bar()
    with one_line_errors():
        # ---- Models -------------------------------------------------------------------------------------------------
        captioners = {name: Captioner.load(name).to(args.device) for name in args.models or demo_models()}
        # ---- App ----------------------------------------------------------------------------------------------------
        launch(build_app(captioners), server_name=args.host, server_port=args.port, share=args.share)


def demo_models() -> list[str]:
    """What `make demo` has left here."""
    found = [folder for folder in DEMO_MODELS if Path(folder, "config.json").is_file()]
    if not found:
        raise UserError(
            f"no model is named, and there is none in {' or '.join(DEMO_MODELS)}: "
            "run `make demo`, or name a folder or Hub id: python app.py MODEL"
        )
    return found


class OfflineBlocks(gr.Blocks):
    """Blocks that fetch nothing: Gradio itself would download a file that a request names by its address."""

    async def preprocess_data(self, block_fn, inputs, *args, **kwargs):
        if names_address(inputs):
            raise gr.Error("Images are taken as files, not by address.")
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


class RequestRate:
    """ASGI middleware that turns an address away that sends or fetches more than `SENT` or `FETCHED`, until it may again."""

    def __init__(self, app):
        self.app = app
        self.limiter = MovingWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope, receive, send):
        answer = self.app
        if scope["type"] == "http":
            rate = FETCHED if scope["method"] in ("GET", "HEAD", "OPTIONS") else SENT
            address = scope["client"][0]
            if not self.limiter.hit(rate, address):
                seconds = max(1, math.ceil(self.limiter.get_window_stats(rate, address).reset_time - time.time()))
                told = f"Too many requests from your address, {rate.amount} a minute at most: try again in {seconds} seconds."
                headers = {"Retry-After": str(seconds)}
                if scope["path"].endswith("/upload"):  # of which Gradio's page shows the whole answer, else the detail
                    answer = PlainTextResponse(told, 429, headers)
                else:
                    answer = JSONResponse({"detail": told}, 429, headers)
        await answer(scope, receive, send)


def names_address(value) -> bool:
    """Whether a request's JSON has a file that lies on another server."""
    if isinstance(value, dict):
        return "://" in str(value.get("path")) or any(map(names_address, value.values()))
    return isinstance(value, list | tuple) and any(map(names_address, value))


def build_app(captioners: dict[str, Captioner]) -> gr.Blocks:
    """The page: images in, captions of each captioner out.

    Args:
        captioners: By the name to show.
    """
    with OfflineBlocks(title="showtell", analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.Markdown(
            f"# showtell\nDrop, choose, paste or photograph images, up to {MAX_IMAGES} at once, and read what "
            f"{' and '.join(f'`{name}`' for name in captioners)} {'tell' if len(captioners) > 1 else 'tells'} of them."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                images = gr.Gallery(
                    label="Images",
                    show_label=False,
                    sources=["upload", "clipboard", "webcam"],
                    file_types=["image"],
                    interactive=True,
                    columns=3,
                    height=300,
                )
                folder = gr.UploadButton("Take a folder", file_count="directory", size="sm")
                way = gr.Radio(WAYS, value=WAYS[0], label="Words are chosen by")
                beams = gr.Slider(2, 10, value=4, step=1, label="Beams", visible=False)
                temperature = gr.Slider(0.1, 2, value=1, step=0.1, label="Temperature", visible=False)
                button = gr.Button("Caption", variant="primary", elem_id="caption")
            with gr.Column(scale=3, min_width=320):
                now = gr.HTML("<p>Captions appear here as they are written.</p>", elem_id="now")
                download = gr.DownloadButton("Download captions.jsonl", visible=False, size="sm", elem_id="download")
                done = gr.HTML(elem_id="done")
        way.change(
            lambda way: [gr.update(visible=way == "beam search"), gr.update(visible=way == "sampling")],
            way,
            [beams, temperature],
        )
        folder.upload(usable_images, folder, images)

        def caption(paths, *settings):
            yield from caption_files(captioners, [path for path, _ in paths or []], decoding(*settings))

        button.click(caption, [images, way, beams, temperature], [now, done, download])
    return app.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def launch(app: gr.Blocks, **options):
    """Serve the app; fonts are the reader's own, so that nothing comes from another server."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(**fonts)
    limits = {"max_file_size": MAX_IMAGE_BYTES, "app_kwargs": {"middleware": [Middleware(RequestRate)]}}
    return app.launch(theme=theme, css=CSS, footer_links=[], **limits, **options)


def decoding(way: str, num_beams: int, temperature: float) -> dict:
    """What `generate()` is told."""
    if way == WAYS[0]:
        return {}
    if way == "sampling":  # of all words: transformers' own habit is the likeliest fifty
        return {"do_sample": True, "num_beams": 1, "temperature": float(temperature), "top_k": 0}
    return {"do_sample": False, "num_beams": int(num_beams) if way == "beam search" else 1}


def usable_images(paths: list[str]) -> list[str]:
    """The images among uploaded files, as many as are captioned at once; what is left out is said on the page."""
    good = []
    for path in paths:
        if len(good) == MAX_IMAGES:
            gr.Warning(f"Only the first {MAX_IMAGES} images are taken.")
            break
        try:
            decode_image(Path(path).read_bytes())
        except BadImage as error:
            gr.Warning(str(Markup.escape(f"{Path(path).name}: {error}")))
        else:
            good.append(path)
    return good


def caption_files(captioners: dict[str, Captioner], paths: list[str], generation: dict) -> Iterator[tuple]:
    """Caption images one after the other, with each captioner in turn.

    Yields at each new word what the page shows: the image of the moment, those before it, the file to download.
    """
    paths = usable_images(paths)
    if not paths:
        raise gr.Error("There is no image to caption: drop one, paste one, or take a photograph.")
    lines, before, shown = [], "", ""
    for path in paths:
        image = decode_image(Path(path).read_bytes())
        source = image_data_uri(image)
        before, captions = shown + before, dict.fromkeys(captioners, "")
        for name, captioner in captioners.items():
            pixels = captioner.processor(images=[image], return_tensors="pt")["pixel_values"]
            inputs = {"pixel_values": pixels.to(captioner.model.device)}
            for captions[name] in captioner.stream(inputs, **generation):
                yield image_card(source, path, captions, "told now"), before, gr.skip()
            lines.append({"image_id": Path(path).name, "model": name, "caption": captions[name]})
        shown = image_card(source, path, captions, "told")
    with tempfile.TemporaryDirectory() as folder:  # Gradio keeps a copy, and forgets it when it forgets the uploads
        file = Path(folder) / "captions.jsonl"
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        yield gr.skip(), before, gr.update(value=str(file), visible=True)


def image_card(source: str, path: str, captions: dict[str, str], kind: str) -> str:
    """An image, as the address of its data, with its captions as HTML; names and captions are text, whatever they hold."""
    entries = Markup().join(
        Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(name, caption) for name, caption in captions.items()
    )
    name = Path(path).name
    return Markup('<div class="{}"><img src="{}" alt="{}" title="{}"><dl>{}</dl></div>').format(
        kind, source, name, name, entries
    )


if __name__ == "__main__":
    main()
