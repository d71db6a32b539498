"""An encoder in torch, onnxruntime and OpenVINO, and in onnxruntime with 8 bits: images a processor second, and CIDEr of its captions.

    python -m benchmarks.encoder_engines outputs/lstm_flickr8k --dataset_name data/flickr8k --json encoder_engines.json

8 bits are static quantization of weights, per channel, and activations, calibrated on the first training images. OpenVINO is timed
where it is installed. Differences are to torch: of states, root mean square relative to theirs; of CIDEr, with a 95 % interval.
"""

import io
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.machine import benchmark_parser, describe_machine, in_turns, medians, write_result
from data_scripts import load_captions
from metrics.caption_scores import CaptionScorer
from metrics.caption_scores.intervals import bootstrap_interval
from modeling.captioner import Captioner
from modeling.onnx_encoder import exported_encoder, onnx_encoder, onnx_session, session_encoder
from system.errors import one_line_errors

BATCH_SIZE = 32

Encode = Callable[[torch.Tensor], BaseModelOutput]


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, runs=5)
    parser.add_argument("model_name_or_path", help="folder of a captioner")
    parser.add_argument("--dataset_name", default="scenes", help="see the training scripts")
    parser.add_argument("--max_eval_samples", type=int, default=1000, help="images of the last split to caption")
    parser.add_argument("--num_timed", type=int, default=64, help="images of a run that is timed")
    parser.add_argument("--num_calibration", type=int, default=16, help="training images that 8 bits are calibrated on")
    parser.add_argument("--num_float", type=int, default=12, help="first convolutions left in float32 beside 8 bits")
    args = parser.parse_args(argv)
    with one_line_errors(), torch.inference_mode():
        captioner, dataset = Captioner.load(args.model_name_or_path), load_captions(args.dataset_name)
        rows = dataset[list(dataset)[-1]]
        rows = rows.select(range(min(args.max_eval_samples, len(rows))))
        batches = [_pixels(captioner, rows, first) for first in range(0, len(rows), BATCH_SIZE)]
        calibration = _pixels(captioner, dataset["train"], 0, args.num_calibration)
        engines = build_engines(captioner.encoder, calibration, args.num_float)
        timed = torch.cat(batches)[: args.num_timed]
        sides = {name: lambda encode=encode: rate(encode, timed) for name, encode in engines.items()}
        rates = medians(in_turns(sides, args.runs))
        found = compare_captions(captioner, engines, batches, rows["captions"])
    result = {name: {"images_per_processor_second": rates[name], **found[name]} for name in engines}
    write_result({"machine": describe_machine(), "images": len(rows), **result}, args.json)


def _pixels(captioner: Captioner, rows, first: int, number: int = BATCH_SIZE) -> torch.Tensor:
    return captioner.preprocess(rows[first : first + number]["image"])["pixel_values"]


def build_engines(encoder: torch.nn.Module, calibration: torch.Tensor, num_float: int) -> dict[str, Encode]:
    """The encoder by each engine, on as many threads as torch has."""
    engines = {"torch": encoder, "onnxruntime": onnx_encoder(encoder, calibration)}
    exported = exported_encoder(encoder, calibration[:1])
    if find_spec("openvino"):
        engines["openvino"] = openvino_encoder(exported)
    for name, number in (("8 bits", 0), (f"8 bits but {num_float} convolutions", num_float)):
        engines[name] = session_encoder(onnx_session(quantized(exported, calibration, number)))
    return engines


def openvino_encoder(exported: bytes) -> Encode:
    """An exported encoder as OpenVINO runs it, in float32, one image after the other."""
    import openvino

    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", **threads}
    core = openvino.Core()
    request = core.compile_model(core.read_model(io.BytesIO(exported)), "CPU", options).create_infer_request()

    def encode(pixel_values: torch.Tensor) -> BaseModelOutput:
        states = [request.infer({0: image[None].numpy()})[0].copy() for image in pixel_values]
        return BaseModelOutput(last_hidden_state=torch.from_numpy(np.concatenate(states)))

    return encode


class Calibration(CalibrationDataReader):
    """Pixels, an image at a time, as onnxruntime asks for them."""

    def __init__(self, pixels: torch.Tensor):
        self.images = iter(pixels)

    def get_next(self) -> dict | None:
        image = next(self.images, None)
        return None if image is None else {"pixel_values": image[None].numpy()}


def quantized(exported: bytes, calibration: torch.Tensor, num_float: int) -> bytes:
    """An exported encoder with 8 bits.

    Weights have 7 of them (`reduce_range`): without VNNI, products of bytes are added up in 16 bits, and saturate.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, target = (Path(folder) / f"{name}.onnx" for name in ("source", "prepared", "target"))
        source.write_bytes(exported)
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        convolutions = [node.name for node in onnx.load(prepared).graph.node if node.op_type == "Conv"]
        quantize_static(
            prepared,
            target,
            Calibration(calibration),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=convolutions[:num_float],
        )
        return target.read_bytes()


def rate(encode: Encode, pixels: torch.Tensor) -> float:
    """Images a second of processor time."""
    started = time.process_time()
    for first in range(0, len(pixels), BATCH_SIZE):
        encode(pixels[first : first + BATCH_SIZE])
    return len(pixels) / (time.process_time() - started)


def compare_captions(captioner: Captioner, engines: dict[str, Encode], batches: list[torch.Tensor], references) -> dict:
    """CIDEr of each engine's captions, and how they and the states differ from torch's."""
    scorer = CaptionScorer([list(captions) for captions in references])
    result, ciders, errors = {}, {}, dict.fromkeys(engines, 0.0)
    captions: dict[str, list[str]] = {name: [] for name in engines}
    for pixels in batches:
        wanted = engines["torch"](pixels).last_hidden_state
        for name, encode in engines.items():
            states = wanted if name == "torch" else encode(pixels).last_hidden_state
            errors[name] += ((states - wanted).square().mean() / wanted.square().mean()).item() / len(batches)
            inputs = {"encoder_outputs": BaseModelOutput(last_hidden_state=states)}
            captions[name] += [item["caption"] for item in captioner.generate(inputs)]
    for name, texts in captions.items():
        ciders[name] = np.array(scorer.per_image_cider(texts))
        difference = ciders[name] - ciders["torch"]
        same = sum(text == other for text, other in zip(texts, captions["torch"], strict=True))
        result[name] = {
            "difference_of_states": errors[name] ** 0.5,
            "same_captions": same,
            "cider": float(ciders[name].mean()),
            "difference_of_cider": [float(difference.mean()), *bootstrap_interval(difference)],
        }
    return result


if __name__ == "__main__":
    main()
