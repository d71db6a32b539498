"""The one place that checks rows: a `SourceRow` of any source, in any state, becomes a `CheckedRow`."""

import ast
import hashlib
import io
import json
import tokenize
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_scripts.archives import SeveralFiles
from data_scripts.images import BadImage, table_image

MAX_CAPTION_CHARACTERS = 10_000  # the longest paragraph of Stanford's set has some 1,500


class OutsideSource(OSError):
    """A row names a file of this machine that does not belong to its source."""


@dataclass(frozen=True)
class SourceRow:
    """One image of a source, unchecked; or what a reader could not use, for the summary.

    Args:
        split: "train", "validation" or "test".
        image_id: The image's name in the source.
        captions: What the source has for captions, text or not.
        place: Where a person finds the row, for messages: file, line, image.
        read: Returns the image's bytes, or raises OSError. None if there is no image.
        problem: Why nothing of the row can be used, as far as its reader knows; an error with `--strict`.
        note: What the summary should say of this place otherwise.
        window: Values that become black and white of an image with more than 8 bits, see `to_rgb`.
    """

    split: str
    image_id: Any
    captions: Sequence[Any]
    place: str
    read: Callable[[], bytes] | None
    problem: str = ""
    note: str = ""
    window: tuple[float, float] | None = None


def problem_row(place: str, problem: str) -> SourceRow:
    """A row that its reader cannot use."""
    return SourceRow("", None, (), place, None, problem=problem)


def note_row(place: str, note: str) -> SourceRow:
    """Something that the summary should count and name."""
    return SourceRow("", None, (), place, None, note=note)


@dataclass
class CheckedRow:
    """A checked row: the `captions` that can be used, why the rest, or the image, cannot, and what was changed."""

    row: SourceRow
    image: bytes = b""
    content_hash: str = ""
    captions: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    usable: bool = False


def caption_problem(caption: Any) -> str | None:
    """Return why a caption cannot be trained on or scored, or None if it can."""
    if caption is None or caption != caption:  # a missing cell is None, or NaN, which is unlike itself
        return "empty caption"
    if not isinstance(caption, str):
        return "caption is not text"
    if not caption.strip():
        return "empty caption"
    if not _is_storable(caption):
        return "caption has a null character or broken Unicode"
    if not any(character.isalnum() for character in caption):
        return "caption without a word"
    if len(caption) > MAX_CAPTION_CHARACTERS:
        return f"caption longer than {MAX_CAPTION_CHARACTERS:,} characters"
    return None


def valid_id(value: Any) -> str | None:
    """An image's ID as text, or None where a table has none: null, NaN, blank. 7.0, what pandas makes of 7 beside a gap, is "7"."""
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def listed_captions(cell: Any) -> list[Any]:
    """The captions of a cell: its own text, or the items of a list, also of one that was written as text.

    Lists are written as JSON writes them, as Python does, or as NumPy does, without commas.
    """
    if isinstance(cell, list | tuple):
        return [caption for item in cell for caption in listed_captions(item)]
    text = cell.strip() if isinstance(cell, str) else ""
    if text[:1] + text[-1:] not in ("[]", "()"):
        return [cell]
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        items = _python_strings(text)
    if not isinstance(items, list):
        return [cell]
    items = [caption for item in items for caption in (item if isinstance(item, list) else [item])]
    return items if all(item is None or isinstance(item, str) for item in items) else [cell]


def _python_strings(text: str) -> list[str | None] | None:
    """The items of a list of strings as Python or NumPy prints it; None if it is anything else."""
    items, between = [], []
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.STRING:
                items.append(ast.literal_eval(token.string))
            elif token.string in ("None", "nan"):
                items.append(None)
            elif token.string.strip():
                between.append(token.string)
    except (tokenize.TokenError, SyntaxError, ValueError):
        return None
    return items if items and set(between[1:-1]) <= {","} and len(between) >= 2 else None


def check_row(row: SourceRow) -> CheckedRow:
    """Read and check one row. Where the image or every caption is unusable, so is the row."""
    checked = CheckedRow(row)
    if row.note:
        checked.notes.append(row.note)
    if row.problem:
        checked.problems.append(row.problem)
    if row.read is None:
        return checked
    for cell in row.captions:
        captions = listed_captions(cell)
        if isinstance(cell, str) and captions != [cell]:
            checked.notes.append("cell read as a list of captions")
        for caption in captions:
            problem = caption_problem(caption)
            if problem:
                checked.problems.append(problem)
                continue
            composed = unicodedata.normalize("NFC", caption)
            if composed != caption:
                checked.notes.append("caption brought into Unicode's composed form (NFC)")
            checked.captions.append(composed.strip())
    if not checked.captions:
        checked.problems.append("image without a usable caption")
        return checked
    if not isinstance(row.image_id, str) or not row.image_id or not _is_storable(row.image_id):
        checked.problems.append("image without a name, or with a broken one")
        return checked
    try:
        checked.image = row.read()
    except FileNotFoundError:
        checked.problems.append("no such image file")
        return checked
    except SeveralFiles:
        checked.problems.append("several image files of that name")
        return checked
    except OutsideSource:
        checked.problems.append("image file outside the dataset's own folder")
        return checked
    except OSError:
        checked.problems.append("image file cannot be read")
        return checked
    try:
        checked.image, notes = table_image(checked.image, row.window)
    except BadImage as error:
        checked.problems.append(str(error))
        return checked
    checked.notes += notes
    checked.content_hash = hashlib.sha256(checked.image).hexdigest()
    checked.usable = True
    return checked


def _is_storable(text: str) -> bool:
    # Lone surrogates, which json and file systems can bring, have no UTF-8.
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
