#!/usr/bin/env bash
# datasets 5.2.0 with Pillow 12.3.0.
#
# Expected: ds.map(lambda row: {"width": row["image"].width}) adds a column and leaves the column "image", which it
# only reads, byte for byte as it was.
# Seen: each JPEG held as bytes is decoded and written again at Pillow's quality of 75: the file of quality 95 shrinks
# to 61 % and pixels change by up to 29 of 255 grey levels. Each further map that looks at the image does it again,
# and the error grows. A map with input_columns of other columns leaves the bytes alone.
# For users: a dataset with a "width" or "blurred" column is not the dataset one downloaded. Cast to
# Image(decode=False) before such a map, or compute the column with an iteration and add_column.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check datasets==5.2.0 pillow==12.3.0

venv/bin/python - <<'PY'
import io

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PIL

noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype="uint8")
file = io.BytesIO()
PIL.fromarray(noise).resize((64, 64), PIL.BICUBIC).save(file, "JPEG", quality=95)
rows = {"image": [{"bytes": file.getvalue(), "path": None}], "caption": ["A dog."]}
dataset = Dataset.from_dict(rows, features=Features({"image": Image(), "caption": Value("string")}))


def stored(dataset):
    """Bytes of the first image as the dataset holds them."""
    return dataset.cast_column("image", Image(decode=False))[0]["image"]["bytes"]


def error(other):
    """Largest and mean difference of the first image's pixels from the original's, in grey levels."""
    difference = np.abs(np.asarray(other[0]["image"], dtype=int) - np.asarray(dataset[0]["image"], dtype=int))
    return int(difference.max()), float(difference.mean())


def add_width(dataset):
    return dataset.map(lambda row: {"width": row["image"].width})


once = add_width(dataset)
many = once
for _ in range(4):
    many = add_width(many)
untouched = dataset.map(lambda caption: {"length": len(caption)}, input_columns="caption")
assert stored(dataset) == stored(untouched) == file.getvalue()
assert len(stored(once)) < 0.7 * len(stored(dataset))
assert error(once)[0] > 15 and error(many)[1] > 1.3 * error(once)[1], (error(once), error(many))
print(
    f"a map that reads image.width: {len(stored(dataset))} bytes become {len(stored(once))}, pixels off by up to"
    f" {error(once)[0]} (mean {error(once)[1]:.1f}); after five such maps mean {error(many)[1]:.1f}"
)
PY
