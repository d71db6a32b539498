"""Read caption files (csv, jsonl, json, Parquet) whole, with errors that name file and line."""

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from data_scripts.archives import SourceFiles, name_key
from data_scripts.row_checks import SourceRow, note_row, problem_row
from system.errors import UserError

IMAGE_SUFFIXES = frozenset(
    (
        ".avif",
        ".bmp",
        ".gif",
        ".heic",
        ".heif",
        ".jfif",
        ".jp2",
        ".jpeg",
        ".jpg",
        ".jxl",
        ".png",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    )
)
SPELLED_DIFFERENTLY = "file name spelled differently (case, blanks, slashes or Unicode form)"
TOO_MANY_CELLS = "more cells than columns: a caption that holds commas needs quotes"


@dataclass
class Table:
    """A csv, jsonl or Parquet file.

    Args:
        name: File name, for messages.
        columns: Column names in order of appearance.
        rows: (line, cells by column).
        problems: Rows that cannot be read.
    """

    name: str
    columns: list[str]
    rows: list[tuple[int, dict[str, Any]]]
    problems: list[SourceRow] = field(default_factory=list)

    def column(self, name: str) -> str:
        """Return the column's name as the file spells it.

        Raises:
            UserError: There is no such column.
        """
        found = find_column(self.columns, name)
        if found is None:
            raise UserError(
                f"{self.name} has no column '{name}', only {self.columns}; "
                "columns are separated by commas and named in the first line"
            )
        return found


def find_column(columns: Iterable[str], *names: str) -> str | None:
    """Return the first of `names` that is a column, or the one column that differs from it only as `name_key` allows."""
    for name in names:
        if name in columns:
            return name
        similar = [column for column in columns if name_key(column) == name_key(name)]
        if len(similar) == 1:
            return similar[0]
    return None


def read_table(files: SourceFiles, name: str) -> Table:
    """Read a csv, jsonl or Parquet file of a source.

    Raises:
        UserError: It is damaged, or not what its name says.
    """
    if name.lower().endswith(".parquet"):
        return parse_parquet(_content(files, name), name)
    text = read_text(files, name)
    if name.lower().endswith(".csv"):
        return parse_csv(text, name)
    rows = list(json_objects(text, name))
    return Table(name, list(dict.fromkeys(column for _, row in rows for column in row)), rows)


def read_text(files: SourceFiles, name: str) -> str:
    """Return the text of a file of the source.

    Raises:
        UserError: It is missing, damaged or not UTF-8.
    """
    return decode_text(_content(files, name), name)


def first_line(files: SourceFiles, name: str) -> str:
    """The first line of a text file as far as it can be read, to tell what the file is."""
    try:
        return files.read(name)[:1000].decode("utf-8-sig", "replace").splitlines()[0]
    except (OSError, IndexError):
        return ""


def _content(files: SourceFiles, name: str) -> bytes:
    try:
        return files.read(name)
    except OSError as error:
        raise UserError(str(error)) from error


def parse_parquet(content: bytes, name: str) -> Table:
    """Read the table of a Parquet file, whose lines are its rows from 1 on.

    Raises:
        UserError: It is damaged.
    """
    import pyarrow as pa  # here, so that --help need not import it
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    return Table(name, table.column_names, list(enumerate(table.to_pylist(), start=1)))


def decode_text(content: bytes, name: str) -> str:
    """Return the text of the file `name`, with line ends as they are.

    Raises:
        UserError: It is not UTF-8. A byte order mark is accepted.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{name}, line {line}: not UTF-8 text; save the file as UTF-8") from error


def parse_csv(text: str, name: str) -> Table:
    """Parse comma-separated values with a header. A row with more cells than the header is a problem: a caption is cut there.

    Raises:
        UserError: A column is there twice, most rows have more cells than columns, or it is not valid CSV.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # so that an endless caption is judged with its row, not here
    # Strict, because a quote that is never closed would make all lines after it one caption.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows, too_long = [], []
    try:
        columns = list(reader.fieldnames or [])
        for column, times in Counter(columns).items():
            if times > 1 and column:
                raise UserError(f"{name} has the column '{column}' twice in its first line: keep one")
        for cells in reader:
            beyond = cells.pop(None, [])
            if any(cell.strip() for cell in beyond):  # commas at the end of a line lose nothing
                too_long.append(reader.line_num)
            else:
                rows.append((reader.line_num, cells))
    except csv.Error as error:
        # The row that began after the last one read; an open quote is found only at the end of the file.
        raise UserError(f"{name}, line {reader.line_num + 1}: not valid CSV ({error})") from error
    if len(too_long) > len(rows):
        raise UserError(
            f'{name}, line {too_long[0]}: {TOO_MANY_CELLS}, like "a dog, running"; {len(too_long):,} of '
            f"{len(too_long) + len(rows):,} rows are like that"
        )
    return Table(name, columns, rows, [problem_row(f"{name}, line {line}", TOO_MANY_CELLS) for line in too_long])


def json_objects(text: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, object) of a text with one JSON object per line; empty lines are skipped.

    Raises:
        UserError: A line holds anything else.
    """
    # Not splitlines(), which also splits at the Unicode line ends that JSON allows inside a string.
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            row = parse_json(content, f"{name}, line {line}")
            if not isinstance(row, dict):
                raise UserError(f"{name}, line {line}: not a JSON object")
            yield line, row


def parse_json(text: str, place: str) -> Any:
    """Parse a JSON text.

    Raises:
        UserError: It is not valid JSON; the sentence begins with `place`.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the first also for a number of thousands of digits
        raise UserError(f"{place}: not valid JSON ({error})") from error


@dataclass
class ImageRef:
    """A row of a caption file: an image by file name, with captions. Its split is None if it is not used."""

    split: str | None
    file_name: str
    captions: list[Any]
    place: str


def gather_images(files: SourceFiles, refs: Iterable[ImageRef], root: str, short_ids: bool = False) -> list[SourceRow]:
    """Make one row per image file: rows of a split that name the same file are captions of one image.

    The same caption for the same image twice is one row copied, and counts once. The summary names such rows, and the image
    files that no row names.

    Args:
        files: Where the images are.
        refs: Rows with `file_name` as a path in `files`.
        root: Folder, "" or with a slash at its end, where every image file should have a row.
        short_ids: Whether an image's ID is its path below `root`, instead of the whole path.
    """
    images: dict[tuple[str, str], SourceRow] = {}
    notes = []
    for ref in refs:
        found = files.find(ref.file_name)
        read = files.reader(ref.file_name, found)
        if ref.split is None:
            notes.append(note_row(ref.place, "row of another split, not used: see --splits"))
            continue
        name = found[0] if len(found) == 1 else ref.file_name
        if found and name != ref.file_name:
            notes.append(note_row(ref.place, SPELLED_DIFFERENTLY))
        image_id = "/".join(name.split("/")[root.count("/") :]) if short_ids else name
        row = images.setdefault((ref.split, name), SourceRow(ref.split, image_id, [], ref.place, read))
        for caption in ref.captions:
            if caption in row.captions:
                notes.append(note_row(ref.place, "row repeated, counted once"))
            else:
                row.captions.append(caption)
    return [*images.values(), *notes, *unnamed_images(files, root)]


def unnamed_images(files: SourceFiles, root: str = "") -> list[SourceRow]:
    """Notes on the image files below a folder that no row names, and links; called when all rows have their readers."""

    def is_hidden(path: PurePosixPath) -> bool:
        return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)

    paths = [PurePosixPath(name) for name in files.names if name not in files.named]
    links = [
        note_row(name, "link to a folder or out of the source, not followed: copy the files") for name in files.links
    ]
    return links + [
        note_row(str(path), "image file that no row names")
        for path in paths
        if path.suffix.lower() in IMAGE_SUFFIXES
        and name_key(str(path)).startswith(name_key(root))
        and not is_hidden(path)
    ]
