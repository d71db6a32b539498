#!/usr/bin/env bash
# Pillow 12.3.0; files written and read back by tifffile 2026.3.3.
#
# Expected: TIFF's PhotometricInterpretation 0, WhiteIsZero, means the same at every depth: the value 0 is white. Pillow reads
# such a file of 8 bits so, by inverting it, and one of 16 bits too.
# Seen: a file of 16 bits (mode "I;16"), and one of floats, comes as it is stored: a negative, without a word. The same holds for
# whoever decodes with Pillow, such as `datasets`.
# For users: X-ray and fax scanners write WhiteIsZero. Where image.mode starts with "I" or "F" and image.tag_v2.get(262) is 0,
# invert the values.
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

ramp = np.linspace(0, 1, 64).reshape(8, 8)  # stored values, 0 first: in a WhiteIsZero file the first pixel is white


def first_and_last(values):
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="miniswhite")
    assert np.array_equal(tifffile.imread(io.BytesIO(file.getvalue())), values)
    image = Image.open(file)
    assert image.tag_v2[262] == 0
    return image.getpixel((0, 0)), image.getpixel((7, 7))


eight = first_and_last((ramp * 255).astype("uint8"))
sixteen = first_and_last((ramp * 65535).astype("uint16"))
floats = first_and_last(ramp.astype("float32"))
assert eight == (255, 0)  # white is 255, as it should be
assert sixteen == (0, 65535) and floats == (0.0, 1.0)
print(f"first and last pixel of the same WhiteIsZero gradient: {eight} at 8 bits, {sixteen} at 16 bits, {floats} as floats")
PY
