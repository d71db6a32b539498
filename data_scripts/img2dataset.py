"""Prepare what img2dataset has downloaded, in any of its formats (tars, files, Parquet), or other webdataset tars.

    python -m data_scripts.img2dataset laion/ --output_dir data/laion
    python -m data_scripts.img2dataset "train-{00000..00009}.tar" --output_dir data/mine

A sample is an image with a .json or .txt of the same name; its captions are `caption` in the first, else the second. What img2dataset
could not download or resize (`status` in its Parquet files is not "success") is counted. It writes photos anew without their EXIF
orientation: a JPEG gets back the one that its `exif` notes. A sample's split is that of the folders' and tars' names, `val-00000.tar`.
More than fits on the disk twice is better streamed: docs/scale.md.

Source: https://github.com/rom1504/img2dataset, img2dataset/writer.py (1.47).
"""

import argparse
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING, Any

from data_scripts.archives import SourceFiles, open_files, read_file
from data_scripts.command_line import add_archive_option, add_table_options, prepare
from data_scripts.images import MAX_IMAGE_BYTES, NOTED, keep_noted_orientation
from data_scripts.row_checks import SourceRow, note_row, problem_row
from data_scripts.splits import SPLIT_NAMES
from data_scripts.text_files import IMAGE_SUFFIXES
from system.errors import UserError, one_line_errors

if TYPE_CHECKING:
    import pyarrow as pa

# pyarrow is imported where it is used: `--help` has no use for it.

CAPTION_NAMES = ("caption", "captions", "text", "txt")  # of a sample's .json or a Parquet column
TEXT_SUFFIXES = (".txt", ".caption", ".text")


def find_stats(files: SourceFiles) -> str:
    """A file that img2dataset alone writes, `00000_stats.json`; "" if there is none."""
    return next((name for name in files.names if re.fullmatch(r"\d+_stats\.json", PurePosixPath(name).name)), "")


def img2dataset_rows(files: SourceFiles, root: Path | None) -> tuple[list[SourceRow], str]:
    """Return one row per image, and the format in words. The ID is the sample's key.

    Args:
        files: The files of a folder or a zip.
        root: The folder; None for a zip, in which only files of their own can be read.

    Raises:
        UserError: There are no samples, or they cannot be read from where they are.
    """
    tars = [name for name in files.names if name.lower().endswith(".tar")]
    parquets = [name for name in files.names if name.lower().endswith(".parquet")]
    if (tars or parquets) and root is None:
        raise UserError(f"{files.location} has tars or Parquet files inside: unpack it and give the folder")
    rows: list[SourceRow] = []
    from_parquet = False
    for name in parquets:
        found, has_images = parquet_rows(root / name, name)
        from_parquet |= has_images
        rows += found
    for name in tars:
        rows += tar_rows(root / name, name)
    kind = "in tars" if tars else "in Parquet files"
    if not tars and not from_parquet:
        rows, kind = [*file_rows(files), *rows], "in files"
    if not any(row.read or row.problem for row in rows):
        raise UserError(f"{files.location} has no sample of img2dataset or webdataset")
    title = "img2dataset's output" if find_stats(files) or from_parquet else "webdataset's layout"
    return rows, f"{title} {kind}"


def split_of(name: str) -> str:
    """The split that a word of a file's name means, or the name of a folder it is in; training where there is none."""
    path = PurePosixPath(name.lower())
    words = [*re.findall("[a-z]+", path.stem), *reversed(path.parent.parts)]
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "train")


def notes_of(texts: dict[str, bytes]) -> dict[str, Any]:
    """What the .json of a sample says, from the contents of its text files by suffix."""
    try:
        about = json.loads(texts.get(".json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def captions_of(texts: dict[str, bytes]) -> list[Any]:
    """The captions of a sample, from the contents of its text files by suffix."""
    about = notes_of(texts)
    for name in CAPTION_NAMES:
        if about.get(name):
            return about[name] if isinstance(about[name], list) else [about[name]]
    return [texts[suffix].decode("utf-8", "replace").strip() for suffix in TEXT_SUFFIXES if suffix in texts][:1]


def _upright(read: Callable[[], bytes], about: dict[str, Any]) -> Callable[[], bytes]:
    """`read`, with the orientation of what it reads, where `about` notes one."""
    noted = {name: about.get(name) for name in NOTED}  # a table of rows need not hold the captions twice
    return (lambda: keep_noted_orientation(read(), noted)) if noted["exif"] else read


# ---- Tars -----------------------------------------------------------------------------------------------------------


def tar_rows(path: Path, name: str) -> Iterator[SourceRow]:
    """The samples of an uncompressed tar, whose images are read where they lie."""
    key, texts, image = None, {}, None

    def row() -> SourceRow:
        if image is None:
            return problem_row(f"{name}, {key}", "sample without an image")
        read = _upright(partial(_read_part, path, *image), notes_of(texts))
        return SourceRow(split_of(name), key, captions_of(texts), f"{name}, {key}", read)

    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # else it keeps them all
                folder, base = os.path.split(member.name)
                stem, dot, suffix = base.partition(".")
                if member.isdir() or not stem:
                    continue
                if os.path.join(folder, stem) != key:
                    if key is not None:
                        yield row()
                    key, texts, image = os.path.join(folder, stem), {}, None
                if not member.isreg():
                    yield note_row(f"{name}, {member.name}", "link in a tar, not followed: pack the file itself")
                    continue
                suffix = dot + suffix.lower()
                if suffix in IMAGE_SUFFIXES and image is None:
                    image = member.offset_data, member.size
                elif f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES:
                    yield note_row(
                        f"{name}, {member.name}", "second image of a sample (names end at their first dot), not used"
                    )
                elif suffix in (".json", *TEXT_SUFFIXES):
                    texts[suffix] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError) as error:
        yield problem_row(name, f"tar is compressed or damaged ({error})")
    if key is not None:
        yield row()


def _read_part(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(min(size, MAX_IMAGE_BYTES + 1))
    if len(content) < min(size, MAX_IMAGE_BYTES + 1):
        raise OSError(f"{path} is truncated")
    return content


# ---- Files ----------------------------------------------------------------------------------------------------------


def file_rows(files: SourceFiles) -> Iterator[SourceRow]:
    """The samples whose image, text and json are files of their own."""
    texts_of: dict[str, dict[str, str]] = {}
    for name in files.names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in (".json", *TEXT_SUFFIXES):
            texts_of.setdefault(stem, {})[suffix.lower()] = name
    for name in files.names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in IMAGE_SUFFIXES:
            try:
                texts = {suffix: files.read(text) for suffix, text in texts_of.get(stem, {}).items()}
            except OSError as error:
                yield problem_row(name, f"its text cannot be read ({error})")
                continue
            key = PurePosixPath(stem).name if PurePosixPath(stem).name.isdigit() else name
            split = split_of(str(PurePosixPath(name).parent))
            read = _upright(partial(files.read, name), notes_of(texts))
            yield SourceRow(split, key, captions_of(texts), name, read)


# ---- Parquet --------------------------------------------------------------------------------------------------------


def parquet_rows(path: Path, name: str) -> tuple[list[SourceRow], bool]:
    """The samples of a Parquet file with images, or what its table of a tar or folder says was not downloaded; and which of the two it is.

    Raises:
        UserError: It cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_scripts.shards import holds_images

    try:
        parquet = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    with parquet:
        columns = parquet.schema_arrow.names
        image = next((field.name for field in parquet.schema_arrow if holds_images(field.type)), None)
        caption = next((column for column in CAPTION_NAMES if column in columns), None)
        wanted = [column for column in ("key", "status", caption, *NOTED) if column in columns]
        rows = []
        for group in range(parquet.num_row_groups):
            for number, cells in enumerate(parquet.read_row_group(group, wanted).to_pylist()):
                key = cells.get("key") or f"{PurePosixPath(name).stem}_{group}_{number}"
                place = f"{name}, {key}"
                if (status := cells.get("status", "success")) != "success":
                    rows.append(note_row(place, f"not downloaded by img2dataset: {status}"))
                elif image:
                    captions = cells.get(caption)
                    captions = captions if isinstance(captions, list) else [captions]
                    read = _upright(partial(_read_cell, path, image, group, number), cells)
                    rows.append(SourceRow(split_of(name), str(key), captions, place, read))
    return rows, image is not None


_one_reader = Lock()  # or each of the threads that check rows would read the same group


def _read_cell(path: Path, column: str, group: int, number: int) -> bytes:
    with _one_reader:
        cell = _images_of_group(path, column, group)[number].as_py()
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if content is None:
        raise FileNotFoundError("the row has no image")
    return content


@lru_cache(maxsize=2)
def _images_of_group(path: Path, column: str, group: int) -> "pa.ChunkedArray":
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as parquet:
        return parquet.read_row_group(group, [column])[column]


# ---- Command --------------------------------------------------------------------------------------------------------


def named_files(sources: Sequence[str]) -> SourceFiles:
    """Tars and Parquet files that are named one by one, by globs or by braces, with the tables of what was not downloaded beside them.

    Raises:
        UserError: One is not there, or is not on this machine.
    """
    from data_scripts.shards import find_shards

    paths: list[str] = []
    for source in sources:
        if "://" in source:
            raise UserError(
                f"{source}: only files of this machine become a table; stream it in training, see docs/scale.md"
            )
        paths += find_shards(source)["train"]
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise UserError(f"{missing[0]} is not a file")
    beside = [os.path.splitext(path)[0] + suffix for path in paths for suffix in (".parquet", "_stats.json")]
    names = dict.fromkeys([*paths, *filter(os.path.isfile, beside)])
    return SourceFiles(", ".join(sources), {name: partial(read_file, Path(name)) for name in names})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="folder or zip, or tars or Parquet files, also by globs and braces"
    )
    add_table_options(parser)
    add_archive_option(parser)
    arguments = parser.parse_args(argv)
    first = arguments.sources[0]
    is_folder = os.path.isdir(first)
    with one_line_errors(), ExitStack() as stack:
        if len(arguments.sources) == 1 and (is_folder or first.lower().endswith(".zip")):
            files = stack.enter_context(open_files(first, arguments.max_unpacked_gigabytes))
            rows, layout = img2dataset_rows(files, Path(files.location) if is_folder else None)
        else:
            rows, layout = img2dataset_rows(named_files(arguments.sources), Path())
        prepare(rows, arguments, layout)


if __name__ == "__main__":
    main()
