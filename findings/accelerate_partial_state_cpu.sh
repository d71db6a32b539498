#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.14.1, on a machine without a GPU (or with its GPUs hidden, as here).
#
# Expected: two processes of `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2` know of one another, by
# whichever class of accelerate they ask: the launcher's way to two processes on CPUs.
# Seen: `PartialState()` says in both that it is process 0 of 1 and starts no process group; `Accelerator()` in the same script says 0
# and 1 of 2. `PartialState(cpu=True)` says so too. No warning.
# For users: a script that needs no model prepared and asks `PartialState()` alone for its share, to encode or to caption files, has
# every process do all of the work, and all write the same files. Create an Accelerator, or pass `cpu=` yourself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=""
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 accelerate==1.15.0 numpy==2.4.6

cat > ask.py <<'PY'
import sys

from accelerate import Accelerator, PartialState

state = {"PartialState()": PartialState, "PartialState(cpu=True)": lambda: PartialState(cpu=True), "Accelerator()": Accelerator}
found = state[sys.argv[1]]()
print(f"{sys.argv[1]} {found.process_index} of {found.num_processes}", flush=True)
PY
ask() {
  ACCELERATE_USE_CPU=true venv/bin/accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no \
    --dynamo_backend no --main_process_port 0 ask.py "$1" 2>/dev/null | sort | tr '\n' ';'
}
found="$(ask 'PartialState()') $(ask 'PartialState(cpu=True)') $(ask 'Accelerator()')"
expected="PartialState() 0 of 1;PartialState() 0 of 1; PartialState(cpu=True) 0 of 2;PartialState(cpu=True) 1 of 2;"
expected+=" Accelerator() 0 of 2;Accelerator() 1 of 2;"
[ "$found" = "$expected" ] || { echo "changed: $found"; exit 1; }
echo "two processes on CPUs, accelerate 1.15.0: PartialState() is process 0 of 1 in both, Accelerator() 0 and 1 of 2"
