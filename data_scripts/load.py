"""Load captioned images by name: what the training scripts call."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
from datasets import DatasetDict, load_from_disk
from filelock import FileLock

from data_scripts import dataset_rows, scenes
from data_scripts.caption_table import FEATURES, write_caption_table
from data_scripts.row_checks import SourceRow
from system.errors import UserError


def load_captions(
    source: str = "scenes",
    image_column: str = "image",
    caption_column: str | Sequence[str] | None = None,
    revision: str | None = None,
    splits: Sequence[str] = (),
) -> DatasetDict:
    """Load captioned images: "train", and "validation" and "test" where there are any.

    Args:
        source: "scenes" for the images drawn here; a folder that one of the commands of `data_scripts` has saved; or
            any other dataset on the Hub or on disk, which is then prepared as `data_scripts.hub` does it. What is
            drawn or prepared here is kept in the cache of `datasets`.
        image_column, caption_column: Where the images and captions of any other dataset stand.
        revision: Branch, tag or commit on the Hub.
        splits: Those that have to be there.

    Returns:
        Rows of image (RGB image), image_id, captions (list of texts).

    Raises:
        UserError: The dataset cannot be opened, or has no such columns or splits.
    """
    dataset = _load_captions(source, image_column, caption_column, revision)
    missing = [split for split in splits if split not in dataset]
    if missing:
        raise UserError(f"{source} has no split {missing[0]!r}, only {', '.join(dataset)}: prepare it with one")
    return dataset


def load_for_training(source: str, max_images: int | None = None) -> tuple[DatasetDict, list[str]]:
    """What a run trains and is validated on, as `load_captions` gives it, and all training captions in one list.

    Args:
        max_images: Of the training images the first so many; None keeps all.
    """
    dataset = load_captions(source, splits=("train", "validation"))
    if max_images:
        dataset["train"] = dataset["train"].select(range(min(max_images, len(dataset["train"]))))
    return dataset, [text for texts in dataset["train"]["captions"] for text in texts]


def _load_captions(
    source: str, image_column: str, caption_column: str | Sequence[str] | None, revision: str | None
) -> DatasetDict:
    if source == "scenes":
        # The code is part of the key, so that what an older version drew is not taken for this one's.
        return _cached(f"scenes-{_digest(Path(scenes.__file__).read_text())}", scenes.scene_rows)
    dataset = dataset_rows.open_dataset(source, revision)
    if (Path(source) / "dataset_dict.json").is_file() and all(part.features == FEATURES for part in dataset.values()):
        return dataset
    caption_columns = [caption_column] if isinstance(caption_column, str) else caption_column
    fingerprints = [f"{split}={part._fingerprint}" for split, part in dataset.items()]
    key = _digest(repr((fingerprints, image_column, caption_columns)))
    return _cached(
        f"{Path(source).name}-{key}", lambda: dataset_rows.dataset_rows(dataset, image_column, caption_columns, source)
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cached(name: str, make_rows: Callable[[], Sequence[SourceRow]]) -> DatasetDict:
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "showtell" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Under `accelerate launch` several processes come here at once; one prepares, the others wait.
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            print(f"Preparing {name}\n{write_caption_table(make_rows(), folder)}")
    return load_from_disk(folder)
