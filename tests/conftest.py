"""Every test runs offline, on one thread of the CPU unless ACCELERATE_USE_CPU=false, with caches of its own."""

import gc
import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import pytest
from filelock import FileLock
from packaging.version import Version
from PIL import Image

# Fixtures of tests that take seconds: whole runs, processes of their own, a browser.
SLOW_FIXTURES = {
    *("alone", "browser", "context", "exported", "hub", "node_modules"),
    *("runs", "started", "trained", "workshop"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker("slow")


def pytest_collection_finish(session):
    """Runs of the tests leave a blank curves.png: they are many, and drawing takes longer than so small a training."""
    if torch := sys.modules.get("torch"):  # not imported here: pytest-xdist starts its workers after this process
        torch.set_num_threads(1)
    gc.freeze()  # the collector would go through all libraries again and again
    if run := sys.modules.get("training.run"):
        run.draw_curves = lambda folder, history: Image.new("L", (1, 1), 255).save(Path(folder) / "curves.png")


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory):
    """Drawn scenes and encoded images of the tests go to a folder of the session, here and in subprocesses."""
    import datasets

    folder = tmp_path_factory.mktemp("datasets_cache")
    os.environ["HF_DATASETS_CACHE"] = str(folder)
    datasets.config.HF_DATASETS_CACHE = folder
    return folder


@pytest.fixture(scope="session")
def exporter(tmp_path_factory):
    """Torch's exporter to ONNX, which exports the same weights, and the same image processor, once for all workers: it takes seconds.

    Tests that need it are skipped with a torch whose exporter cannot export a captioner.
    """
    import torch

    if Version(torch.__version__) < Version("2.7"):
        pytest.skip(f"export_onnx.py needs torch 2.7, and refuses {torch.__version__}")
    from benchmarks import onnx_step
    from modeling import onnx_export, onnx_pixels, transformers_js
    from modeling.fingerprint import weights_digest

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def once(name: str, export: Callable[[Path], Any]) -> Path:
        kept = folder / f"exported-{name}"
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                begun = kept.with_name(f"{kept.name}-begun")  # a failed export is none
                begun.mkdir(exist_ok=True)
                export(begun)
                begun.rename(kept)
        return kept

    export, export_pixels = onnx_export.export_encoder_and_step, onnx_export.export_pixel_processor

    def export_once(captioner, into):
        kept = once(weights_digest(captioner.model), lambda place: export(captioner, place))
        shutil.copytree(kept, into, dirs_exist_ok=True)

    def export_pixels_once(image_processor, path):
        size = onnx_pixels.PixelProcessor(image_processor).output_size
        name = hashlib.sha256(image_processor.to_json_string().encode()).hexdigest()
        shutil.copy(once(name, lambda place: export_pixels(image_processor, place / "pixels")) / "pixels", path)
        return size

    with pytest.MonkeyPatch.context() as patch:
        for module in (onnx_export, onnx_step):
            patch.setattr(module, "export_encoder_and_step", export_once)
        for module in (onnx_export, transformers_js):
            patch.setattr(module, "export_pixel_processor", export_pixels_once)
        yield


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium, driven by Playwright; tests that need it are skipped where there is none."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium (on Debian and Ubuntu: apt install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright (pip install playwright)")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def node_modules() -> str:
    """A node_modules with transformers.js and, which it needs, onnxruntime-web; tests that need it are skipped without."""
    if shutil.which("node") is None:
        pytest.skip("needs Node (on Debian and Ubuntu: apt install nodejs npm)")
    folder = os.environ.get("SHOWTELL_NODE_MODULES") or os.path.join(os.path.dirname(__file__), "..", "node_modules")
    if not os.path.isdir(os.path.join(folder, "@huggingface", "transformers")):
        pytest.skip("needs transformers.js: `make npm`, or SHOWTELL_NODE_MODULES naming the node_modules that has it")
    return os.path.abspath(folder)


@pytest.fixture(scope="session")
def small_scenes(tmp_path_factory) -> str:
    """A folder with 24 drawn training images, 10 for validation, 9 for the test, five captions each."""
    from data_scripts.caption_table import write_caption_table
    from data_scripts.scenes import scene_rows

    folder = tmp_path_factory.mktemp("data") / "scenes"
    num_scenes = {"train": 24, "validation": 10, "test": 9}
    write_caption_table(scene_rows(num_scenes, num_captions=dict.fromkeys(num_scenes, 5)), folder)
    return str(folder)


@pytest.fixture(scope="session")
def colors(tmp_path_factory) -> str:
    """A folder with five images of one color in each split, two captions of unlike length each, in `small_captioners`' words."""
    from datasets import Dataset, DatasetDict, Features, List, Value
    from datasets import Image as ImageFeature
    from small_captioners import COLORS, IMAGES

    captions = [[f"a {color} dog", f"the small cat sits on a {color} big dog and runs"] for color in COLORS]
    features = Features(
        {"image": ImageFeature(mode="RGB"), "image_id": Value("string"), "captions": List(Value("string"))}
    )
    table = Dataset.from_dict(
        {"image": [image.copy() for image in IMAGES], "image_id": list(COLORS), "captions": captions}, features=features
    )
    folder = tmp_path_factory.mktemp("data") / "colors"
    DatasetDict({"train": table, "validation": table, "test": table}).save_to_disk(folder)
    return str(folder)


@pytest.fixture(scope="session")
def starts(tmp_path_factory) -> dict[str, str]:
    """Folders of small captioners of random weights, to fine-tune, by kind."""
    from small_captioners import build

    folders = {kind: str(tmp_path_factory.mktemp("starts") / kind) for kind in ("lstm", "vit_gpt2")}
    for kind, folder in folders.items():
        build(kind, num_layers=1).save(folder)
    return folders


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on the loopback address; `huggingface_hub` of this process talks to it as the user "me", with an empty cache."""
    import datasets
    import huggingface_hub
    import huggingface_hub.constants as settings

    if huggingface_hub.__version__.startswith("1."):
        pytest.skip("the Hub of the tests answers what huggingface_hub 2 asks; with 1.33 some fail")
    from hub_server import running_hub
    from huggingface_hub import close_session, file_download
    from huggingface_hub.utils import _http

    from system import retries

    with running_hub() as hub:
        cache = str(tmp_path / "hub_cache")
        monkeypatch.setattr(settings, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            settings, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(settings, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(settings, "HF_HUB_CACHE", cache)
        for module in (_http, file_download):  # the client waits for seconds before it tries again
            monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0.01)
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        # For processes that a test starts.
        hub.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            **{"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_me", "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": ""},
            **{"HF_HOME": str(tmp_path / "fresh_home"), "OMP_NUM_THREADS": "1"},
        }
        yield hub
        close_session()
