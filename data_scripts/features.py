"""A frozen encoder sees each picture once: its output goes to an Arrow file and is read from there ever after."""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from datasets import Array2D, Dataset, DatasetDict, concatenate_datasets
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

SHARD_SIZE = 512  # pictures a file: what a kill can cost


def encoder_fingerprint(encoder: torch.nn.Module, image_processor) -> str:
    """A digest of the encoder's layers, weights and statistics and of all that the image processor does."""
    digest = hashlib.sha256(f"{image_processor.to_json_string()} {encoder}".encode())
    for name, value in encoder.state_dict().items():
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
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> Dataset:
    """What a frozen encoder says of every picture of a split, computed at most once.

    Args:
        dataset: Rows with an `image`.
        encoder: Pixels (batch, 3, height, width) to states (batch, positions, size), without gradient and in eval.
        image_processor: Pictures to pixels.
        fingerprint: Of encoder and image processor; another one never meets this one's files.
        batch_size: Pictures the encoder sees together.
        device: Where the encoder is.

    Returns:
        As many rows, in the same order, with the one column `encoder_features`: float16 (positions, size).

    Under several processes each computes its share of the files and waits for the others. Files are written beside and
    renamed by `datasets`, 512 pictures each, so that after a kill all but the last few are there.
    """
    state = PartialState()
    pictures = dataset.select_columns(["image"])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "showtell_features" / fingerprint
    os.makedirs(folder, exist_ok=True)
    starts = range(0, len(pictures), SHARD_SIZE)
    shards = [pictures.select(range(start, min(start + SHARD_SIZE, len(pictures)))) for start in starts]
    paths = [folder / f"{pictures_fingerprint(shard)}.arrow" for shard in shards]

    def encode(images: list) -> torch.Tensor:
        pixels = image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            return encoder(pixels.to(device))  # (batch, positions, size)

    # Dealt by place, not by what is missing: another process may be writing already.
    mine = list(zip(shards, paths, strict=True))[state.process_index :: state.num_processes]
    missing = [(shard, path) for shard, path in mine if not path.exists()]
    if missing:
        _write_shards(missing, encode, batch_size, show_progress=state.is_main_process)
    state.wait_for_everyone()
    return concatenate_datasets([Dataset.from_file(str(path)) for path in paths])


def _write_shards(shards: list[tuple[Dataset, Path]], encode: Callable, batch_size: int, show_progress: bool) -> None:
    """Encode the pictures of each shard into its file, after saying how much that is."""
    shape = tuple(encode([shards[0][0][0]["image"]]).shape[1:])  # (positions, size)
    columns = datasets.Features({"encoder_features": Array2D(shape, "float16")})
    num_pictures = sum(len(shard) for shard, _ in shards)
    megabytes = num_pictures * shape[0] * shape[1] * 2 / 1e6
    logger.info(
        f"Encoding {num_pictures:,} pictures once: {shape[0]} x {shape[1]} numbers each, "
        f"{megabytes:,.0f} MB in {shards[0][1].parent}"
    )
    free = shutil.disk_usage(shards[0][1].parent).free / 1e6
    if megabytes > free:
        raise OSError(
            f"the features of {num_pictures:,} pictures need {megabytes:,.0f} MB in {shards[0][1].parent}, where {free:,.0f} "
            "are free: make room, set HF_DATASETS_CACHE to a larger disk, or give --cache_features false"
        )
    datasets.disable_progress_bars()  # ours counts pictures over all files
    with tqdm(total=num_pictures, unit="picture", desc="encoding", disable=not show_progress) as bar:

        def encode_batch(batch: dict) -> dict:
            states = encode(batch["image"])
            bar.update(len(states))
            return {"encoder_features": states.half().cpu().numpy()}

        for shard, path in shards:
            shard.map(
                encode_batch,
                batched=True,
                batch_size=batch_size,
                remove_columns=["image"],
                features=columns,
                cache_file_name=str(path),
                new_fingerprint=path.stem,
            )
    datasets.enable_progress_bars()


def encode_splits(dataset: DatasetDict, encoder: torch.nn.Module, image_processor) -> dict[str, Dataset]:
    """The features of every split, by a frozen encoder that gives `last_hidden_state`."""
    encoder = encoder.eval()
    fingerprint = encoder_fingerprint(encoder, image_processor)
    device = next(encoder.parameters()).device
    return {
        split: cache_features(
            rows, lambda pixels: encoder(pixels).last_hidden_state, image_processor, fingerprint, device=device
        )
        for split, rows in dataset.items()
    }
