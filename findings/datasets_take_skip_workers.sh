#!/usr/bin/env bash
# datasets 5.2.0, torch 2.13.0.
#
# Expected: take(n) and skip(n) of a stream are two parts without a common row, as their documentation splits training from
# validation data, however they are read.
# Seen: in a DataLoader with workers each worker takes or skips its share of n from the start of its own shards. take(20) is
# the first 20 rows in one process, and with 2 workers the first 10 of either half. Validation read without workers,
# training with 2: 10 of the 20 validation rows are trained on, 10 rows are in neither part, and all counts are right.
# No error and no warning.
# For users: split by shards or files, or give both parts the same num_workers in every run.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check datasets==5.2.0 torch==2.13.0 numpy==2.4.6

venv/bin/python - 2>log.txt <<'PY' || { cat log.txt; exit 1; }
from datasets import Dataset
from torch.utils.data import DataLoader

ROWS, HELD_OUT = 100, 20
stream = Dataset.from_dict({"caption": [f"caption {number}" for number in range(ROWS)]}).to_iterable_dataset(num_shards=2)


def read(part, workers):
    return [caption for batch in DataLoader(part, batch_size=5, num_workers=workers) for caption in batch["caption"]]


validation = read(stream.take(HELD_OUT), 0)
assert validation == [f"caption {number}" for number in range(HELD_OUT)], validation
shared = {}
for workers in (0, 1, 2):
    training = read(stream.skip(HELD_OUT), workers)
    assert len(training) == len(set(training)) == ROWS - HELD_OUT, len(training)
    shared[workers] = len(set(training) & set(validation))
    assert len(set(training) | set(validation)) == ROWS - shared[workers]
    same = read(stream.take(HELD_OUT), workers)
    assert not set(training) & set(same)
assert shared == {0: 0, 1: 0, 2: 10}, shared
with open("log.txt") as file:
    assert not file.read().strip()
print(
    f"of {HELD_OUT} rows of take({HELD_OUT}), read without workers, skip({HELD_OUT}) has {shared[0]} when read with 0 or 1"
    f" workers and {shared[2]} with 2"
)
PY
