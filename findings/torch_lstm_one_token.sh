#!/usr/bin/env bash
# torch 2.14.1, CPU with AVX2 alone: nn.LSTM (oneDNN) of one token of one sequence, in inference.
#
# Expected: as fast as the cells it consists of, since both are bound by reading the same weights once.
# Seen: it reorders its weights at each call, so that one token takes four to nine times as long as torch.lstm_cell with
# the same weights; from four sequences on, the two take the same time.
# For users: decode single sequences token by token with torch.lstm_cell, layer by layer.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 numpy

venv/bin/python - <<'PY'
import time

import torch

torch.set_num_threads(1)
lstm = torch.nn.LSTM(1024, 1024, 3, batch_first=True).eval()


def cells(inputs, hidden, cell):
    for layer, weights in enumerate(lstm.all_weights):
        inputs = torch.lstm_cell(inputs, (hidden[layer], cell[layer]), *weights)[0]
    return inputs


def milliseconds(function):
    """Of processor time, the best of 30."""
    times = []
    for _ in range(30):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return 1000 * min(times)


with torch.inference_mode():
    ratios = {}
    for batch_size in (1, 8):
        inputs, state = torch.randn(batch_size, 1, 1024), (torch.randn(3, batch_size, 1024), torch.randn(3, batch_size, 1024))
        torch.testing.assert_close(lstm(inputs, state)[0][:, 0], cells(inputs[:, 0], *state))
        whole, parts = milliseconds(lambda: lstm(inputs, state)), milliseconds(lambda: cells(inputs[:, 0], *state))
        ratios[batch_size] = whole / parts
print("one token in nn.LSTM, times that of its cells:", {size: round(ratio, 1) for size, ratio in ratios.items()})
assert ratios[1] > 2 > ratios[8], ratios
PY
