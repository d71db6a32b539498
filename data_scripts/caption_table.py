"""The caption table: what every source of captioned images becomes.

`write_caption_table` checks the rows of a source, leaves out what cannot be used and says so, makes missing splits from
the training images, and saves a `DatasetDict` whose rows are

    image: the image's own bytes, decoded to RGB on access
    image_id: its name, unique in the dataset
    captions: one or more sentences or paragraphs, in Unicode's composed form (NFC)
    content_hash: SHA-256 of the image's bytes, in hexadecimal
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Features, Image, List, Value

from data_scripts import table_shards
from data_scripts.row_checks import SourceRow
from data_scripts.splits import DEFAULT_SHARE, SPLITS, cut_missing_splits
from system.errors import UserError, printable
from system.files import resumable_folder

FEATURES = Features(
    {
        "image": Image(mode="RGB"),
        "image_id": Value("string"),
        "captions": List(Value("string")),
        "content_hash": Value("string"),
    }
)

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
    num_proc: int = 1,
) -> Summary:
    """Check the rows of a source and save those that can be used as a `DatasetDict` in `output_dir`, completely or not at all.

    Args:
        rows: One per image, in the order in which they are stored; and what their reader has to say beside them.
        output_dir: New or empty folder.
        strict: Whether a row that cannot be used is an error, instead of skipped.
        validation_share, test_share: Fractions of the training images that become these splits where the source has none.
        seed: Random seed of these splits.
        num_proc: Number of processes that read and check images.

    It is written in shards of 10,000 rows. After a kill, the same call writes the shards that are missing.

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
    key = table_shards.rows_digest(rows, (strict, shares, seed))
    with resumable_folder(output_dir, key) as folder:
        written = table_shards.write_shards(rows, folder, strict, num_proc, FEATURES.arrow_schema, summary)
        if not written:
            raise UserError(f"no image can be used\n{summary}")
        row_numbers = {split: [i for i, row in enumerate(written) if row.split == split] for split in SPLITS}
        content_hashes = [row.content_hash for row in written]
        row_numbers = cut_missing_splits(row_numbers, content_hashes, shares, seed)
        table_shards.move_to_splits(folder, written, row_numbers, FEATURES)
        _count(row_numbers, written, summary)
        (folder / "whole").replace(output_dir)
    return summary


def _count(row_numbers: dict[str, list[int]], written: list[table_shards.WrittenRow], summary: Summary) -> None:
    groups: dict[str, list[tuple[str, str]]] = {}
    for split, numbers in row_numbers.items():
        summary.num_images[split] = len(numbers)
        summary.num_captions[split] = sum(written[number].num_captions for number in numbers)
        for number in numbers:
            groups.setdefault(written[number].content_hash, []).append((split, written[number].image_id))
    summary.repeated_images = [group for group in groups.values() if len(group) > 1]
