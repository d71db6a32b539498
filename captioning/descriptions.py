"""Captions as descriptions in the images' own metadata, where photo programs look for them: XMP `dc:description`.

Written by Exiv2 (python-exiv2, GPL-3.0, an extra), which edits metadata and leaves the encoded image as it is.
"""

import hashlib
import io
import sys
from pathlib import Path

from PIL import Image

from captioning.outputs import Sidecars
from captioning.sources import ImageRef
from system.errors import UserError, printable
from system.files import write_file

DESCRIPTION, IPTC_CAPTION, IPTC_CHARSET = (
    "Xmp.dc.description",
    "Iptc.Application2.Caption",
    "Iptc.Envelope.CharacterSet",
)
LANGUAGE = "x-default"
MAX_IPTC_BYTES = 2000  # by IIM 4.2, dataset 2:120


class NoPlace(ValueError):
    """A file that Exiv2 cannot write a description into; the message says why."""


def load_exiv2():
    """The package.

    Raises:
        UserError: It is not installed.
    """
    try:
        import exiv2
    except ImportError as error:
        raise UserError("--output_format xmp needs Exiv2: pip install 'showtell[xmp]'") from error
    exiv2.LogMsg.setLevel(exiv2.LogMsg.Level.mute)
    return exiv2


def _open(content: bytes):
    exiv2 = load_exiv2()
    try:
        image = exiv2.ImageFactory.open(content)
        image.readMetadata()
    except exiv2.Exiv2Error as error:
        raise NoPlace(f"its metadata cannot be read: {error.message}") from error
    if not int(image.checkMode(exiv2.MetadataId.Xmp)) & int(exiv2.AccessMode.Write):
        raise NoPlace("Exiv2 writes no XMP into files of its format")
    return image


def read_description(content: bytes) -> str:
    """The description in an image file; "" if there is none.

    Raises:
        NoPlace: There cannot be one.
    """
    data = _open(content).xmpData()
    return dict(data[DESCRIPTION].value()).get(LANGUAGE, "") if DESCRIPTION in data else ""


def with_description(content: bytes, text: str) -> bytes:
    """An image file with a description in place of what it had; those in named languages stay.

    A caption by IPTC is replaced, too, where the file has one and its character set and length allow it.

    Raises:
        NoPlace: There cannot be one, or the pixels would not be the same.
    """
    exiv2, image = load_exiv2(), _open(content)
    xmp, iptc = image.xmpData(), image.iptcData()
    texts = dict(xmp[DESCRIPTION].value()) if DESCRIPTION in xmp else {}
    xmp[DESCRIPTION] = exiv2.LangAltValue(texts | {LANGUAGE: text})
    if IPTC_CAPTION in iptc:
        is_utf8 = IPTC_CHARSET in iptc and iptc[IPTC_CHARSET].toString() == "\x1b%G"
        if (is_utf8 or text.isascii()) and len(text.encode()) <= MAX_IPTC_BYTES:
            iptc[IPTC_CAPTION] = text
    try:
        image.writeMetadata()
    except exiv2.Exiv2Error as error:
        raise NoPlace(f"its metadata cannot be written: {error.message}") from error
    written = bytes(image.data())
    if pixels_digest(written) != pixels_digest(content):
        raise NoPlace("its pixels would change")
    return written


def pixels_digest(content: bytes) -> str:
    """SHA-256 of the decoded pixels of an image's first page, its size, mode, orientation and number of pages."""
    with Image.open(io.BytesIO(content)) as image:
        about = (image.size, image.mode, image.getexif().get(0x0112), getattr(image, "n_frames", 1))
        return hashlib.sha256(repr(about).encode() + image.tobytes()).hexdigest()


class Descriptions(Sidecars):
    """The description in each image's own file, in place of a text file beside it: the rest is as of `Sidecars`."""

    def path_of(self, ref: ImageRef) -> Path:
        return Path(ref.path)

    def problem_of(self, ref: ImageRef) -> str:
        """Why an image cannot have a description; "" if it can."""
        if not ref.is_file:
            return "is in no file of its own that could have a description"
        try:
            self.read_text(self.path_of(ref))
        except (NoPlace, OSError) as error:
            return str(error)
        return ""

    def has(self, ref: ImageRef) -> bool:
        return bool(self.read_text(self.path_of(ref))) if self.existing == "skip" else super().has(ref)

    def read_text(self, path: Path) -> str:
        return read_description(path.read_bytes())

    def write_text(self, path: Path, text: str) -> None:
        try:
            content = with_description(path.read_bytes(), text.strip())
        except NoPlace as error:
            print(f"{printable(str(path))} is as it was: {error}", file=sys.stderr)
            return
        mode = path.stat().st_mode
        write_file(path, content, sync=True)
        path.chmod(mode & 0o7777)
