#!/usr/bin/env bash
# pillow-jxl-plugin 1.3.8 with Pillow 13.0.0.
#
# Expected: save("small.jxl") writes the image as it is in memory.
# Seen: an image opened from a JPEG file and changed in place (thumbnail, paste, putpixel, ImageDraw) is written as the
# file on disk, since the plugin packs that file anew where it sees Pillow's format "JPEG" and a file name. A thumbnail
# of 64 pixels becomes a file of 300 pixels, and an area that was painted over is in it again. The warning, "Using
# JPEG reconstruction to create lossless JXL image", does not say so. resize() and crop() give a new image and are right.
# For users: data sets are shrunk by thumbnail(), and faces painted over, before they are saved. Save a copy(), or with
# lossless_jpeg=False.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pillow-jxl-plugin==1.3.8 pillow==13.0.0 numpy==2.4.6

venv/bin/python -W ignore - <<'PY'
import numpy as np
import pillow_jxl  # noqa: F401, registers the format
from PIL import Image

Image.linear_gradient("L").resize((300, 200)).convert("RGB").save("photo.jpg", quality=95)


def saved(image, **options):
    image.save("saved.jxl", **options)
    with Image.open("saved.jxl") as again:
        return again.copy()


small = Image.open("photo.jpg")
small.thumbnail((64, 64))
assert small.size == (64, 43), small.size
assert saved(small).size == (300, 200), saved(small).size
assert saved(small.copy()).size == saved(small, lossless_jpeg=False).size == (64, 43)

black = Image.open("photo.jpg")
black.paste((0, 0, 0), (0, 0, 300, 200))
assert np.asarray(black).max() == 0
seen = np.asarray(saved(black)).mean()
assert seen > 100, seen
assert np.asarray(saved(black.copy())).max() == 0
print(
    f"a JPEG's thumbnail of {small.size} saved as .jxl is {saved(small).size} again; painted black it has a mean of {seen:.0f}"
)
PY
