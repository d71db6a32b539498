"""Caption drawn scenes by torch, onnxruntime, transformers.js under Node and the page of --web in Chromium, an image at a time.

    npm install --ignore-scripts @huggingface/transformers@4.3.1
    python -m benchmarks.browser outputs/demo/lstm outputs/demo/vit_gpt2 --node_modules node_modules

Each export captions the images at the model's size and enlarged to 1,200 pixels with noise: captions equal to torch's greedy
ones, median milliseconds a caption, and megabytes of the weights.
"""

import functools
import http.server
import io
import json
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

import export_onnx
from benchmarks.machine import benchmark_parser, describe_machine, write_result
from captioning.onnx_decoding import ExportedCaptioner
from data_scripts.scenes import scene_rows
from modeling.captioner import Captioner

DTYPES = ("fp32", "q8")
LARGE, NOISE = 1200, 30  # pixels; gray levels, standard deviation
NODE = """
import { pipeline, env, RawImage } from '@huggingface/transformers';
env.allowRemoteModels = false; env.localModelPath = '';
const [folder, dtype, ...paths] = process.argv.slice(2);
const captioner = await pipeline('image-to-text', folder, { dtype });
const images = await Promise.all(paths.map((path) => RawImage.read(path)));
const captions = [], milliseconds = [];
for (const image of images) {
  const started = performance.now();
  captions.push((await captioner(image))[0].generated_text);
  milliseconds.push(performance.now() - started);
}
console.log(JSON.stringify({ captions, milliseconds }));
"""


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, runs=1)
    parser.add_argument("models", nargs="+", help="folders of captioners")
    parser.add_argument("--node_modules", required=True, type=Path, help="folder with @huggingface and onnxruntime-web")
    parser.add_argument("--num_images", type=int, default=50, help="images of the validation split")
    args = parser.parse_args(argv)
    result = {"machine": describe_machine(args.device)}
    with tempfile.TemporaryDirectory() as work:
        images = write_images(Path(work), args.num_images)
        for number, name in enumerate(args.models):
            result[name] = measure(name, images, Path(work) / str(number), args.node_modules.resolve())
    write_result(result, args.json)


def write_images(folder: Path, number: int) -> dict[str, list[Path]]:
    """Paths of the images, "small" as drawn and "large" with noise, which a resize without averaging keeps."""
    noise, paths = np.random.default_rng(0), {"small": [], "large": []}
    rows = [row for row in scene_rows() if row.split == "validation"]
    for place, row in enumerate(rows[:number]):
        image = Image.open(io.BytesIO(row.read())).convert("RGB")
        pixels = np.asarray(image.resize((LARGE, LARGE), Image.Resampling.BICUBIC)).astype(np.float32)
        noisy = (pixels + noise.normal(0, NOISE, pixels.shape)).clip(0, 255).astype(np.uint8)
        for size, one in (("small", image), ("large", Image.fromarray(noisy))):
            paths[size].append(folder / f"{size}-{place:04}.png")
            one.save(paths[size][-1])
    return paths


def measure(name: str, images: dict[str, list[Path]], folder: Path, node_modules: Path) -> dict:
    """What each engine needs for the images, and how many of its captions are torch's."""
    captioner = Captioner.load(name)
    page, script = folder / "page", folder / "js"
    dtypes = ["--dtype", ",".join(DTYPES)]
    export_onnx.main([name, str(page), "--web", "--onnxruntime_web", str(node_modules / "onnxruntime-web"), *dtypes])
    engines: dict[str, Callable] = {"torch": functools.partial(by_torch, captioner)}
    for dtype in DTYPES:
        engines[f"onnxruntime {dtype}"] = functools.partial(by_onnxruntime, ExportedCaptioner(page, dtype), captioner)
        engines[f"Chromium {dtype}"] = functools.partial(by_chromium, page, dtype)
    if captioner.model.config.model_type == "vision-encoder-decoder":
        export_onnx.main([name, str(script), "--format", "transformers.js", *dtypes])
        for dtype in DTYPES:
            engines[f"Node {dtype}"] = functools.partial(by_node, script, dtype, node_modules)
    result: dict = {"megabytes": {}}
    for dtype in DTYPES:
        files = ExportedCaptioner(page, dtype).files
        result["megabytes"][dtype] = round(sum(path.stat().st_size for path in files) / 1e6, 3)
    for size, paths in images.items():
        expected, result[size] = None, {}
        for engine, caption in engines.items():
            captions, milliseconds = caption(paths)
            expected = expected or captions
            same = sum(one == other for one, other in zip(captions, expected, strict=True))
            result[size][engine] = {"same_captions": same, "milliseconds": round(median(milliseconds), 1)}
    return result


def timed(caption: Callable[[Image.Image], str], paths: list[Path]) -> tuple[list[str], list[float]]:
    captions, milliseconds = [], []
    for image in [Image.open(path).convert("RGB") for path in paths]:
        started = time.perf_counter()
        captions.append(caption(image))
        milliseconds.append((time.perf_counter() - started) * 1000)
    return captions, milliseconds


def by_torch(captioner: Captioner, paths: list[Path]) -> tuple[list[str], list[float]]:
    def caption(image: Image.Image) -> str:
        inputs = dict(captioner.processor(images=[image], return_tensors="pt"))
        return captioner.generate(inputs, num_beams=1)[0]["caption"]

    return timed(caption, paths)


def by_onnxruntime(exported: ExportedCaptioner, captioner: Captioner, paths: list) -> tuple[list[str], list[float]]:
    def caption(image: Image.Image) -> str:
        (ids,) = exported.generate(exported.preprocess(np.asarray(image)), num_beams=1)
        return captioner.tokenizer.decode(ids, skip_special_tokens=True).strip()

    return timed(caption, paths)


def by_node(folder: Path, dtype: str, node_modules: Path, paths: list[Path]) -> tuple[list[str], list[float]]:
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "node_modules").symlink_to(node_modules)
        (Path(work) / "caption.mjs").write_text(NODE, encoding="utf-8")
        command = ["node", "caption.mjs", str(folder), dtype, *map(str, paths)]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=True)
    made = json.loads(done.stdout.splitlines()[-1])
    return made["captions"], made["milliseconds"]


def by_chromium(folder: Path, dtype: str, paths: list[Path]) -> tuple[list[str], list[float]]:
    from playwright.sync_api import expect, sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with served(folder) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(f"{url}?device=wasm&dtype={dtype}")
        page.wait_for_selector("#controls", state="visible", timeout=120_000)
        page.select_option("#beams", "1")
        page.set_input_files("#files", paths)
        expect(page.locator(".done")).to_have_count(len(paths), timeout=600_000)
        captions = [text.strip() for text in page.locator(".caption").all_text_contents()]
        times = page.locator(".done").evaluate_all("all => all.map((card) => Number(card.dataset.milliseconds))")
        browser.close()
    return captions[::-1], times[::-1]  # the last is the first on the page


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on the loopback address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


if __name__ == "__main__":
    main()
