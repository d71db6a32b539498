"""The one place that judges a row: a `SourceRow` of any source comes in, in any state, a `CheckedRow` goes out."""

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image as PillowImage
from PIL import ImageOps

MAX_CAPTION_CHARACTERS = 10_000  # the longest paragraph of Stanford's set has some 1,500
MAX_IMAGE_BYTES = 20 * 2**20  # a hundred of them, as `datasets` writes at once, fit Arrow's 2 GiB
MAX_PIXELS = 64 * 10**6  # below this Pillow, too, sees no decompression bomb when the image is read again
MAX_ASPECT_RATIO = 100  # resized by its short side, a longer image would fill the memory
# The readers that need neither another program nor a network; PostScript, say, would start Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# What captioning takes besides: not every Pillow, nor every machine that decodes a dataset, reads these.
MORE_FORMATS = ("AVIF", "JPEG2000", "ICO", "ICNS", "TGA", "QOI", "HEIF", "JXL")
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "La", "RGBa")


class OutsideSource(OSError):
    """A row names a file of this machine that is none of its source's."""


@dataclass(frozen=True)
class SourceRow:
    """One image of a source, not yet looked at.

    Args:
        split: "train", "validation" or "test".
        image_id: The image's name in the source.
        captions: What the source has for captions, text or not.
        place: Where a person finds the row, for messages: file, line, image.
        read: Gives the image's bytes, or raises OSError.
    """

    split: str
    image_id: Any
    captions: Sequence[Any]
    place: str
    read: Callable[[], bytes]


@dataclass
class CheckedRow:
    """A row that has been looked at: `captions` that can be used, and why the rest, or the image, cannot."""

    row: SourceRow
    image: bytes = b""
    content_hash: str = ""
    captions: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    usable: bool = False


def caption_problem(caption: Any) -> str | None:
    """Say why a caption cannot be trained on or scored, or None if it can."""
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
def captioned_formats() -> tuple[str, ...]:
    """The formats that Pillow reads here, with its plug-ins for HEIC and JPEG XL where they are installed."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401 (registers itself)
    PillowImage.init()
    return tuple(name for name in IMAGE_FORMATS + MORE_FORMATS if name in PillowImage.OPEN)


def is_image_file(path: str | os.PathLike) -> bool:
    """Whether a file is an image that can be captioned, or would be if it were whole: by its suffix, else by its first bytes."""
    formats = captioned_formats()
    if PillowImage.registered_extensions().get(Path(path).suffix.lower()) in formats:
        return True
    try:
        with PillowImage.open(path, formats=formats):
            return True
    except Exception:  # on other files Pillow's readers raise almost anything
        return False


def decode_image(
    content: bytes,
    least_side: int | None = None,
    to_rgb: Callable[[PillowImage.Image], PillowImage.Image] | None = None,
) -> PillowImage.Image:
    """An image as the caption table decodes it for the training: RGB, turned as its EXIF data says.

    Args:
        content: Of the file.
        least_side: Where a JPEG's sides stay above this many pixels, it is decoded at a half, a quarter or an eighth of its
            size, which takes a fraction of the time; None decodes at its own size.
        to_rgb: Converts an image of any mode, upright; `captioned_formats` are then taken. None takes only what `datasets`
            decodes alike everywhere.

    Raises:
        BadImage: It cannot be used.
    """
    if not content:
        raise BadImage("image file is empty")
    if len(content) > MAX_IMAGE_BYTES:
        raise BadImage(f"image file larger than {MAX_IMAGE_BYTES // 2**20} MiB")
    try:
        with PillowImage.open(io.BytesIO(content), formats=captioned_formats() if to_rgb else IMAGE_FORMATS) as image:
            width, height = image.size
            # Size and mode stand in the header: a bomb is refused before it is unpacked.
            if width * height > MAX_PIXELS:
                raise BadImage(f"image of more than {MAX_PIXELS:,} pixels")
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise BadImage(f"image more than {MAX_ASPECT_RATIO} times as long as it is wide")
            if image.mode not in EIGHT_BIT_MODES and to_rgb is None:
                raise BadImage("image has more than 8 bits a channel, which Pillow would clip to white")
            if least_side:
                image.draft(None, (least_side, least_side))
            image.load()
            if to_rgb:
                return to_rgb(image)
            ImageOps.exif_transpose(image, in_place=True)
            return image if image.mode == "RGB" else image.convert("RGB")
    except PillowImage.DecompressionBombError as error:
        raise BadImage(f"image of more than {MAX_PIXELS:,} pixels") from error
    except BadImage:
        raise
    except Exception as error:  # on broken bytes Pillow's readers raise almost anything
        raise BadImage("image does not decode") from error


def check_row(row: SourceRow) -> CheckedRow:
    """Read and judge one row. Where the image or every caption is unusable, so is the row."""
    checked = CheckedRow(row)
    for caption in row.captions:
        problem = caption_problem(caption)
        if problem:
            checked.problems.append(problem)
        else:
            checked.captions.append(caption.strip())
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
    except OutsideSource:
        checked.problems.append("image file outside the dataset's own folder")
        return checked
    except OSError:
        checked.problems.append("image file cannot be read")
        return checked
    try:
        decode_image(checked.image)
    except BadImage as error:
        checked.problems.append(str(error))
        return checked
    checked.content_hash = hashlib.sha256(checked.image).hexdigest()
    checked.usable = True
    return checked


def _is_storable(text: str) -> bool:
    # Lone surrogates, which json and file systems can bring, have no UTF-8.
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
