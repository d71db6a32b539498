#!/usr/bin/env bash
# datasets 5.2.0 with Pillow 12.3.0.
#
# Expected: an image given as a NumPy array of 16 bits a channel is stored with the upper 8 of them where Pillow has no mode of
# 16-bit color, or is refused. A gray array of 16 bits is stored as it is.
# Seen: color of 16 bits is cast by astype(uint8), the value modulo 256: 256 and 512 become 0, and a smooth gradient becomes 256
# sawteeth. The warning, "Downcasting array dtype uint16 to uint8 to be compatible with 'Pillow'", does not say so. int64, which NumPy
# makes of a list, wraps in the same way, where its values are above 255.
# For users: divide by 257 yourself, (array / 257).round().astype("uint8").
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check datasets==5.2.0 pillow==12.3.0

venv/bin/python - <<'PY'
import warnings

import numpy as np
from datasets import Dataset, Features, Image

warnings.simplefilter("ignore")
ramp = np.linspace(0, 65535, 1024).astype("uint16").reshape(1, 1024)
color = np.repeat(ramp[..., None], 3, axis=-1)
stored = Dataset.from_dict({"image": [color]}, features=Features({"image": Image()}))[0]["image"]
gray = Dataset.from_dict({"image": [ramp]}, features=Features({"image": Image()}))[0]["image"]
values = np.asarray(stored)[0, :, 0].astype(int)
assert np.array_equal(np.asarray(gray), ramp)
assert np.array_equal(values, ramp[0] % 256)
falls = int((np.diff(values) < 0).sum())
print(f"a gradient from 0 to 65535 in 16-bit color is stored modulo 256: it falls {falls} times; in gray it is kept")
PY
