"""Measure what a process needs until its first training step, on tables of made-up captions.

    python -m benchmarks.scale --samples 3000000 --json scale.json
    python -m benchmarks.scale --samples 3000000 --json scale.json --against ../other_checkout

`train_lstm.py` is started in a fresh process on a table of one caption an image, with a small model and an image of some hundred
bytes, and stopped after its first step; then a second time, with what the first has left in the cache. Memory is what the process has
for itself (anonymous pages), at its peak; pages of memory-mapped files, which all processes share and the system takes back when it
needs room, count in `peak_resident_mb` beside it. `--against` measures another checkout of this repository on the same table.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from benchmarks.machine import benchmark_parser, describe_machine, write_result
from data_scripts.caption_table import FEATURES
from data_scripts.table_shards import ROWS_PER_BATCH, describe_split
from data_scripts.train_tokenizer import train_tokenizer
from modeling.inception_lstm import build_inception_lstm

SMALL_TABLE = 1000  # captions of a run whose memory is that of the libraries, the model and a batch
ROWS_AT_ONCE = 100_000
WORDS = [
    "red",
    "blue",
    "small",
    "large",
    "dog",
    "cat",
    "house",
    "tree",
    "on",
    "under",
    "beside",
    "the",
    "a",
    "runs",
    "sits",
]

# Runs in the checkout that is measured. It leaves after the first optimizer step.
CHILD = """
import json, os, sys, threading, time
started = time.perf_counter()
peak = 0

def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(name))

def watch():
    global peak
    while True:
        peak = max(peak, memory("RssAnon"))
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
options = json.loads(sys.argv[1])
sys.argv[1:] = []
sys.path.insert(0, os.getcwd())
import torch
torch.set_num_threads(1)
import train_lstm
from training.run import TrainingRun
plain = TrainingRun.optimizer_step

def stop_after_step(run):
    plain(run)
    seconds = time.perf_counter() - started
    print("measured", json.dumps({
        "seconds": seconds, "peak_mb": max(peak, memory("RssAnon")), "now_mb": memory("RssAnon"), "resident_mb": memory("VmHWM"),
    }), flush=True)
    os._exit(0)

TrainingRun.optimizer_step = stop_after_step
train_lstm.main(options)
"""


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, runs=1)
    parser.add_argument("--samples", type=int, default=1_000_000, help="number of captions of the table")
    parser.add_argument("--against", type=Path, help="another checkout of this repository to measure as well")
    args = parser.parse_args(argv)
    own = Path(__file__).parent.parent
    result = {"machine": describe_machine(args.device), "samples": args.samples}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_table(folder / "small", SMALL_TABLE)
        write_table(folder / "table", args.samples)
        build_inception_lstm(
            "test_efficientnet",
            train_tokenizer([" ".join(WORDS)], 120),
            pretrained_encoder=False,
            image_size=64,
            image_embed_dim=32,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
        ).save(folder / "captioner")
        result |= measure(own, folder, args.samples)
        if args.against:
            result["against"] = measure(args.against.resolve(), folder, args.samples)
    write_result(result, args.json)


def write_table(folder: Path, num_captions: int) -> None:
    """A caption table of made-up captions, one an image; all its images are the same."""
    random = np.random.default_rng(0)
    phrases = pa.array([" ".join(random.choice(WORDS, random.integers(3, 9))) for _ in range(20_000)])
    content = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(content, "PNG")
    schema = FEATURES.arrow_schema
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
    with pa.OSFile(str(folder / "train" / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for start in range(0, num_captions, ROWS_AT_ONCE):
            size = min(ROWS_AT_ONCE, num_captions - start)
            parts = [phrases.take(pa.array(random.integers(0, len(phrases), size))) for _ in range(2)]
            names = pa.array(np.arange(start, start + size)).cast(pa.string())
            images = pa.StructArray.from_arrays(
                [pa.array([content.getvalue()] * size, pa.binary()), pa.nulls(size, pa.string())], ["bytes", "path"]
            )
            captions = pa.ListArray.from_arrays(
                pa.array(np.arange(size + 1, dtype=np.int32)), pc.binary_join_element_wise(*parts, " ")
            )
            hashes = pc.utf8_lpad(names, 64, "0")
            arrays = [
                array.cast(field.type) for array, field in zip([images, names, captions, hashes], schema, strict=True)
            ]
            batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
            for first in range(0, size, ROWS_PER_BATCH):
                writer.write_batch(batch.slice(first, ROWS_PER_BATCH))
            if not start:
                validation = batch.slice(0, 32)
    with pa.OSFile(str(folder / "validation" / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_batch(validation)
    for split in ("train", "validation"):
        describe_split(folder / split, ["data.arrow"], f"{split}-{num_captions}", FEATURES)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')


def measure(checkout: Path, folder: Path, num_captions: int) -> dict[str, float]:
    """Start a checkout's `train_lstm.py` on the small table, to know the memory of all else, and twice on the large one."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        empty = start(checkout, folder, "small", cache)
        first, again = (start(checkout, folder, "table", cache) for _ in range(2))
    beyond = max(first["peak_mb"], again["peak_mb"]) - empty["peak_mb"]
    return {
        "bytes_per_caption": round((again["now_mb"] - empty["now_mb"]) * 2**20 / num_captions, 1),
        "peak_memory_mb": round(max(first["peak_mb"], again["peak_mb"]), 1),
        "peak_memory_beyond_model_mb": round(beyond, 1),
        "peak_memory_again_mb": round(again["peak_mb"], 1),
        "peak_resident_mb": round(max(first["resident_mb"], again["resident_mb"]), 1),
        "peak_memory_of_1000_captions_mb": round(empty["peak_mb"], 1),
        "seconds_to_first_step": round(first["seconds"], 2),
        "seconds_to_first_step_again": round(again["seconds"], 2),
        "seconds_to_first_step_of_1000_captions": round(empty["seconds"], 2),
    }


def start(checkout: Path, folder: Path, table: str, cache: str) -> dict[str, float]:
    options = {
        "model_name_or_path": folder / "captioner",
        "dataset_name": folder / table,
        "output_dir": folder / "run",
        "feature_cache": "none",
        "max_steps": 1,
        "report_to": "none",
        "max_length": 10,
        "overwrite_output_dir": "true",
    }
    words = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    environment = {**os.environ, "HF_DATASETS_CACHE": cache, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, "-c", CHILD, json.dumps(words)]
    child = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    lines = [line for line in child.stdout.splitlines() if line.startswith("measured ")]
    if not lines:
        raise RuntimeError(f"{checkout} did not come to its first step\n{child.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("measured "))


if __name__ == "__main__":
    main()
