"""Time a step of the exported LSTM captioner in float32 and int8 by onnxruntime on one thread, and profile what bounds it.

    OMP_NUM_THREADS=1 python -m benchmarks.onnx_step --json onnx_step.json

The step is that of full size with attention: three layers of 1,024, 8,000 tokens, a grid of 8 x 8, random weights. Times are
processor time. The profile is onnxruntime's own, shares of each operator; beside it are the bytes of weights that a step
reads, and the time of a bare product of a float32 matrix of as many bytes with a vector.
"""

import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import ViTImageProcessor, set_seed

from benchmarks.full_size import VOCABULARY
from benchmarks.machine import benchmark_parser, describe_machine, in_turns, medians, ratio_of_medians, write_result
from captioning.onnx_decoding import SUFFIXES
from data_scripts.train_tokenizer import train_tokenizer
from modeling import InceptionLSTMConfig, InceptionLSTMForConditionalGeneration
from modeling.captioner import Captioner
from modeling.onnx_export import export_encoder_and_step
from modeling.onnx_files import convert
from modeling.processing import build_processor

ENCODER, PIXELS = "test_efficientnet", 256  # a small CNN with the grid of Inception-ResNet-v2; the step does not run it
STEPS = 30
DTYPES = ("fp32", "q8")


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, runs=3)
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=[1, 3, 5, 32], help="captions, or beams, in a step"
    )
    args = parser.parse_args(argv)
    result = {"machine": describe_machine() | {"onnxruntime": onnxruntime.__version__}}
    with tempfile.TemporaryDirectory() as work:
        files = export_steps(build_captioner(), Path(work))
        result["megabytes"] = {dtype: path.stat().st_size / 1e6 for dtype, path in files.items()}
        for batch_size in args.batch_sizes:
            result[f"batch {batch_size}"] = compare(files, batch_size, args.runs)
        result["profile"] = {f"batch {size}": profile(files, size) for size in args.batch_sizes}
    result["bare_product"] = {dtype: bare_product(size) for dtype, size in result["megabytes"].items()}
    write_result(result, args.json)


def build_captioner() -> Captioner:
    set_seed(0)
    config = InceptionLSTMConfig(encoder_name=ENCODER, attention=True, vocab_size=VOCABULARY["lstm"])
    image_processor = ViTImageProcessor(size={"height": PIXELS, "width": PIXELS})
    processor = build_processor(image_processor, train_tokenizer(["a dog runs"] * 5, 100))
    return Captioner(InceptionLSTMForConditionalGeneration(config).eval(), processor)


def export_steps(captioner: Captioner, folder: Path) -> dict[str, Path]:
    export_encoder_and_step(captioner, folder)
    files = {dtype: folder / f"of_{dtype}{SUFFIXES[dtype]}.onnx" for dtype in DTYPES}
    for dtype, path in files.items():
        convert(folder / "step.onnx", path, dtype)
    return files


def open_step(path: Path, profile_prefix: str | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if profile_prefix:
        options.enable_profiling, options.profile_file_prefix = True, profile_prefix
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def random_inputs(session: onnxruntime.InferenceSession, batch_size: int) -> dict[str, np.ndarray]:
    draw, inputs = np.random.default_rng(0), {}
    for wanted in session.get_inputs():
        shape = [batch_size if isinstance(size, str) else size for size in wanted.shape]
        whole = "int" in wanted.type
        inputs[wanted.name] = np.ones(shape, np.int64) if whole else draw.standard_normal(shape).astype(np.float32)
    return inputs


def compare(files: dict[str, Path], batch_size: int, runs: int) -> dict:
    """Milliseconds of processor time a step, medians of `STEPS` in each run, in turns."""

    def timed(path: Path):
        session = open_step(path)
        inputs = random_inputs(session, batch_size)
        session.run(None, inputs)

        def step() -> float:
            times = []
            for _ in range(STEPS):
                started = time.process_time()
                session.run(None, inputs)
                times.append((time.process_time() - started) * 1000)
            return statistics.median(times)

        return step

    measured = in_turns({dtype: timed(path) for dtype, path in files.items()}, runs)
    return medians(measured) | {"ratio": ratio_of_medians(measured, *DTYPES)}


def profile(files: dict[str, Path], batch_size: int) -> dict[str, dict[str, float]]:
    """The share of each operator in the time of all, in percent, the largest first, of those from 1 on."""
    shares = {}
    for dtype, path in files.items():
        session = open_step(path, str(path.with_suffix("")))
        inputs = random_inputs(session, batch_size)
        for _ in range(STEPS):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
        spent = Counter()
        for event in events:
            if event["name"].endswith("_kernel_time"):
                spent[event["args"]["op_name"]] += event["dur"]
        percent = {name: round(100 * time_ / spent.total(), 1) for name, time_ in spent.most_common()}
        shares[dtype] = {name: share for name, share in percent.items() if share >= 1}
    return shares


def bare_product(megabytes: float) -> float:
    """Milliseconds of processor time of a float32 matrix of so many bytes times a vector, the median of `STEPS`."""
    matrix, times = torch.ones(int(megabytes * 1e6) // 4096, 1024), []
    vector = torch.ones(1024)
    for _ in range(STEPS):
        started = time.process_time()
        torch.mv(matrix, vector)
        times.append((time.process_time() - started) * 1000)
    return statistics.median(times)


if __name__ == "__main__":
    main()
