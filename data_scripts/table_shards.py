"""The files of a caption table: written a shard at a time, by several processes, and never twice.

The rows are checked and written in shards of 10,000, in the order of the source. When all are there, and with them the content hashes that
decide which image is in which split, each shard becomes the splits' file, by its new name where all of it is in one split.
"""

import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import DatasetInfo, Features
from tqdm import tqdm

from data_scripts.row_checks import CheckedRow, SourceRow, check_row
from system.errors import UserError, printable
from system.files import write_file

CAN_FORK = sys.platform == "linux"  # Windows has no fork, and macOS none that a process with threads survives
ROWS_PER_SHARD = 10_000  # what a kill can cost each process
# A table keeps some kilobytes in memory for each batch of its files. A batch of images has to fit Arrow's 2 GiB.
ROWS_PER_BATCH, BATCH_BYTES = 1000, 2**26
ROWS_AT_ONCE = 64  # that are checked together


class WrittenRow(NamedTuple):
    split: str
    image_id: str
    content_hash: str
    num_captions: int


def rows_digest(rows: Sequence[SourceRow], options: Any) -> str:
    """A digest of what a source says of its rows, images excepted."""
    digest = hashlib.sha256(repr(options).encode())
    for row in rows:
        about = (
            row.split,
            row.image_id,
            list(row.captions),
            row.place,
            row.read is None,
            row.problem,
            row.note,
            row.window,
        )
        digest.update(repr(about).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()[:16]


def write_shards(
    rows: Sequence[SourceRow], folder: Path, strict: bool, num_proc: int, schema: pa.Schema, summary
) -> list[WrittenRow]:
    """Check rows, write the usable ones into shards that are not there yet, and say of all what became of them.

    Raises:
        UserError: With `strict`, at the first row that has anything to skip.
    """
    starts = range(0, len(rows), ROWS_PER_SHARD)
    missing = [start for start in starts if not _report(folder, start).exists()]
    with tqdm(total=len(rows), unit="image", desc="Checking") as progress:
        progress.update(sum(len(rows[start : start + ROWS_PER_SHARD]) for start in starts if start not in set(missing)))
        work = _Work(rows, folder, strict, schema, threads=max(1, (os.cpu_count() or 1) // max(num_proc, 1)))
        if num_proc > 1 and len(missing) > 1 and not CAN_FORK:
            progress.write(
                f"--num_proc {num_proc} needs Linux: one process does it, with a thread for each core", sys.stderr
            )
            work.threads = os.cpu_count() or 1
        if num_proc > 1 and len(missing) > 1 and CAN_FORK:
            # By fork: readers of rows hold open files and cannot be sent to a process.
            global _work
            _work = work
            with multiprocessing.get_context("fork").Pool(min(num_proc, len(missing))) as pool:
                for number in pool.imap_unordered(_write_one, missing):
                    progress.update(number)
            _work = None
        else:
            for start in missing:
                work.write(start, progress)
    written = []
    for start in starts:
        report = json.loads(_report(folder, start).read_text(encoding="utf-8"))
        written += [WrittenRow(*row) for row in report["written"]]
        for kind, found in (("skipped", summary.skipped), ("notes", summary.notes)):
            for reason, places in report[kind].items():
                found.setdefault(reason, []).extend(places)
    return written


class _Work:
    """What it takes to write a shard."""

    def __init__(self, rows: Sequence[SourceRow], folder: Path, strict: bool, schema: pa.Schema, threads: int):
        self.rows, self.folder, self.strict, self.schema, self.threads = rows, folder, strict, schema, threads

    def write(self, start: int, progress: tqdm | None = None) -> int:
        """Write the shard that begins with a row, and then its report; give the number of rows."""
        report: dict[str, Any] = {"written": [], "skipped": {}, "notes": {}}
        captions = hashlib.sha256()
        rows = self.rows[start : start + ROWS_PER_SHARD]
        path = _shard(self.folder, start)
        partial = path.with_suffix(".tmp")
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_stream(file, self.schema) as writer:
            for batch in _batches(self._usable(rows, report, progress)):
                values = [
                    {
                        "image": {"bytes": checked.image, "path": None},
                        "image_id": checked.row.image_id,
                        "captions": checked.captions,
                        "content_hash": checked.content_hash,
                    }
                    for checked in batch
                ]
                writer.write_batch(pa.RecordBatch.from_pylist(values, schema=self.schema))
                report["written"] += [
                    (checked.row.split, checked.row.image_id, checked.content_hash, len(checked.captions))
                    for checked in batch
                ]
                captions.update(json.dumps([checked.captions for checked in batch]).encode())
        report["captions"] = captions.hexdigest()
        os.replace(partial, path)
        write_file(_report(self.folder, start), json.dumps(report).encode())
        return len(rows)

    def _usable(self, rows: Sequence[SourceRow], report: dict, progress: tqdm | None) -> Iterator[CheckedRow]:
        with ThreadPoolExecutor(self.threads) as pool:
            for start in range(0, len(rows), ROWS_AT_ONCE):
                for checked in pool.map(check_row, rows[start : start + ROWS_AT_ONCE]):
                    place = printable(checked.row.place)
                    if checked.problems and self.strict:
                        raise UserError(f"{place}: {checked.problems[0]} (--strict)")
                    for kind, found in (("skipped", checked.problems), ("notes", checked.notes)):
                        for reason in found:
                            report[kind].setdefault(reason, []).append(place)
                    if progress is not None:
                        progress.update()
                    if checked.usable:
                        yield checked


_work: _Work | None = None  # of the processes that were forked to help


def _write_one(start: int) -> int:
    return _work.write(start)


def _batches(rows: Iterator[CheckedRow]) -> Iterator[list[CheckedRow]]:
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row.image)
        if len(batch) == ROWS_PER_BATCH or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _shard(folder: Path, start: int) -> Path:
    return folder / f"rows-{start // ROWS_PER_SHARD:05}.arrow"


def _report(folder: Path, start: int) -> Path:
    return _shard(folder, start).with_suffix(".json")


# ---- Splits ---------------------------------------------------------------------------------------------------------


def move_to_splits(
    folder: Path, written: Sequence[WrittenRow], row_numbers: dict[str, list[int]], features: Features
) -> None:
    """Make of the shards in `folder` a `DatasetDict` in `folder`/whole, as `load_from_disk` reads it.

    Needs disk space for one shard more than the table. A shard is removed once its rows are where they belong.
    """
    whole = folder / "whole"
    names = list(row_numbers)
    split_of_row = np.full(len(written), -1, dtype=np.int8)
    for number, rows in enumerate(row_numbers.values()):
        split_of_row[rows] = number
        (whole / names[number]).mkdir(parents=True, exist_ok=True)
    files: dict[str, list[str]] = {name: [] for name in names}
    first, content = 0, hashlib.sha256()
    for report in sorted(folder.glob("rows-*.json")):
        about = json.loads(report.read_text(encoding="utf-8"))
        content.update(about["captions"].encode())
        size = len(about["written"])
        splits, first = split_of_row[first : first + size], first + size
        targets = {number: f"data-{report.stem.removeprefix('rows-')}.arrow" for number in np.unique(splits).tolist()}
        for number, name in targets.items():
            files[names[number]].append(name)
        source = report.with_suffix(".arrow")
        if not source.exists() or not targets:  # moved before a kill, or no row can be used
            continue
        if len(targets) == 1:
            ((number, name),) = targets.items()
            os.replace(source, whole / names[number] / name)
            continue
        for number, name in targets.items():
            _copy_rows(source, whole / names[number] / name, splits == number)
        source.unlink()
    for split, rows in row_numbers.items():
        digest = content.copy()  # says what is in the split, and not when it was made
        digest.update(repr((split, [written[row] for row in rows])).encode())
        describe_split(whole / split, files[split], digest.hexdigest()[:16], features)
    write_file(whole / "dataset_dict.json", json.dumps({"splits": names}).encode())


def _copy_rows(source: Path, target: Path, chosen: np.ndarray) -> None:
    partial, first = target.with_suffix(".tmp"), 0
    with (
        pa.memory_map(str(source)) as file,
        pa.ipc.open_stream(file) as reader,
        pa.OSFile(str(partial), "wb") as out,
        pa.ipc.new_stream(out, reader.schema) as writer,
    ):
        for batch in reader:
            rows = chosen[first : first + batch.num_rows]
            first += batch.num_rows
            if rows.any():
                writer.write_batch(batch.filter(pa.array(rows)))
    os.replace(partial, target)


def describe_split(folder: Path, files: Sequence[str], fingerprint: str, features: Features) -> None:
    """Write the two JSON files of a `Dataset` on disk beside its Arrow files."""
    DatasetInfo(features=features).write_to_directory(str(folder))
    state = {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_file(folder / "state.json", json.dumps(state, indent=1).encode())
