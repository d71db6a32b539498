#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 24.0.0.
#
# Expected: load_from_disk maps a saved dataset, and needs next to no memory, however many rows it has.
# Seen: every process keeps two to five kilobytes for each record batch of the file, and save_to_disk makes batches of 100
# rows where there is an image column (1,000 for text alone). 300,000 rows of a dozen bytes take five and more times as
# much memory in batches of 100 as in batches of 1,000.
# For users: ten million images are 100,000 record batches, some hundred megabytes in every process and data loader
# worker before the first image is read. Set datasets.config.ARROW_RECORD_BATCH_SIZE_FOR_IMAGE_DATASETS before saving.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==24.0.0 pillow

venv/bin/python - <<'PY'
import json
import subprocess
import sys

import datasets
import pyarrow as pa
from datasets import Dataset, Features, Image, Value

features = Features({"image": Image(), "caption": Value("string")})
image = pa.array([{"bytes": b"x", "path": None}] * 300_000, Image().pa_type)
dataset = Dataset(pa.table({"image": image, "caption": pa.array(["a dog"] * 300_000)})).cast(features)
dataset.save_to_disk("as_it_is")
datasets.config.ARROW_RECORD_BATCH_SIZE_FOR_IMAGE_DATASETS = 1000
dataset.save_to_disk("larger")

measure = """
import json, sys
from datasets import load_from_disk

def memory():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

load_from_disk("tiny")
before = memory()
table = load_from_disk(sys.argv[1])
print(json.dumps([memory() - before, len(table.data.to_batches())]))
"""
Dataset.from_dict({"caption": ["a dog"]}).save_to_disk("tiny")
seen = {
    name: json.loads(subprocess.run([sys.executable, "-c", measure, name], check=True, capture_output=True).stdout)
    for name in ("as_it_is", "larger")
}
(kilobytes, batches), (fewer_kilobytes, fewer_batches) = seen["as_it_is"], seen["larger"]
assert (batches, fewer_batches) == (3000, 300), seen
assert kilobytes > 2 * batches and kilobytes > 4 * fewer_kilobytes, seen
print(f"load_from_disk of 300,000 images: {batches} record batches and over 2 kB of memory for each")
PY
