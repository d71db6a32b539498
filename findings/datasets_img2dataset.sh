#!/usr/bin/env bash
# datasets 5.2.0; files laid out as img2dataset 1.47.0 writes them (its writer.py: 00000.tar, 00000.parquet, 00000_stats.json).
#
# Expected: load_dataset(folder) of what img2dataset has downloaded in its webdataset format gives the images and captions in its tars.
# Seen: it gives the tables of URLs beside the tars, without an image, and with a row for each that could not be downloaded. As many
# files end in .parquet as in .tar and .json, and of a draw .parquet wins; the tars are passed over without a word. Streaming is the same.
# For users: load_dataset("webdataset", data_files=f"{folder}/*.tar").
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check datasets==5.2.0 pillow==12.3.0

venv/bin/python - <<'PY'
import io
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import load_dataset
from PIL import Image

os.mkdir("laion")
keys, statuses = [f"{number:09}" for number in range(4)], ["success", "success", "failed_to_download", "success"]
captions = [f"image {number}" for number in range(4)]
about = {"url": [f"https://example.org/{key}.jpg" for key in keys], "key": keys, "caption": captions, "status": statuses}
pq.write_table(pa.table(about), "laion/00000.parquet")
with open("laion/00000_stats.json", "w") as file:
    json.dump({"count": 4, "successes": 3}, file)
with tarfile.open("laion/00000.tar", "w") as archive:
    for key, caption, status in zip(keys, captions, statuses):
        if status == "success":
            image = io.BytesIO()
            Image.new("RGB", (16, 16)).save(image, "JPEG")
            for suffix, content in (("jpg", image.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

guessed = load_dataset("laion")["train"]
named = load_dataset("webdataset", data_files="laion/*.tar")["train"]
assert {"jpg", "txt"} <= set(named.column_names) and len(named) == 3
assert guessed.column_names == ["url", "key", "caption", "status"] and len(guessed) == 4
print(f"load_dataset(folder): {len(guessed)} rows of {guessed.column_names}; by name of the format: {len(named)} images")
PY
