"""Read caption files (csv, jsonl, json) whole, with errors that name file and line."""

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from data_scripts.archives import SourceFiles
from system.errors import UserError


def read_text(files: SourceFiles, name: str) -> str:
    """Return the text of a file of the source.

    Raises:
        UserError: It is missing, damaged or not UTF-8.
    """
    try:
        content = files.read(name)
    except OSError as error:
        raise UserError(str(error)) from error
    return decode_text(content, name)


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


def read_csv(files: SourceFiles, name: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Give (line on which the row ends, row) of a comma-separated file with a header.

    Raises:
        UserError: A column is missing or there twice, or the file is no csv.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # so that an endless caption is judged with its row, not here
    # Strict, because a quote that is never closed would make all lines after it one caption.
    reader = csv.DictReader(io.StringIO(read_text(files, name), newline=""), strict=True)
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
        raise UserError(f"{name}, line {reader.line_num + 1}: not valid CSV ({error})") from error


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
