"""Features of a frozen encoder, computed once per image and augmentation and read from disk, memory-mapped, ever after."""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from modeling.fingerprint import weights_digest
from modeling.onnx_encoder import fastest_encoder
from system.errors import UserError

logger = logging.getLogger(__name__)

IMAGES_PER_FILE = 512  # what a kill can cost
BATCH_SIZE = 32  # images the encoder encodes together; files hold whole batches
# What a config says of where a model comes from, and not of what it computes.
NOT_COMPUTED = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
)


class Features:
    """Rows of cached features: a column `encoder_features` and, of int8 ones, `feature_scale`; see `quantize_features`.

    Args:
        files: Paths of the columns' arrays, files of rows that follow each other.
        rows: Numbers of the rows among all of them; all in their order where None.
    """

    def __init__(self, files: Sequence[dict[str, Path]], rows: np.ndarray | None = None):
        self.files = files
        self._arrays = self._open()
        self.starts = np.cumsum([0] + [len(arrays["encoder_features"]) for arrays in self._arrays])
        self.rows = np.arange(self.starts[-1]) if rows is None else rows

    def _open(self) -> list[dict[str, np.ndarray]]:
        return [{name: np.load(path, mmap_mode="r") for name, path in file.items()} for file in self.files]

    def __getstate__(self) -> dict:
        """A process that decodes images opens the files itself: a pickled memory map is a copy of all of it."""
        return {name: value for name, value in vars(self).items() if name != "_arrays"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._arrays = self._open()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, list[np.ndarray]]:
        rows = self.rows[indices]
        files = np.searchsorted(self.starts, rows, side="right") - 1
        return {
            name: [self._arrays[file][name][row - self.starts[file]] for file, row in zip(files, rows, strict=True)]
            for name in self._arrays[0]
        }

    def select(self, indices: Sequence[int]) -> "Features":
        return Features(self.files, self.rows[indices])


def encode_splits(
    dataset: DatasetDict, encoder: torch.nn.Module, image_processor, args, num_augmentations: int = 1
) -> dict[str, list[Features | None]]:
    """The features of every split, by an encoder that gives `last_hidden_state`.

    Args:
        args: `cache_features`, `int8_features`, `compile_encoder` and `dataloader_num_workers` of the run.
        num_augmentations: Of the training images; those of other splits are not augmented.

    Returns:
        Of each split its augmentations, see `augment_image`; None for each where features are not cached, or the encoder is trained.

    Raises:
        UserError: An option of the cache is given, and the encoder is trained.
    """
    augmentations = {split: num_augmentations if split == "train" else 1 for split in dataset}
    trains = any(parameter.requires_grad for parameter in encoder.parameters())
    if trains or not args.cache_features:
        if trains and (args.int8_features or args.compile_encoder):
            option = "int8_features" if args.int8_features else "compile_encoder"
            raise UserError(f"--{option} true has no effect: the encoder is trained, and its features are not cached")
        logger.info(f"Feature cache disabled: {'the encoder is trainable' if trains else '--cache_features false'}.")
        return {split: [None] * number for split, number in augmentations.items()}
    encoder.eval()
    num_images = sum(len(rows) * augmentations[split] for split, rows in dataset.items())
    encode = (
        compiled_for_batches(encoder) if args.compile_encoder else fastest_encoder(encoder, num_images, logger.info)
    )
    return cache_features(
        dataset,
        lambda pixels: encode(pixels).last_hidden_state,
        image_processor,
        encoder_fingerprint(encoder, image_processor),
        int8=args.int8_features,
        num_augmentations=augmentations,
        num_workers=args.dataloader_num_workers,
        device=next(encoder.parameters()).device,
    )


# ---- Keys -----------------------------------------------------------------------------------------------------------


def encoder_fingerprint(encoder: torch.nn.Module, image_processor) -> str:
    """A digest of the encoder's layers, config, weights and statistics, and of all that the image processor does."""
    config = getattr(encoder, "config", None)  # layers do not show how many heads they have
    settings = {} if config is None else {k: v for k, v in config.to_dict().items() if k not in NOT_COMPUTED}
    about = f"{image_processor.to_json_string()} {encoder} {json.dumps(settings, sort_keys=True, default=str)}"
    return weights_digest(encoder, about)


def images_fingerprint(images: Dataset) -> str:
    """A digest of the images' bytes, in their order; an image kept as a path counts with its file's bytes."""
    digest = hashlib.sha256()
    for image in images.cast_column("image", datasets.Image(decode=False))["image"]:
        digest.update(image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class FeatureFile:
    """Where the features of some images, rows with an `image`, are cached, in one augmentation."""

    path: Path  # without suffix: each column is an .npy file of its own
    rows: Dataset
    augmentation: int

    def exists(self) -> bool:
        return self.column("encoder_features").exists()  # written last

    def column(self, name: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{name}.npy")


def feature_files(
    dataset: DatasetDict, fingerprint: str, int8: bool, num_augmentations: Mapping[str, int]
) -> dict[str, list[list[FeatureFile]]]:
    """The files of each split's augmentations, whether they exist or not; see `cache_features`."""
    files = {}
    for split, rows in dataset.items():
        images = rows.select_columns(["image"])
        starts = range(0, len(images), IMAGES_PER_FILE)
        parts = [images.select(range(start, min(start + IMAGES_PER_FILE, len(images)))) for start in starts]
        names = [images_fingerprint(part) for part in parts]
        files[split] = []
        for augmentation in range(num_augmentations.get(split, 1)):
            folder = features_folder(fingerprint, int8, augmentation)
            files[split].append(
                [FeatureFile(folder / name, part, augmentation) for name, part in zip(names, parts, strict=True)]
            )
    return files


def features_folder(fingerprint: str, int8: bool = False, augmentation: int = 0) -> Path:
    """Where the features of one encoder, in one format and of one augmentation, are cached."""
    name = fingerprint + "-int8" * int8 + f"-augmentation{augmentation}" * (augmentation > 0)
    return Path(datasets.config.HF_DATASETS_CACHE) / "showtell_features" / name


# ---- Computing ------------------------------------------------------------------------------------------------------


def cache_features(
    dataset: DatasetDict,
    encoder: Callable[[torch.Tensor], torch.Tensor],
    image_processor,
    fingerprint: str,
    *,
    int8: bool = False,
    num_augmentations: Mapping[str, int] | None = None,
    batch_size: int = BATCH_SIZE,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, list[Features]]:
    """The features of every image, computed at most once.

    Args:
        dataset: Splits of rows with an `image`.
        encoder: Pixels (batch, 3, height, width) to states (batch, positions, size), without gradient and in eval.
        image_processor: Images to pixels.
        fingerprint: Of encoder and image processor; another one never reads this one's files.
        int8: Whether to cache each state as int8, relative to its largest value: half the disk, lossy.
        num_augmentations: Of a split's images, see `augment_image`; one where a split is not named.
        batch_size: Images the encoder encodes together.
        num_workers: Processes that decode images; 0 decodes in this one.
        device: Where the encoder is.

    Returns:
        Of each split its augmentations: as many rows, in the same order.

    Under several processes each computes its part of the files and waits for the others. Files hold 512 images and are renamed once
    they are whole, so that after a kill all but the last few are there.

    Raises:
        UserError: The disk has no room for them, or another process's cannot be read from here.
    """
    state = PartialState()
    by_split = feature_files(dataset, fingerprint, int8, num_augmentations or {})
    # The same images twice are one file.
    files = list({file.path: file for all_ in by_split.values() for one in all_ for file in one}.values())

    to_pixels = PixelCollator(image_processor)

    def encode(pixels: torch.Tensor) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return quantize_features(encoder(pixels.to(device)), int8)

    missing = [file for file in files if not file.exists()]
    # Dealt by position, not by what is missing: another process may be writing already.
    own = [file for file in files[state.process_index :: state.num_processes] if file in missing]
    if own:
        images = ImagesOfFiles(own)
        example = encode(to_pixels([images[0]]))
        _check_room(sum(len(file.rows) for file in missing), example)
        loader = DataLoader(
            images,
            batch_sampler=batches_of_files([len(file.rows) for file in own], batch_size),
            num_workers=num_workers,
            collate_fn=to_pixels,
            generator=torch.Generator(),  # else it draws a number, and a run that finds the features has others after it
        )
        for folder in {file.path.parent for file in own}:
            _open_folder(folder)
        with tqdm(total=len(images), unit="image", desc="encoding", disable=not state.is_main_process) as bar:
            _write_files(own, map(encode, loader), bar)
    if not missing:
        number, folder = sum(len(file.rows) for file in files), features_folder(fingerprint, int8)
        logger.info(f"Features of {number:,} images are read from {folder}")
    state.wait_for_everyone()
    if lacking := [file.path.parent for file in files if not file.exists()]:
        raise UserError(
            f"{lacking[0]} lacks images that another process has encoded: set HF_DATASETS_CACHE to a folder that all machines "
            "share, or give --cache_features false"
        )
    names = ["encoder_features", *(["feature_scale"] if int8 else [])]
    return {
        split: [Features([{name: file.column(name) for name in names} for file in one]) for one in all_]
        for split, all_ in by_split.items()
    }


class PixelCollator:
    """Images to the pixels of an image processor, (batch, 3, height, width); an object, so that it can be sent to workers."""

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        return self.image_processor(images=images, return_tensors="pt")["pixel_values"]


class ImagesOfFiles(torch.utils.data.Dataset):
    """The images of files, one file after the other, each in its file's augmentation."""

    def __init__(self, files: Sequence[FeatureFile]):
        self.rows = concatenate_datasets([file.rows for file in files])
        self.augmentations = [file.augmentation for file in files for _ in range(len(file.rows))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Image.Image:
        return augment_image(self.rows[index]["image"].convert("RGB"), self.augmentations[index])


def quantize_features(states: torch.Tensor, int8: bool = False) -> dict[str, np.ndarray]:
    """States (batch, positions, size) as they are cached: `encoder_features`, float16 or, with their `feature_scale`, int8.

    The scale, float32 (batch, positions), is each state's largest value over 127.
    """
    states = states.float().cpu()
    if not int8:
        return {"encoder_features": states.half().numpy()}
    scale = states.abs().amax(dim=-1) / 127  # (batch, positions)
    relative = states / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return {"encoder_features": relative.round().to(torch.int8).numpy(), "feature_scale": scale.numpy()}


def batches_of_files(sizes: Sequence[int], batch_size: int) -> list[range]:
    """Indices of the images of files that follow each other, in batches none of which reaches into two files."""
    batches, first = [], 0
    for size in sizes:
        end = first + size
        batches += [range(start, min(start + batch_size, end)) for start in range(first, end, batch_size)]
        first = end
    return batches


def _write_files(files: Sequence[FeatureFile], batches: Iterable[dict[str, np.ndarray]], bar: tqdm) -> None:
    """Write batches of columns into files, none of which a batch reaches beyond."""
    batches = iter(batches)
    for file in files:
        parts, num_rows = [], 0
        while num_rows < len(file.rows):
            parts.append(next(batches))
            num_rows += len(parts[-1]["encoder_features"])
            bar.update(len(parts[-1]["encoder_features"]))
        for name in sorted(parts[0], reverse=True):  # encoder_features last: where it exists, all do
            partial = file.path.with_name(f"tmp-{os.getpid()}-{file.path.name}.npy")
            np.save(partial, np.concatenate([part[name] for part in parts]))
            os.replace(partial, file.column(name))


def _check_room(num_images: int, example: dict) -> None:
    """Log how much is going to be cached before it is computed.

    Raises:
        UserError: There is no room for it.
    """
    root = Path(datasets.config.HF_DATASETS_CACHE)
    megabytes = num_images * sum(value.nbytes for value in example.values()) / 1e6
    positions, size = example["encoder_features"].shape[1:]
    logger.info(
        f"Encoding {num_images:,} images once: {positions} x {size} features each, {megabytes:,.0f} MB in {root}"
    )
    os.makedirs(root, exist_ok=True)
    free = shutil.disk_usage(root).free / 1e6
    if megabytes > free:
        raise UserError(
            f"the features of {num_images:,} images need {megabytes:,.0f} MB in {root}, where {free:,.0f} are free: make room, set "
            "HF_DATASETS_CACHE to a larger disk, or give --int8_features true or --cache_features false"
        )


def _open_folder(folder: Path) -> None:
    """Create a folder, or remove what a killed run was writing; after a day no run can be at it any more."""
    os.makedirs(folder, exist_ok=True)
    for path in folder.glob("tmp*"):
        if time.time() - path.stat().st_mtime > 24 * 60 * 60:
            path.unlink(missing_ok=True)


def compiled_for_batches(encoder: torch.nn.Module, batch_size: int = BATCH_SIZE) -> Callable:
    """The encoder compiled by `torch.compile` for whole batches; others, for which it would compile anew, go through it as it is.

    Raises:
        UserError: At its first batch, where it cannot be compiled, most often for lack of a C++ compiler.
    """
    compiled = torch.compile(encoder)

    def encode(pixels: torch.Tensor):
        if len(pixels) != batch_size:
            return encoder(pixels)
        try:
            return compiled(pixels)
        except RuntimeError as error:
            reason = " ".join(str(error).split("\n")[:2])  # "backend='inductor' raised:" and what it raised
            raise UserError(f"--compile_encoder true: {reason}") from error

    return encode
