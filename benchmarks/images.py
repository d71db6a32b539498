"""Time the way of images from files to pixels against bare decoding and resizing of the same files.

    python -m benchmarks.images --images folder/ --json images.json

The bare side opens, resizes and crops each file with Pillow and makes a tensor; showtell's is what `caption.py` does, checks
included.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.full_size import build_captioner, paragraphs
from benchmarks.machine import benchmark_parser, describe_machine, in_turns, medians, ratio_of_medians, write_result
from captioning.job import ImageCollator, load_batches
from captioning.sources import ImageDecoder, ImageSources
from modeling.processing import ImagesToPixels, resized_side

BATCH_SIZE = 32
SIZES = {"small": (500, 375), "photograph": (4000, 3000)}  # width and height in pixels of the images that are drawn


class BareImages(torch.utils.data.Dataset):
    """Files as normalized squares, (3, side, side), by Pillow and numpy alone."""

    def __init__(self, paths: list[str], image_processor):
        self.paths, self.side = paths, image_processor.crop_size["height"]
        self.short, self.resample = image_processor.size["shortest_edge"], image_processor.resample
        self.mean, self.std = (
            torch.tensor(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as opened:
            image = opened.convert("RGB")
        scale = self.short / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], self.resample)
        left, top = ((side - self.side) // 2 for side in image.size)
        image = image.crop((left, top, left + self.side, top + self.side))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, runs=5)
    parser.add_argument("--images", help="folder of images; drawn if not given")
    parser.add_argument(
        "--num_images", type=int, default=128, help="number of small images that are drawn; a tenth as many large ones"
    )
    parser.add_argument("--num_workers", type=int, default=0, help="number of processes that decode, on both sides")
    args = parser.parse_args(argv)
    result = {"machine": describe_machine(args.device)}
    processor = build_captioner("lstm", [texts[0] for texts in paragraphs(None, 200)["captions"]]).processor
    with tempfile.TemporaryDirectory() as folder:
        folders = {"given": args.images} if args.images else make_images(Path(folder), args.num_images)
        for kind, path in folders.items():
            result[kind] = compare([ref.path for ref in ImageSources([str(path)])], processor, args)
    write_result(result, args.json)


def compare(paths: list[str], processor, args) -> dict:
    """Images per second of both sides, in turns."""
    decoder, collate = (
        ImageDecoder(2 * resized_side(processor.image_processor)),
        ImageCollator(ImagesToPixels(processor)),
    )
    bare = DataLoader(BareImages(paths, processor.image_processor), BATCH_SIZE, num_workers=args.num_workers)

    def showtell():
        refs = list(ImageSources(paths))
        batches = [refs[start : start + BATCH_SIZE] for start in range(0, len(refs), BATCH_SIZE)]
        return load_batches(batches, decoder, collate, args.num_workers)

    def rate(batches) -> float:
        start = time.perf_counter()
        for _ in batches:
            pass
        return len(paths) / (time.perf_counter() - start)

    measured = in_turns({"bare": lambda: rate(bare), "showtell": lambda: rate(showtell())}, args.runs)
    return {
        "images": len(paths),
        "images_per_second": measured,
        "medians": medians(measured),
        "fraction_of_bare": ratio_of_medians(measured, "showtell", "bare"),
    }


def make_images(folder: Path, num_images: int) -> dict[str, Path]:
    """JPEGs of a colored cloud, always the same, a folder for each size; a tenth as many of the large ones."""
    random = np.random.default_rng(0)
    for kind, size in SIZES.items():
        (folder / kind).mkdir()
        for number in range(num_images if kind == "small" else max(num_images // 10, 4)):
            cloud = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
            cloud.resize(size, Image.Resampling.BICUBIC).save(folder / kind / f"{number}.jpg", quality=90)
    return {kind: folder / kind for kind in SIZES}


if __name__ == "__main__":
    main()
