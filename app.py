"""Caption images in a browser, with several captioners side by side.

    python app.py outputs/demo/lstm outputs/demo/vit_gpt2

Without a model it takes those of `make demo`. It listens on this machine alone and fetches nothing, unless options or Gradio's
own environment variables (GRADIO_SERVER_NAME, GRADIO_SERVER_PORT, GRADIO_SHARE) say otherwise.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from data_scripts.images import MAX_IMAGE_BYTES, BadImage, decode_image
from system.errors import UserError, one_line_errors
from system.request_rate import RequestRate
from training.arguments import option, parse_recipe

if TYPE_CHECKING:
    import gradio as gr

    from captioning.onnx_captioner import OnnxCaptioner
    from modeling.captioner import Captioner
    from reporting.model_card import TrainingData

# What takes seconds to import is imported where it is used, so that `--help` and a wrong option answer at once.

DEMO_MODELS = ("outputs/demo/lstm", "outputs/demo/vit_gpt2")
DECODING_METHODS = (
    "model default",
    "greedy",
    "beam search",
    "sampling",
)  # the default is what the model was saved with
NUM_EXAMPLES = 4  # scenes to try a model of scenes on
PHOTOGRAPH_MODEL = "nlpconnect/vit-gpt2-image-captioning"  # on the Hub, trained on photographs
MAX_IMAGES = 32  # at once
MAX_WAITING = 16  # requests in the queue; one is served at a time, the others wait or are turned away
# Of each address: uploads, captionings and all else that is sent; and what is fetched, a page being some 100 files.
SENT, FETCHED = "60 per minute", "3000 per minute"
CSS = """
#images .grid-container { grid-template-columns: repeat(3, 1fr); }
.captions { display: flex; flex-wrap: wrap; gap: .9rem 1.5rem; padding: .9rem 0; border-top: 1px solid var(--border-color-primary); }
.captions img { width: 11rem; height: 8.25rem; object-fit: contain; border-radius: 6px; background: var(--background-fill-secondary); }
.captions dl { flex: 1 1 18rem; display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .6rem 1.5rem; margin: 0; }
.captions dl { align-content: start; overflow-wrap: anywhere; }
.captions dt { opacity: .7; font-size: .85rem; }
.captions dd { margin: 0; min-height: 1.6em; font-size: 1.05rem; font-weight: 600; line-height: 1.35; }
.captions .note { flex: 1 0 100%; margin: 0; padding-left: .7rem; border-left: 3px solid var(--color-accent); font-size: .9rem; }
.captions .note code { display: inline-block; overflow-wrap: anywhere; }
.captions.current { flex-direction: column; border: 0; padding-top: 0; }
.captions.current img { width: 100%; height: min(24rem, 80vw); }
.captions.current dl { flex: none; }
.captions.current dd { font-size: 1.3rem; min-height: 3.6rem; }
"""


@dataclass
class AppArguments:
    models: list[str] = option(
        help="Folders or Hub ids of captioners, trained here or third-party; or folders of export_onnx.py.",
        positional="*",
    )
    prompt: str | None = option(
        None, "Prompt of third-party models: request of chat models, or text to continue; by their kinds if not given."
    )
    port: int | None = option(None, "Port; the first free one from 7860 on if not given.", min=1, max=65535)
    host: str | None = option(
        None, "Address to listen on; 127.0.0.1 if not given, 0.0.0.0 lets other machines connect."
    )
    share: bool | None = option(None, "Also open a public address through Gradio's servers; not if not given.")
    device: str | None = option(None, "Device: cpu, cuda, mps; cuda if not given and available, else cpu.")


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_recipe((AppArguments,), argv, __doc__)
    with one_line_errors():
        check_environment()
        names = args.models or demo_models()
        from reporting.model_card import training_data_of

        captioners = load_captioners(names, args.prompt, args.device)
        try:
            app = build_app(captioners, {name: training_data_of(name) for name in names})
            launch(app, server_name=args.host, server_port=args.port, share=args.share)
        except OSError as error:
            if "port" not in str(error):  # Gradio's sentence where none is free
                raise
            raise UserError(f"port {args.port or 'of any number'} cannot be used: {error}") from error


def check_environment() -> None:
    """See to it that Gradio is installed, and that it can read its settings.

    Raises:
        UserError: It is not, or cannot.
    """
    if missing := [name for name in ("gradio", "limits") if find_spec(name) is None]:
        raise UserError(f"the app needs {' and '.join(missing)}: pip install --editable '.[app]'")
    port = os.environ.get("GRADIO_SERVER_PORT", "7860")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"GRADIO_SERVER_PORT is {port!r} in the environment: it must be a number from 1 to 65535")


def load_captioners(
    names: Collection[str], prompt: str | None, device: str | None = None
) -> "dict[str, Captioner | OnnxCaptioner]":
    """The captioners by their names, on their device; the prompt is that of those which take one. Exported ones need no torch.

    Raises:
        UserError: One cannot be loaded, or none takes a prompt.
    """
    from captioning.onnx_captioner import is_exported, load_exported

    exported = {name for name in names if is_exported(name)}
    third_party = third_party_models(set(names) - exported)
    if prompt is not None and not third_party:
        raise UserError("--prompt has no effect: these captioners take none but those that they were trained with")
    return {
        name: load_exported(name, AppArguments([], device=device))
        if name in exported
        else load_captioner(name, prompt if name in third_party else None, device)
        for name in names
    }


def third_party_models(names: Collection[str]) -> set[str]:
    """Those that were not trained here."""
    if not names:
        return set()
    from modeling.loading import is_trained_here

    return {name for name in names if not is_trained_here(name)}


def load_captioner(name: str, prompt: str | None, device: str | None) -> "Captioner":
    """A captioner on its device."""
    import torch
    import transformers

    from modeling.image_text_to_text import load_captioner as load

    transformers.logging.disable_progress_bar()
    return load(name, prompt).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def demo_models() -> list[str]:
    """The captioners that `make demo` has left here."""
    found = [folder for folder in DEMO_MODELS if Path(folder, "config.json").is_file()]
    if not found:
        raise UserError(
            f"no model is named, and there is none in {' or '.join(DEMO_MODELS)}: "
            "run `make demo`, or name a folder or Hub id: python app.py MODEL"
        )
    return found


def names_address(value) -> bool:
    """Whether a request's JSON has a file that lies on another server."""
    if isinstance(value, dict):
        return "://" in str(value.get("path")) or any(map(names_address, value.values()))
    return isinstance(value, list | tuple) and any(map(names_address, value))


def build_app(
    captioners: "Mapping[str, Captioner | OnnxCaptioner]", training_data: "Mapping[str, TrainingData]"
) -> "gr.Blocks":
    """The page: images in, captions of each captioner out.

    Args:
        captioners: By the name to show.
        training_data: What each was trained on. Where one was trained on scenes, there are scenes to try it on.
    """
    import gradio as gr

    scene_models = [name for name, data in training_data.items() if data.is_scenes]
    only_rich = all(training_data[name].dataset == "rich_scenes" for name in scene_models)
    examples = example_scenes(only_rich) if scene_models else {}
    example_hashes = {sha256(content) for content in examples.values()}

    class OfflineBlocks(gr.Blocks):
        """Blocks that fetch nothing: Gradio itself would download a file that a request names by its address."""

        async def preprocess_data(self, block_fn, inputs, *args, **kwargs):
            if names_address(inputs):
                raise gr.Error("Images are taken as files, not by address.")
            return await super().preprocess_data(block_fn, inputs, *args, **kwargs)

    with OfflineBlocks(title="showtell", analytics_enabled=False, delete_cache=(600, 3600)) as app:
        gr.Markdown(
            f"# showtell\nDrop, choose, paste or photograph images, up to {MAX_IMAGES} at once, and compare the captions of\n\n"
            + "\n".join(f"- `{name}`, {trained_on(training_data[name])}" for name in captioners)
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                images = gr.Gallery(
                    label="Images",
                    elem_id="images",
                    show_label=False,
                    sources=["upload", "clipboard", "webcam"],
                    file_types=["image"],
                    interactive=True,
                    columns=3,
                    height=300,
                    object_fit="contain",
                )
                if examples:
                    with tempfile.TemporaryDirectory() as beside:  # Gradio keeps copies
                        for name, content in examples.items():
                            Path(beside, name).write_bytes(content)
                        paths = [[[str(Path(beside, name))]] for name in examples]
                        gr.Examples(paths, images, label="Example scenes", elem_id="examples", cache_examples=False)
                folder = gr.UploadButton("Upload a folder", file_count="directory", size="sm")
                method = gr.Radio(DECODING_METHODS, value=DECODING_METHODS[0], label="Decoding")
                beams = gr.Slider(2, 10, value=4, step=1, label="Beams", visible=False)
                temperature = gr.Slider(0.1, 2, value=1, step=0.1, label="Temperature", visible=False)
                button = gr.Button("Caption", variant="primary", elem_id="caption")
            with gr.Column(scale=3, min_width=320):
                current = gr.HTML("<p>Captions appear here as they are generated.</p>", elem_id="current")
                download = gr.DownloadButton("Download captions.jsonl", visible=False, size="sm", elem_id="download")
                done = gr.HTML(elem_id="done")
        method.change(
            lambda method: [gr.update(visible=method == "beam search"), gr.update(visible=method == "sampling")],
            method,
            [beams, temperature],
        )
        folder.upload(usable_images, folder, images)

        def caption(paths, *settings):
            paths = [path for path, _ in paths or []]
            yield from caption_files(captioners, paths, decoding(*settings), scene_models, example_hashes)

        button.click(caption, [images, method, beams, temperature], [current, done, download])
    return app.queue(max_size=MAX_WAITING, default_concurrency_limit=1)


def trained_on(data: "TrainingData") -> str:
    """What a model was trained on, as Markdown."""
    from reporting.model_card import markdown_line

    if data.dataset is None:
        return "trained on unknown data"
    return f"trained on {markdown_line(data.dataset)}{' (drawn shapes only)' if data.is_scenes else ''}"


def example_scenes(rich: bool = False) -> dict[str, bytes]:
    """Plain or rich scenes of the test split, whose combinations no model of scenes was trained on: PNG files by name."""
    from data_scripts.scenes import scene_rows

    rows = [row for row in scene_rows(rich=rich) if row.split == "test"]
    return {f"{row.image_id}.png": row.read() for row in rows[:NUM_EXAMPLES]}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def launch(app: "gr.Blocks", **options):
    """Serve the app; fonts are the reader's own, so that nothing comes from another server."""
    import gradio as gr
    from starlette.middleware import Middleware

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(**fonts)
    limits = {
        "max_file_size": MAX_IMAGE_BYTES,
        "app_kwargs": {"middleware": [Middleware(RequestRate, rates=lambda: (SENT, FETCHED))]},
    }
    return app.launch(theme=theme, css=CSS, footer_links=[], **limits, **options)


def decoding(method: str, num_beams: int, temperature: float) -> dict:
    """Arguments of `generate()`."""
    if method == "model default":
        return {}
    if method == "sampling":  # from the whole vocabulary: transformers' default is the likeliest fifty
        return {"do_sample": True, "num_beams": 1, "temperature": float(temperature), "top_k": 0}
    return {"do_sample": False, "num_beams": int(num_beams) if method == "beam search" else 1}


def usable_images(paths: list[str]) -> list[str]:
    """The images among uploaded files, as many as are captioned at once; the page says what is left out."""
    import gradio as gr
    from markupsafe import Markup

    usable = []
    for path in paths:
        if len(usable) == MAX_IMAGES:
            gr.Warning(f"Only the first {MAX_IMAGES} images are taken.")
            break
        try:
            read_image(path)
        except BadImage as error:
            gr.Warning(str(Markup.escape(f"{Path(path).name}: {error}")))
        else:
            usable.append(path)
    return usable


def read_image(path: str):
    """An uploaded image as RGB.

    Raises:
        BadImage: It cannot be used.
    """
    return decode_image(Path(path).read_bytes())


def caption_files(
    captioners: "Mapping[str, Captioner | OnnxCaptioner]",
    paths: list[str],
    generation: dict,
    scene_models: Collection[str] = (),
    scene_hashes: Collection[str] = (),
) -> Iterator[tuple]:
    """Caption images one after the other, with each captioner in turn.

    Args:
        generation: Arguments of `generate()`.
        scene_models: Names of the captioners trained on drawn scenes alone; any image but a scene has a note of them.
        scene_hashes: SHA-256 of the files known to be scenes.

    Yields at each new word what the page shows: the current image, those before it, the file to download.
    """
    import gradio as gr
    from markupsafe import escape

    from reporting.page import image_data_uri

    paths = usable_images(paths)
    if not paths:
        raise gr.Error("There is no image to caption: drop one, paste one, or take a photograph.")
    lines, before, shown = [], "", ""
    for path in paths:
        image = read_image(path)
        source = image_data_uri(image)
        is_scene = sha256(Path(path).read_bytes()) in scene_hashes
        note = scenes_note(scene_models) if scene_models and not is_scene else ""
        before, captions = shown + before, dict.fromkeys(captioners, "")
        for name, captioner in captioners.items():
            try:
                inputs = captioner.on_device(captioner.preprocess([image]))
                for captions[name] in captioner.stream(inputs, **generation):
                    yield image_card(source, path, captions, "captions current", note), before, gr.skip()
            except UserError as error:
                raise gr.Error(str(escape(f"{Path(path).name}, {name}: {error}"))) from error
            lines.append({"image_id": Path(path).name, "model": name, "caption": captions[name]})
        shown = image_card(source, path, captions, "captions", note)
    with tempfile.TemporaryDirectory() as folder:  # Gradio keeps a copy, and deletes it when it deletes the uploads
        file = Path(folder) / "captions.jsonl"
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        yield gr.skip(), before, gr.update(value=str(file), visible=True)


def scenes_note(names: Collection[str]) -> str:
    """What to know about the captions that captioners of scenes generate for other images, as HTML."""
    from markupsafe import Markup

    know = "knows" if len(names) == 1 else "know"
    return Markup(
        '<p class="note">{} {} drawn shapes only and will not describe a photograph. To caption photographs: '
        "<code>python app.py {}</code></p>"
    ).format(" and ".join(names), know, PHOTOGRAPH_MODEL)


def image_card(source: str, path: str, captions: dict[str, str], kind: str, note: str = "") -> str:
    """An image, as the address of its data, with its captions as HTML; names and captions are text, whatever they hold.

    Args:
        note: HTML to follow the captions.
    """
    from markupsafe import Markup

    entries = Markup().join(
        Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(name, caption) for name, caption in captions.items()
    )
    name = Path(path).name
    return Markup('<div class="{}"><img src="{}" alt="{}" title="{}"><dl>{}</dl>{}</div>').format(
        kind, source, name, name, entries, note
    )


if __name__ == "__main__":
    main()
