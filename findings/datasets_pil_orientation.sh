#!/usr/bin/env bash
# datasets 5.2.0 with Pillow 12.3.0.
#
# Expected: a photo that bears an EXIF orientation is upright however it gets into an Image column, as datasets turns
# it upright when it decodes one.
# Seen: given as a file, as bytes or as an image opened from a path it is upright. Given as an image opened from bytes (a
# download, a tar member, an upload) it is encoded anew, without EXIF: the orientation is lost and the photo lies on its
# side, in memory and in every file saved from the data set. No warning.
# For users: give {"bytes": ..., "path": None} instead of the image, which also keeps the JPEG as it is, or turn it upright
# first by ImageOps.exif_transpose.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check datasets==5.2.0 pillow==12.3.0

venv/bin/python - <<'PY'
import io

from datasets import Dataset, Features, Image
from PIL import Image as pil
from PIL import ImageOps

exif = pil.Exif()
exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees to look at it
file = io.BytesIO()
pil.new("RGB", (40, 20)).save(file, "JPEG", exif=exif)
content = file.getvalue()
with open("photo.jpg", "wb") as photo:
    photo.write(content)


def size(given):
    """Width and height of the photo when it is read from the data set."""
    return Dataset.from_dict({"image": [given]}, features=Features({"image": Image()}))[0]["image"].size


opened = pil.open(io.BytesIO(content))
assert ImageOps.exif_transpose(opened).size == (20, 40)
upright = {
    "file": size("photo.jpg"),
    "bytes": size({"bytes": content, "path": None}),
    "image of a path": size(pil.open("photo.jpg")),
    "turned": size(ImageOps.exif_transpose(opened)),
}
assert set(upright.values()) == {(20, 40)}, upright
seen = size(pil.open(io.BytesIO(content)))
assert seen == (40, 20), seen
print(f"a portrait photo given as an image opened from bytes is {seen} in the data set; given in {len(upright)} other ways, (20, 40)")
PY
