"""Which thresholds find near-duplicates: changed copies of images and captions beside others of two splits.

    python -m benchmarks.near_duplicates data/flickr8k --model_name_or_path outputs/mine --json near_duplicates.json

`training.near_duplicates` compares what its thresholds let through. Here copies of some images and captions of the last split are
changed in known ways; for each threshold, two tables say which share of each kind of copy is found, and how many pairs of the first
split and the last one are, which are other images, or captions of other images. Look at the pairs: a data set has near-duplicates of
its own.
"""

import argparse
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from benchmarks.machine import describe_machine
from data_scripts import load_captions
from system.errors import one_line_errors
from system.files import write_file
from training.near_duplicates import NearDuplicateArguments, caption_rows, encode_means, pairs_above, unit_rows

THRESHOLDS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


def jpeg(quality: int) -> Callable[[Image.Image], Image.Image]:
    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return change


def resize(share: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.resize([max(round(side * share), 1) for side in image.size])


def crop(share: float) -> Callable[[Image.Image], Image.Image]:
    """From the middle, so that this share of each side stays."""

    def change(image: Image.Image) -> Image.Image:
        margins = [side * (1 - share) / 2 for side in image.size]
        return image.crop([*map(round, margins), *(round(s - m) for s, m in zip(image.size, margins, strict=True))])

    return change


def brightness(factor: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: ImageEnhance.Brightness(image).enhance(factor)


def write_text(image: Image.Image) -> Image.Image:
    image = image.copy()
    draw, size = ImageDraw.Draw(image), max(image.height // 16, 8)
    draw.text((size // 2, image.height - 2 * size), "(c) 2026 A. Photographer", fill="white", font_size=size)
    return image


IMAGE_CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG quality 75": jpeg(75),
    "JPEG quality 20": jpeg(20),
    "half the size": resize(0.5),
    "a quarter of the size": resize(0.25),
    "crop to 95 %": crop(0.95),
    "crop to 90 %": crop(0.9),
    "crop to 80 %": crop(0.8),
    "20 % darker": brightness(0.8),
    "20 % brighter": brightness(1.2),
    "mirrored": ImageOps.mirror,
    "small text": write_text,
    "gray": lambda image: image.convert("L").convert("RGB"),
}


def swap_two_words(words: list[str], place: int, other: str) -> list[str]:
    return [*words[:place], *words[place : place + 2][::-1], *words[place + 2 :]]


# words of a caption, a place among them and a word of another caption -> the changed words
CAPTION_CHANGES: dict[str, Callable[[list[str], int, str], list[str]]] = {
    "upper case, no punctuation": lambda words, place, other: [word.upper().strip(".,") for word in words],
    "two words swapped": swap_two_words,
    "one word left out": lambda words, place, other: words[:place] + words[place + 1 :],
    "one word added": lambda words, place, other: [*words[:place], other, *words[place:]],
    "one word replaced": lambda words, place, other: [*words[:place], other, *words[place + 1 :]],
}


def measure_images(dataset: DatasetDict, model: str, num_images: int) -> dict:
    """Cosines of images and their changed copies, and of pairs of other images."""
    first, *_, last = dataset
    chosen = subsample(len(dataset[last]), num_images)
    originals = [dataset[last][row]["image"].convert("RGB") for row in chosen]
    features = Features({"image": ImageFeature()})
    copies = {
        kind: Dataset.from_dict({"image": [change(image) for image in originals]}, features=features)
        for kind, change in IMAGE_CHANGES.items()
    }
    base = {split: dataset[split].select_columns(["image", "content_hash"]) for split in (first, last)}
    means = encode_means(DatasetDict(base | copies), NearDuplicateArguments(model_name_or_path=model))
    units = unit_rows(means, torch.cat([means[first], means[last]]).mean(dim=0))
    return summarize(
        units[first], units[last], {kind: (units[last][chosen] * units[kind]).sum(dim=1) for kind in copies}
    )


def measure_captions(dataset: DatasetDict, num_captions: int) -> dict:
    """The same of captions: words changed in known ways."""
    generator = random.Random(0)
    first, *_, last = dataset
    texts = {split: [text for texts in dataset[split]["captions"] for text in texts] for split in (first, last)}
    chosen = subsample(len(texts[last]), num_captions)
    copies = {kind: [] for kind in CAPTION_CHANGES}
    for row in chosen:
        words = texts[last][row].split()
        place = generator.randrange(max(len(words) - 1, 1))
        other = generator.choice(generator.choice(texts[first]).split() or ["a"])
        for kind, change in CAPTION_CHANGES.items():
            copies[kind].append(" ".join(change(words, place, other)))
    cosines = {}
    for kind, changed in copies.items():  # each beside the others alone, since copies change how rare a word is
        rows = caption_rows(texts | {kind: changed})
        originals = rows[last].index_select(0, torch.tensor(chosen))
        cosines[kind] = torch.sparse.sum(originals * rows[kind], dim=1).to_dense()
    rows = caption_rows(texts)
    return summarize(rows[first], rows[last], cosines)


def subsample(number: int, size: int) -> list[int]:
    size = min(number, size)
    return [number * place // size for place in range(size)]


def summarize(first: torch.Tensor, last: torch.Tensor, cosines: dict[str, torch.Tensor]) -> dict:
    """For each threshold the share of copies found, all and of each kind, and the pairs of two splits; the lowest cosines."""
    pairs = pairs_above(last, first, min(THRESHOLDS))
    every, of_pairs = torch.cat(list(cosines.values())), torch.tensor([cosine for _, _, cosine in pairs] or [0.0])
    owners = torch.tensor([row for row, _, _ in pairs] or [0])
    rows = []
    for threshold in THRESHOLDS:
        above = of_pairs >= threshold
        found = {kind: float((of_kind >= threshold).float().mean()) for kind, of_kind in cosines.items()}
        rows.append(
            {
                "threshold": threshold,
                "found": float((every >= threshold).float().mean()),
                "pairs": int(above.sum()),
                "rows_in_pairs": len(owners[above].unique()),
                "of_kinds": found,
            }
        )
    return {
        "copies": len(every),
        "pairs_compared": len(first) * len(last),
        "thresholds": rows,
        "fifth_percentiles": {kind: float(of_kind.quantile(0.05)) for kind, of_kind in cosines.items()},
        "most_alike": sorted(pairs, key=lambda pair: -pair[2])[:100],
    }


def print_table(title: str, measured: dict) -> None:
    kinds = list(measured["fifth_percentiles"])
    print(f"\n{title}: {measured['copies']:,} copies, {measured['pairs_compared']:,} pairs of the two splits\n")
    print("| threshold | " + " | ".join(kinds) + " | all | pairs | in pairs |\n" + "|---:" * (len(kinds) + 4) + "|")
    for row in measured["thresholds"]:
        shares = [f"{share:.3f}" for share in (*row["of_kinds"].values(), row["found"])]
        print(f"| {row['threshold']} | {' | '.join(shares)} | {row['pairs']:,} | {row['rows_in_pairs']:,} |")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset_name", help="folder made by a data_scripts command, with two splits or more")
    parser.add_argument("--model_name_or_path", help="captioner whose encoder compares images; captions alone without")
    parser.add_argument("--images", type=int, default=150, help="number of images that are changed in each way")
    parser.add_argument("--captions", type=int, default=1500, help="number of captions that are changed in each way")
    parser.add_argument("--json", type=Path, help="file to write the measurements to")
    args = parser.parse_args(argv)
    with one_line_errors():
        dataset = load_captions(args.dataset_name)
    if len(dataset) < 2:
        parser.error(f"{args.dataset_name} has one split, {next(iter(dataset))}: copies are compared between two")
    result = {"machine": describe_machine(), "captions": measure_captions(dataset, args.captions)}
    print_table("captions", result["captions"])
    if args.model_name_or_path:
        result["images"] = measure_images(dataset, args.model_name_or_path, args.images)
        print_table("images", result["images"])
    if args.json:
        write_file(args.json, f"{json.dumps(result, indent=2)}\n".encode())


if __name__ == "__main__":
    main()
