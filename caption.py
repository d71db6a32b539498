"""Caption images: files, folders or URLs in, captions out.

    python caption.py --model_name_or_path outputs/demo/lstm image.jpg folder/ https://example.org/image.jpg
    python caption.py --model_name_or_path outputs/demo/lstm folder/ --output captions.jsonl

The output is text (`name<TAB>caption`), .jsonl or .html, by the suffix of --output; text on the screen if it is not given. Images
that cannot be read, and files of a folder that are no images, are counted and named on stderr.
"""

import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from data_scripts.row_checks import MAX_IMAGE_BYTES, BadImage, decode_image, is_image_file
from system.errors import UserError, one_line_errors, printable
from system.files import write_file
from training.arguments import GenerationArguments, parse_recipe

if TYPE_CHECKING:
    import torch

    from modeling.captioner import Captioner

# What takes seconds to import is imported where it is used, so that `--help` and a wrong option answer at once.

OUTPUT_SUFFIXES = (".txt", ".jsonl", ".html")
NUM_IMAGES_ON_PAGE = 200
NUM_NAMED = 5  # of the files of a folder that are passed over
MAX_IMAGE_SECONDS = 60.0  # that one may take to come from the network


@dataclass
class CaptionArguments:
    images: list[str] = field(
        metadata={"help": "Image files, folders (with all below them) and http(s) URLs.", "positional": "+"}
    )
    model_name_or_path: str = field(
        metadata={"help": "Folder, training checkpoint or Hub id of a captioner of either kind."}
    )
    output: str | None = field(
        default=None, metadata={"help": "File to write: .txt, .jsonl or .html; text on the screen if not given."}
    )
    batch_size: int = field(default=32, metadata={"help": "Images per batch.", "min": 1})
    num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Number of processes that decode images; if not given up to 8 on a GPU, and 0, the main process, on a CPU.",
            "min": 0,
        },
    )
    device: str | None = field(
        default=None, metadata={"help": "Device: cpu, cuda, mps; cuda if not given and available, else cpu."}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "Data type of weights and activations; auto is bfloat16, which changes a word now and then, where the device "
            "has instructions for it."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of sampling.", "min": 0, "below": 2**32})

    def __post_init__(self):
        if self.output and Path(self.output).suffix not in OUTPUT_SUFFIXES:
            raise UserError(f"--output {self.output}: the name must end in {', '.join(OUTPUT_SUFFIXES)}")


class ImageSources:
    """Images by name: {"name", "image"}, or {"name", "problem"} where one cannot be used.

    Args:
        names: Files and http(s) URLs.
        min_side: See `decode_image`.
    """

    def __init__(self, names: list[str], min_side: int):
        self.names = names
        self.min_side = min_side

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        from modeling.captioning_pipeline import to_rgb

        name = self.names[index]
        try:
            return {"name": name, "image": decode_image(read_image(name), self.min_side, to_rgb)}
        except BadImage as error:
            return {"name": name, "problem": str(error)}
        except (OSError, ValueError) as error:
            return {"name": name, "problem": f"cannot be read: {error}"}


class ImageCollator:
    """Items of `ImageSources` as one batch, made where the images are decoded: (items, pixels of those without a problem).

    Args:
        processor: The captioner's.
        keep_images: Whether the items keep their images, in the size of a page.
    """

    def __init__(self, processor, keep_images: bool = False):
        self.processor = processor
        self.keep_images = keep_images

    def __call__(self, items: list[dict]) -> "tuple[list[dict], torch.Tensor | None]":
        images = [item["image"] for item in items if "image" in item]
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"] if images else None
        for item in items:
            if "image" in item and self.keep_images:
                from reporting.page import IMAGE_SIZE

                item["image"].thumbnail((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
            else:
                item.pop("image", None)
        return items, pixels


def main(argv: list[str] | None = None) -> None:
    args, generation_args = parse_recipe((CaptionArguments, GenerationArguments), argv, __doc__)
    with one_line_errors():
        names = [name for source in args.images for name in list_images(source)]
        captioner = load_captioner(args, generation_args)
        num_captioned = caption_names(captioner, names, args)
    if num_captioned < len(names):
        print(f"{num_captioned} of {len(names)} images captioned", file=sys.stderr)
    if not num_captioned:
        raise SystemExit(2)


def load_captioner(args: CaptionArguments, generation_args: GenerationArguments) -> "Captioner":
    """The captioner, on its device and with the decoding settings of the command line."""
    gc.disable()  # or it goes through all that is imported again and again: a tenth of the time to the first caption
    try:
        import torch
        import transformers

        from modeling.captioner import Captioner

        transformers.logging.disable_progress_bar()
        torch.manual_seed(args.seed)
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        captioner = Captioner.load(args.model_name_or_path).to(device, args.dtype)
    finally:
        gc.enable()
    captioner.set_decoding(**generation_args.settings())
    return captioner


def caption_names(captioner: "Captioner", names: list[str], args: CaptionArguments) -> int:
    """Caption files and URLs, write what was asked for, and return how many were captioned."""
    from torch.utils.data import DataLoader
    from tqdm.auto import tqdm

    from modeling.processing import resized_side

    inspect = bool(args.output and args.output.endswith(".html"))  # the page shows the probability of each word
    if args.num_workers is None:
        args.num_workers = 0 if captioner.model.device.type == "cpu" else min(8, os.cpu_count())
    loader = DataLoader(
        ImageSources(names, 2 * resized_side(captioner.image_processor)),
        args.batch_size,
        num_workers=args.num_workers,
        collate_fn=ImageCollator(captioner.processor, keep_images=inspect),
    )
    num_inspected = NUM_IMAGES_ON_PAGE if inspect else 0
    return write_items(caption_items(captioner, tqdm(loader, unit="batch", disable=None), num_inspected), args.output)


def list_images(source: str) -> list[str]:
    """The images that one argument names, a folder's in the order of their names; a folder's other files are counted and named.

    Raises:
        UserError: A folder has no images.
    """
    if not os.path.isdir(source):
        return [source]
    files = sorted(path for path in Path(source).rglob("*") if path.is_file())
    images = [str(path) for path in files if is_image_file(path)]
    others = sorted({str(path) for path in files} - set(images))
    if others:
        named = ", ".join(printable(os.path.relpath(name, source)) for name in others[:NUM_NAMED])
        more = f" and {len(others) - NUM_NAMED:,} more" if len(others) > NUM_NAMED else ""
        told = f"{len(others):,} of {len(files):,} files are no images that can be read here: {named}{more}"
        if missing := missing_plug_ins(others):
            told += f" ({'; '.join(missing)})"
        print(f"{printable(source)}: {told}", file=sys.stderr)
    if not images:
        raise UserError(f"{printable(source)} has no images")
    return images


def missing_plug_ins(names: list[str]) -> list[str]:
    """What to install so that Pillow reads more of these files."""
    plug_ins = {".heic": "pillow-heif", ".heif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
    suffixes = {Path(name).suffix.lower() for name in names} & plug_ins.keys()
    return sorted(f"{suffix} needs `pip install {plug_ins[suffix]}`" for suffix in suffixes)


def read_image(name: str) -> bytes:
    """The bytes of an image, from a file or from the network, up to a limit."""
    if "://" not in name:
        return Path(name).read_bytes()
    from system.downloads import download

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        download(name, path, MAX_IMAGE_BYTES, MAX_IMAGE_SECONDS)
        return path.read_bytes()


def caption_items(captioner: "Captioner", batches, num_inspected: int = 0) -> Iterator[dict]:
    """The items with their captions, as they come; those that have a problem are named on stderr and dropped.

    Args:
        batches: What `ImageCollator` makes.
        num_inspected: Number of first captions, rounded up to whole batches, that are inspected, see `Captioner.inspect`.
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
    """Write the captions in the format of the output's suffix, whole or not at all, and count the images."""
    count = 0
    lines, images, records = [], [], []
    for count, item in enumerate(items, start=1):
        captions = [item["caption"], *item.get("others", [])]
        if output is None:
            for caption in captions:
                print(f"{printable(item['name'])}\t{caption}", flush=True)
        elif output.endswith(".txt"):
            lines += [f"{item['name']}\t{caption}\n" for caption in captions]
        elif output.endswith(".jsonl"):
            others = {"others": item["others"]} if "others" in item else {}
            line = {"image_id": item["name"], "caption": item["caption"], **others}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        elif count <= NUM_IMAGES_ON_PAGE:
            images.append(item.pop("image"))
            records.append({"image_id": item.pop("name"), "references": [], **item})
    if output and count and output.endswith(".html"):
        from reporting.page import write_page

        if count > NUM_IMAGES_ON_PAGE:
            print(
                f"{output} shows the first {NUM_IMAGES_ON_PAGE} of {count:,} images; --output captions.jsonl has all",
                file=sys.stderr,
            )
        with tempfile.TemporaryDirectory() as folder:
            write_file(output, write_page(folder, images, records, {}).read_bytes())
    elif output and count:
        write_file(output, "".join(lines).encode("utf-8", "backslashreplace"))
    return count


if __name__ == "__main__":
    main()
