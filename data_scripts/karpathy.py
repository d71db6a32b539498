"""Prepare COCO, Flickr8k or Flickr30k with Karpathy's splits: his json and an image folder.

    python -m data_scripts.karpathy dataset_coco.json --images coco/ --output_dir data/coco

Source: Karpathy and Fei-Fei, Deep Visual-Semantic Alignments for Generating Image Descriptions (CVPR 2015); the json
files are those of https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip.
"""

import argparse
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from data_scripts.archives import SourceFiles, open_files
from data_scripts.command_line import add_archive_option, add_table_options, prepare
from data_scripts.row_checks import SourceRow
from data_scripts.splits import SPLIT_NAMES
from data_scripts.text_files import decode_text, parse_json
from system.errors import UserError, one_line_errors


def karpathy_rows(entries: Any, images: SourceFiles, table_name: str, restval: str = "train") -> list[SourceRow]:
    """Return one row per entry of the json. Its id is COCO's own number where there is one, else the file name.

    Args:
        entries: What the json file holds.
        images: Where the images are; the entries' `filepath` may be missing from it.
        table_name: Of the json file, for messages.
        restval: Counts images of COCO's validation set in neither of Karpathy's as "train", or leaves them out: "none".

    Raises:
        UserError: The file is not Karpathy's, or names a split that does not exist.
    """
    if not isinstance(entries, dict) or not isinstance(entries.get("images"), list):
        raise UserError(f"{table_name} has no list 'images': it is not one of Karpathy's files")
    rows = []
    for number, entry in enumerate(entries["images"]):
        place = f"{table_name}, image {number}"
        try:
            file_name, split, sentences = entry["filename"], entry["split"], entry["sentences"]
            captions = [sentence["raw"] for sentence in sentences]
            path = str(PurePosixPath(entry.get("filepath", "")) / file_name)
            split = restval if split == "restval" else SPLIT_NAMES.get(split)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{place}: 'filename', 'split' or 'sentences' with 'raw' is missing") from error
        if split is None:
            raise UserError(f"{place}: '{entry['split']}' is none of train, restval, val, test")
        if split == "none":
            continue
        name = images.find(path) or images.find(file_name) or path
        number_in_coco = entry.get("cocoid")
        image_id = file_name if number_in_coco is None else str(number_in_coco)
        rows.append(SourceRow(split, image_id, captions, f"{place}, {file_name}", partial(images.read, name)))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json")
    parser.add_argument("--images", required=True, help="images: folder, zip, or http(s) URL of a zip")
    parser.add_argument(
        "--restval", choices=("train", "none"), default="train", help="what COCO's 'restval' images count as"
    )
    add_table_options(parser)
    add_archive_option(parser)
    arguments = parser.parse_args(argv)
    with one_line_errors(), open_files(arguments.images, arguments.max_unpacked_gigabytes) as images:
        table = Path(arguments.source)
        if not table.is_file():
            raise UserError(f"{table} is not a file")
        entries = parse_json(decode_text(table.read_bytes(), table.name), table.name)
        prepare(karpathy_rows(entries, images, table.name, arguments.restval), arguments)


if __name__ == "__main__":
    main()
