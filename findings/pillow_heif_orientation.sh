#!/usr/bin/env bash
# pillow-heif 1.8.1 with Pillow 12.3.0.
#
# Expected: image.save("x.heic", exif=image.getexif()), the usual way to keep a photo's EXIF data, gives a photo that is as upright as
# the JPEG it was opened from, as the same call does for AVIF, and as it is without exif=.
# Seen: without exif= the pixels are turned upright. With it they stay as they are stored, the EXIF orientation is written, but no
# rotation property (irot) with it; and readers of HEIF, pillow-heif among them, ignore EXIF's orientation. Every photo held upright
# comes out lying on its side.
# For users: image = ImageOps.exif_transpose(image) before saving, which also sets the orientation in its EXIF data.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pillow==12.3.0 pillow-heif==1.8.1

venv/bin/python - <<'PY'
import io

from PIL import Image, ImageOps
from pillow_heif import register_heif_opener

register_heif_opener()
exif = Image.Exif()
exif[0x0112] = 6  # to be turned by a quarter, as phones write it
file = io.BytesIO()
Image.new("RGB", (64, 32), "red").save(file, "JPEG", exif=exif)
photo = Image.open(file)


def upright_size(kind, **options):
    saved = io.BytesIO()
    photo.save(saved, kind, **options)
    return ImageOps.exif_transpose(Image.open(saved)).size


assert ImageOps.exif_transpose(photo).size == (32, 64)
plain, with_exif = upright_size("HEIF"), upright_size("HEIF", exif=photo.getexif())
avif = upright_size("AVIF", exif=photo.getexif())
assert plain == avif == (32, 64) and with_exif == (64, 32), (plain, avif, with_exif)
print(f"a photo of {(32, 64)} as shown: HEIC {plain} without exif=, {with_exif} with it; AVIF {avif} with it")
PY
