#!/usr/bin/env bash
# onnxruntime 1.32.0 on an LSTM exported by torch 2.13.0 (dynamo=True, onnxscript 0.7.2, onnx 1.23.2).
#
# Expected: onnxruntime's quantize_dynamic, whose list of operators has LSTM, makes an int8 model of a quarter of the size.
# Seen: the model comes back as it was: both layers are float32 LSTM nodes, and the file is as large as before. It returns
# without an error; the one line that it logs is the general advice to run pre-processing first, which says nothing of LSTMs.
# The exporter reorders torch's gates inside the graph (Slice and Concat of each weight), and the quantizer takes only
# weights that are constants. After quant_pre_process, which folds them, both layers are quantized, and the file is .26 of
# the size.
# For users: run quant_pre_process first, and look for DynamicQuantizeLSTM in the result, or at its size.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 onnx==1.23.2 onnxruntime==1.32.0 onnxscript==0.7.2

venv/bin/python - <<'PY'
import os
import warnings

warnings.filterwarnings("ignore")

import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process

model = torch.nn.LSTM(256, 256, 2, batch_first=True).eval()
torch.onnx.export(
    model, (torch.randn(1, 5, 256),), "exported.onnx", dynamo=True, external_data=False, verbose=False
)
quant_pre_process("exported.onnx", "folded.onnx")
share = {}
for source in ("exported", "folded"):
    quantize_dynamic(f"{source}.onnx", f"{source}_int8.onnx", weight_type=QuantType.QInt8)
    kinds = [node.op_type for node in onnx.load(f"{source}_int8.onnx").graph.node]
    assert kinds.count("LSTM" if source == "exported" else "DynamicQuantizeLSTM") == 2, (source, kinds)
    share[source] = os.path.getsize(f"{source}_int8.onnx") / os.path.getsize("exported.onnx")
assert share["exported"] > 0.99 and share["folded"] < 0.3, share
print("quantize_dynamic leaves torch's exported LSTM in float32; after quant_pre_process it is int8 and .26 of the size")
PY
