"""What is imported only where it is used: captions come without the packages of pages, curves, trackers, the app and the server."""

from pathlib import Path

import huggingface_hub
import pytest
from fresh import run_fresh
from small_captioners import IMAGES

ROOT = Path(__file__).parent.parent
OPTIONAL = [
    "fastapi",
    "gradio",
    "jinja2",
    "limits",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openai",
    "peft",
]
OPTIONAL += ["tensorboard", "trackio", "uvicorn", "wandb"]
if not huggingface_hub.__version__.startswith("1."):
    OPTIONAL += ["httpx"]  # huggingface_hub 2 brings httpx2
CODE = f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
for name in {OPTIONAL}:
    sys.modules[name] = None  # importing it is a ModuleNotFoundError
scripts, modules, arguments = eval(sys.argv[1])
for name in scripts + modules:
    importlib.import_module(name)
import caption
caption.main(arguments)
"""


@pytest.mark.slow
def test_every_script_is_imported_and_captions_come_without_them(starts, tmp_path):
    IMAGES[0].save(tmp_path / "red.png")
    scripts = sorted(path.stem for path in ROOT.glob("*.py"))
    modules = ["training.run", "training.features", "reporting.page", "reporting.curves", "reporting.model_card"]
    arguments = ["--model_name_or_path", starts["lstm"], str(tmp_path / "red.png")]
    said = run_fresh(CODE, repr((scripts, modules, arguments)), folder=tmp_path / "elsewhere")
    assert said.startswith(str(tmp_path / "red.png"))
