#!/usr/bin/env bash
# torch 2.14.1: torch.nn.functional.linear_cross_entropy, under torch.autocast on a CPU.
#
# Expected: LinearCrossEntropyOptions turns on chunks, which save the memory of the logits; the loss is the one without.
# Seen: under autocast the loss without options is float32, as that of cross_entropy, which autocast always computes in
# float32. With options the operation stands outside autocast: hidden states that autocast made bfloat16 give a bfloat16
# loss, float16 ones a float16 loss. A mean of 7.33 nats becomes 7.34375, in steps of 1/32, and a float16 sum over 12,000
# tokens is infinite where the float32 one is 88,000. No warning. Float32 hidden states are multiplied in float32, not in
# the type of autocast.
# For users: curves, early stopping and the choice of the best checkpoint see a loss with three digits, and a summed
# float16 loss overflows above 65,504 nats: sum parts in float32, and cast hidden states and weights oneself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.3.5

venv/bin/python - <<'PY'
import torch
from torch.nn import functional as F

torch.manual_seed(0)
weight = torch.randn(1000, 64) / 8
chunks = torch.nn.LinearCrossEntropyOptions()


def losses(tokens: int, dtype: torch.dtype, reduction: str) -> list[torch.Tensor]:
    """By cross_entropy, by linear_cross_entropy, and by it in chunks."""
    hidden, labels = torch.randn(tokens, 64, dtype=dtype), torch.randint(0, 1000, (tokens,))
    with torch.autocast("cpu", dtype=dtype):
        plain = F.cross_entropy(F.linear(hidden, weight), labels, reduction=reduction)
        fused = [
            F.linear_cross_entropy(hidden, weight, labels, reduction=reduction, options=options)
            for options in (None, chunks)
        ]
    return [plain, *fused]


plain, reference, chunked = losses(256, torch.bfloat16, "mean")
assert plain.dtype == reference.dtype == torch.float32 and torch.equal(plain, reference)
assert chunked.dtype == torch.bfloat16 and float(chunked) * 32 % 1 == 0
plain, reference, chunked = losses(12_000, torch.float16, "sum")
assert reference.dtype == torch.float32 and 80_000 < reference.item() < 100_000
assert chunked.dtype == torch.float16 and chunked.isinf()
print("in chunks, linear_cross_entropy under autocast returns bfloat16 and float16 losses; a float16 sum is infinite")
PY
