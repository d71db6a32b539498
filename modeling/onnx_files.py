"""ONNX files of a captioner's parts: exported, and converted to smaller weights."""

import shutil
import warnings
from pathlib import Path

import onnx
import torch
from torch import nn

from .onnx_quantization import to_float16, to_int4, to_int8

OPSET = 20
MAX_BYTES_IN_FILE = 1_800_000_000  # of weights; an .onnx file ends at 2 GiB, and more goes into a .data file beside it


def export_module(
    module: nn.Module, inputs: tuple, path: Path, input_names: list, output_names: list, shapes: tuple
) -> None:
    """Write a module as an ONNX model, with its weights in a .data file beside it where they are too many for one file."""
    num_bytes = sum(parameter.nbytes for parameter in module.parameters())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            inputs,
            path,
            input_names=input_names,
            output_names=output_names,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            external_data=num_bytes > MAX_BYTES_IN_FILE,
            verbose=False,
        )
    without_traces(path)


def without_traces(path: Path) -> None:
    """Delete what the exporter notes about each node and tensor: stack traces with paths of this machine, and known shapes.

    In a small model it is a fifth of the file.
    """
    model = onnx.load(path, load_external_data=False)
    del model.graph.value_info[:], model.graph.metadata_props[:], model.metadata_props[:]
    for node in [*model.graph.node, *(node for function in model.functions for node in function.node)]:
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.save(model, path)


def convert(source: Path, target: Path, dtype: str) -> None:
    """Write a float32 model with weights of another data type: fp32 as it is, fp16, q8, q4.

    Raises:
        ValueError: The weights are too many for one file, and are to be converted.
    """
    data = source.with_name(f"{source.name}.data")
    if dtype == "fp32":
        shutil.copy(source, target)
        if data.exists():
            shutil.copy(data, target.with_name(data.name))
        return
    if data.exists():
        raise ValueError(f"{source.name}: its weights are too many for one file, which {dtype} needs")
    {"fp16": to_float16, "q8": to_int8, "q4": to_int4}[dtype](source, target)
