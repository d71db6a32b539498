"""Caption files that come as csv, jsonl or json: read whole, with errors that name file and line."""

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from data_scripts.archives import SourceFiles
from system.errors import UserError


def decode_text(content: bytes, name: str) -> str:
    """Return the text of the file `name`, with line ends as they are.

    Raises:
        ValueError: It is not UTF-8. A byte order mark is accepted.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{name}, line {line}: not UTF-8 text; save the file as UTF-8") from error


def read_csv(files: SourceFiles, name: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Give (line on which the row ends, row) of a comma-separated file with a header.

    Raises:
        ValueError: A column is missing or there twice, or the file is no csv.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # so that an endless caption is judged with its row, not here
    # Strict, because a quote that is never closed would make all lines after it one caption.
    reader = csv.DictReader(io.StringIO(decode_text(files.read(name), name), newline=""), strict=True)
    try:
        for column, times in Counter(reader.fieldnames or []).items():
            if times > 1 and column:
                raise UserError(f"{name} names the column '{column}' twice in its first line: keep one")
        for column in columns:
            if column not in (reader.fieldnames or []):
                raise UserError(
                    f"{name} has no column '{column}', only {list(reader.fieldnames or [])}; "
                    "columns are separated by commas and named in the first line"
                )
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        # The row that began after the last one given; an open quote is found out at the end of the file only.
        raise UserError(f"{name}, line {reader.line_num + 1}: not readable as csv ({error})") from error


def read_jsonl(files: SourceFiles, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Give (line, object) of a file with one json object a line.

    Raises:
        ValueError: A line holds anything else.
    """
    # Not splitlines(), which also cuts at the Unicode line ends that json allows inside a text.
    for line, text in enumerate(decode_text(files.read(name), name).split("\n"), start=1):
        if text.strip():
            row = parse_json(text, f"{name}, line {line}")
            if not isinstance(row, dict):
                raise UserError(f"{name}, line {line}: not a json object")
            yield line, row


def parse_json(text: str, place: str) -> Any:
    """Return what a json text holds.

    Raises:
        ValueError: It is not json; the sentence begins with `place`.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the first also for a number of thousands of digits
        raise UserError(f"{place}: not readable as json ({error})") from error


def gather_captions(rows: Iterator[tuple[str, Any, str]]) -> dict[str, tuple[list[Any], str]]:
    """Put rows of (file name, caption, place) that name the same image together: name -> (captions, first place).

    The same caption for the same image twice is one row copied, and counts once.
    """
    images: dict[str, tuple[list[Any], str]] = {}
    for file_name, caption, place in rows:
        captions, _ = images.setdefault(file_name, ([], place))
        if caption not in captions:
            captions.append(caption)
    return images
