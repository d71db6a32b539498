"""A frozen encoder sees each picture once: its output goes to an Arrow file and is read from there ever after."""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, concatenate_datasets
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from data_scripts.views import view_of_picture

logger = logging.getLogger(__name__)

SHARD_SIZE = 512  # pictures a file: what a kill can cost
# Of a transformers encoder's config, what changes its output and shows in no weight's shape.
TELLING = ("num_attention_heads", "hidden_act", "layer_norm_eps")
BATCH_SIZE = 32  # pictures the encoder sees together; files hold whole batches


def encoder_fingerprint(encoder: torch.nn.Module, image_processor) -> str:
    """A digest of the encoder's layers, settings, weights and statistics and of all that the image processor does."""
    settings = getattr(encoder, "config", None)  # layers do not show how many heads they have
    settings = {} if settings is None else {name: getattr(settings, name, None) for name in TELLING}
    return weights_digest(encoder, f"{image_processor.to_json_string()} {encoder} {settings}")


def weights_digest(module: torch.nn.Module, about: str = "") -> str:
    """A digest of all weights and statistics of a module, and of what is told about it."""
    digest = hashlib.sha256(about.encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def pictures_fingerprint(pictures: Dataset) -> str:
    """A digest of the pictures' own bytes, in their order; a picture kept as a path counts with its file's bytes."""
    digest = hashlib.sha256()
    for picture in pictures.cast_column("image", datasets.Image(decode=False))["image"]:
        digest.update(picture["bytes"] if picture["bytes"] is not None else Path(picture["path"]).read_bytes())
    return digest.hexdigest()


def cache_features(
    dataset: Dataset,
    encoder: Callable[[torch.Tensor], torch.Tensor],
    image_processor,
    fingerprint: str,
    in_8_bits: bool = False,
    view: int = 0,
    batch_size: int = BATCH_SIZE,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Dataset:
    """What a frozen encoder says of every picture of a split, computed at most once.

    Args:
        dataset: Rows with an `image`.
        encoder: Pixels (batch, 3, height, width) to states (batch, positions, size), without gradient and in eval.
        image_processor: Pictures to pixels.
        fingerprint: Of encoder and image processor; another one never meets this one's files.
        in_8_bits: Whether to keep each state in 8 bits a number, as shares of its largest: half the disk, and not exact.
        view: Which view of each picture it sees, see `view_of_picture`.
        batch_size: Pictures the encoder sees together.
        num_workers: Processes that decode pictures; 0 decodes in this one.
        device: Where the encoder is.

    Returns:
        As many rows, in the same order, with the columns of `store_states`.

    Under several processes each computes its share of the files and waits for the others. Files are written beside and
    renamed by `datasets`, 512 pictures each, so that after a kill all but the last few are there.
    """
    state = PartialState()
    pictures = dataset.select_columns(["image"])
    folder = (
        Path(datasets.config.HF_DATASETS_CACHE)
        / "showtell_features"
        / (fingerprint + "-int8" * in_8_bits + f"-view{view}" * (view > 0))
    )
    os.makedirs(folder, exist_ok=True)
    starts = range(0, len(pictures), SHARD_SIZE)
    shards = [pictures.select(range(start, min(start + SHARD_SIZE, len(pictures)))) for start in starts]
    paths = [folder / f"{pictures_fingerprint(shard)}.arrow" for shard in shards]

    def to_pixels(rows: list[dict]) -> torch.Tensor:
        images = [view_of_picture(row["image"].convert("RGB"), view) for row in rows]
        return image_processor(images=images, return_tensors="pt")["pixel_values"]  # (batch, 3, height, width)

    def encode(pixels: torch.Tensor) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return store_states(encoder(pixels.to(device)), in_8_bits)

    # Dealt by place, not by what is missing: another process may be writing already.
    mine = list(zip(paths, shards, strict=True))[state.process_index :: state.num_processes]
    missing = {path: shard for path, shard in mine if not path.exists()}  # the same pictures twice are one file
    if missing:
        rows = concatenate_datasets(list(missing.values()))
        files = {path: len(shard) for path, shard in missing.items()}
        loader = DataLoader(
            rows,
            batch_sampler=batches_of_shards(files.values(), batch_size),
            num_workers=num_workers,
            collate_fn=to_pixels,
            generator=torch.Generator(),  # else it draws a number, and a run that finds the features has others after it
        )
        example = encode(to_pixels([rows[0]]))
        _write_files(files, map(encode, loader), example, batch_size, show_progress=state.is_main_process)
    else:
        logger.info(f"What the encoder says of {len(pictures):,} pictures is read from {folder}")
    state.wait_for_everyone()
    if not all(path.exists() for path in paths):
        raise OSError(
            f"{folder} lacks pictures that another process has encoded: set HF_DATASETS_CACHE to a folder that all machines "
            "share, or give --cache_features false"
        )
    return concatenate_datasets([Dataset.from_file(str(path)) for path in paths])


def store_states(states: torch.Tensor, in_8_bits: bool = False) -> dict[str, np.ndarray]:
    """States (batch, positions, size) as they are kept: `encoder_features`, float16 or, with their `feature_scale`, int8.

    The scale, float32 (batch, positions), is each state's largest number over 127.
    """
    states = states.float().cpu()
    if not in_8_bits:
        return {"encoder_features": states.half().numpy()}
    scale = states.abs().amax(dim=-1) / 127  # (batch, positions)
    shares = states / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return {"encoder_features": shares.round().to(torch.int8).numpy(), "feature_scale": scale.numpy()}


def batches_of_shards(sizes: Iterable[int], batch_size: int) -> list[range]:
    """Places of shards that lie behind each other, in batches none of which reaches into two of them."""
    batches, first = [], 0
    for size in sizes:
        end = first + size
        batches += [range(start, min(start + batch_size, end)) for start in range(first, end, batch_size)]
        first = end
    return batches


def _write_files(
    files: dict[Path, int], batches: Iterator[dict], example: dict, batch_size: int, show_progress: bool
) -> None:
    """Write so many rows into each file, after saying how much that is.

    Args:
        files: Path and number of rows.
        batches: Columns of `batch_size` rows, fewer at a file's end.
        example: Columns of one row.
    """
    states = example["encoder_features"]
    columns = datasets.Features(encoder_features=datasets.Array2D(states.shape[1:], str(states.dtype)))
    if "feature_scale" in example:
        columns["feature_scale"] = datasets.List(datasets.Value("float32"))
    folder, num_pictures = next(iter(files)).parent, sum(files.values())
    megabytes = num_pictures * sum(value.nbytes for value in example.values()) / 1e6
    positions, size = states.shape[1:]
    logger.info(
        f"Encoding {num_pictures:,} pictures once: {positions} x {size} numbers each, {megabytes:,.0f} MB in {folder}"
    )
    free = shutil.disk_usage(folder).free / 1e6
    if megabytes > free:
        raise OSError(
            f"the features of {num_pictures:,} pictures need {megabytes:,.0f} MB in {folder}, where {free:,.0f} are free: "
            "make room, set HF_DATASETS_CACHE to a larger disk, or give --int8_features true or --cache_features false"
        )
    datasets.disable_progress_bars()  # ours counts pictures over all files
    with tqdm(total=num_pictures, unit="picture", desc="encoding", disable=not show_progress) as bar:

        def next_batch(places: dict) -> dict:
            bar.update(len(places["place"]))
            return next(batches)

        for path, num_rows in files.items():
            Dataset.from_dict({"place": range(num_rows)}).map(
                next_batch,
                batched=True,
                batch_size=batch_size,
                remove_columns=["place"],
                features=columns,
                cache_file_name=str(path),
                new_fingerprint=path.stem,
            )
    datasets.enable_progress_bars()


def encode_splits(
    dataset: DatasetDict, encoder: torch.nn.Module, image_processor, args, num_views: int = 1
) -> dict[str, list[Dataset]]:
    """The features of every split, by an encoder that gives `last_hidden_state`.

    Args:
        args: `cache_features`, `int8_features`, `compile_encoder` and `dataloader_num_workers` of the run.
        num_views: Of the training pictures; the others have one.

    Returns:
        Of each split its views, see `view_of_picture`; None for each where they are not kept, or the encoder learns.
    """
    views = {split: range(num_views if split == "train" else 1) for split in dataset}
    learns = any(parameter.requires_grad for parameter in encoder.parameters())
    if learns or not args.cache_features:
        logger.info(
            f"The encoder sees every picture anew each time: {'it learns' if learns else '--cache_features false'}"
        )
        return {split: [None] * len(views[split]) for split in dataset}
    encoder.eval()
    fingerprint = encoder_fingerprint(encoder, image_processor)
    device = next(encoder.parameters()).device
    encode = compiled_for_batches(encoder) if args.compile_encoder else encoder
    return {
        split: [
            cache_features(
                rows,
                lambda pixels: encode(pixels).last_hidden_state,
                image_processor,
                fingerprint,
                args.int8_features,
                view,
                num_workers=args.dataloader_num_workers,
                device=device,
            )
            for view in views[split]
        ]
        for split, rows in dataset.items()
    }


def compiled_for_batches(encoder: torch.nn.Module, batch_size: int = BATCH_SIZE) -> Callable:
    """The encoder as `torch.compile` makes it, for whole batches; others, for which it would compile anew, it sees as it is.

    Raises:
        OSError: At its first batch, where it cannot be compiled, most often for want of a C++ compiler.
    """
    compiled = torch.compile(encoder)

    def encode(pixels: torch.Tensor):
        if len(pixels) != batch_size:
            return encoder(pixels)
        try:
            return compiled(pixels)
        except RuntimeError as error:
            reason = " ".join(str(error).split("\n")[:2])  # "backend='inductor' raised:" and what it raised
            raise OSError(f"--compile_encoder true: {reason}") from error

    return encode
