"""The one place that checks rows: a `SourceRow` of any source, in any state, becomes a `CheckedRow`."""

import ast
import hashlib
import io
import json
import os
import re
import tokenize
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image as PillowImage

from data_scripts.archives import SeveralFiles
from data_scripts.pixels import has_deep_color, has_deep_gray, is_misread, to_rgb

MAX_CAPTION_CHARACTERS = 10_000  # the longest paragraph of Stanford's set has some 1,500
MAX_IMAGE_BYTES = 20 * 2**20  # a hundred of them, as `datasets` writes at once, fit Arrow's 2 GiB
MAX_PIXELS = 64 * 10**6  # below this Pillow, too, sees no decompression bomb when the image is read again
MAX_ASPECT_RATIO = 100  # resized by its short side, a longer image would fill the memory
# The readers that need neither another program nor a network; PostScript, say, would start Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
# Besides: most Pillows that decode a dataset elsewhere have no plug-in for these, or they are easily mistaken. A table has them anew.
MORE_FORMATS = ("ICNS", "TGA", "QOI", "HEIF", "JXL")
LOSSY_FORMATS = (
    "HEIF",
    "JXL",
)  # anew as JPEG, at a quality that loses less than they have lost; as PNG they would be ten times as large
JPEG_QUALITY = 95


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


class BadImage(ValueError):
    """An image that cannot be used; the message says why."""


@cache
def image_formats() -> tuple[str, ...]:
    """The formats that Pillow reads here, with its plug-ins for HEIC and JPEG XL where they are installed; AVIF came with 11.3."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401 (registers itself)
    PillowImage.init()
    return tuple(name for name in IMAGE_FORMATS + MORE_FORMATS if name in PillowImage.OPEN)


def is_image_file(path: str | os.PathLike) -> bool:
    """Whether a file is an image that can be captioned, or would be if it were whole: by its suffix, else by its first bytes."""
    formats = image_formats()
    if PillowImage.registered_extensions().get(Path(path).suffix.lower()) in formats:
        return True
    try:
        with PillowImage.open(path, formats=formats):
            return True
    except Exception:  # on other files Pillow's readers raise almost anything
        return False


@dataclass(frozen=True)
class DecodedImage:
    """An image as 8-bit RGB, upright; its file's format, whether its gray has more than 8 bits, and what a user should know of it."""

    image: PillowImage.Image
    format: str
    is_deep_gray: bool
    notes: list[str]


def decode_image(
    content: bytes, min_side: int | None = None, window: tuple[float, float] | None = None
) -> PillowImage.Image:
    """Decode an image as for training: 8-bit RGB, with EXIF orientation applied.

    Args:
        content: The file's bytes.
        min_side: A JPEG is decoded at 1/2, 1/4 or 1/8 of its size, in a fraction of the time, as long as its sides stay above
            this many pixels; None decodes at full size.
        window: Values that become black and white of an image with more than 8 bits, see `to_rgb`.

    Raises:
        BadImage: It cannot be used.
    """
    return decode_with_notes(content, min_side, window).image


def decode_with_notes(
    content: bytes, min_side: int | None = None, window: tuple[float, float] | None = None
) -> DecodedImage:
    """As `decode_image`, and what the file has that the image has not."""
    if not content:
        raise BadImage("image file is empty")
    if len(content) > MAX_IMAGE_BYTES:
        raise BadImage(f"image file larger than {MAX_IMAGE_BYTES // 2**20} MiB")
    try:
        with PillowImage.open(io.BytesIO(content), formats=image_formats()) as image:
            width, height = image.size
            # Size and mode are in the header: a bomb is refused before it is unpacked.
            if width * height > MAX_PIXELS:
                raise BadImage(f"image of more than {MAX_PIXELS:,} pixels")
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise BadImage(f"image more than {MAX_ASPECT_RATIO} times as long as it is wide")
            if is_misread(image):
                raise BadImage("uncompressed TIFF of a kind that Pillow misreads: save it anew, as PNG")
            is_deep_gray, notes = has_deep_gray(image), _notes(image)
            if min_side:
                image.draft(None, (min_side, min_side))
            image.load()
            return DecodedImage(to_rgb(image, window), image.format, is_deep_gray, notes)
    except PillowImage.DecompressionBombError as error:
        raise BadImage(f"image of more than {MAX_PIXELS:,} pixels") from error
    except BadImage:
        raise
    except Exception as error:  # on broken bytes Pillow's readers raise almost anything
        raise BadImage(f"image does not decode{_known_format(content)}") from error


def _notes(image: PillowImage.Image) -> list[str]:
    """What of an image file that is open is not used."""
    notes = []
    if has_deep_gray(image):
        notes.append("gray of more than 8 bits, scaled to 8")
    if has_deep_color(image):
        notes.append("color of 16 bits a channel, the upper 8 used")
    # The further images of a photo (MPO) are its depth or another exposure.
    if image.format not in ("MPO", "ICO", "ICNS") and getattr(image, "n_frames", 1) > 1:
        notes.append("image of several pages or frames, the first used")
    return notes


def table_image(content: bytes, window: tuple[float, float] | None = None) -> tuple[bytes, list[str]]:
    """The bytes of an image as a caption table has them, and notes: its own; anew where Pillow elsewhere decodes another image or none.

    Raises:
        BadImage: It cannot be used.
    """
    decoded = decode_with_notes(content, window=window)
    if decoded.format in (*IMAGE_FORMATS, "MPO") and not decoded.is_deep_gray:
        return content, decoded.notes
    buffer = io.BytesIO()
    if decoded.format in LOSSY_FORMATS:
        decoded.image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return buffer.getvalue(), [*decoded.notes, f"{decoded.format}, stored as JPEG of quality {JPEG_QUALITY}"]
    image = decoded.image.convert("L") if decoded.is_deep_gray else decoded.image
    image.save(buffer, "PNG")
    return buffer.getvalue(), decoded.notes if decoded.is_deep_gray else [
        *decoded.notes,
        f"{decoded.format}, stored as PNG",
    ]


class PlugIn(NamedTuple):
    """A package that reads a format for Pillow."""

    format: str
    package: str


PLUG_INS = {"HEIC": PlugIn("HEIF", "'showtell[heif]'"), "JPEG XL": PlugIn("JXL", "pillow-jxl-plugin")}
# First bytes, from an offset on, of what people take for images of a common kind.
UNREADABLE_FORMATS = (
    (4, rb"ftyp(hei[cxs]|hev[cx]|mif1|msf1)", "HEIC"),
    (0, rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL"),
    (0, rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<svg", "SVG"),
    (4, rb"ftypavi[fs]", "AVIF"),
)


def _known_format(content: bytes) -> str:
    for offset, pattern, name in UNREADABLE_FORMATS:
        if re.match(pattern, content[offset : offset + 1000], re.DOTALL):
            plug_in = PLUG_INS.get(name)
            if plug_in and plug_in.format not in image_formats():
                return f": it is {name}, which needs `pip install {plug_in.package}`"
            return f": it is {name}, which Pillow does not read here; convert it to JPEG or PNG"
    return ""


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
