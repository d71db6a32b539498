"""Read drawn scenes from 64 local tars beside the same scenes from a caption table: batches of pixels and tokens, an epoch each.

Rates are per second of processor time, so that other load on the machine does not count.

python -m benchmarks.shards --json shards.json
"""

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import datasets
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.machine import (
    benchmark_parser,
    describe_machine,
    in_turns,
    ratio_of_medians,
    write_result,
)
from data_scripts.caption_table import write_caption_table
from data_scripts.load import Shards
from data_scripts.scenes import scene_rows
from data_scripts.train_tokenizer import train_tokenizer
from modeling.inception_lstm import build_inception_lstm
from training.batches import CaptionCollator, CaptionPairs, CaptionSampler
from training.loaders import ShardLoader
from training.shards import CaptionStream, StreamSampler

BATCH_SIZE = 64


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, runs=3)
    parser.add_argument("--scenes", type=int, default=1280, help="number of drawn scenes")
    parser.add_argument("--shards", type=int, default=64, help="number of tars")
    args = parser.parse_args(argv)
    result = {"machine": describe_machine(args.device), "scenes": args.scenes, "shards": args.shards}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        scenes = [replace(row, read=partial(as_jpeg, row.read)) for row in scene_rows({"train": args.scenes})]
        write_caption_table(scenes, folder / "table", validation_share=0, test_share=0)
        rows = datasets.load_from_disk(folder / "table")["train"]
        tars = write_tars(rows, folder, args.shards)
        result |= compare(rows, tars, args.runs)
    write_result(result, args.json)


def as_jpeg(read: Callable[[], bytes]) -> bytes:
    """A drawn scene as img2dataset stores an image: 256 pixels wide, JPEG."""
    content = io.BytesIO()
    Image.open(io.BytesIO(read())).convert("RGB").resize((256, 256)).save(content, "JPEG", quality=95)
    return content.getvalue()


def write_tars(rows: Dataset, folder: Path, num_shards: int) -> list[str]:
    """The rows as webdataset tars, as many in each."""
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    paths = []
    for shard in range(num_shards):
        paths.append(str(folder / f"{shard:05}.tar"))
        with tarfile.open(paths[-1], "w") as archive:
            for number, row in enumerate(undecoded.shard(num_shards, shard)):
                captions = json.dumps({"captions": row["captions"]}).encode()
                for suffix, content in (("jpg", row["image"]["bytes"]), ("json", captions)):
                    info = tarfile.TarInfo(f"{number:05}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return paths


def compare(rows: Dataset, tars: list[str], runs: int) -> dict:
    """Captions a second of processor time of both sides, in turns."""
    captions = [text for texts in rows["captions"] for text in texts]
    sizes = {"image_embed_dim": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tokenizer = train_tokenizer(captions, 200)
    captioner = build_inception_lstm("test_efficientnet", tokenizer, pretrained_encoder=False, image_size=224, **sizes)
    collator, accelerator = CaptionCollator(captioner.processor, share_images="index"), Accelerator(cpu=True)
    pairs = CaptionPairs(rows, tokenizer)
    stream = CaptionStream(Shards(tars, False, captions[:1000]), tokenizer)

    def table() -> float:
        sampler = CaptionSampler(pairs.lengths, BATCH_SIZE, images=pairs.row_of_pair)
        return rate(accelerator.prepare(DataLoader(pairs, BATCH_SIZE, sampler=sampler, collate_fn=collator)))

    def shards() -> float:
        sampler = StreamSampler(stream, BATCH_SIZE, True, False, 0, 0, 1)
        loader = ShardLoader(accelerator, sampler, 1, collator, BATCH_SIZE, num_workers=0)
        return rate(batch for batches in loader.steps(epoch=0, done=0) for batch in batches)

    def rate(batches) -> float:
        start = time.process_time()  # of all threads; other load on the machine does not count
        number = sum(len(batch["labels"]) for batch in batches)
        assert number == len(captions)
        return number / (time.process_time() - start)

    measured = in_turns({"table": table, "shards": shards}, runs)
    return {"captions_per_processor_second": measured, "shards_to_table": ratio_of_medians(measured, "shards", "table")}


if __name__ == "__main__":
    main()
