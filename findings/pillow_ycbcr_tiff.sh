#!/usr/bin/env bash
# Pillow 12.3.0 and 13.0.0; files read back by tifffile 2026.3.3.
#
# Expected: a TIFF that Image.save has written can be opened by Pillow, whatever mode it was saved in.
# Seen: image.convert("YCbCr").save("x.tif") writes a valid file of 3 bytes a pixel, which tifffile reads. Pillow reads uncompressed
# YCbCr as if it had 4 ("RGBX") and did not need to be converted: "image file is truncated (0 bytes not processed)". Where more bytes
# follow, such as a second page, there is no error: the pixels are garbage. With compression="tiff_lzw" all is well. `datasets` stores a
# PIL image of mode YCbCr in this way, and the row raises when it is read.
# Pillow 13.0.0 reads these, in mode YCbCr. It does not look at tag 530, YCbCrSubSampling, by whose default, (2, 2), four pixels share a
# chroma value: such files still fail, or are garbage where more bytes follow.
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
print(f"Pillow 12.3.0: a YCbCr TIFF of Pillow's own: {alone!r}; the first of two pages is off by up to {pages}; with LZW by {compressed}")
PY

venv/bin/pip install --quiet --disable-pip-version-check pillow==13.0.0
venv/bin/python - <<'PY'
import io
import struct

import numpy as np
from PIL import Image

image = Image.radial_gradient("L").convert("YCbCr")
values = np.asarray(image)


def tiff(data: bytes, subsampling: int) -> bytes:
    """256 x 256 pixels of uncompressed YCbCr, by TIFF 6.0, and as many bytes behind them."""
    rows = [(256, 3, 1, 256), (257, 3, 1, 256), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 6), (273, 3, 1, 140)]
    rows += [(277, 3, 1, 3), (278, 3, 1, 256), (279, 4, 1, len(data)), (530, 3, 2, subsampling << 16 | subsampling)]
    directory = b"".join(struct.pack("<HHII", *row) for row in rows) + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<IH", 8, len(rows)) + directory + struct.pack("<HHH", 8, 8, 8) + data + bytes(len(data))


def difference(content: bytes) -> int:
    opened = Image.open(io.BytesIO(content))
    return int(np.abs(np.asarray(opened.convert("RGB"), int) - np.asarray(image.convert("RGB"), int)).max())


blocks = values.reshape(128, 2, 128, 2, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 4, 3)  # four pixels, in the order of the file
shared = np.concatenate([blocks[..., 0], blocks[:, 0, 1:]], axis=1).astype(np.uint8)
each, four = difference(tiff(values.tobytes(), 1)), difference(tiff(shared.tobytes(), 2))
assert each == 0 and four > 50, (each, four)
print(f"Pillow 13.0.0: with a chroma value for each pixel off by {each}, with one for four by up to {four}")
PY
