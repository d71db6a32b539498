"""Image files: which are read and how large they may be, and their pixels as 8-bit RGB, whatever depth they have."""

import io
import json
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

MAX_IMAGE_BYTES = 20 * 2**20  # a hundred of them, as `datasets` writes at once, fit Arrow's 2 GiB
MAX_PIXELS = 64 * 10**6  # below this Pillow, too, sees no decompression bomb when the image is read again
MAX_ASPECT_RATIO = 100  # resized by its short side, a longer image would fill the memory
# The readers that need neither another program nor a network; PostScript, say, would start Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO")
# Besides: most Pillows that decode a dataset elsewhere have no plug-in for these, or they are easily mistaken. A table has them anew.
MORE_FORMATS = ("ICNS", "TGA", "QOI", "HEIF", "JXL")
LOSSY_FORMATS = ("HEIF", "JXL")  # anew as JPEG; as PNG they would be ten times as large
JPEG_QUALITY = 95  # loses less than they have lost


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
    Image.init()
    return tuple(name for name in IMAGE_FORMATS + MORE_FORMATS if name in Image.OPEN)


def has_image_suffix(path: str | os.PathLike) -> bool:
    """Whether a name ends as those of images do that can be read."""
    return Image.registered_extensions().get(Path(path).suffix.lower()) in image_formats()


def is_image_file(path: str | os.PathLike) -> bool:
    """Whether a file is an image that can be captioned, or would be if it were whole: by its suffix, else by its first bytes."""
    if has_image_suffix(path):
        return True
    try:
        with Image.open(path, formats=image_formats()):
            return True
    except Exception:  # on other files Pillow's readers raise almost anything
        return False


@dataclass(frozen=True)
class DecodedImage:
    """An image as 8-bit RGB, upright.

    Args:
        image: The image.
        format: Of its file.
        is_gray: Whether it is gray of more than 8 bits.
        is_scaled: Whether its values are not those that Pillow makes of the file.
        is_ycbcr: Whether it is a TIFF that Pillow before 13 misreads.
        notes: What a user should know of it.
    """

    image: Image.Image
    format: str
    is_gray: bool
    is_scaled: bool
    is_ycbcr: bool
    notes: list[str]


def decode_image(content: bytes, min_side: int | None = None, window: tuple[float, float] | None = None) -> Image.Image:
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
        with Image.open(io.BytesIO(content), formats=image_formats()) as image:
            width, height = image.size
            # Size and mode are in the header: a bomb is refused before it is unpacked.
            if width * height > MAX_PIXELS:
                raise BadImage(f"image of more than {MAX_PIXELS:,} pixels")
            if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                raise BadImage(f"image more than {MAX_ASPECT_RATIO} times as long as it is wide")
            if is_misread(image):
                raise BadImage("uncompressed TIFF of a kind that Pillow misreads: save it anew, as PNG")
            is_gray, is_color_scaled = has_deep_gray(image), bool(window) and has_deep_color(image)
            notes, is_ycbcr = _notes(image, is_color_scaled), image.format == "TIFF" and image.mode == "YCbCr"
            if min_side:
                image.draft(None, (min_side, min_side))
            image.load()
            rgb = color_in_window(image, content, window) if is_color_scaled else to_rgb(image, window)
            return DecodedImage(rgb, image.format, is_gray, is_gray or is_color_scaled, is_ycbcr, notes)
    except Image.DecompressionBombError as error:
        raise BadImage(f"image of more than {MAX_PIXELS:,} pixels") from error
    except BadImage:
        raise
    except Exception as error:  # on broken bytes Pillow's readers raise almost anything
        raise BadImage(f"image does not decode{_known_format(content)}") from error


def _notes(image: Image.Image, is_color_scaled: bool) -> list[str]:
    """What of an image file that is open and not yet loaded is not used."""
    notes = []
    if has_deep_gray(image):
        notes.append("gray of more than 8 bits, scaled to 8")
    if has_deep_color(image):
        notes.append("color of 16 bits a channel, " + ("scaled to 8" if is_color_scaled else "the upper 8 used"))
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
    if decoded.format in (*IMAGE_FORMATS, "MPO") and not decoded.is_scaled and not decoded.is_ycbcr:
        return content, decoded.notes
    buffer = io.BytesIO()
    if decoded.format in LOSSY_FORMATS:
        decoded.image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return buffer.getvalue(), [*decoded.notes, f"{decoded.format}, stored as JPEG of quality {JPEG_QUALITY}"]
    image = decoded.image.convert("L") if decoded.is_gray else decoded.image
    image.save(buffer, "PNG")
    stored = [] if decoded.is_scaled else [f"{decoded.format}, stored as PNG"]
    return buffer.getvalue(), decoded.notes + stored


NOTED = ("exif", "width", "height")  # by img2dataset: of the download, and of what it wrote
# EXIF orientations in the words of exifread, which img2dataset keeps.
ORIENTATIONS = {
    "Mirrored horizontal": 2,
    "Rotated 180": 3,
    "Mirrored vertical": 4,
    "Mirrored horizontal then rotated 90 CCW": 5,
    "Rotated 90 CW": 6,
    "Mirrored horizontal then rotated 90 CW": 7,
    "Rotated 90 CCW": 8,
}


def keep_noted_orientation(content: bytes | None, about: dict[str, Any]) -> bytes | None:
    """The bytes of a JPEG with the EXIF orientation that img2dataset dropped as it wrote the photo anew; all else as it is.

    Args:
        content: The image file as img2dataset has it; None where a row has none.
        about: What it notes of the sample: the cells of `NOTED`, of which `exif` is JSON text.
    """
    try:
        orientation = ORIENTATIONS.get(json.loads(about["exif"])["Image Orientation"])
        if orientation is None or not content or not content.startswith(b"\xff\xd8"):
            return content
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
            if "exif" in image.info or image.size != (about.get("width"), about.get("height")):
                return content  # the download itself, or changed since
    except Exception:  # not img2dataset's words, or an image that its own check will name
        return content
    exif = Image.Exif()
    exif[0x0112] = orientation
    segment = exif.tobytes()
    return content[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + content[2:]


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


# ---- Pixels ---------------------------------------------------------------------------------------------------------
# What Pillow 12.3 and 13 make of more than 8 bits. `to_rgb` stands in modeling/captioning_pipeline.py, too, which travels with saved
# models and can import nothing; a test holds them equal.


def has_deep_gray(image: Image.Image) -> bool:
    """Whether an image has gray values of more than 8 bits, which Pillow and `datasets` clip to white."""
    return image.mode.startswith(("I", "F"))


def has_deep_color(image: Image.Image) -> bool:
    """Whether an image that is open and not yet loaded has 16 bits a channel of color (or gray and alpha): Pillow drops the lower 8."""
    return not has_deep_gray(image) and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def is_misread(image: Image.Image) -> bool:
    """Whether a TIFF is of the uncompressed kinds that Pillow takes for others: 16 bits a channel in separate planes, and YCbCr.

    Pillow 13 knows YCbCr where no pixels share a chroma value; by TIFF 6.0 (section 21) four do unless the file says otherwise.
    """
    tags = getattr(image, "tag_v2", {})
    is_planar_and_deep = tags.get(284) == 2 and max(tags.get(258, (8,))) > 8
    is_known = image.mode == "YCbCr" and set(tags.get(530, (2, 2))) == {1}
    return tags.get(259) == 1 and (is_planar_and_deep or (tags.get(262) == 6 and not is_known))


OTHER_BYTES = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}


def color_in_window(image: Image.Image, content: bytes, window: tuple[float, float]) -> Image.Image:
    """Color of 16 bits a channel as 8-bit RGB, upright, with the values of `window` black and white.

    Pillow unpacks one byte of each channel, the upper one; with the byte order of the raw mode turned around, the lower one.

    Args:
        image: The image.
        content: Its file's bytes.

    Raises:
        BadImage: Pillow has no such raw mode, as of gray with alpha.
    """
    lower = Image.open(io.BytesIO(content), formats=[image.format])
    lower.tile = [_with_arguments(tile, _turned_around(tile[3])) for tile in lower.tile]
    try:
        lower.load()
    except (ValueError, OSError) as error:
        raise BadImage("16 bits a channel of a kind that no window can be taken of") from error
    values = np.asarray(image)[..., :3] * 256.0 + np.asarray(lower)[..., :3]
    low, high = window
    scaled = Image.fromarray((np.clip((values - low) / (high - low), 0, 1) * 255).round().astype(np.uint8))
    scaled.getexif().update(image.getexif())  # for its orientation
    return to_rgb(scaled)


def _with_arguments(tile: tuple, arguments: str | tuple) -> tuple:
    """Pillow's tile with other arguments of its decoder: a named tuple, which Pillow 13 insists on, or a plain one in old versions."""
    return tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


def _turned_around(raw_mode: str | tuple) -> str | tuple:
    if isinstance(raw_mode, tuple):
        return (_turned_around(raw_mode[0]), *raw_mode[1:])
    mode, _, order = raw_mode.partition(";")
    return f"{mode};{OTHER_BYTES[order]}"


def to_rgb(image: Image.Image, window: tuple[float, float] | None = None) -> Image.Image:
    """An image as 8-bit RGB, with its EXIF orientation applied.

    Gray values of more than 8 bits (integers of 16 or 32 bits, floats), which Pillow clips to white, are scaled: the image's minimum
    becomes black and its maximum white, as ImageJ and matplotlib show it; or those of `window`, beyond which it is black or white.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF; the upright copy has none
    if image.getexif().get(0x0112, 1) != 1:  # else the same is a copy
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if image.mode == "I" and tags.get(258) == (32,) and tags.get(339, (1,)) == (1,):
            values = values.view(np.uint32)  # Pillow reads 32 bits without a sign as if they had one
        finite = values[np.isfinite(values)]
        low, high = window or ((float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0))
        values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
        values = np.clip((values - low) / ((high - low) or 1.0), 0, 1)
        if tags.get(262) == 0:  # WhiteIsZero, which Pillow inverts at 8 bits only
            values = 1 - values
        image = Image.fromarray((values * 255).round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
