"""The notebook goes from images to a model on the Hub, and captions with what it pulled from there."""

import re
from pathlib import Path

import pytest

nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "caption_your_images.ipynb"


@pytest.mark.slow
def test_it_runs_from_images_to_a_pushed_model(hub, tmp_path, monkeypatch):
    """Every cell as it stands, but for the first, which sets how many images and epochs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = next(cell for cell in notebook.cells if "NUM_IMAGES, NUM_EPOCHS = " in cell.source)
    settings.source = settings.source.replace("NUM_EPOCHS = 5000, 6", "NUM_EPOCHS = 120, 2")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name)
    environment = hub.environment | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "work").mkdir()
    resources = {"metadata": {"path": str(tmp_path / "work")}}
    done = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()

    repository = hub.repositories["model", "me/my-captioner"]
    assert (
        repository.private and {"model.safetensors", "README.md", "samples/01.jpg"} <= repository.files("main").keys()
    )
    told = done.cells[-1].outputs[-1]["data"]["text/plain"].strip("'")
    lines = (tmp_path / "work" / "outputs" / "mine" / "captions.jsonl").read_text().splitlines()
    assert told and f'"caption": "{told}"' in lines[0]
    assert any("/me/my-captioner/resolve/" in path for _, path, _ in hub.requests)


def test_it_is_kept_without_outputs_and_names_no_path():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    assert not re.search(r"/(home|root|tmp|Users)/", NOTEBOOK.read_text())
