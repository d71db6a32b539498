"""Read a dataset of the Hub, or of a folder that `datasets` can read or has saved, as rows for the caption table."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk
from huggingface_hub.constants import HF_HUB_CACHE

from data_scripts.archives import read_file
from data_scripts.row_checks import OutsideSource, SourceRow
from data_scripts.splits import SPLIT_NAMES
from system.errors import UserError
from system.retries import error_summary

CAPTION_COLUMNS = ("captions", "caption", "text")


def open_dataset(source: str, revision: str | None = None, config_name: str | None = None) -> DatasetDict:
    """Open a dataset on the Hub, a folder saved with `save_to_disk`, or a folder of parquet files or the like.

    Raises:
        UserError: There is no such dataset, or it cannot be read.
    """
    try:
        if (Path(source) / "dataset_dict.json").is_file() or (Path(source) / "dataset_info.json").is_file():
            dataset = load_from_disk(source)
        else:
            dataset = load_dataset(source, config_name, revision=revision)
    except Exception as error:  # datasets, Arrow and the Hub's client each have their own
        raise UserError(f"dataset '{source}' cannot be opened: {error_summary(error, source)}") from error
    return DatasetDict({"train": dataset}) if isinstance(dataset, Dataset) else dataset


def dataset_rows(
    dataset: DatasetDict, image_column: str = "image", caption_columns: Sequence[str] | None = None, source: str = ""
) -> list[SourceRow]:
    """Return one row per image. Splits other than training, validation and test are left out.

    Images that a row only names are read from the folder `source` and from the caches of downloads, nowhere else.

    Raises:
        UserError: A column is missing, or the image column does not hold images.
    """
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    own_folders = [Path(folder).resolve() for folder in (source, *caches) if folder]
    rows = []
    for split_name, split in dataset.items():
        if split_name not in SPLIT_NAMES:
            print(f"split '{split_name}' is not used: it is none of train, validation, test")
            continue
        columns = _caption_columns(split, split_name, caption_columns)
        if not isinstance(split.features.get(image_column), Image):
            kind = split.features.get(image_column, "missing")
            raise UserError(
                f"column '{image_column}' of split '{split_name}' holds no images ({kind}); there are "
                f"{split.column_names}: name one with --image_column"
            )
        images = split.select_columns(image_column).cast_column(image_column, Image(decode=False))
        for image_id, (number, captions) in _gather(split, split_name, columns).items():
            place = f"{split_name}, row {number}, {image_id}"
            read = partial(_read_image, images, number, image_column, own_folders)
            rows.append(SourceRow(SPLIT_NAMES[split_name], image_id, captions, place, read))
    return rows


def _caption_columns(split: Dataset, split_name: str, names: Sequence[str] | None) -> list[str]:
    columns = list(names) if names else [name for name in CAPTION_COLUMNS if name in split.column_names][:1]
    missing = [name for name in columns if name not in split.column_names]
    if missing or not columns:
        wanted = f"'{missing[0]}'" if missing else " or ".join(CAPTION_COLUMNS)
        raise UserError(
            f"split '{split_name}' has no column {wanted}, only {split.column_names}: name it with --caption_column"
        )
    return columns


def _gather(split: Dataset, split_name: str, columns: Sequence[str]) -> dict[str, tuple[int, list[Any]]]:
    """Return (number of the first row, captions) of each image, by id."""
    has_id = "image_id" in split.column_names
    # Without the image column this reads texts only.
    texts = split.select_columns([*columns, "image_id"] if has_id else columns)
    gathered: dict[str, tuple[int, list[Any]]] = {}
    for number, row in enumerate(texts):
        image_id = str(row["image_id"]) if has_id and row["image_id"] is not None else f"{split_name}_{number}"
        _, captions = gathered.setdefault(image_id, (number, []))
        for column in columns:
            captions += row[column] if isinstance(row[column], list) else [row[column]]
    return gathered


def _read_image(images: Dataset, number: int, column: str, own_folders: list[Path]) -> bytes:
    image = images[number][column] or {}
    if image.get("bytes") is not None:
        return image["bytes"]
    if not image.get("path"):
        raise FileNotFoundError("the row has no image")
    path = Path(image["path"])
    if not any(path.resolve().is_relative_to(folder) for folder in own_folders):
        raise OutsideSource(f"{path} is a file of this machine, not of the dataset")
    return read_file(path)
