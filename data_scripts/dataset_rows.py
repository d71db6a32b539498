"""Read a dataset of the Hub, or of a folder that `datasets` can read or has saved, as rows for the caption table."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset, load_from_disk
from huggingface_hub.constants import HF_HUB_CACHE
from tqdm import tqdm

from data_scripts.archives import read_file
from data_scripts.row_checks import OutsideSource, SourceRow, note_row, valid_id
from data_scripts.splits import SplitNames
from data_scripts.text_files import IMAGE_SUFFIXES, find_column
from system.errors import UserError
from system.retries import error_summary

CAPTION_COLUMNS = ("captions", "caption", "text", "txt")  # the last in WebDataset shards
BINARY = ("binary", "large_binary")


def open_dataset(source: str, revision: str | None = None, config_name: str | None = None) -> DatasetDict:
    """Open a dataset on the Hub, a folder saved with `save_to_disk`, a folder of Parquet files or the like, or one Parquet file.

    Raises:
        UserError: There is no such dataset, or it cannot be read.
    """
    try:
        if (Path(source) / "dataset_dict.json").is_file() or (Path(source) / "dataset_info.json").is_file():
            dataset = load_from_disk(source)
        else:
            dataset = _load(source, config_name, revision)
    except Exception as error:  # datasets, Arrow and the Hub's client each have their own
        nowhere = "" if Path(source).exists() else f"there is no folder '{source}' here, and on the Hub "
        raise UserError(f"dataset '{source}' cannot be opened: {nowhere}{error_summary(error, source)}") from error
    return DatasetDict({"train": dataset}) if isinstance(dataset, Dataset) else dataset


def _load(source: str, config_name: str | None, revision: str | None) -> DatasetDict:
    """`load_dataset`, and all images of WebDataset shards: `datasets` takes their columns from the first five samples."""
    suffixes = [suffix.removeprefix(".") for suffix in sorted(IMAGE_SUFFIXES)]
    images = {name: Image() for suffix in suffixes for name in (suffix, suffix.upper())}
    if source.endswith(".parquet") and Path(source).is_file():
        return load_dataset("parquet", data_files=source)
    try:
        dataset = load_dataset(source, config_name, revision=revision)
    except Exception as error:
        if "WebDataset format" not in repr(error.__cause__ or error):
            raise
        texts = {"__key__": Value("string"), "__url__": Value("string"), "txt": Value("string")}
        return load_dataset(source, config_name, revision=revision, features=Features(texts | images))
    for part in dataset.values():
        found = [name for name, feature in part.features.items() if isinstance(feature, Image)]
        if "__key__" in part.features and any(part.data.column(name).null_count for name in found):
            features = Features(images | dict(part.features))
            return load_dataset(source, config_name, revision=revision, features=features)
    return dataset


def dataset_rows(
    dataset: DatasetDict,
    source: str = "",
    image_column: str = "image",
    caption_columns: Sequence[str] | None = None,
    split_column: str | None = None,
    splits: str | None = None,
) -> list[SourceRow]:
    """Return one row per image, and notes on what is not used.

    Rows of a split are captions of one image if they share its `image_id` and its bytes; without an ID, the bytes alone.
    Images that a row only names are read from the folder `source` and from the caches of downloads, nowhere else.

    Args:
        dataset: Splits of any names.
        source: Folder of the dataset, or its name.
        image_column: Column of images of `datasets`, of bytes, of {bytes, path}, or of files' paths in the folder `source`.
        caption_columns: Columns of texts or lists of texts; None for the first of the usual ones.
        split_column: Column of each row's split; None for `split` in a dataset of one split, where its values are splits.
        splits: Names of the splits, see `SplitNames`.

    Raises:
        UserError: A column or split is missing, or the image column does not hold images.
    """
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    own_folders = [Path(folder).resolve() for folder in (source, *caches) if folder]
    split_of = SplitNames(splits)
    columns_of_splits = _split_columns(dataset, split_column, split_of)
    rows: list[SourceRow] = []
    there: set[str] = set()
    for split_name, part in dataset.items():
        split_names = _split_names(part, split_name, columns_of_splits[split_name])
        there.update(split_names)
        row_splits = [split_of(name) for name in split_names]
        unused = Counter(name for name, split in zip(split_names, row_splits, strict=True) if split is None)
        rows += [note_row(f"{name}, {count:,} rows", "split not used, see --splits") for name, count in unused.items()]
        if not any(row_splits):
            continue
        captions = _caption_columns(part, split_name, caption_columns)
        images = _image_columns(part, split_name, image_column, Path(source))
        read = partial(_read_image, _undecoded(part, images), Path(source), own_folders)
        rows += _gather(part, split_name, row_splits, captions, read)
    split_of.check(there)
    if not any(row.read for row in rows) and there:
        raise UserError(
            f"none of the splits {', '.join(sorted(there))} is train, validation or test: name them by --splits"
        )
    return rows


def _split_names(part: Dataset, split_name: str, column: str | None) -> list[str]:
    """The source's name of each row's split."""
    if column is None:
        return [split_name] * len(part)
    feature = part.features[column]
    return [feature.int2str(value) if isinstance(feature, ClassLabel) else str(value) for value in part[column]]


def _split_columns(dataset: DatasetDict, given: str | None, split_of: SplitNames) -> dict[str, str | None]:
    if given is None:
        columns: dict[str, str | None] = dict.fromkeys(dataset)
        if len(dataset) == 1:
            ((name, part),) = dataset.items()
            column = find_column(part.column_names, "split")
            if column is not None and any(map(split_of, set(_split_names(part, name, column)))):
                columns[name] = column
        return columns
    columns = {name: find_column(part.column_names, given) for name, part in dataset.items()}
    for name, column in columns.items():
        if column is None:
            raise UserError(f"split '{name}' has no column '{given}', only {dataset[name].column_names}")
    return columns


def _caption_columns(split: Dataset, split_name: str, names: Sequence[str] | None) -> list[str]:
    if names:
        columns = {name: find_column(split.column_names, name) for name in names}
    else:
        columns = {" or ".join(CAPTION_COLUMNS): find_column(split.column_names, *CAPTION_COLUMNS)}
    for name, column in columns.items():
        if column is None:
            raise UserError(
                f"split '{split_name}' has no column {name}, only {split.column_names}: name it with --caption_column"
            )
    return list(columns.values())


def _image_columns(split: Dataset, split_name: str, name: str, source: Path) -> list[str]:
    """The image column; where there is none of the default name, all that hold images, as WebDataset shards of jpg and png have."""
    column = find_column(split.column_names, name)
    columns = [column] if column else []
    if not columns and name == "image":
        columns = [column for column, feature in split.features.items() if isinstance(feature, Image)]
    if not columns or not all(_holds_images(split, column, source) for column in columns):
        kind = split.features[column] if column else "missing"
        raise UserError(
            f"column '{name}' of split '{split_name}' holds no images ({kind}); there are "
            f"{split.column_names}: name one with --image_column"
        )
    return columns


def _holds_images(split: Dataset, column: str, source: Path) -> bool:
    """Whether a column holds images, or their files' bytes as pandas, polars and pyarrow store them, or paths of files."""
    feature = split.features[column]
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        paths = (path for path in split[column] if path)
        return source.is_dir() and (source / next(paths, "")).is_file()
    if isinstance(feature, dict):
        feature = feature.get("bytes")
    return isinstance(feature, Image) or (isinstance(feature, Value) and feature.dtype in BINARY)


def _undecoded(split: Dataset, columns: Sequence[str]) -> Dataset:
    images = split.select_columns(list(columns))
    for column in columns:
        if isinstance(images.features[column], Image):
            images = images.cast_column(column, Image(decode=False))
    return images


def _gather(
    part: Dataset, split_name: str, row_splits: Sequence[str | None], columns: Sequence[str], read
) -> list[SourceRow]:
    """Return one row per image of a split, in the order of its first rows."""
    id_column = find_column(part.column_names, "image_id")
    # Without the image column this reads texts only.
    texts = part.select_columns([*columns, id_column] if id_column else list(columns))
    image_ids = [valid_id(value) for value in part[id_column]] if id_column else [None] * len(part)
    times = Counter(zip(row_splits, image_ids, strict=True))
    used = [number for number, split in enumerate(row_splits) if split]
    # Only rows that can be captions of another row's image have to be read for that.
    all_known = all(
        image_ids[number] is not None and times[row_splits[number], image_ids[number]] == 1 for number in used
    )
    hashes = dict.fromkeys(used) if all_known else _content_hashes(used, read)
    groups: dict[tuple, SourceRow] = {}
    first_of_bytes: dict[tuple, SourceRow] = {}
    for number, cells in enumerate(texts):
        split, image_id, content = row_splits[number], image_ids[number], hashes.get(number)
        if split is None:
            continue
        if image_id is None and content is not None and (split, content) in first_of_bytes:
            row = first_of_bytes[split, content]
        else:
            key = (split, image_id, content if content is not None or image_id is not None else number)
            name = image_id if image_id is not None else f"{split_name}_{number}"
            new = SourceRow(split, name, [], f"{split_name}, row {number}, {name}", partial(read, number))
            row = groups.setdefault(key, new)
            first_of_bytes.setdefault((split, content), row)
        for column in columns:
            row.captions.extend(_texts(cells[column]))
    if len(groups) < len(used):
        print(f"{split_name}: {len(used):,} rows are captions of {len(groups):,} images, as their bytes say")
    return list(groups.values())


def _texts(cell: Any) -> list[Any]:
    cells = cell if isinstance(cell, list) else [cell]
    # Members of WebDataset shards that datasets knows no type for come as bytes.
    return [text.decode("utf-8", "replace") if isinstance(text, bytes) else text for text in cells]


def _content_hashes(numbers: Sequence[int], read) -> dict[int, str | None]:
    """Return the hash of each row's image; None where it cannot be read, which is found out later."""

    def content_hash(number: int) -> str | None:
        try:
            return hashlib.sha256(read(number)).hexdigest()
        except OSError:
            return None

    with ThreadPoolExecutor() as pool:
        progress = tqdm(pool.map(content_hash, numbers), total=len(numbers), unit="row", desc="Comparing images")
        return dict(zip(numbers, progress, strict=True))


def _read_image(images: Dataset, source: Path, own_folders: list[Path], number: int) -> bytes:
    for image in images[number].values():
        if isinstance(image, bytes):
            return image
        if isinstance(image, str):
            image = {"path": source / image}
        if image is None or (image.get("bytes") is None and not image.get("path")):
            continue
        if image.get("bytes") is not None:
            return image["bytes"]
        path = Path(image["path"])
        if not any(path.resolve().is_relative_to(folder) for folder in own_folders):
            raise OutsideSource(f"{path} is a file of this machine, not of the dataset")
        return read_file(path)
    raise FileNotFoundError("the row has no image")
