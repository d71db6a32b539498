"""Time an epoch of either training script against the reference implementation, full-size models with random weights.

    python -m benchmarks.train_epoch --dataset_name data/paragraphs --json train_epoch.json

The reference implementation is timed over a few steps, all of one size; showtell is the script itself, over an epoch of few images
whose features are cached, also in bfloat16 where the machine has instructions for it. Encoding the images is timed apart, for
growing numbers of images.
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
from benchmarks import reference
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
from modeling.captioner import Captioner
from training.arguments import DataArguments
from training.batches import CaptionCollator, CaptionPairs
from training.features import Features, encode_splits

# In an epoch of showtell; fewer would not fill batches of captions of similar length, as the 5,715 of the subset do.
NUM_IMAGES = {"lstm": 512, "vit_gpt2": 48}
EPOCH_CAPTIONS = 5715  # training images of the Stanford Paragraphs subset


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, runs=2)
    parser.add_argument(
        "--captioners", choices=["lstm", "vit_gpt2"], nargs="+", default=["lstm", "vit_gpt2"], help="captioners to time"
    )
    parser.add_argument("--dataset_name", help="folder of a prepared dataset; made-up paragraphs if not given")
    parser.add_argument("--steps", type=int, default=1, help="number of steps of the reference implementation per run")
    args = parser.parse_args(argv)
    os.environ["ACCELERATE_USE_CPU"] = str(args.device == "cpu")
    result = {"machine": describe_machine(args.device)}
    captions = paragraphs(args.dataset_name, EPOCH_CAPTIONS)
    for kind in args.captioners:
        with tempfile.TemporaryDirectory() as folder:
            datasets.config.HF_DATASETS_CACHE = Path(folder)  # for features
            result[kind] = compare(kind, captions, Path(folder), args)
    write_result(result, args.json)


def compare(kind: str, rows: datasets.Dataset, folder: Path, args) -> dict:
    """Seconds per caption of both sides, in turns."""
    texts = [texts[0] for texts in rows["captions"]]
    captioner = build_captioner(kind, texts)
    model, processor = captioner.model.to(args.device).train(), captioner.processor
    longest = max(CaptionPairs(rows, processor.tokenizer).lengths)
    loader = DataLoader(reference.CaptionDataset(rows, processor, longest), BATCH_SIZE[kind], shuffle=True)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    batches = iter(loader)

    def plain() -> float:
        start = time.perf_counter()
        for _ in range(args.steps):
            batch = next(batches)
            reference.train_step(model, optimizer, **{name: value.to(args.device) for name, value in batch.items()})
        synchronize(args.device)
        return (time.perf_counter() - start) / args.steps / BATCH_SIZE[kind]

    agreement = losses_agree(captioner, rows, args.device)
    save_parts(kind, captioner, folder)
    growth = []
    for share in (4, 2, 1):
        size = NUM_IMAGES[kind] // share
        start = time.perf_counter()
        encode(captioner, rows.select(range(size)))
        encoding = time.perf_counter() - start
        growth.append(
            {
                "images": size,
                "encoding_seconds": encoding,
                "epoch_seconds": size * ours(kind, rows, size, folder, args),
            }
        )
    epoch = partial(ours, kind, rows, NUM_IMAGES[kind], folder, args)
    sides = {"reference": plain, "showtell": epoch}
    if computes_in_bfloat16(torch.device(args.device)):
        sides["showtell_in_bfloat16"] = partial(epoch, bf16=True)
    plain()  # warm-up; showtell has had its own in `growth`
    measured = in_turns(sides, args.runs)
    encoding = growth[-1]["encoding_seconds"] / growth[-1]["images"]
    seconds = medians(measured)
    return {
        "longest_caption": int(longest),
        "seconds_per_caption": measured,
        "seconds_per_epoch": {name: value * EPOCH_CAPTIONS for name, value in seconds.items()},
        "speedup": {name: ratio_of_medians(measured, "reference", name) for name in sides if name != "reference"},
        "speedup_with_encoding": seconds["reference"] / (seconds["showtell"] + encoding),
        "growth": growth,
        "relative_difference_of_losses": agreement,
    }


def ours(kind: str, rows: datasets.Dataset, size: int, folder: Path, args, bf16: bool = False) -> float:
    """Seconds per caption in an epoch of `size` captions, as the training script reports them."""
    table = rows.select(range(size))
    datasets.DatasetDict(train=table, validation=table.select(range(2))).save_to_disk(folder / f"set-{size}")
    options = {
        "dataset_name": folder / f"set-{size}",
        "output_dir": folder / "run",
        "num_train_epochs": 1,
        "save_epochs": 2,  # only the last checkpoint, which is not timed
        "per_device_train_batch_size": BATCH_SIZE[kind],
        "load_best_model_at_end": "false",
        "overwrite_output_dir": "true",
        "report_to": "none",
        "max_length": 4,
        "bf16": bf16,
    }
    if kind == "lstm":
        script = train_lstm
        options |= {"model_name_or_path": folder / "captioner"}
    else:
        script = train_vit_gpt2
        options |= {"encoder": folder / "encoder", "decoder": folder / "decoder", "prompt": ""}
    AcceleratorState._reset_state(reset_partial_state=True)  # or the process keeps the precision of its first run
    script.main([text for name, value in options.items() for text in (f"--{name}", str(value))])
    return json.loads((folder / "run" / "results.json").read_text())["train"]["seconds"] / size


def save_parts(kind: str, captioner: Captioner, folder: Path) -> None:
    """Save what the training script starts from: the LSTM captioner whole, ViT-GPT2's encoder and decoder apart."""
    model, processor = captioner.model, captioner.processor
    if kind == "lstm":
        captioner.save(folder / "captioner")
    else:
        model.encoder.save_pretrained(folder / "encoder")
        processor.image_processor.save_pretrained(folder / "encoder")
        model.decoder.save_pretrained(folder / "decoder")
        processor.tokenizer.save_pretrained(folder / "decoder")


def encode(captioner: Captioner, rows: datasets.Dataset) -> Features:
    """The features of rows, encoded unless they are cached."""
    table = datasets.DatasetDict(train=rows)
    return encode_splits(table, captioner.encoder, captioner.image_processor, DataArguments())["train"][0]


@torch.no_grad()
def losses_agree(captioner: Captioner, rows: datasets.Dataset, device: str) -> float:
    """Relative difference between the losses of a batch by the reference implementation and from cached features."""
    model, processor = captioner.model, captioner.processor
    rows = rows.select(range(BATCH_SIZE["vit_gpt2"]))
    pairs = CaptionPairs(rows, processor.tokenizer, features=[encode(captioner, rows)])
    dataset = reference.CaptionDataset(rows, processor, max(pairs.lengths))
    batch = next(iter(DataLoader(dataset, len(rows))))
    plain = reference.caption_loss(model.eval(), **{name: value.to(device) for name, value in batch.items()}).item()
    cached = CaptionCollator(processor)(pairs.__getitems__(range(len(rows))))
    states = type(cached["encoder_outputs"])(cached.pop("encoder_outputs").last_hidden_state.to(device))
    cached = {name: value.to(device) for name, value in cached.items()}
    loss = model(encoder_outputs=states, **cached).loss.item()  # in eval, too: no dropout
    model.train()
    return math.fabs(loss - plain) / plain


if __name__ == "__main__":
    main()
