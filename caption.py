"""Tell what is in images: files, folders or URLs in, captions out.

    python caption.py --model_name_or_path outputs/demo/lstm image.jpg folder/ https://example.org/image.jpg
    python caption.py --model_name_or_path outputs/demo/lstm folder/ --output captions.jsonl

The output is text (`name<TAB>caption`), .jsonl or .html, as the file's name says; text on the screen if none is named. A
image that cannot be read is named on stderr and left out.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from accelerate.utils import set_seed
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from data_scripts.row_checks import MAX_IMAGE_BYTES, BadImage, decode_image
from modeling.captioner import Captioner
from modeling.processing import resized_side
from reporting.page import IMAGE_SIZE, write_page
from system.downloads import download
from system.errors import UserError, one_line_errors, printable
from system.files import write_file
from training.arguments import value_problem

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
NUM_IMAGES_ON_PAGE = 200
MAX_IMAGE_SECONDS = 60.0  # that one may take to come from the network


class ImageSources(torch.utils.data.Dataset):
    """Images by name: {"name", "image"}, or {"name", "problem"} where one cannot be used.

    Args:
        names: Files and http(s) addresses.
        least_side: See `decode_image`.
    """

    def __init__(self, names: list[str], least_side: int):
        self.names = names
        self.least_side = least_side

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        name = self.names[index]
        try:
            return {"name": name, "image": decode_image(read_image(name), self.least_side)}
        except BadImage as error:
            return {"name": name, "problem": str(error)}
        except (OSError, ValueError) as error:
            return {"name": name, "problem": f"cannot be read: {error}"}


class ImageCollator:
    """Items of `ImageSources` as one batch, made where the images are decoded: (items, pixels of those without a problem).

    Args:
        processor: The captioner's.
        keep_images: Whether the items keep their images, no larger than a page shows them.
    """

    def __init__(self, processor, keep_images: bool = False):
        self.processor = processor
        self.keep_images = keep_images

    def __call__(self, items: list[dict]) -> tuple[list[dict], torch.Tensor | None]:
        images = [item["image"] for item in items if "image" in item]
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"] if images else None
        for item in items:
            if "image" in item and self.keep_images:
                item["image"].thumbnail((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
            else:
                item.pop("image", None)
        return items, pixels


def main(argv: list[str] | None = None) -> None:
    # ---- Arguments --------------------------------------------------------------------------------------------------
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="files, folders (with all below them) and http(s) addresses")
    parser.add_argument("--model_name_or_path", required=True, help="folder or Hub id of a captioner of either kind")
    parser.add_argument("--output", help="file to write, .txt, .jsonl or .html; text on the screen if not given")
    parser.add_argument("--batch_size", type=int, default=32, help="images captioned at once")
    parser.add_argument("--num_beams", type=int, help="beams; 1 is greedy; what the model was saved with if not given")
    parser.add_argument(
        "--top_p",
        type=float,
        help="sample each word from the likeliest that hold so much of the probability, in place of beams",
    )
    parser.add_argument("--seed", type=int, default=42, help="of what is sampled")
    parser.add_argument("--max_length", type=int, help="longest caption, in tokens; the model's own if not given")
    parser.add_argument("--min_length", type=int, help="shortest caption, in tokens; likewise")
    parser.add_argument(
        "--length_penalty",
        type=float,
        help="of beams: the power of its length a caption's score is divided by; likewise",
    )
    parser.add_argument(
        "--no_repeat_ngram_size", type=int, help="no run of so many tokens twice; 0 allows all; likewise"
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        help="processes that read and decode images; if not given up to 8 on a GPU, and none on a CPU, which the model needs",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, mps")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="numbers to compute in; auto is bfloat16, which changes a word now and then, where the device is fast in it",
    )
    args = parser.parse_args(argv)
    if args.output and Path(args.output).suffix not in (".txt", ".jsonl", ".html"):
        parser.error(f"--output {args.output}: the name must end in .txt, .jsonl or .html")
    for name, value in vars(args).items():
        if problem := value_problem(name, value):
            parser.error(f"--{name} {value}: {problem}")
    if args.top_p and args.num_beams and args.num_beams > 1:
        parser.error(f"--top_p {args.top_p} and --num_beams {args.num_beams}: give one of them")
    transformers.logging.disable_progress_bar()

    with one_line_errors():
        names = [name for source in args.images for name in list_images(source)]
        # ---- Model --------------------------------------------------------------------------------------------------
        captioner = Captioner.load(args.model_name_or_path).to(args.device, args.dtype)
        captioner.set_decoding(
            args.max_length,
            args.min_length,
            args.top_p,
            num_beams=args.num_beams,
            length_penalty=args.length_penalty,
            no_repeat_ngram_size=args.no_repeat_ngram_size,
        )
    set_seed(args.seed)

    # ---- Captions ---------------------------------------------------------------------------------------------------
    inspect = bool(args.output and args.output.endswith(".html"))  # the page tells of each word how sure the model was
    if args.num_workers is None:
        args.num_workers = 0 if args.device == "cpu" else min(8, os.cpu_count())
    loader = DataLoader(
        ImageSources(names, 2 * resized_side(captioner.image_processor)),
        args.batch_size,
        num_workers=args.num_workers,
        collate_fn=ImageCollator(captioner.processor, keep_images=inspect),
    )
    num_inspected = NUM_IMAGES_ON_PAGE if inspect else 0
    items = caption_items(captioner, tqdm(loader, unit="batch", disable=None), num_inspected)
    with one_line_errors():
        num_captioned = write_items(items, args.output)
    if num_captioned < len(names):
        print(f"{num_captioned} of {len(names)} images captioned", file=sys.stderr)
    if not num_captioned:
        raise SystemExit(2)


def list_images(source: str) -> list[str]:
    """The images that one argument names, a folder's in the order of their names."""
    if not os.path.isdir(source):
        return [source]
    found = sorted(str(path) for path in Path(source).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise UserError(f"{source} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def read_image(name: str) -> bytes:
    """An image's bytes, from a file or from the network, up to a limit."""
    if "://" not in name:
        return Path(name).read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        download(name, path, MAX_IMAGE_BYTES, MAX_IMAGE_SECONDS)
        return path.read_bytes()


def caption_items(captioner: Captioner, batches, num_inspected: int = 0) -> Iterator[dict]:
    """The items with what `Captioner.generate` tells of each, as they come; those that have a problem are named on stderr and dropped.

    Args:
        batches: What `ImageCollator` makes.
        num_inspected: So many of the first captions, rounded up to whole batches, get what `Captioner.inspect` tells.
    """
    num_captioned = 0
    for items, pixels in batches:
        for item in items:
            if "problem" in item:
                print(f"{printable(item['name'])}: {item['problem']}", file=sys.stderr)
        if pixels is not None:
            inspect = num_captioned < num_inspected
            made = captioner.generate({"pixel_values": pixels.to(captioner.model.device)}, inspect)
            num_captioned += len(made)
            good = [item for item in items if "problem" not in item]
            for item, caption in zip(good, made, strict=True):
                yield {**item, **caption}


def write_items(items: Iterator[dict], output: str | None) -> int:
    """Write the captions as the output's name says, whole or not at all, and count them."""
    count = 0
    lines, images, records = [], [], []
    for count, item in enumerate(items, start=1):
        if output is None:
            print(f"{printable(item['name'])}\t{item['caption']}", flush=True)
        elif output.endswith(".txt"):
            lines.append(f"{item['name']}\t{item['caption']}\n")
        elif output.endswith(".jsonl"):
            lines.append(json.dumps({"image_id": item["name"], "caption": item["caption"]}, ensure_ascii=False) + "\n")
        elif count <= NUM_IMAGES_ON_PAGE:
            images.append(item.pop("image"))
            records.append({"image_id": item.pop("name"), "references": [], **item})
    if output and count and output.endswith(".html"):
        if count > NUM_IMAGES_ON_PAGE:
            told = (
                f"{output} shows the first {NUM_IMAGES_ON_PAGE} of {count:,} images; --output captions.jsonl holds all"
            )
            print(told, file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            write_file(output, write_page(folder, images, records, {}).read_bytes())
    elif output and count:
        write_file(output, "".join(lines).encode("utf-8", "backslashreplace"))
    return count


if __name__ == "__main__":
    main()
