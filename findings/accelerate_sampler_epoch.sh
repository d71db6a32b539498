#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.13.0, one process.
#
# Expected: a run that is resumed in its third epoch calls set_epoch(2) on its sampler before it iterates, as torch's
# DistributedSampler asks for, and gets the order of the third epoch.
# Seen: the prepared loader counts its own iterations from 0 and sets that number on the sampler whenever iteration
# begins, so that the resumed run reads the order of epoch 0 again. No warning. From the second epoch after resuming on,
# the order is one of an epoch that was trained already, too.
# For users: images of one epoch are seen twice and the run is not the one that was interrupted, which no loss shows.
# Call set_epoch on the loader that prepare() returns: it remembers the number.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HOME="$work/hf"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check accelerate==1.15.0 torch==2.13.0 numpy

venv/bin/python - <<'PY'
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Sampler


class Shuffled(Sampler):
    """Another order in every epoch, the same in every process."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 8

    def __iter__(self):
        return iter(torch.randperm(8, generator=torch.Generator().manual_seed(self.epoch)).tolist())


def order(where):
    """The rows of one epoch after a third epoch was asked for."""
    sampler = Shuffled()
    loader = Accelerator(cpu=True).prepare(DataLoader(list(range(8)), batch_size=4, sampler=sampler))
    (sampler if where == "sampler" else loader).set_epoch(2)
    return torch.cat(list(loader)).tolist()


orders = []
for epoch in range(3):
    sampler = Shuffled()
    sampler.set_epoch(epoch)
    orders.append(list(sampler))
assert len(set(map(tuple, orders))) == 3
assert order("loader") == orders[2]
assert order("sampler") == orders[0] != orders[2]
print("accelerate: epoch 2 set on the sampler is read in the order of epoch 0, set on the loader in its own")
PY
