"""The caption table: what every source of captioned images becomes.

`write_caption_table` checks the rows of a source, leaves out what cannot be used and says so, cuts missing splits off
the training images, and saves a `DatasetDict` whose rows are

    image: the image's own bytes, decoded to RGB on access
    image_id: its name, unique in the dataset
    captions: one or more sentences or paragraphs
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from tqdm import tqdm

from data_scripts.row_checks import CheckedRow, SourceRow, check_row
from data_scripts.splits import DEFAULT_SHARE, SPLITS, cut_missing_splits
from system.errors import UserError, printable
from system.files import atomic_folder

FEATURES = Features({"image": Image(mode="RGB"), "image_id": Value("string"), "captions": List(Value("string"))})

ROWS_PER_BATCH = 64
NAMES_SHOWN = 10


@dataclass
class Summary:
    """What became of a source's rows. `str()` of it is the closing summary of every command."""

    num_images: Counter = field(default_factory=Counter)
    num_captions: Counter = field(default_factory=Counter)
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason -> places
    repeated_images: list[list[tuple[str, str]]] = field(default_factory=list)  # groups of (split, image_id)

    def __str__(self) -> str:
        lines = [
            f"{split}: {self.num_images[split]:,} images, {self.num_captions[split]:,} captions"
            for split in SPLITS
            if self.num_images[split]
        ]
        for reason, places in sorted(self.skipped.items()):
            lines += [f"skipped, {reason}: {len(places):,}", *_bounded(places)]
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
    """Check rows on all processors, in order, and give the usable ones in batches; the rest goes to the summary.

    Raises:
        UserError: With `strict`, at the first row that has anything to skip.
    """
    image_ids: set[str] = set()
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(rows), unit="image", desc="Checking") as progress:
        for start in range(0, len(rows), ROWS_PER_BATCH):
            usable = []
            for checked in pool.map(check_row, rows[start : start + ROWS_PER_BATCH]):
                if checked.usable and checked.row.image_id in image_ids:
                    checked.problems.append("second image of that name")
                    checked.usable = False
                if checked.problems and strict:
                    raise UserError(f"{printable(checked.row.place)}: {checked.problems[0]} (--strict)")
                for problem in checked.problems:
                    summary.skipped.setdefault(problem, []).append(printable(checked.row.place))
                if checked.usable:
                    image_ids.add(checked.row.image_id)
                    usable.append(checked)
                progress.update()
            yield usable


def write_caption_table(
    rows: Sequence[SourceRow],
    output_dir: str | Path,
    strict: bool = False,
    validation_share: float = DEFAULT_SHARE,
    test_share: float = DEFAULT_SHARE,
    seed: int = 0,
) -> Summary:
    """Check the rows of a source and save those that can be used as a `DatasetDict` in `output_dir`, whole or not at all.

    Args:
        rows: One per image, in the order in which they are to be stored.
        output_dir: Must not exist yet, or be empty.
        strict: Take a row that cannot be used for an error, instead of skipping it.
        validation_share, test_share: Of the training images, cut off where the source has no such split.
        seed: Of the cut.

    Raises:
        UserError: A share is impossible, no row can be used, or with `strict`, one cannot.
        FileExistsError: There is something in `output_dir`.
    """
    shares = {"validation": validation_share, "test": test_share}
    if min(shares.values()) < 0 or sum(shares.values()) >= 1:
        raise UserError("--validation_share and --test_share must be 0 or more, and less than 1 together")
    if not rows:
        raise UserError("the source has no image")
    summary = Summary()
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
