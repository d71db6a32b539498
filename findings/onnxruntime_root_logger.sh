#!/usr/bin/env bash
# onnxruntime 1.32.0 (onnx 1.23.2, onnx-ir 1.1.0).
#
# Expected: importing a module of a library leaves the logging of the program to the program.
# Seen: `import onnxruntime.quantization.matmul_nbits_quantizer`, the tool for weights of four bits, calls logging.basicConfig
# at level INFO: the root logger gets a handler on stderr, and the INFO lines of every library of the process, httpx's for
# each request to the Hub among them, are printed from then on. A basicConfig of the program's own that comes after it does
# nothing. onnxruntime itself and quantize_dynamic leave the root logger as it is.
# For users: call logging.basicConfig before the import, or with force=True after it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 onnx-ir==1.1.0 numpy==2.4.6

venv/bin/python - 2>log.txt <<'PY' || { cat log.txt; exit 1; }
import logging

other = logging.getLogger("httpx")

from onnxruntime.quantization import quantize_dynamic  # noqa: E402, F401

other.info("a request, before")
assert not logging.root.handlers and logging.root.level == logging.WARNING

import onnxruntime.quantization.matmul_nbits_quantizer  # noqa: E402, F401

other.info("a request, after")
logging.basicConfig(level=logging.ERROR)
other.info("a request, after the program's own basicConfig")
with open("log.txt") as file:
    seen = [line.rpartition(" - ")[2].strip() for line in file if "a request" in line]
assert seen == ["a request, after", "a request, after the program's own basicConfig"], seen
print(f"INFO lines of httpx on stderr: 0 before the import of matmul_nbits_quantizer, {len(seen)} of 2 after, in spite of basicConfig")
PY
