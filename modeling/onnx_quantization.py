"""The same ONNX model with smaller weights: float16, 8 bits with a scale for each channel, or 4 with one for each block.

8 bits: linear layers and LSTMs compute with bytes, their activations quantized as they come (onnxruntime's `quantize_dynamic`).
Embeddings and convolutions have their weights alone in 8 bits, and compute in float32. 4 bits: linear layers have their weights
alone in them, and compute in float32; the rest as in 8 bits.
"""

import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

ZERO = 128
BLOCK = 16  # weights of 4 bits that share a scale; the demo's CIDEr falls by .008, and with 32 by .039
MIN_WEIGHTS = 512  # below these a tensor is not worth its scales


def to_float16(source: Path, target: Path) -> None:
    """Weights and arithmetic in float16, of graphs with an LSTM the weights alone; inputs and outputs stay float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = onnx.load(source)
    if any(node.op_type == "LSTM" for node in model.graph.node):  # onnxruntime crashes on some of those in float16
        store_as_float16(model.graph)
    else:
        model = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True)
        OnnxModel(model).topological_sort()  # the conversion appends the casts of the inputs
    onnx.save(model, target)


def store_as_float16(graph: onnx.GraphProto) -> None:
    """Make the weights float16, and cast them where they are read, which onnxruntime does once, as it loads them; in place."""
    for weight in list(graph.initializer):
        if weight.data_type != onnx.TensorProto.FLOAT or np.prod(weight.dims) < MIN_WEIGHTS:
            continue
        name, values = weight.name, numpy_helper.to_array(weight)
        graph.initializer.remove(weight)
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float16), f"{name}.float16"))
        cast = helper.make_node("Cast", [f"{name}.float16"], [name], f"{name}.cast", to=onnx.TensorProto.FLOAT)
        graph.node.insert(0, cast)


def to_int8(source: Path, target: Path) -> None:
    """Weights in 8 bits, with a scale for each channel; a weight that two layers share stays one."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.getLogger().addFilter(_not_about_preprocessing)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as beside:
            if any(node.op_type == "LSTM" for node in onnx.load(source).graph.node):
                # The exporter changes the order of the gates inside the graph, and only constants are quantized.
                constant = Path(beside) / "constant.onnx"
                quant_pre_process(source, constant, skip_symbolic_shape=True)
                source = constant
            quantize_dynamic(
                source,
                target,
                op_types_to_quantize=["MatMul", "LSTM"],
                per_channel=True,
                # Unsigned: products of signed and unsigned bytes overflow on processors with AVX2 and without VNNI.
                weight_type=QuantType.QUInt8,
            )
    finally:
        logging.getLogger().removeFilter(_not_about_preprocessing)
    model = onnx.load(target)
    del model.graph.value_info[:]  # inferred by onnxruntime, and no longer true
    quantize_weights(model.graph)
    onnx.save(model, target)


def to_int4(source: Path, target: Path) -> None:
    """Weights of linear layers in 4 bits, a scale for each `BLOCK` of them; embeddings and convolutions as in `to_int8`."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from onnxruntime.quantization.onnx_model import ONNXModel

    root.setLevel(level)  # as it was before the import, which makes the program log what it does
    root.handlers[:] = handlers
    model = ONNXModel(onnx.load(source))
    model.replace_gemm_with_matmul()  # the tool leaves Gemm, as which GPT-2's layers are written, in float32
    quantizer = MatMulNBitsQuantizer(model.model, bits=4, block_size=BLOCK, is_symmetric=False)
    quantizer.process()
    quantize_weights(quantizer.model.model.graph)
    onnx.save(quantizer.model.model, target)


def quantize_weights(graph: onnx.GraphProto) -> None:
    """Make the weights of embeddings, convolutions and of linear layers that share an embedding's bytes, in place."""
    weights = {weight.name: weight for weight in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for name, weight in weights.items():
        if weight.data_type != onnx.TensorProto.FLOAT or np.prod(weight.dims) < MIN_WEIGHTS:
            continue
        nodes = readers.get(name, [])
        if nodes and all(node.op_type == "Conv" and node.input[1] == name for node in nodes):
            scale_name = _store(graph, weight)
            zeros = _constant(graph, f"{name}.zeros", np.full(weight.dims[0], ZERO, dtype=np.uint8))
            inputs = [f"{name}.bytes", scale_name, zeros]
            new = helper.make_node("DequantizeLinear", inputs, [name], axis=0, name=f"{name}.dequantize")
            graph.node.insert(0, new)
        elif any(_is_gather(node, name) for node in nodes) and all(
            _is_gather(node, name) or _heads(node, readers) for node in nodes
        ):
            scale_name = _store(graph, weight)
            for node in nodes:
                if node.op_type == "Gather":
                    _gather_bytes(graph, node, scale_name)
                    continue
                for product in _heads(node, readers):
                    _multiply_bytes(graph, product, scale_name)
                node.input[0] = f"{name}.bytes"


def _is_gather(node: onnx.NodeProto, name: str) -> bool:
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return node.op_type == "Gather" and node.input[0] == name and axis == 0


def _heads(node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]]) -> list[onnx.NodeProto]:
    """The products with a transposed weight; none where it is used in another way."""
    products = readers.get(node.output[0], [])
    is_linear = node.op_type == "Transpose" and all(
        product.op_type == "MatMul" and product.input[1] == node.output[0] for product in products
    )
    return products if is_linear else []


def _store(graph: onnx.GraphProto, weight: onnx.TensorProto) -> str:
    """Replace a weight by bytes, `{name}.bytes`, of which `ZERO` is 0, and float32 scales, (rows,), whose name is returned."""
    values = numpy_helper.to_array(weight)
    largest = np.abs(values).reshape(len(values), -1).max(axis=1)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    rounded = np.round(values / scale.reshape(-1, *[1] * (values.ndim - 1)))
    stored = numpy_helper.from_array((rounded + ZERO).astype(np.uint8), f"{weight.name}.bytes")
    scales = numpy_helper.from_array(scale, f"{weight.name}.scale")
    graph.initializer.remove(weight)
    graph.initializer.extend([stored, scales])
    return scales.name


def _gather_bytes(graph: onnx.GraphProto, node: onnx.NodeProto, scale_name: str) -> None:
    """Rows of a weight stored as bytes, times their scales, in place of rows of a float32 weight."""
    weight, ids, rows = node.input[0], node.input[1], node.output[0]
    zero = _constant(graph, "float_zero", np.float32(ZERO))
    last_axis = _constant(graph, "last_axis", np.array([-1]))
    _replace(
        graph,
        node,
        helper.make_node("Gather", [f"{weight}.bytes", ids], [f"{rows}.bytes"]),
        helper.make_node("Cast", [f"{rows}.bytes"], [f"{rows}.float"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Sub", [f"{rows}.float", zero], [f"{rows}.signed"]),
        helper.make_node("Gather", [scale_name, ids], [f"{rows}.scale"]),
        helper.make_node("Unsqueeze", [f"{rows}.scale", last_axis], [f"{rows}.column"]),
        helper.make_node("Mul", [f"{rows}.signed", f"{rows}.column"], [rows]),
    )


def _multiply_bytes(graph: onnx.GraphProto, node: onnx.NodeProto, scale_name: str) -> None:
    """A product with a weight of bytes, whose columns have these scales, in place of one with float32."""
    inputs, weight, outputs = node.input[0], node.input[1], node.output[0]
    bytes_, scale, zero = (f"{outputs}.{part}" for part in ("bytes", "scale", "zero"))
    weight_zero = _constant(graph, "byte_zero", np.uint8(ZERO))
    _replace(
        graph,
        node,
        helper.make_node("DynamicQuantizeLinear", [inputs], [bytes_, scale, zero]),
        helper.make_node("MatMulInteger", [bytes_, weight, zero, weight_zero], [f"{outputs}.int32"]),
        helper.make_node("Cast", [f"{outputs}.int32"], [f"{outputs}.float"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [scale, scale_name], [f"{outputs}.scales"]),
        helper.make_node("Mul", [f"{outputs}.float", f"{outputs}.scales"], [outputs]),
    )


def _replace(graph: onnx.GraphProto, node: onnx.NodeProto, *others: onnx.NodeProto) -> None:
    place = list(graph.node).index(node)
    graph.node.remove(node)
    for number, other in enumerate(others):
        other.name = f"{other.output[0]}.{other.op_type}"
        graph.node.insert(place + number, other)


def _constant(graph: onnx.GraphProto, name: str, value: np.ndarray | np.generic) -> str:
    if all(weight.name != name for weight in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def _not_about_preprocessing(record: logging.LogRecord) -> bool:
    return "pre-processing" not in record.getMessage()
