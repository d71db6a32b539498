"""Features of a frozen encoder, computed once per image and augmentation and read from disk, memory-mapped, ever after."""

import hashlib
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, DatasetDict
from filelock import FileLock
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import CLIPImageProcessor, ViTImageProcessor

from data_scripts.augmentations import augment_image
from modeling.fingerprint import weights_digest
from modeling.onnx_encoder import fastest_encoder
from system.errors import UserError
from system.files import write_file

logger = logging.getLogger(__name__)

IMAGES_PER_PART = 512  # of a file that are written together: what a kill can cost
MAX_FILE_BYTES = 10**9  # a process can map some 65,000 files
BATCH_SIZE = 32  # images the encoder encodes together; parts hold whole batches
GPU_BATCH_SIZE = 128  # the same on a GPU, which small batches do not fill
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
        files: Paths of the columns' arrays, files of rows that follow each other. They are opened when they are read.
        sizes: Number of rows of each.
        rows: Numbers of the rows among all of them; all in their order where None.
    """

    def __init__(self, files: Sequence[dict[str, Path]], sizes: Sequence[int], rows: np.ndarray | None = None):
        self.files, self.sizes, self.rows = files, sizes, rows
        self.starts = np.cumsum([0, *sizes])
        self._arrays: dict[int, dict[str, np.ndarray]] = {}

    def _open(self, file: int) -> dict[str, np.ndarray]:
        if file not in self._arrays:
            self._arrays[file] = {name: np.load(path, mmap_mode="r") for name, path in self.files[file].items()}
        return self._arrays[file]

    def __getstate__(self) -> dict:
        """A process that decodes images opens the files itself: a pickled memory map is a copy of all of it."""
        return vars(self) | {"_arrays": {}}

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.rows is None else len(self.rows)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, list[np.ndarray]]:
        rows = np.asarray(indices) if self.rows is None else self.rows[indices]
        files = (np.searchsorted(self.starts, rows, side="right") - 1).tolist()
        return {
            name: [self._open(file)[name][row - self.starts[file]] for file, row in zip(files, rows, strict=True)]
            for name in self.files[0]
        }

    def select(self, indices: Sequence[int]) -> "Features":
        rows = np.asarray(indices) if self.rows is None else self.rows[indices]
        return Features(self.files, self.sizes, rows)


def encode_splits(
    dataset: DatasetDict, encoder: torch.nn.Module, image_processor, args, num_augmentations: int = 1
) -> dict[str, list[Features | None]]:
    """The features of every split, by an encoder that gives `last_hidden_state`.

    Args:
        args: `feature_cache`, `compile_encoder` and `dataloader_num_workers` of the run.
        num_augmentations: Of the training images; those of other splits are not augmented.

    Returns:
        Of each split its augmentations, see `augment_image`; None for each where features are not cached, or the encoder is trained.

    Raises:
        UserError: An option of the cache is given, and the encoder is trained.
    """
    augmentations = {split: num_augmentations if split == "train" else 1 for split in dataset}
    tables = {split: rows for split, rows in dataset.items() if isinstance(rows, Dataset)}  # shards are not cached
    trains = any(parameter.requires_grad for parameter in encoder.parameters())
    if trains or args.feature_cache == "none":
        if trains and (args.feature_cache == "int8" or args.compile_encoder):
            option = "compile_encoder true" if args.compile_encoder else "feature_cache int8"
            raise UserError(f"--{option} has no effect: the encoder is trained, and its features are not cached")
        logger.info(f"Feature cache disabled: {'the encoder is trainable' if trains else '--feature_cache none'}.")
        return {split: [None] * number for split, number in augmentations.items()}
    encoder.eval()
    device = next(encoder.parameters()).device
    num_images = sum(len(rows) * augmentations[split] for split, rows in tables.items())
    encode = (
        compiled_for_batches(encoder, batch_size_on(device))
        if args.compile_encoder
        else fastest_encoder(encoder, num_images, logger.info)
    )
    streamed = {split: [None] * augmentations[split] for split in dataset if split not in tables}
    return streamed | cache_features(
        tables,
        lambda pixels: encode(pixels).last_hidden_state,
        image_processor,
        encoder_fingerprint(encoder, image_processor),
        int8=args.feature_cache == "int8",
        num_augmentations=augmentations,
        num_workers=args.dataloader_num_workers,
        device=device,
    )


def batch_size_on(device: torch.device | str) -> int:
    """Images that are encoded together on a device."""
    return GPU_BATCH_SIZE if torch.device(device).type == "cuda" else BATCH_SIZE


# ---- Keys -----------------------------------------------------------------------------------------------------------


def encoder_fingerprint(encoder: torch.nn.Module, image_processor) -> str:
    """A digest of the encoder's layers, config, weights and statistics, and of all that the image processor does."""
    config = getattr(encoder, "config", None)  # layers do not show how many heads they have
    settings = {} if config is None else _what_is_computed(config.to_dict())
    pixels = json.loads(image_processor.to_json_string())
    pixels.pop("auto_map", None)  # where its code lies, which it knows once it has been saved
    pixels = json.dumps(pixels, indent=2, sort_keys=True)
    about = f"{pixels}\n {encoder} {json.dumps(settings, sort_keys=True, default=str)}"
    return weights_digest(encoder, about)


def _what_is_computed(settings: dict) -> dict:
    """A config without what does not change its model, in the configs inside it too."""
    inner = {key: _what_is_computed(value) if isinstance(value, dict) else value for key, value in settings.items()}
    return {key: value for key, value in inner.items() if key not in NOT_COMPUTED}


def image_fingerprints(rows: Dataset, size: int) -> Iterator[str]:
    """A digest of each `size` images that follow each other, the last ones fewer: of the content hashes that the caption table has.

    Only a table without them has its images read, those that are kept as paths too.
    """
    if "content_hash" in rows.column_names:
        for table in rows.select_columns(["content_hash"]).with_format("arrow").iter(size):
            yield hashlib.sha256("".join(table["content_hash"].to_pylist()).encode()).hexdigest()
        return
    images = rows.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    for start in range(0, len(images), size):
        digest = hashlib.sha256()
        for number in range(start, min(start + size, len(images))):
            image = images[number]["image"]
            content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
            digest.update(hashlib.sha256(content).hexdigest().encode())
        yield digest.hexdigest()


@dataclass(frozen=True, eq=False)
class FeatureFile:
    """Where the features of some images, rows with an `image` from `start` up to `stop`, are cached, in one augmentation."""

    path: Path  # without suffix: each column is an .npy file of its own
    rows: Dataset
    start: int
    stop: int
    augmentation: int

    def exists(self) -> bool:
        return self.column("encoder_features").exists()  # renamed last

    def column(self, name: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{name}.npy")

    def parts(self) -> list["Part"]:
        starts = range(self.start, self.stop, IMAGES_PER_PART)
        return [Part(self, start, min(start + IMAGES_PER_PART, self.stop)) for start in starts]


@dataclass(frozen=True, eq=False)
class Part:
    """Images of a file, from `start` up to `stop`, whose features are written together."""

    file: FeatureFile
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def mark(self) -> Path:
        """A file that is there once the part is written."""
        return self.file.path.with_name(f"{self.file.path.name}.part-{self.start - self.file.start}")

    def is_missing(self) -> bool:
        # In this order: the mark goes when the file has its name.
        return not self.mark.exists() and not self.file.exists()


def feature_files(
    dataset: DatasetDict, fingerprint: str, int8: bool, num_augmentations: Mapping[str, int], images_per_file: int
) -> dict[str, list[list[FeatureFile]]]:
    """The files of each split's augmentations, whether they exist or not; see `cache_features`."""
    files = {}
    for split, rows in dataset.items():
        names = list(image_fingerprints(rows, images_per_file))
        images = rows.select_columns(["image"])
        starts = range(0, len(images), images_per_file)
        bounds = [(start, min(start + images_per_file, len(images))) for start in starts]
        files[split] = []
        for augmentation in range(num_augmentations.get(split, 1)):
            folder = features_folder(fingerprint, int8, augmentation)
            files[split].append(
                [
                    FeatureFile(folder / name, images, *bound, augmentation)
                    for name, bound in zip(names, bounds, strict=True)
                ]
            )
    return files


def features_folder(fingerprint: str, int8: bool = False, augmentation: int = 0) -> Path:
    """Where the features of one encoder, in one format and of one augmentation, are cached."""
    name = fingerprint + "-int8" * int8 + f"-augmentation{augmentation}" * (augmentation > 0)
    return Path(datasets.config.HF_DATASETS_CACHE) / "showtell_features" / name


# ---- Computing ------------------------------------------------------------------------------------------------------


def cache_features(
    dataset: Mapping[str, Dataset],
    encoder: Callable[[torch.Tensor], torch.Tensor],
    image_processor,
    fingerprint: str,
    *,
    int8: bool = False,
    num_augmentations: Mapping[str, int] | None = None,
    batch_size: int | None = None,
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
        batch_size: Images the encoder encodes together; see `batch_size_on` where None.
        num_workers: Processes that decode images; 0 decodes in this one.
        device: Where the encoder is.

    Returns:
        Of each split its augmentations: as many rows, in the same order.

    Under several processes each computes its part and waits for the others; where the machines of a run have a cache each, the
    processes of a machine compute all for it. Files have about 1 GB; their parts of 512 images are marked once they are written, and a
    file gets its name when all are, so that after a kill all but the last few images are there.

    Raises:
        UserError: The disk has no room for them.
    """
    state = PartialState()

    def encode(pixels: torch.Tensor) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            return quantize_features(encoder(to_pixels.finish(pixels)), int8)

    to_pixels, batch_size = PixelCollator(image_processor, device), batch_size or batch_size_on(device)
    rows = next(iter(dataset.values()))
    shapes = _feature_shapes(
        features_folder(fingerprint, int8), lambda: encode(to_pixels([rows[0]["image"].convert("RGB")]))
    )
    size = sum(shape.num_bytes for shape in shapes.values())
    per_file = max(MAX_FILE_BYTES // size // IMAGES_PER_PART, 1) * IMAGES_PER_PART
    by_split = feature_files(dataset, fingerprint, int8, num_augmentations or {}, per_file)
    # The same images twice are one file.
    files = list({file.path: file for all_ in by_split.values() for one in all_ for file in one}.values())
    missing = [file for file in files if not file.exists()]
    number, num_processes = sharing_processes(Path(datasets.config.HF_DATASETS_CACHE))
    if missing:
        parts = [part for file in files for part in file.parts()]
        _check_room(sum(len(part) for part in parts if part.is_missing()), size, shapes["encoder_features"])
        # Dealt by position, not by what is missing: another process may be writing already.
        own = [part for part in parts[number::num_processes] if part.is_missing()]
        _encode_parts(own, encode, to_pixels, shapes, batch_size, num_workers)
    else:
        folder = features_folder(fingerprint, int8)
        logger.info(f"Features of {sum(file.stop - file.start for file in files):,} images are read from {folder}")
    state.wait_for_everyone()
    for file in files[number::num_processes]:
        _name_file(file, list(shapes))
    state.wait_for_everyone()
    if lacking := [file.path.parent for file in files if not file.exists()]:
        raise UserError(
            f"{lacking[0]} lacks images that another process has encoded: start again, and what is missing is encoded"
        )
    return {
        split: [
            Features(
                [{name: file.column(name) for name in shapes} for file in one], [file.stop - file.start for file in one]
            )
            for one in all_
        ]
        for split, all_ in by_split.items()
    }


def sharing_processes(folder: Path) -> tuple[int, int]:
    """(number of this process, how many) among the processes of the run that see the same folder: all, or those of a machine."""
    state = PartialState()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
    if local >= state.num_processes:
        return state.process_index, state.num_processes
    (name,) = broadcast_object_list([f".shared-{uuid.uuid4().hex}"])
    folder.mkdir(parents=True, exist_ok=True)
    if state.is_main_process:
        (folder / name).touch()
    state.wait_for_everyone()
    shared = all(gather_object([(folder / name).exists()]))
    state.wait_for_everyone()
    (folder / name).unlink(missing_ok=True)
    return (state.process_index, state.num_processes) if shared else (state.local_process_index, local)


@dataclass(frozen=True)
class ArrayShape:
    """What a column has of an image: shape and type."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def _feature_shapes(folder: Path, encode_one: Callable[[], dict[str, np.ndarray]]) -> dict[str, ArrayShape]:
    """The columns of an encoder's features; one image is encoded for it, once."""
    path = folder / "shapes.json"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            shapes = {name: (values.shape[1:], values.dtype.str) for name, values in encode_one().items()}
            write_file(path, json.dumps(shapes).encode())
    shapes = json.loads(path.read_text())
    return {name: ArrayShape(tuple(shape), dtype) for name, (shape, dtype) in shapes.items()}


class PixelCollator:
    """Images to the pixels of an image processor, (batch, 3, height, width); an object, so that it can be sent to workers.

    For a GPU the workers resize and crop alone, and give uint8; the GPU, see `finish`, does the arithmetic, which takes most of
    a processor's time. The pixels are the same.
    """

    def __init__(self, image_processor, device: torch.device | str = "cpu"):
        self.image_processor, self.device = image_processor, torch.device(device)
        on_gpu = self.device.type == "cuda" and isinstance(image_processor, (CLIPImageProcessor, ViTImageProcessor))
        self.options = {"do_rescale": False, "do_normalize": False} if on_gpu else {}

    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        return self.image_processor(images=images, return_tensors="pt", **self.options)["pixel_values"]

    def finish(self, pixels: torch.Tensor) -> torch.Tensor:
        """The pixels of a batch on the device."""
        pixels = pixels.to(self.device, non_blocking=True)
        if not self.options:
            return pixels
        shapes_stay = {"do_resize": False, "do_center_crop": False}
        return self.image_processor(images=pixels, return_tensors="pt", **shapes_stay)["pixel_values"]


class ImagesOfParts(torch.utils.data.Dataset):
    """The images of parts, one part after the other, each in its file's augmentation."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Image.Image:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        part = self.parts[number]
        image = part.file.rows[part.start + index - int(self.starts[number])]["image"]
        return augment_image(image.convert("RGB"), part.file.augmentation)

    def batches(self, size: int) -> list[range]:
        """Indices of the images in batches, none of which reaches into two parts."""
        bounds = pairwise(self.starts.tolist())
        return [range(start, min(start + size, end)) for first, end in bounds for start in range(first, end, size)]


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


def _encode_parts(
    parts: Sequence[Part],
    encode: Callable[[torch.Tensor], dict[str, np.ndarray]],
    to_pixels: "PixelCollator",
    shapes: dict[str, ArrayShape],
    batch_size: int,
    num_workers: int,
) -> None:
    """Encode the images of parts, and write the parts."""
    if not parts:
        return
    images = ImagesOfParts(parts)
    loader = DataLoader(
        images,
        batch_sampler=images.batches(batch_size),
        num_workers=num_workers,
        collate_fn=to_pixels,
        pin_memory=to_pixels.device.type == "cuda",
        generator=torch.Generator(),  # else it draws a number, and a run that finds the features has others after it
    )
    silent = not PartialState().is_main_process
    with tqdm(total=len(images), unit="image", desc="encoding", disable=silent) as bar:
        _write_parts(parts, map(encode, loader), shapes, bar)


def _write_parts(
    parts: Sequence[Part], batches: Iterable[dict[str, np.ndarray]], shapes: dict[str, ArrayShape], bar: tqdm
) -> None:
    """Write batches of columns into the files of parts, none of which a batch reaches beyond, and mark each part that is whole."""
    batches = iter(batches)
    for part in parts:
        file, written = part.file, 0
        file.path.parent.mkdir(parents=True, exist_ok=True)
        columns = {name: _partial_array(file, name, shape) for name, shape in shapes.items()}
        while written < len(part):
            batch = next(batches)
            first = part.start - file.start + written
            for name, values in batch.items():
                columns[name][first : first + len(values)] = values
            written += len(values)
            bar.update(len(values))
        for column in columns.values():
            column.flush()  # before the mark says so
        part.mark.touch()


def _partial_array(file: FeatureFile, name: str, shape: ArrayShape) -> np.ndarray:
    """The array of a file that has not its name yet, made where it is missing."""
    path = file.column(name).with_suffix(".partial")
    with FileLock(f"{file.path}.lock"):
        if path.exists():
            return np.lib.format.open_memmap(path, mode="r+")
        return np.lib.format.open_memmap(path, "w+", shape.dtype, (file.stop - file.start, *shape.shape))


def _name_file(file: FeatureFile, names: Sequence[str]) -> None:
    """Give a file all of whose parts are written its name."""
    parts, partial = file.parts(), {name: file.column(name).with_suffix(".partial") for name in names}
    if not file.exists():
        if not all(part.mark.exists() for part in parts):
            return
        for name in sorted(names, reverse=True):  # encoder_features last: where it exists, all do
            if partial[name].exists():
                os.replace(partial[name], file.column(name))
    elif not parts[0].mark.exists():
        return
    for path in (*(part.mark for part in parts), *partial.values(), Path(f"{file.path}.lock")):
        path.unlink(missing_ok=True)


def _check_room(num_images: int, image_bytes: int, shape: ArrayShape) -> None:
    """Log how much is going to be cached before it is computed.

    Raises:
        UserError: There is no room for it.
    """
    root = Path(datasets.config.HF_DATASETS_CACHE)
    megabytes = num_images * image_bytes / 1e6
    positions, size = shape.shape
    logger.info(
        f"Encoding {num_images:,} images and augmentations once: {positions} x {size} features each, {megabytes:,.0f} MB in {root}"
    )
    os.makedirs(root, exist_ok=True)
    free = shutil.disk_usage(root).free / 1e6
    if megabytes > free:
        raise UserError(
            f"the features of {num_images:,} images need {megabytes:,.0f} MB in {root}, where {free:,.0f} are free: make room, set "
            "HF_DATASETS_CACHE to a larger disk, or give --feature_cache int8 or none"
        )


def compiled_for_batches(encoder: torch.nn.Module, batch_size: int) -> Callable:
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
