#!/usr/bin/env bash
# onnx 1.23.2 (onnx.reference.ReferenceEvaluator), compared with onnxruntime 1.32.0.
#
# Expected: the operators LSTM, GRU and RNN have an input sequence_lens. After a row's length the standard's output is
# zero, and Y_h is the state at its last real step. The reference evaluator, whose purpose is to define right results,
# follows it or refuses.
# Seen: it ignores sequence_lens. The row of full length agrees to 1e-6; a row of 2 of 5 steps gets the outputs and
# the final state of its padding. onnxruntime follows the standard.
# For users: a padded batch checked against the reference evaluator looks as if the export or the runtime were wrong,
# and one computed with it is wrong from the first padded step on. Check such models one row at a time, without
# padding.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0

venv/bin/python - <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

steps, batch, inputs, hidden = 5, 2, 3, 4
random = np.random.default_rng(0)
differences = {}
for operator, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1)):
    shapes = {"X": [steps, batch, inputs], "W": [1, gates * hidden, inputs], "R": [1, gates * hidden, hidden]}
    feeds = {name: random.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    graph_inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph_inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, [batch]))
    outputs = [
        helper.make_tensor_value_info("Y", TensorProto.FLOAT, [steps, 1, batch, hidden]),
        helper.make_tensor_value_info("Y_h", TensorProto.FLOAT, [1, batch, hidden]),
    ]
    node = helper.make_node(operator, ["X", "W", "R", "", "lengths"], ["Y", "Y_h"], hidden_size=hidden)
    graph = helper.make_graph([node], operator, graph_inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    feeds["lengths"] = np.array([steps, 2], dtype="int32")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    runtime, reference = session.run(None, feeds), ReferenceEvaluator(model).run(None, feeds)
    # The short row alone, cut to its two steps: what both should give.
    alone = ReferenceEvaluator(model).run(
        None, {**feeds, "X": feeds["X"][:2, 1:], "lengths": np.array([2], dtype="int32")}
    )
    assert np.allclose(runtime[1][:, 0], reference[1][:, 0], atol=1e-5), operator
    assert np.allclose(runtime[1][:, 1], alone[1][:, 0], atol=1e-5), operator
    assert not runtime[0][2:, :, 1].any() and reference[0][2:, :, 1].all(), operator
    differences[operator] = float(np.abs(runtime[1][:, 1] - reference[1][:, 1]).max())
assert min(differences.values()) > 0.05, differences
print(
    "final state of a row of 2 of 5 steps, reference evaluator against onnxruntime: off by up to "
    + ", ".join(f"{value:.2f} ({operator})" for operator, value in differences.items())
)
PY
