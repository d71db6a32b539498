"""Prepare Flickr8k as it is distributed.

    python -m data_scripts.flickr8k Flickr8k_Dataset.zip --text Flickr8k_text.zip --output_dir data/flickr8k

Each of the two may be a zip, its URL or a folder. Without `--text`, SOURCE is a folder that holds both, packed or not.
Images that stand in no split list are not used; without any list all are training images.
"""

import argparse
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from data_scripts.archives import SourceFiles, open_files
from data_scripts.command_line import add_archive_option, add_table_options, prepare
from data_scripts.row_checks import SourceRow
from data_scripts.text_files import read_text
from system.errors import UserError, one_line_errors

TOKEN_FILE = "Flickr8k.token.txt"
SPLIT_LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "validation": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


def read_captions(text_files: SourceFiles) -> dict[str, list[str]]:
    """Return the captions of each image by file name, from lines `name.jpg#number<tab>caption`.

    Raises:
        UserError: The file is missing, or a line is not of that form.
    """
    name = text_files.find(TOKEN_FILE)
    if name is None:
        raise UserError(f"{text_files.location} has no {TOKEN_FILE}")
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(text_files, name).split("\n"), start=1):
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        file_name, hash_sign, _ = key.rpartition("#")
        if not tab or not hash_sign:
            raise UserError(f"{name}, line {number}: not 'image.jpg#number', a tab and a caption")
        captions.setdefault(file_name, []).append(caption)
    return captions


def read_split_lists(text_files: SourceFiles) -> dict[str, list[str]]:
    """Return the images of each split that has a list, by file name; nothing where there is no list.

    Raises:
        UserError: There are lists, but none of training images.
    """
    lists = {}
    for split, list_name in SPLIT_LISTS.items():
        name = text_files.find(list_name)
        if name is not None:
            lists[split] = read_text(text_files, name).split()
    if lists and "train" not in lists:
        raise UserError(f"{text_files.location} has split lists, but no {SPLIT_LISTS['train']}")
    return lists


def flickr8k_rows(images: SourceFiles, text_files: SourceFiles) -> list[SourceRow]:
    """Return one row per image of the split lists, or of the captions where there are no lists.

    Raises:
        UserError: The text files are missing, or are not what they should be.
    """
    captions = read_captions(text_files)
    lists = read_split_lists(text_files) or {"train": list(captions)}
    return [
        SourceRow(
            split=split,
            image_id=file_name,
            captions=captions.get(file_name, []),
            place=f"{SPLIT_LISTS[split]}, {file_name}",
            read=partial(images.read, images.find(file_name) or file_name),
        )
        for split, file_names in lists.items()
        for file_name in file_names
    ]


def find_parts(folder: Path) -> tuple[Path, Path]:
    """Return where in a folder the images and the texts lie: in the distributed zips, or unpacked in the folder."""
    images, text = folder / "Flickr8k_Dataset.zip", folder / "Flickr8k_text.zip"
    return (images if images.is_file() else folder), (text if text.is_file() else folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="images: zip, http(s) URL of a zip, or folder")
    parser.add_argument("--text", help=f"{TOKEN_FILE} and the split lists: zip, http(s) URL of a zip, or folder")
    add_table_options(parser)
    add_archive_option(parser)
    arguments = parser.parse_args(argv)
    with one_line_errors(), ExitStack() as stack:
        if arguments.text is None and not Path(arguments.source).is_dir():
            raise UserError(f"--text is needed, because {arguments.source} is not a folder that holds both")
        parts = (arguments.source, arguments.text) if arguments.text else find_parts(Path(arguments.source))
        images, text_files = (stack.enter_context(open_files(part, arguments.max_unpacked_gigabytes)) for part in parts)
        prepare(flickr8k_rows(images, text_files), arguments)


if __name__ == "__main__":
    main()
