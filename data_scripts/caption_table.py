"""The caption table: what every source of captioned images becomes.

`write_caption_table` checks the rows of a source, leaves out what cannot be used and says so, makes missing splits from
the training images, and saves a `DatasetDict` whose rows are

    image: the image's own bytes, decoded to RGB on access
    image_id: its name, unique in the dataset
    captions: one or more sentences or paragraphs, in Unicode's composed form (NFC)
    content_hash: SHA-256 of the image's bytes, in hexadecimal
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from tqdm import tqdm

from data_scripts.row_checks import CheckedRow, SourceRow, check_row
from data_scripts.splits import DEFAULT_SHARE, SPLITS, cut_missing_splits
from system.errors import UserError, printable
from system.files import atomic_folder

FEATURES = Features(
    {
        "image": Image(mode="RGB"),
        "image_id": Value("string"),
        "captions": List(Value("string")),
        "content_hash": Value("string"),
    }
)

ROWS_PER_BATCH = 64
NAMES_SHOWN = 10


@dataclass
class Summary:
    """What became of a source's rows; as text, the closing summary of every command."""

    num_images: Counter = field(default_factory=Counter)
    num_captions: Counter = field(default_factory=Counter)
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason -> places
    notes: dict[str, list[str]] = field(default_factory=dict)  # what was changed or is unused -> places
    repeated_images: list[list[tuple[str, str]]] = field(default_factory=list)  # groups of (split, image_id)

    def __str__(self) -> str:
        lines = [
            f"{split}: {self.num_images[split]:,} images, {self.num_captions[split]:,} captions"
            for split in SPLITS
            if self.num_images[split]
        ]
        for reason, places in sorted(self.skipped.items()):
            lines += [f"skipped, {reason}: {len(places):,}", *_bounded(places)]
        for note, places in sorted(self.notes.items()):
            lines += [f"{note}: {len(places):,}", *_bounded(places)]
        across, within = [], []
        for group in self.repeated_images:
            names = " = ".join(f"{image_id} ({split})" for split, image_id in group)
            (across if len({split for split, _ in group}) > 1 else within).append(names)
        lines += [f"same image in two splits: {len(across):,}", *_bounded(across)]
        if within:
            lines += [f"same image twice in one split: {len(within):,}", *_bounded(within)]
        return "\n".join(lines)


def _bounded(names: list[str]) -> list[str]:
    more = [f"  ... and {len(names) - NAMES_SHOWN:,} more"] if len(names) > NAMES_SHOWN else []
    return [f"  {name}" for name in names[:NAMES_SHOWN]] + more


def check_rows(rows: Sequence[SourceRow], strict: bool, summary: Summary) -> Iterator[list[CheckedRow]]:
    """Check rows on all processors, in order, and yield the usable ones in batches; the rest goes to the summary.

    Raises:
        UserError: With `strict`, at the first row that has anything to skip.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(rows), unit="image", desc="Checking") as progress:
        for start in range(0, len(rows), ROWS_PER_BATCH):
            usable = []
            for checked in pool.map(check_row, rows[start : start + ROWS_PER_BATCH]):
                if checked.problems and strict:
                    raise UserError(f"{printable(checked.row.place)}: {checked.problems[0]} (--strict)")
                for problem in checked.problems:
                    summary.skipped.setdefault(problem, []).append(printable(checked.row.place))
                for note in checked.notes:
                    summary.notes.setdefault(note, []).append(printable(checked.row.place))
                if checked.usable:
                    usable.append(checked)
                progress.update()
            yield usable


def with_unique_ids(rows: Sequence[SourceRow], summary: Summary) -> list[SourceRow]:
    """The rows with an ID each: one that several splits have is qualified by its split, and one repeated in a split is numbered."""
    splits: dict[Any, set[str]] = defaultdict(set)
    for row in rows:
        if row.read and isinstance(row.image_id, str):
            splits[row.image_id].add(row.split)
    taken: set[str] = set()
    unique = []
    for row in rows:
        if row.read and row.image_id in splits:
            base = image_id = row.image_id if len(splits[row.image_id]) == 1 else f"{row.split}/{row.image_id}"
            copy = 1
            while image_id in taken or (image_id != row.image_id and image_id in splits):
                copy += 1
                image_id = f"{base}#{copy}"
            taken.add(image_id)
            if image_id != row.image_id:
                place = f"{printable(row.place)} is now {printable(image_id)}"
                summary.notes.setdefault("image_id not unique, changed", []).append(place)
                row = replace(row, image_id=image_id)
        unique.append(row)
    return unique


def write_caption_table(
    rows: Sequence[SourceRow],
    output_dir: str | Path,
    strict: bool = False,
    validation_share: float = DEFAULT_SHARE,
    test_share: float = DEFAULT_SHARE,
    seed: int = 0,
) -> Summary:
    """Check the rows of a source and save those that can be used as a `DatasetDict` in `output_dir`, completely or not at all.

    Args:
        rows: One per image, in the order in which they are stored; and what their reader has to say beside them.
        output_dir: New or empty folder.
        strict: Whether a row that cannot be used is an error, instead of skipped.
        validation_share, test_share: Fractions of the training images that become these splits where the source has none.
        seed: Random seed of these splits.

    Raises:
        UserError: A fraction is impossible, no row can be used, or with `strict`, one cannot; or `output_dir` is not empty.
    """
    shares = {"validation": validation_share, "test": test_share}
    if min(shares.values()) < 0 or sum(shares.values()) >= 1:
        raise UserError("--validation_share and --test_share must be 0 or more, and less than 1 together")
    summary = Summary()
    if not any(row.read or row.problem for row in rows):
        raise UserError("the source has no image")
    rows = with_unique_ids(rows, summary)
    with atomic_folder(output_dir) as (folder, scratch):
        written = _write_arrow(rows, scratch / "rows.arrow", strict, summary)
        if not written:
            raise UserError(f"no image can be used\n{summary}")
        row_numbers = {split: [i for i, (name, *_) in enumerate(written) if name == split] for split in SPLITS}
        content_hashes = [content_hash for *_, content_hash in written]
        row_numbers = cut_missing_splits(row_numbers, content_hashes, shares, seed)

        table = Dataset.from_file(str(scratch / "rows.arrow"))
        dataset = DatasetDict({split: table.select(numbers) for split, numbers in row_numbers.items()})
        dataset.save_to_disk(folder)
        _count(dataset, row_numbers, written, summary)
    return summary


def _write_arrow(rows: Sequence[SourceRow], path: Path, strict: bool, summary: Summary) -> list[tuple[str, str, str]]:
    """Write the usable rows of all splits to one Arrow file. Returns (split, image_id, content hash) of each."""
    written = []
    schema = FEATURES.arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in check_rows(rows, strict, summary):
            values = [
                {
                    "image": {"bytes": checked.image, "path": None},
                    "image_id": checked.row.image_id,
                    "captions": checked.captions,
                    "content_hash": checked.content_hash,
                }
                for checked in batch
            ]
            writer.write_batch(pa.RecordBatch.from_pylist(values, schema=schema))
            written += [(checked.row.split, checked.row.image_id, checked.content_hash) for checked in batch]
    return written


def _count(
    dataset: DatasetDict, row_numbers: dict[str, list[int]], written: list[tuple[str, str, str]], summary: Summary
) -> None:
    groups: dict[str, list[tuple[str, str]]] = {}
    for split, numbers in row_numbers.items():
        summary.num_images[split] = len(numbers)
        summary.num_captions[split] = sum(len(captions) for captions in dataset[split]["captions"])
        for number in numbers:
            _, image_id, content_hash = written[number]
            groups.setdefault(content_hash, []).append((split, image_id))
    summary.repeated_images = [group for group in groups.values() if len(group) > 1]
