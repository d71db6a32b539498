#!/usr/bin/env bash
# Pillow 12.3.0; files written and read back by tifffile 2026.3.3.
#
# Expected: an RGB TIFF of 16 bits a channel reads the same whether its channels are interleaved or in separate planes
# (PlanarConfiguration 2), as it does when it is compressed: Pillow keeps the upper 8 bits.
# Seen: uncompressed planes of 16 bits are read as if they had 8: each byte becomes a pixel, low bytes beside high ones, and the
# lower half of the image is never read. The result is colored noise, without an error or a warning.
# For users: write such files compressed or interleaved; or refuse them where tag_v2[284] is 2, tag_v2[259] is 1 and
# max(tag_v2[258]) is 16.
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

ramp = np.linspace(0, 65535, 64 * 64).astype("uint16").reshape(64, 64)
planes = np.stack([ramp, ramp[::-1], ramp.T])  # (channel, row, column)


def share_of_right_pixels(values, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="rgb", **options)
    assert np.array_equal(tifffile.imread(io.BytesIO(file.getvalue())), values)
    image = np.asarray(Image.open(file))
    return float((image == np.moveaxis(planes >> 8, 0, -1)).all(axis=-1).mean())


interleaved = share_of_right_pixels(np.moveaxis(planes, 0, -1))
compressed = share_of_right_pixels(planes, planarconfig="separate", compression="zlib")
separate = share_of_right_pixels(planes, planarconfig="separate")
assert interleaved == compressed == 1 and separate < 0.1, (interleaved, compressed, separate)
print(f"pixels that are right: interleaved {interleaved:.0%}, planes compressed {compressed:.0%}, planes uncompressed {separate:.1%}")
PY
