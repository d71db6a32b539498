#!/usr/bin/env bash
# datasets 5.2.0, load_dataset("imagefolder") of a folder with a metadata file.
#
# Expected: an image that no row of metadata.csv or metadata.jsonl names is an error, as it was when metadata files came to
# imagefolder, or a row without a caption, or at least a warning.
# Seen: the data set has the rows of the metadata file and no others. Of 5 images beside a table of 2 the other 3 are left
# out without a word, which may be a folder that has grown since, a table written while captions were still made, or names
# that were changed. The opposite, a row whose image is not there, is an error.
# For users: compare the number of rows with the number of image files; drop_metadata=True counts them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check datasets==5.2.0 pillow==12.3.0

venv/bin/python -W error::UserWarning - 2>log.txt <<'PY' || { cat log.txt; exit 1; }
import json
import logging
from pathlib import Path

from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from PIL import Image

said = []
handler = logging.Handler(logging.WARNING)
handler.emit = said.append
logging.getLogger("datasets").addHandler(handler)


def folder(name, captioned):
    """Five images and a metadata file of the format that is meant, with the numbers in `captioned`."""
    path = Path(name.replace(".", "_"))
    path.mkdir()
    for number in range(5):
        Image.new("RGB", (8, 8)).save(path / f"{number}.jpg")
    rows = [{"file_name": f"{number}.jpg", "text": f"image {number}"} for number in captioned]
    if name.endswith("csv"):
        lines = ["file_name,text", *(",".join(row.values()) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    (path / name).write_text("\n".join(lines) + "\n")
    return str(path)


seen = []
for name in ("metadata.csv", "metadata.jsonl"):
    path = folder(name, (0, 3))
    seen.append(load_dataset("imagefolder", data_dir=path, split="train")["text"][:])
    assert len(load_dataset("imagefolder", data_dir=path, split="train", drop_metadata=True)) == 5
assert seen == [["image 0", "image 3"]] * 2, seen
assert not said, [record.getMessage() for record in said]
Path("more").mkdir()
try:
    row = load_dataset("imagefolder", data_dir=folder("more/metadata.csv", (0, 9)), split="train")[1]
except (DatasetGenerationError, FileNotFoundError):
    pass
else:
    raise SystemExit(f"a row without an image is no error: {row}")
print(f"a folder of 5 images with captions for 2 is a data set of {len(seen[0])} rows, without a warning; a row without its image is an error")
PY
