"""Time an epoch of either training script against the report's way, full-size models with random weights on paragraphs.

    python -m benchmarks.train_epoch --dataset_name data/paragraphs --json train_epoch.json

The report's way is timed over a few steps, all of which are alike; ours is the script itself, over an epoch of few images
whose features are there, as they are from the second epoch on, also in bfloat16 where the machine computes in it. Building
the features is timed beside, and both grow with the data.
"""

import json
import math
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import datasets
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

import train_lstm
import train_vit_gpt2
from benchmarks import reference_way
from benchmarks.full_size import BATCH_SIZE, build_captioner, paragraphs
from benchmarks.machine import (
    benchmark_parser,
    describe_machine,
    in_turns,
    medians,
    ratio_of_medians,
    synchronize,
    write_result,
)
from modeling.caption_loss import computes_in_bfloat16
from modeling.captioner import save_captioner
from training.arguments import DataArguments
from training.batches import CaptionCollator, CaptionPairs
from training.features import encode_splits

# Of our epochs; fewer could not be sorted into batches of one length, as the report's 5,715 can.
NUM_IMAGES = {"lstm": 512, "vit_gpt2": 48}
EPOCH_CAPTIONS = 5715  # of the report's training split


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, runs=2)
    parser.add_argument("--system", choices=["lstm", "vit_gpt2"], nargs="+", default=["lstm", "vit_gpt2"])
    parser.add_argument("--dataset_name", help="prepared data set; made-up paragraphs if not given")
    parser.add_argument("--steps", type=int, default=1, help="steps of the report's way a run")
    args = parser.parse_args(argv)
    result = {"machine": describe_machine(args.device)}
    captions = paragraphs(args.dataset_name, EPOCH_CAPTIONS)
    for system in args.system:
        with tempfile.TemporaryDirectory() as folder:
            datasets.config.HF_DATASETS_CACHE = Path(folder)  # every cache is built here, and goes with it
            result[system] = compare(system, captions, Path(folder), args)
    write_result(result, args.json)


def compare(system: str, rows: datasets.Dataset, folder: Path, args) -> dict:
    """Seconds a caption of the report's way and of ours, in turns."""
    texts = [texts[0] for texts in rows["captions"]]
    model, processor = build_captioner(system, texts)
    model.to(args.device).train()
    longest = max(CaptionPairs(rows, processor.tokenizer).lengths)
    loader = DataLoader(reference_way.CaptionDataset(rows, processor, longest), BATCH_SIZE[system], shuffle=True)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    batches = iter(loader)

    def report() -> float:
        start = time.perf_counter()
        for _ in range(args.steps):
            batch = next(batches)
            reference_way.train_step(model, optimizer, **{name: value.to(args.device) for name, value in batch.items()})
        synchronize(args.device)
        return (time.perf_counter() - start) / args.steps / BATCH_SIZE[system]

    agreement = losses_agree(system, model, processor, rows, args.device)
    save_parts(system, model, processor, folder)
    growth = []
    for share in (4, 2, 1):
        size = NUM_IMAGES[system] // share
        start = time.perf_counter()
        encode(model, processor, rows.select(range(size)))
        building = time.perf_counter() - start
        growth.append(
            {
                "images": size,
                "cache_seconds": building,
                "epoch_seconds": size * ours(system, rows, size, folder, args),
            }
        )
    epoch = partial(ours, system, rows, NUM_IMAGES[system], folder, args)
    sides = {"report": report, "ours": epoch}
    if computes_in_bfloat16(torch.device(args.device)):
        sides["ours_in_bfloat16"] = partial(epoch, mixed_precision="bf16")
    report()  # the first step is not what is asked for; ours has had its own in `growth`
    measured = in_turns(sides, args.runs)
    cache = growth[-1]["cache_seconds"] / growth[-1]["images"]
    seconds = medians(measured)
    return {
        "longest_caption": int(longest),
        "seconds_a_caption": measured,
        "seconds_an_epoch": {name: value * EPOCH_CAPTIONS for name, value in seconds.items()},
        "times_faster": {name: ratio_of_medians(measured, "report", name) for name in sides if name != "report"},
        "times_faster_with_building_the_cache": seconds["report"] / (seconds["ours"] + cache),
        "growth": growth,
        "relative_difference_of_losses": agreement,
    }


def ours(system: str, rows: datasets.Dataset, size: int, folder: Path, args, mixed_precision: str = "no") -> float:
    """Seconds a caption in an epoch of so many, as the training script tells them."""
    table = rows.select(range(size))
    datasets.DatasetDict(train=table, validation=table.select(range(2))).save_to_disk(folder / f"set-{size}")
    options = {
        "dataset": folder / f"set-{size}",
        "output_dir": folder / "run",
        "num_train_epochs": 1,
        "save_epochs": 2,  # no checkpoint, which nobody asks for here
        "per_device_train_batch_size": BATCH_SIZE[system],
        "load_best_model_at_end": "false",
        "overwrite_output_dir": "true",
        "report_to": "none",
        "max_length": 4,
    }
    if system == "lstm":
        script = train_lstm
        options |= {"model": folder / "captioner", "mixed_precision": mixed_precision}
    else:
        script = train_vit_gpt2
        options |= {"encoder": folder / "encoder", "decoder": folder / "decoder", "prompt": ""}
        options |= {"use_cpu": args.device == "cpu", "bf16": mixed_precision == "bf16"}
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # the LSTM captioner's way of --use_cpu
    AcceleratorState._reset_state(reset_partial_state=True)  # else a process keeps the precision of its first run
    script.main([text for name, value in options.items() for text in (f"--{name}", str(value))])
    return json.loads((folder / "run" / "results.json").read_text())["train"]["seconds"] / size


def save_parts(system: str, model, processor, folder: Path) -> None:
    """The captioner as its script starts from it: the LSTM captioner's whole, ViT-GPT2's in halves."""
    if system == "lstm":
        save_captioner(model, processor, folder / "captioner")
    else:
        model.encoder.save_pretrained(folder / "encoder")
        processor.image_processor.save_pretrained(folder / "encoder")
        model.decoder.save_pretrained(folder / "decoder")
        processor.tokenizer.save_pretrained(folder / "decoder")


def encode(model, processor, rows: datasets.Dataset) -> datasets.Dataset:
    """The features of rows that were not encoded before."""
    table = datasets.DatasetDict(train=rows)
    return encode_splits(table, model.get_encoder(), processor.image_processor, DataArguments())["train"][0]


@torch.no_grad()
def losses_agree(system: str, model, processor, rows: datasets.Dataset, device: str) -> float:
    """Relative difference between the loss of a batch by the report's way and by ours from cached features."""
    rows = rows.select(range(BATCH_SIZE["vit_gpt2"]))
    pairs = CaptionPairs(rows, processor.tokenizer, features=[encode(model, processor, rows)])
    dataset = reference_way.CaptionDataset(rows, processor, max(pairs.lengths))
    batch = next(iter(DataLoader(dataset, len(rows))))
    plain = reference_way.caption_loss(model.eval(), **{name: value.to(device) for name, value in batch.items()}).item()
    cached = CaptionCollator(processor)(pairs.__getitems__(range(len(rows))))
    del cached["index"]
    states = type(cached["encoder_outputs"])(cached.pop("encoder_outputs").last_hidden_state.to(device))
    cached = {name: value.to(device) for name, value in cached.items()}
    loss = model(encoder_outputs=states, **cached).loss.item()  # in eval as well: without dropout
    model.train()
    return math.fabs(loss - plain) / plain


if __name__ == "__main__":
    main()
