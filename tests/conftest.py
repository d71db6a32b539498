"""Every test runs offline, on one thread, with caches of its own."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory):
    """Drawn scenes and encoded pictures of the tests go to a folder of the session, here and in subprocesses."""
    import datasets

    folder = tmp_path_factory.mktemp("datasets_cache")
    os.environ["HF_DATASETS_CACHE"] = str(folder)
    datasets.config.HF_DATASETS_CACHE = folder
    return folder


@pytest.fixture(scope="session")
def small_scenes(tmp_path_factory) -> str:
    """A folder with 24 drawn training pictures, 10 for validation, 9 for the test, five captions each."""
    from data_scripts.caption_table import write_caption_table
    from data_scripts.scenes import scene_rows

    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_caption_table(scene_rows({"train": 24, "validation": 10, "test": 9}), folder)
    return str(folder)
