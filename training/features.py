"""A frozen encoder sees each image once: its output goes to an Arrow file and is read from there ever after."""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, concatenate_datasets
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from data_scripts.augmentations import augment_image

logger = logging.getLogger(__name__)

SHARD_SIZE = 512  # images a file: what a kill can cost
# Of a transformers encoder's config, what changes its output and shows in no weight's shape.
CONFIG_KEYS = ("num_attention_heads", "hidden_act", "layer_norm_eps")
BATCH_SIZE = 32  # images the encoder sees together; files hold whole batches


def encoder_fingerprint(encoder: torch.nn.Module, image_processor) -> str:
    """A digest of the encoder's layers, settings, weights and statistics and of all that the image processor does."""
    settings = getattr(encoder, "config", None)  # layers do not show how many heads they have
    settings = {} if settings is None else {name: getattr(settings, name, None) for name in CONFIG_KEYS}
    return weights_digest(encoder, f"{image_processor.to_json_string()} {encoder} {settings}")


def weights_digest(module: torch.nn.Module, about: str = "") -> str:
    """A digest of all weights and statistics of a module, and of what is told about it."""
    digest = hashlib.sha256(about.encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def images_fingerprint(images: Dataset) -> str:
    """A digest of the images' own bytes, in their order; an image kept as a path counts with its file's bytes."""
    digest = hashlib.sha256()
    for image in images.cast_column("image", datasets.Image(decode=False))["image"]:
        digest.update(image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes())
    return digest.hexdigest()


def cache_features(
    dataset: DatasetDict,
    encoder: Callable[[torch.Tensor], torch.Tensor],
    image_processor,
    fingerprint: str,
    int8: bool = False,
    num_augmentations: Mapping[str, int] | None = None,
    batch_size: int = BATCH_SIZE,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, list[Dataset]]:
    """What a frozen encoder says of every image, computed at most once.

    Args:
        dataset: Splits of rows with an `image`.
        encoder: Pixels (batch, 3, height, width) to states (batch, positions, size), without gradient and in eval.
        image_processor: Images to pixels.
        fingerprint: Of encoder and image processor; another one never meets this one's files.
        int8: Whether to keep each state in 8 bits a number, as shares of its largest: half the disk, and not exact.
        num_augmentations: Of a split's images, see `augment_image`; one where none is told.
        batch_size: Images the encoder sees together.
        num_workers: Processes that decode images; 0 decodes in this one.
        device: Where the encoder is.

    Returns:
        Of each split its views: as many rows, in the same order, with the columns of `quantize_features`.

    Under several processes each computes its share of the files and waits for the others. Files are written beside and
    renamed by `datasets`, 512 images each, so that after a kill all but the last few are there.

    Raises:
        OSError: The disk has no room for them, or another process's are not to be seen from here.
    """
    state = PartialState()
    kept = feature_files(dataset, fingerprint, int8, num_augmentations or {})
    # The same images twice are one file.
    files = list({file.path: file for views in kept.values() for view in views for file in view}.values())

    def to_pixels(pil_images: list[Image.Image]) -> torch.Tensor:
        return image_processor(images=pil_images, return_tensors="pt")["pixel_values"]  # (batch, 3, height, width)

    def encode(pixels: torch.Tensor) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return quantize_features(encoder(pixels.to(device)), int8)

    missing = [file for file in files if not file.path.exists()]
    # Dealt by place, not by what is missing: another process may be writing already.
    mine = [file for file in files[state.process_index :: state.num_processes] if file in missing]
    if mine:
        images = ImagesOfFiles(mine)
        example = encode(to_pixels([images[0]]))
        _check_room(sum(len(file.rows) for file in missing), example)
        loader = DataLoader(
            images,
            batch_sampler=batches_of_shards((len(file.rows) for file in mine), batch_size),
            num_workers=num_workers,
            collate_fn=to_pixels,
            generator=torch.Generator(),  # else it draws a number, and a run that finds the features has others after it
        )
        _write_files(mine, map(encode, loader), example, batch_size, show_progress=state.is_main_process)
    if not missing:
        number, folder = sum(len(file.rows) for file in files), features_folder(fingerprint, int8)
        logger.info(f"What the encoder says of {number:,} images is read from {folder}")
    state.wait_for_everyone()
    if lacking := [file.path.parent for file in files if not file.path.exists()]:
        raise OSError(
            f"{lacking[0]} lacks images that another process has encoded: set HF_DATASETS_CACHE to a folder that all "
            "machines share, or give --cache_features false"
        )
    return {
        split: [concatenate_datasets([Dataset.from_file(str(file.path)) for file in view]) for view in views]
        for split, views in kept.items()
    }


@dataclass(frozen=True, eq=False)
class FeatureFile:
    """Where the features of some images, rows with an `image`, are kept, in one view."""

    path: Path
    rows: Dataset
    view: int


def feature_files(
    dataset: DatasetDict, fingerprint: str, int8: bool, num_augmentations: Mapping[str, int]
) -> dict[str, list[list[FeatureFile]]]:
    """The files of each split's views, whether they are there or not; see `cache_features`."""
    files = {}
    for split, rows in dataset.items():
        images = rows.select_columns(["image"])
        starts = range(0, len(images), SHARD_SIZE)
        shards = [images.select(range(start, min(start + SHARD_SIZE, len(images)))) for start in starts]
        names = [f"{images_fingerprint(shard)}.arrow" for shard in shards]
        files[split] = []
        for view in range(num_augmentations.get(split, 1)):
            folder = features_folder(fingerprint, int8, view)
            files[split].append(
                [FeatureFile(folder / name, shard, view) for name, shard in zip(names, shards, strict=True)]
            )
    return files


def features_folder(fingerprint: str, int8: bool = False, view: int = 0) -> Path:
    """Where the features of one encoder, kept one way, of one view of images lie."""
    name = fingerprint + "-int8" * int8 + f"-view{view}" * (view > 0)
    return Path(datasets.config.HF_DATASETS_CACHE) / "showtell_features" / name


class ImagesOfFiles(torch.utils.data.Dataset):
    """The images of files, those of one behind those of the other, each in its file's view."""

    def __init__(self, files: Sequence[FeatureFile]):
        self.rows = concatenate_datasets([file.rows for file in files])
        self.views = [file.view for file in files for _ in range(len(file.rows))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Image.Image:
        return augment_image(self.rows[place]["image"].convert("RGB"), self.views[place])


def quantize_features(states: torch.Tensor, int8: bool = False) -> dict[str, np.ndarray]:
    """States (batch, positions, size) as they are kept: `encoder_features`, float16 or, with their `feature_scale`, int8.

    The scale, float32 (batch, positions), is each state's largest number over 127.
    """
    states = states.float().cpu()
    if not int8:
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


def _check_room(num_images: int, example: dict) -> None:
    """Say how much is going to be kept, before it is computed.

    Raises:
        OSError: There is no room for it.
    """
    root = Path(datasets.config.HF_DATASETS_CACHE)
    megabytes = num_images * sum(value.nbytes for value in example.values()) / 1e6
    positions, size = example["encoder_features"].shape[1:]
    logger.info(
        f"Encoding {num_images:,} images once: {positions} x {size} numbers each, {megabytes:,.0f} MB in {root}"
    )
    os.makedirs(root, exist_ok=True)
    free = shutil.disk_usage(root).free / 1e6
    if megabytes > free:
        raise OSError(
            f"the features of {num_images:,} images need {megabytes:,.0f} MB in {root}, where {free:,.0f} are free: "
            "make room, set HF_DATASETS_CACHE to a larger disk, or give --int8_features true or --cache_features false"
        )


def _open_folder(folder: Path) -> None:
    """Make a folder, or clear it of what a killed run was writing; after a day no run can be at it any more."""
    os.makedirs(folder, exist_ok=True)
    for path in folder.glob("tmp*"):  # as `datasets` calls a file that is not whole
        if time.time() - path.stat().st_mtime > 24 * 60 * 60:
            path.unlink(missing_ok=True)


def _write_files(
    files: Sequence[FeatureFile], batches: Iterator[dict], example: dict, batch_size: int, show_progress: bool
) -> None:
    """Write what the encoder says into files.

    Args:
        batches: Columns of `batch_size` rows, fewer at a file's end.
        example: Columns of one row.
    """
    states = example["encoder_features"]
    columns = datasets.Features(encoder_features=datasets.Array2D(states.shape[1:], str(states.dtype)))
    if "feature_scale" in example:
        columns["feature_scale"] = datasets.List(datasets.Value("float32"))
    for folder in {file.path.parent for file in files}:
        _open_folder(folder)
    datasets.disable_progress_bars()  # ours counts images over all files
    with tqdm(
        total=sum(len(file.rows) for file in files), unit="image", desc="encoding", disable=not show_progress
    ) as bar:

        def next_batch(places: dict) -> dict:
            bar.update(len(places["place"]))
            return next(batches)

        for file in files:
            Dataset.from_dict({"place": range(len(file.rows))}).map(
                next_batch,
                batched=True,
                batch_size=batch_size,
                remove_columns=["place"],
                features=columns,
                cache_file_name=str(file.path),
                new_fingerprint=file.path.stem,
            )
    datasets.enable_progress_bars()


def encode_splits(
    dataset: DatasetDict, encoder: torch.nn.Module, image_processor, args, num_augmentations: int = 1
) -> dict[str, list[Dataset]]:
    """The features of every split, by an encoder that gives `last_hidden_state`.

    Args:
        args: `cache_features`, `int8_features`, `compile_encoder` and `dataloader_num_workers` of the run.
        num_augmentations: Of the training images; the others have one.

    Returns:
        Of each split its views, see `augment_image`; None for each where they are not kept, or the encoder learns.
    """
    views = {split: num_augmentations if split == "train" else 1 for split in dataset}
    learns = any(parameter.requires_grad for parameter in encoder.parameters())
    if learns or not args.cache_features:
        logger.info(
            f"The encoder sees every image anew each time: {'it learns' if learns else '--cache_features false'}"
        )
        return {split: [None] * number for split, number in views.items()}
    encoder.eval()
    encode = compiled_for_batches(encoder) if args.compile_encoder else encoder
    return cache_features(
        dataset,
        lambda pixels: encode(pixels).last_hidden_state,
        image_processor,
        encoder_fingerprint(encoder, image_processor),
        args.int8_features,
        views,
        num_workers=args.dataloader_num_workers,
        device=next(encoder.parameters()).device,
    )


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
