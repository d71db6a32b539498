#!/usr/bin/env bash
# Pillow 12.3.0; files read back by tifffile 2026.3.3.
#
# Expected: a TIFF that Image.save has written can be opened by Pillow, whatever mode it was saved in.
# Seen: image.convert("YCbCr").save("x.tif") writes a valid file of 3 bytes a pixel, which tifffile reads. Pillow reads uncompressed
# YCbCr as if it had 4 ("RGBX") and did not need to be converted: "image file is truncated (0 bytes not processed)". Where more bytes
# follow, such as a second page, there is no error: the pixels are garbage. With compression="tiff_lzw" all is well. `datasets` stores a
# PIL image of mode YCbCr in this way, and the row raises when it is read.
# For users: convert to RGB before saving or adding to a dataset.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pillow==12.3.0 tifffile==2026.3.3 numpy==2.4.6

venv/bin/python - <<'PY'
import io

import numpy as np
import tifffile
from PIL import Image

image = Image.radial_gradient("L").convert("YCbCr")


def outcome(**options):
    """Largest difference between what was saved and the first page that is read, or the error."""
    file = io.BytesIO()
    image.save(file, "TIFF", **options)
    opened = Image.open(file)
    try:
        return int(np.abs(np.asarray(opened.convert("RGB"), int) - np.asarray(image.convert("RGB"), int)).max())
    except OSError as error:
        return f"OSError: {error}"


file = io.BytesIO()
image.save(file, "TIFF")
assert np.array_equal(tifffile.imread(io.BytesIO(file.getvalue())), np.asarray(image))
alone, pages, compressed = outcome(), outcome(save_all=True, append_images=[image]), outcome(compression="tiff_lzw")
assert "truncated" in alone and pages > 50 and compressed == 0, (alone, pages, compressed)
print(f"a YCbCr TIFF of Pillow's own: {alone!r}; the first of two pages is off by up to {pages}; with LZW by {compressed}")
PY
