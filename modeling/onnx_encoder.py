"""A frozen encoder through onnxruntime on a CPU, where that is installed, equal and faster."""

import io
import logging
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

MAX_DIFFERENCE = 1e-3  # of a state, relative to the largest one
NUM_CHECKED = 4  # images of the first batch that both encode
MIN_IMAGES = 256  # below these the export takes longer than it saves
MAX_BYTES = 1_800_000_000  # of weights; a serialized ONNX model ends at 2 GiB
OPSET = 17

Encode = Callable[[torch.Tensor], BaseModelOutput]


class States(nn.Module):
    """Pixels to the last hidden state alone."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.encoder(pixel_values).last_hidden_state  # (batch, positions, size)


def fastest_encoder(encoder: nn.Module, num_images: int, report: Callable[[str], None]) -> "nn.Module | FastestEncoder":
    """The encoder, for so many images; see `FastestEncoder`."""
    return encoder if num_images < MIN_IMAGES else FastestEncoder(encoder, report)


class FastestEncoder:
    """An encoder that chooses its engine at the first batch: onnxruntime where its states are those of torch, and sooner there.

    Called with pixels (batch, 3, height, width), it returns the encoder's output with `last_hidden_state`.

    Args:
        encoder: Frozen, in eval.
        report: Takes a sentence about an engine that was tried and not taken.
    """

    def __init__(self, encoder: nn.Module, report: Callable[[str], None]):
        self.encoder, self.report = encoder, report
        self.encode: Encode | None = None

    @torch.inference_mode()
    def __call__(self, pixel_values: torch.Tensor) -> BaseModelOutput:
        if self.encode is None:
            self.encode = self._choose(pixel_values[:NUM_CHECKED])
        return self.encode(pixel_values)

    def _choose(self, pixels: torch.Tensor) -> Encode:
        if (reason := unsuitable(self.encoder)) is not None:
            return self._torch(reason)
        try:
            other = onnx_encoder(self.encoder, pixels)
            other(pixels[:1])  # the first takes longer, with either
            started = time.perf_counter()
            found = other(pixels).last_hidden_state
        except Exception as error:  # exporter and runtime raise almost anything
            reason = (
                f"{type(error).__name__}: {str(error).splitlines()[0][:200]}" if str(error) else type(error).__name__
            )
            return self._torch(f"onnxruntime cannot run it ({reason})")
        seconds = time.perf_counter() - started
        self.encoder(pixels[:1])
        started = time.perf_counter()
        wanted = self.encoder(pixels).last_hidden_state.float()
        if time.perf_counter() - started < seconds:
            return self._torch("onnxruntime is slower here")
        difference = ((found - wanted).abs().max() / wanted.abs().max()).item()
        if not difference <= MAX_DIFFERENCE:
            return self._torch(f"onnxruntime's states differ by {difference:.1e} of the largest")
        return other

    def _torch(self, reason: str) -> Encode:
        if reason:
            self.report(f"The encoder runs in torch: {reason}.")
        return self.encoder


def unsuitable(encoder: nn.Module) -> str | None:
    """Why an encoder does not go through onnxruntime: a reason, empty where there is nothing to say; None where it can."""
    weights = list(encoder.parameters())
    if find_spec("onnxruntime") is None or find_spec("onnx") is None:
        return ""
    if any(weight.device.type != "cpu" or weight.dtype != torch.float32 for weight in weights):
        return ""  # of a GPU, or in bfloat16 where the processor has instructions for it
    if sum(weight.nbytes for weight in weights) > MAX_BYTES:
        return "its weights are too many for one ONNX file"
    return None


def onnx_encoder(encoder: nn.Module, pixels: torch.Tensor) -> Encode:
    """The encoder as onnxruntime runs it, on as many threads as torch has, for images of this size.

    One image after the other: as fast as batches, and with all sizes known the exporter leaves no arithmetic on sizes in the
    graph, which costs a tenth where a layer pads by the size of its input.
    """
    return session_encoder(onnx_session(exported_encoder(encoder, pixels[:1])))


def onnx_session(model: bytes) -> "InferenceSession":
    """A session of an ONNX model on as many threads as torch has."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # its warnings are about the graph, which nobody wrote
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def session_encoder(session: "InferenceSession") -> Encode:
    """An exported encoder, one image after the other."""

    def encode(pixel_values: torch.Tensor) -> BaseModelOutput:
        images = pixel_values.float().numpy()
        states = [session.run(None, {"pixel_values": images[index : index + 1]})[0] for index in range(len(images))]
        return BaseModelOutput(last_hidden_state=torch.from_numpy(np.concatenate(states)))

    return encode


def exported_encoder(encoder: nn.Module, pixels: torch.Tensor) -> bytes:
    """The encoder as a serialized ONNX model, for batches of this shape."""
    content = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            States(encoder).eval(),
            (pixels.clone(),),
            content,
            input_names=["pixel_values"],
            output_names=["states"],
            opset_version=OPSET,
            dynamo=False,  # a tenth of the new exporter's time, which a thousand images would not bring back
        )
    return content.getvalue()
