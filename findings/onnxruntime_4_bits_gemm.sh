#!/usr/bin/env bash
# onnxruntime 1.32.0 (onnx 1.23.2, onnx-ir 1.1.0) on a model whose linear layers are Gemm nodes, as exporters write those
# with a bias over two dimensions (GPT-2's layers among them).
#
# Expected: MatMulNBitsQuantizer, onnxruntime's tool for weights of four bits, makes a linear layer smaller whether it is
# written as Gemm or as MatMul and Add, which are the same product.
# Seen: the layer as MatMul becomes MatMulNBits and the file .16 of its size; as Gemm it stays as it was, in float32, and
# the file as large. No error and no warning: the log says "skip to quantize", as it does of every Add and Reshape.
# For users: look for MatMulNBits in the result, or at its size; ONNXModel.replace_gemm_with_matmul() of the same package,
# called first, makes both alike.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 onnx-ir==1.1.0 numpy==2.4.6

venv/bin/python - <<'PY'
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.onnx_model import ONNXModel

SIZE = 256
draw = np.random.default_rng(0)
weights = [
    numpy_helper.from_array(draw.standard_normal((SIZE, SIZE)).astype(np.float32), "w"),
    numpy_helper.from_array(draw.standard_normal(SIZE).astype(np.float32), "b"),
]
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", SIZE]) for name in "xy")
layers = {
    "MatMul": [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])],
    "Gemm": [helper.make_node("Gemm", ["x", "w", "b"], ["y"])],
}


def four_bits(nodes, as_matmul=False):
    graph = helper.make_graph(nodes, "layer", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    before = len(model.SerializeToString())
    if as_matmul:
        ONNXModel(model).replace_gemm_with_matmul()
    quantizer = MatMulNBitsQuantizer(model, block_size=32, is_symmetric=True)
    quantizer.process()
    model = quantizer.model.model
    return {node.op_type for node in model.graph.node}, len(model.SerializeToString()) / before


kinds, share = four_bits(layers["MatMul"])
assert "MatMulNBits" in kinds and share < 0.2, (kinds, share)
kinds, share = four_bits(layers["Gemm"])
assert kinds == {"Gemm"} and share > 0.99, (kinds, share)
kinds, share = four_bits(layers["Gemm"], as_matmul=True)
assert "MatMulNBits" in kinds and share < 0.2, (kinds, share)
print("MatMulNBitsQuantizer leaves a linear layer written as Gemm in float32; as MatMul it has 4 bits and .16 of the size")
PY
