"""Load captioned images by name: what the training scripts call."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, Features, load_from_disk
from filelock import FileLock

from data_scripts import (
    caption_table,
    dataset_rows,
    image_folder,
    images,
    row_checks,
    scene_drawing,
    scene_grammar,
    scenes,
    shards,
)
from data_scripts.archives import open_files
from data_scripts.caption_table import DEFAULT_SHARE, FEATURES, write_caption_table
from data_scripts.caption_texts import CaptionTexts
from data_scripts.row_checks import SourceRow, problem_row
from data_scripts.shards import Skipped, find_shards, is_shard_pattern, other_splits, read_shard, shown
from system.errors import UserError
from system.files import write_file

EVAL_SAMPLES = 5000  # of a split in shards that is validated or tested on
FIRST_CAPTIONS = 20_000  # of shards: for a tokenizer, the lengths of captions and the best constant caption
OLDER_FEATURES = Features({name: feature for name, feature in FEATURES.items() if name != "content_hash"})


def load_captions(
    source: str = "scenes",
    image_column: str = "image",
    caption_column: str | Sequence[str] | None = None,
    revision: str | None = None,
    splits: Sequence[str] = (),
    split_column: str | None = None,
    split_names: str | None = None,
) -> DatasetDict:
    """Load captioned images: "train", and "validation" and "test" where there are any.

    Args:
        source: "scenes" or "rich_scenes" for images drawn here; a folder that one of the commands of `data_scripts` has saved; or
            any other dataset on the Hub or on disk, which is then prepared as `data_scripts.hub` does it. What is
            drawn or prepared here is kept in the cache of `datasets`.
        image_column, caption_column: Columns of the images and captions of any other dataset.
        revision: Branch, tag or commit on the Hub.
        splits: Splits that have to be there.
        split_column, split_names: How any other dataset says which row is in which split, see `dataset_rows`.

    Returns:
        Rows of image (RGB image), image_id, captions (list of texts), content_hash (SHA-256 of the image's bytes).

    Raises:
        UserError: The dataset cannot be opened, or has no such columns or splits.
    """
    columns = [caption_column] if isinstance(caption_column, str) else caption_column
    dataset = _load_captions(source, image_column, columns, revision, split_column, split_names)
    missing = [split for split in splits if split not in dataset]
    if missing:
        raise UserError(
            f"{source} has no split {missing[0]!r}, only {', '.join(dataset)}: prepare it with one, by "
            f"`python -m data_scripts.hub {source} --splits {missing[0]}=NAME`"
        )
    return dataset


def load_for_training(
    source: str, max_images: int | None = None, streaming: bool = False, strict: bool = False
) -> tuple[dict[str, Any], CaptionTexts | list[str]]:
    """Load what a run is trained and validated on: as `load_captions` does, or shards to stream; and the training captions.

    Args:
        max_images: Number of training images, the first ones; None for all.
        streaming: Whether a Hub id or a folder is streamed; a shard, a glob of shards or an address always is.
        strict: Whether a shard or a sample that cannot be used is an error, instead of skipped.

    Returns:
        The splits, and all training captions; of shards, whose "train" are `Shards`, the first 20,000.
    """
    if streaming or is_shard_pattern(source):
        if max_images:
            raise UserError("--max_train_samples does not go with shards: name fewer of them, or give --max_steps")
        return _load_shards(source, strict)
    dataset = load_captions(source, splits=("train", "validation"))
    if max_images:
        dataset["train"] = dataset["train"].select(range(min(max_images, len(dataset["train"]))))
    return dataset, CaptionTexts(dataset["train"])


@dataclass(frozen=True)
class Shards:
    """The shards that are trained on.

    Args:
        addresses: Files, local or anywhere fsspec reads.
        strict: Whether one that cannot be used is an error.
        first_captions: Of their first samples.
    """

    addresses: list[str]
    strict: bool
    first_captions: list[str]


def _load_shards(source: str, strict: bool) -> tuple[dict[str, Any], list[str]]:
    splits = find_shards(source)
    if "validation" not in splits:
        if others := other_splits(splits["train"]):
            raise UserError(
                f"{shown(source)} has a column 'split' with rows of {', '.join(others)}, which would be trained on: prepare it as a "
                "table by `python -m data_scripts.hub`, or write a file for each split"
            )
        *splits["train"], last = splits["train"]
        if not splits["train"]:
            raise UserError(f"{shown(source)} is one shard: at least two are needed, the last one for validation")
        splits["validation"] = [last]
        print(
            f"no validation split: {shown(last)}, the last of {len(splits['train']) + 1:,} shards, is held out for it"
        )
    dataset: dict[str, Any] = {
        split: _table_of_shards(splits[split], split, strict) for split in ("validation", "test") if split in splits
    }
    captions = _first_captions(splits["train"], strict)
    return {"train": Shards(splits["train"], strict, captions)} | dataset, captions


def _table_of_shards(addresses: list[str], split: str, strict: bool) -> Dataset:
    """The first 5,000 samples of shards as a table, which evaluation goes over again and again.

    As in `dataset_rows`, samples are captions of one image if they share its ID and its bytes; without an ID, the bytes alone.
    """

    def rows() -> list[SourceRow]:
        skipped, images = Skipped(), {}
        samples = chain.from_iterable(read_shard(address, 0, strict, skipped) for address in addresses)
        for _, sample in islice(samples, EVAL_SAMPLES):
            name, place = sample.image_id or sample.name, f"{split}, {sample.name}"
            row = SourceRow(split, name, [], place, partial(bytes, sample.image))
            images.setdefault((sample.image_id, sample.image), row).captions.extend(sample.captions)
        problems = {**skipped.samples, **skipped.parts}
        return [
            *images.values(),
            *(problem_row(f"{split}, {number:,} samples", problem) for problem, number in problems.items()),
            *(problem_row(address, f"shard {reason}") for address, reason in skipped.shards.items()),
        ]

    key = (_code(shards), addresses, split, EVAL_SAMPLES)
    return _cached(f"shards-{split}", key, rows, share=0.0)[split]


def _first_captions(addresses: list[str], strict: bool) -> list[str]:
    """The captions of the first samples, read once."""
    digest = hashlib.sha256(repr((_code(shards), addresses, FIRST_CAPTIONS)).encode()).hexdigest()[:16]
    path = Path(datasets.config.HF_DATASETS_CACHE) / "showtell" / f"first-captions-{digest}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            samples = chain.from_iterable(read_shard(address, 0, strict) for address in addresses)
            captions = list(islice((caption for _, sample in samples for caption in sample.captions), FIRST_CAPTIONS))
            if not captions:
                raise UserError(f"{shown(addresses[0])} and the other shards have no sample that can be used")
            write_file(path, json.dumps(captions).encode())
    return json.loads(path.read_text())


def _load_captions(
    source: str,
    image_column: str,
    caption_columns: Sequence[str] | None,
    revision: str | None,
    split_column: str | None,
    split_names: str | None,
) -> DatasetDict:
    if source in scene_grammar.DRAWN_DATASETS:
        key = _code(scenes, scene_drawing, scene_grammar)
        return _cached(source, key, partial(scenes.scene_rows, rich=source == "rich_scenes"))
    name = Path(source).name
    options = (image_column, caption_columns, split_column, split_names)
    if image_folder.has_metadata(source):
        with open_files(source) as files:
            listed = [
                (name, Path(source, name).stat().st_mtime_ns, Path(source, name).stat().st_size) for name in files.names
            ]
            return _cached(
                name,
                (_code(image_folder), listed, options),
                lambda: image_folder.image_folder_rows(files, caption_columns, split_column, split_names),
            )
    dataset = dataset_rows.open_dataset(source, revision)
    kinds = [part.features for part in dataset.values()]
    is_table = (Path(source) / "dataset_dict.json").is_file()
    if is_table and all(kind == FEATURES for kind in kinds):
        return dataset
    # A table without hashes was saved by an earlier version: its splits are as they should be.
    share = 0.0 if is_table and all(kind == OLDER_FEATURES for kind in kinds) else DEFAULT_SHARE
    fingerprints = [f"{split}={part._fingerprint}" for split, part in dataset.items()]
    return _cached(
        name,
        (_code(dataset_rows), fingerprints, options),
        lambda: dataset_rows.dataset_rows(dataset, source, image_column, caption_columns, split_column, split_names),
        share,
    )


def _code(*readers) -> str:
    """The text of what makes a table's rows: what an older version prepared is not taken for this one's."""
    return "".join(
        Path(module.__file__).read_text(encoding="utf-8") for module in (caption_table, row_checks, images, *readers)
    )


def _cached(
    name: str, key: object, make_rows: Callable[[], Sequence[SourceRow]], share: float = DEFAULT_SHARE
) -> DatasetDict:
    digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "showtell" / f"{name}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Under `accelerate launch` several processes get here at once; one prepares, the others wait.
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            print(f"Preparing {folder.name}\n{write_caption_table(make_rows(), folder, False, share, share)}")
    return load_from_disk(folder)
