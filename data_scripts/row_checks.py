"""The one place that judges a row: a `SourceRow` of any source comes in, in any state, a `CheckedRow` goes out."""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image as PillowImage
from PIL import ImageOps

MAX_CAPTION_CHARACTERS = 10_000  # the longest paragraph of Stanford's set has some 1,500
MAX_IMAGE_BYTES = 20 * 2**20  # a hundred of them, as `datasets` writes at once, fit Arrow's 2 GiB
MAX_PIXELS = 64 * 10**6  # below this Pillow, too, sees no decompression bomb when the image is read again
MAX_ASPECT_RATIO = 100  # resized by its short side, a longer image would fill the memory
# The readers that need neither another program nor a network; PostScript, say, would start Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
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


def decode_image(content: bytes, least_side: int | None = None) -> PillowImage.Image:
    """An image as the caption table decodes it for the training: RGB, turned as its EXIF data says.

    Args:
        content: Of the file.
        least_side: Where a JPEG's sides stay above this many pixels, it is decoded at a half, a quarter or an eighth of its
            size, which takes a fraction of the time; None decodes at its own size.

    Raises:
        BadImage: It cannot be used.
    """
    if not content:
        raise BadImage("image file is empty")
    if len(content) > MAX_IMAGE_BYTES:
        raise BadImage(f"image file larger than {MAX_IMAGE_BYTES // 2**20} MiB")
    try:
        with PillowImage.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            width, height = image.size
            # Size and mode stand in the header: a bomb is refused before it is unpacked.
            if width * height > MAX_PIXELS:
                raise BadImage(f"image of more than {MAX_PIXELS:,} pixels")
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise BadImage(f"image more than {MAX_ASPECT_RATIO} times as long as it is wide")
            if image.mode not in EIGHT_BIT_MODES:
                raise BadImage("image has more than 8 bits a channel, which Pillow would clip to white")
            if least_side:
                image.draft(None, (least_side, least_side))
            image.load()
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
