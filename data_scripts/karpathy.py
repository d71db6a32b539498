"""Prepare COCO, Flickr8k or Flickr30k with Karpathy's splits: his JSON file and an image folder.

    python -m data_scripts.karpathy dataset_coco.json --images coco/ --output_dir data/coco

Source: Karpathy and Fei-Fei, Deep Visual-Semantic Alignments for Generating Image Descriptions (CVPR 2015); the JSON
files are those of https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip.
"""

import argparse
from pathlib import PurePosixPath
from typing import Any

from data_scripts.annotations import IMAGES_HELP, find_json, open_annotation_file
from data_scripts.archives import SourceFiles
from data_scripts.command_line import add_archive_option, add_table_options, prepare
from data_scripts.row_checks import SourceRow, note_row, valid_id
from data_scripts.splits import SPLIT_NAMES
from data_scripts.text_files import parse_json, unnamed_images
from system.errors import UserError, one_line_errors


def karpathy_rows(entries: Any, images: SourceFiles, table_name: str, restval: str = "train") -> list[SourceRow]:
    """Return one row per image of the JSON file. Its ID is COCO's own number where there is one, else the file name.

    Args:
        entries: Content of the JSON file.
        images: Where the images are; the entries' `filepath` may be missing from it.
        table_name: Name of the JSON file, for messages.
        restval: "train" uses the images of COCO's validation set that are in neither of Karpathy's for training; "none"
            leaves them out.

    Raises:
        UserError: The file is not Karpathy's, or names a split that does not exist.
    """
    if not isinstance(entries, dict) or not isinstance(entries.get("images"), list):
        raise UserError(f"{table_name} has no list 'images': it is not one of Karpathy's files")
    rows: dict[tuple[str, str, str], SourceRow] = {}
    notes = []
    folders = {entry.get("filepath") for entry in entries["images"] if isinstance(entry, dict)} - {None, ""}
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
        place = f"{place}, {file_name}"
        found = images.find(path, anywhere=True)
        if not found:  # the image may lie without its folder, but never in another image's
            found = [
                name
                for name in images.find(file_name, anywhere=True)
                if not any(f"/{name}".endswith(f"/{folder}/{PurePosixPath(name).name}") for folder in folders)
            ]
        read = images.reader(path, found)
        if split == "none":
            notes.append(note_row(place, "not used: --restval none"))
            continue
        image_id = valid_id(entry.get("cocoid")) or file_name
        row = SourceRow(split, image_id, captions, place, read)
        same = rows.setdefault((split, image_id, found[0] if found else path), row)
        if same is not row:
            same.captions.extend(caption for caption in captions if caption not in same.captions)
            notes.append(note_row(place, "image repeated, its captions put together"))
    return [*rows.values(), *notes, *unnamed_images(images)]


def find_tables(files: SourceFiles) -> list[str]:
    """Karpathy's files in a source."""
    return find_json(files, "karpathy")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source",
        help="dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json; or folder, zip or URL of a zip that has it",
    )
    parser.add_argument("--images", help=IMAGES_HELP)
    parser.add_argument(
        "--restval",
        choices=("train", "none"),
        default="train",
        help="split of COCO's 'restval' images; none leaves them out (default: %(default)s)",
    )
    add_table_options(parser)
    add_archive_option(parser)
    arguments = parser.parse_args(argv)
    opened = open_annotation_file(arguments.source, arguments.images, find_tables, arguments.max_unpacked_gigabytes)
    with one_line_errors(), opened as (name, text, images):
        rows = karpathy_rows(parse_json(text, name), images, name, arguments.restval)
        prepare(rows, arguments, f"Karpathy's json ({name})")


if __name__ == "__main__":
    main()
