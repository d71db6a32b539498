"""The images of a job, one after the other: files, folders, URLs, webdataset tars and parquet files.

Nothing here grows with the number of images but what one folder's listing takes.
"""

import json
import os
import sys
import tarfile
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from data_scripts.images import (
    MAX_IMAGE_BYTES,
    NOTED,
    BadImage,
    decode_with_notes,
    has_image_suffix,
    is_image_file,
    keep_noted_orientation,
)
from data_scripts.row_checks import valid_id
from data_scripts.sidecars import SIDECAR_SUFFIXES
from data_scripts.text_files import IMAGE_SUFFIXES
from system.errors import UserError, printable

NUM_NAMED = 5  # of the files of a folder that are passed over
MAX_IMAGE_SECONDS = 60.0  # that one may take to come from the network
MAX_NOTE_BYTES = 1 << 20  # of a sample's .json
ROWS_AT_ONCE = 64  # of a parquet file
PLUG_INS = {".heic": "'showtell[heif]'", ".heif": "'showtell[heif]'", ".jxl": "pillow-jxl-plugin"}


@dataclass(frozen=True)
class ImageRef:
    """An image by name, not yet read.

    Args:
        name: What the output calls it: a file's path, a URL, TAR/MEMBER, or FILE.parquet#ROW.
        path: File or URL that holds it.
        relative: Its path below the folder, tar or parquet file that the user gave.
        offset, size: Where a tar holds it, in bytes; None for a whole file.
        content: Bytes of a parquet file's row.
        problem: Why it cannot be used, as far as the listing shows.
        noted: Where its tar holds the .json of its sample, offset and size.
    """

    name: str
    path: str
    relative: str
    offset: int | None = None
    size: int | None = None
    content: bytes | None = None
    problem: str = ""
    noted: tuple[int, int] | None = None

    def read(self) -> bytes:
        """The image's bytes; of one that is too large, as many as show it. Photos of img2dataset get their orientation back."""
        if self.content is not None:
            return self.content
        if "://" in self.path:
            return _download(self.path)
        content = _read_part(self.path, self.offset, self.size, MAX_IMAGE_BYTES + 1)
        with suppress(OSError, ValueError, RecursionError):  # no .json, or none of img2dataset
            return keep_noted_orientation(content, json.loads(self._note()))
        return content

    def _note(self) -> bytes:
        """The .json of the image's sample: of the tar, or the file beside it."""
        if self.offset is None:
            return _read_part(os.path.splitext(self.path)[0] + ".json", None, None, MAX_NOTE_BYTES)
        return _read_part(self.path, *self.noted, MAX_NOTE_BYTES) if self.noted else b""

    @property
    def is_file(self) -> bool:
        """Whether it is a file of its own on this machine."""
        return self.offset is None and self.content is None and "://" not in self.path


def _read_part(path: str, offset: int | None, size: int | None, limit: int) -> bytes:
    """So many bytes of a file from a place on, all of it where None, and no more than a limit."""
    with open(path, "rb") as file:
        file.seek(offset or 0)
        return file.read(limit if size is None else min(size, limit))


def _download(url: str) -> bytes:
    from system.downloads import download

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        download(url, path, MAX_IMAGE_BYTES, MAX_IMAGE_SECONDS)
        return path.read_bytes()


class ImageDecoder:
    """References to images: {"ref", "image", "notes"}, or {"ref", "problem"} where one cannot be used; for a `DataLoader`.

    Args:
        min_side: See `decode_image`.
        keep_content: Whether an item has the file's bytes, too.
        window: See `decode_image`.
    """

    def __init__(self, min_side: int | None, keep_content: bool = False, window: Sequence[float] | None = None):
        self.min_side = min_side
        self.keep_content = keep_content
        self.window = window

    def __getitem__(self, ref: ImageRef) -> dict:
        if ref.problem:
            return {"ref": ref, "problem": ref.problem}
        try:
            content = ref.read()
            decoded = decode_with_notes(content, self.min_side, self.window)
            item = {"ref": ref, "image": decoded.image, "notes": decoded.notes}
        except BadImage as error:
            return {"ref": ref, "problem": str(error)}
        except (OSError, ValueError) as error:
            return {"ref": ref, "problem": f"cannot be read: {error}"}
        return item | {"content": content} if self.keep_content else item


@dataclass
class ImageSources:
    """What the user named: image files, folders, http(s) URLs, tars, parquet files.

    Args:
        names: As on the command line.
        image_column: Of parquet files; their only column of bytes or images where None.
        id_column: Of parquet files: what to call a row in place of FILE.parquet#ROW.
        ignored: Suffixes of files that are known to stand beside images, and are not worth a word.
    """

    names: Sequence[str]
    image_column: str | None = None
    id_column: str | None = None
    ignored: Sequence[str] = field(default=())
    num_parquet: int = field(default=0, init=False)
    id_hashes: array = field(default_factory=lambda: array("q"), init=False, repr=False)  # of all rows, once counted

    def __iter__(self) -> Iterator[ImageRef]:
        """The images in the order given, a folder's in the order of their names."""
        several = len(self.names) > 1
        for source in self.names:
            top = os.path.basename(os.path.normpath(source)) if several else ""
            if os.path.isdir(source):
                for path in walk(source):
                    inside = os.path.join(top, os.path.relpath(path, source))
                    yield from self._refs(path, inside, in_folder=True)
            else:
                yield from self._refs(source, source.partition("://")[2] or os.path.basename(source))

    def _refs(self, path: str, relative: str, in_folder: bool = False) -> Iterator[ImageRef]:
        if path.endswith(".tar"):
            yield from tar_refs(path, relative if in_folder or len(self.names) > 1 else "")
        elif path.endswith(".parquet"):
            if not in_folder or self._column(path, required=False):
                yield from self._parquet_refs(path, relative)
        elif not in_folder or (is_image_file(path) and not os.path.isdir(path)):
            yield ImageRef(path, path, relative)

    def _column(self, path: str, required: bool = True) -> str | None:
        """The column of a parquet file that holds images.

        Raises:
            UserError: There is none, or which one cannot be known.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        from data_scripts.shards import holds_images

        try:
            schema = pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{printable(path)} cannot be read as parquet: {str(error).splitlines()[0]}") from error
        found = [column.name for column in schema if holds_images(column.type)]
        if self.image_column:
            found = [name for name in schema.names if name == self.image_column]
        if len(found) == 1:
            return found[0]
        if not required:
            return None
        columns = ", ".join(map(printable, schema.names))
        raise UserError(f"{printable(path)}: name the column of the images by --image_column; it has {columns}")

    def _parquet_refs(self, path: str, relative: str) -> Iterator[ImageRef]:
        import pyarrow.parquet as pq

        column = self._column(path)
        columns = [column, *([self.id_column] if self.id_column else [])]
        with pq.ParquetFile(path) as file:
            if missing := set(columns) - set(file.schema_arrow.names):
                raise UserError(f"{printable(path)} has no column {missing.pop()}")
            columns += [name for name in NOTED if name in file.schema_arrow.names and name not in columns]
            row = 0
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=columns):
                for cells in batch.to_pylist():
                    cell = cells[column]
                    content = cell.get("bytes") if isinstance(cell, dict) else cell
                    content = keep_noted_orientation(content, cells)
                    image_id = valid_id(cells[self.id_column]) if self.id_column else None
                    name = f"{path}#{row}" if image_id is None else image_id
                    problem = "" if content else "the row has no image bytes"
                    yield ImageRef(name, path, f"{relative}/{row}", content=content or b"", problem=problem)
                    row += 1

    def count(self, quiet: bool = False) -> int:
        """The number of images, read or not; files of a folder and samples of tars that have none are counted and named on stderr.

        Raises:
            UserError: A source has no images, a tar or parquet file cannot be read, or an ID is not unique.
        """
        self.id_hashes = array("q")
        self.num_parquet = 0
        number = sum(self._count_source(source, quiet) for source in self.names)
        for option in ("image_column", "id_column"):
            if getattr(self, option) and not self.num_parquet:
                raise UserError(f"--{option} has no effect: there is no parquet file with images")
        if self.id_column:
            self._check_ids(quiet)
        return number

    def _check_ids(self, quiet: bool) -> None:
        """Refuse IDs that are not unique, by which a resumed run would take one image for another; count rows without one."""
        import numpy as np

        hashes = self.id_hashes
        num_missing = hashes.count(hash(None))
        if num_missing and not quiet:
            print(
                f"{num_missing:,} of {len(hashes):,} rows have no {self.id_column}: named FILE.parquet#ROW",
                file=sys.stderr,
            )
        if num_repeated := len(hashes) - len(np.unique(np.asarray(hashes))) - max(num_missing - 1, 0):
            raise UserError(
                f"--id_column {self.id_column}: {num_repeated:,} of {len(hashes):,} rows have the ID of a row before, in the same "
                "file or another: leave it out, and rows are named FILE.parquet#ROW"
            )

    def _count_source(self, source: str, quiet: bool) -> int:
        files = PassedOver(source, "files are no images that can be read here")
        samples = PassedOver(source, "samples of tars have no image that can be read here")
        if os.path.isdir(source):
            number = sum(self._count_in_folder(path, files, samples) for path in walk(source))
        else:
            number = self._count(source, samples)
        for passed_over in (files, samples):
            if passed_over.number and not quiet:
                print(passed_over.summary(), file=sys.stderr)
        if not number:
            raise UserError(f"{printable(source)} has no images")
        return number

    def _count_in_folder(self, path: str, files: "PassedOver", samples: "PassedOver") -> int:
        is_shard = path.endswith(".tar") or (path.endswith(".parquet") and self._column(path, required=False))
        if is_shard or (is_image_file(path) and not os.path.isdir(path)):
            files.num_used += 1
            return self._count(path, samples)
        of_ours = Path(path).suffix.lower() in self.ignored or os.path.basename(path).startswith(".showtell")
        if not of_ours and not has_image_beside(path):
            files.add(path)
        return 0

    def _count(self, path: str, samples: "PassedOver") -> int:
        if path.endswith(".tar"):
            return sum(1 for _ in tar_refs(path, samples=samples))
        if not path.endswith(".parquet"):
            return 1
        import pyarrow.parquet as pq

        self.num_parquet += 1
        self._column(path)
        if self.id_column and self.id_column in pq.read_schema(path).names:
            ids = pq.read_table(path, columns=[self.id_column])[self.id_column]
            self.id_hashes.extend(hash(valid_id(value)) for chunk in ids.chunks for value in chunk.to_pylist())
        return pq.read_metadata(path).num_rows


def has_image_beside(path: str) -> bool:
    """Whether a file is the sidecar of an image in its folder, as `python -m data_scripts` reads it."""
    stem, suffix = os.path.splitext(path)
    return suffix.lower() in SIDECAR_SUFFIXES and any(os.path.exists(stem + image) for image in IMAGE_SUFFIXES)


class PassedOver:
    """What of a source is not used, for one line about it.

    Args:
        source: As the user named it.
        what: Noun and reason, in the plural.
    """

    def __init__(self, source: str, what: str):
        self.source, self.what = source, what
        self.num_used = self.number = 0
        self.named: list[str] = []
        self.plug_ins: set[str] = set()

    def add(self, path: str) -> None:
        self.number += 1
        if len(self.named) < NUM_NAMED:
            link = " (a link to a folder, not followed)" if os.path.isdir(path) else ""
            self.named.append(printable(os.path.relpath(path, self.source)) + link)
        if (suffix := Path(path).suffix.lower()) in PLUG_INS:
            self.plug_ins.add(f"{suffix} needs `pip install {PLUG_INS[suffix]}`")

    def summary(self) -> str:
        more = f" and {self.number - NUM_NAMED:,} more" if self.number > NUM_NAMED else ""
        install = f" ({'; '.join(sorted(self.plug_ins))})" if self.plug_ins else ""
        return (
            f"{printable(self.source)}: {self.number:,} of {self.num_used + self.number:,} {self.what}: "
            f"{', '.join(self.named)}{more}{install}"
        )


def without_repeats(names: Sequence[str], quiet: bool = False) -> list[str]:
    """The names, each once, without those that lie below a folder among them; how many were left out is said on stderr."""
    paths = {name: name if "://" in name else os.path.realpath(name) for name in names}
    folders = {path for path in paths.values() if os.path.isdir(path)}
    kept: dict[str, str] = {}
    for name in names:
        if not any(str(parent) in folders for parent in Path(paths[name]).parents):
            kept.setdefault(paths[name], name)
    left_out = len(names) - len(kept)
    if left_out and not quiet:
        print(
            f"{left_out:,} of {len(names):,} inputs are named twice, or lie in a folder that is: captioned once",
            file=sys.stderr,
        )
    return list(kept.values())


def one_for_each_sidecar(
    refs: Iterable[ImageRef], path_of: Callable[[ImageRef], Path], beside: bool
) -> Iterator[ImageRef]:
    """The references, with a problem where an image's sidecar is that of another in its folder, as of x.png beside x.jpg.

    Args:
        path_of: An image's sidecar.
        beside: Whether sidecars stand beside their images, and images in tars have no place for one.
    """
    stems: dict[str, dict[str, str]] = {}  # image by sidecar, of the folder at hand and those above it
    for ref in refs:
        if beside and not ref.is_file:
            yield replace(ref, problem="has no place for a sidecar beside it: give --output FOLDER")
            continue
        folder, sidecar = os.path.split(path_of(ref))
        if folder not in stems:
            stems = {known: names for known, names in stems.items() if folder.startswith(os.path.join(known, ""))}
        first = stems.setdefault(folder, {}).setdefault(sidecar, ref.name)
        problem = f"its sidecar would be that of {printable(first)}"
        yield ref if first == ref.name else replace(ref, problem=problem)


def walk(folder: str) -> Iterator[str]:
    """The files below a folder in the order of their names, and the links to folders or to nothing, which are not followed."""
    with os.scandir(folder) as entries:
        names = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    for name, is_folder in names:
        path = os.path.join(folder, name)
        if is_folder:
            yield from walk(path)
        elif os.path.isfile(path) or os.path.islink(path):
            yield path


def tar_refs(path: str, relative: str = "", samples: PassedOver | None = None) -> Iterator[ImageRef]:
    """The images of a tar as webdataset has them, by the suffix of their names.

    Args:
        relative: What stands before the names below the user's folder.
        samples: Counts the samples, and those without an image.

    Raises:
        UserError: It is no tar that can be read without unpacking it.
    """
    for _, sample in groupby(tar_members(path), sample_key):
        first = ""
        has_image = False
        for stem, group in groupby(sample, lambda member: os.path.splitext(member.name)[0]):
            members = list(group)
            first = first or members[0].name
            files = [member for member in members if member.isfile()]
            noted = next(((file.offset_data, file.size) for file in files if file.name == stem + ".json"), None)
            for file in files:
                if has_image_suffix(file.name):
                    has_image = True
                    inside = os.path.join(relative, *safe_parts(file.name))
                    yield ImageRef(f"{path}/{file.name}", path, inside, file.offset_data, file.size, noted=noted)
        if samples and has_image:
            samples.num_used += 1
        elif samples:
            samples.add(f"{path}/{first}")


def sample_key(member: tarfile.TarInfo) -> tuple[str, str]:
    """What the members of a webdataset sample have in common: folder, and name up to its first dot."""
    folder, base = os.path.split(member.name)
    return folder, base.partition(".")[0]


def tar_members(path: str) -> Iterator[tarfile.TarInfo]:
    """The members of a tar but its folders.

    Raises:
        UserError: It is no tar that can be read without unpacking it.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # else it keeps the header of every member
                if not member.isdir():
                    yield member
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{printable(path)} cannot be read as an uncompressed tar: {error}") from error


def safe_parts(name: str) -> list[str]:
    """The parts of a name that cannot lead out of the folder it is put into."""
    return [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
