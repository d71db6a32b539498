"""Prepare Flickr8k as distributed.

    python -m data_scripts.flickr8k Flickr8k_Dataset.zip --text Flickr8k_text.zip --output_dir data/flickr8k

Each of the two may be a zip, its URL or a folder. Without `--text`, SOURCE is a folder that holds both, zipped or not.
Images in no split list are not used; without any list all are training images.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path

from data_scripts.archives import SourceFiles, open_files
from data_scripts.command_line import add_archive_option, add_table_options, prepare
from data_scripts.row_checks import SourceRow, note_row
from data_scripts.text_files import read_text, unnamed_images
from system.errors import UserError, one_line_errors

TOKEN_FILE = "Flickr8k.token.txt"
SPLIT_LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "validation": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}


def find_text(text_files: SourceFiles, name: str) -> str | None:
    """Return where in the source a text file is, in whatever folder.

    Raises:
        UserError: There are several.
    """
    found = text_files.find(name, anywhere=True)
    if len(found) > 1:
        raise UserError(f"{text_files.location} has several {name}: {', '.join(found)}; keep one")
    return found[0] if found else None


def read_captions(text_files: SourceFiles) -> dict[str, list[str]]:
    """Return the captions of each image by file name, from lines `name.jpg#number<tab>caption`.

    Raises:
        UserError: The file is missing, or a line is not of that form.
    """
    name = find_text(text_files, TOKEN_FILE)
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
        name = find_text(text_files, list_name)
        if name is not None:
            # A line each: a file name may hold blanks.
            lists[split] = [line.strip() for line in read_text(text_files, name).splitlines() if line.strip()]
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
    listed = {file_name for file_names in lists.values() for file_name in file_names}
    rows = [
        SourceRow(
            split=split,
            image_id=file_name,
            captions=captions.get(file_name, []),
            place=f"{SPLIT_LISTS[split]}, {file_name}",
            read=images.reader(file_name, images.find(file_name, anywhere=True)),
        )
        for split, file_names in lists.items()
        for file_name in dict.fromkeys(file_names)
    ]
    unlisted = [name for name in captions if name not in listed]
    for name in unlisted:
        images.named.update(images.find(name, anywhere=True))
    notes = [note_row(name, "image in no split list, not used") for name in unlisted]
    return [*rows, *notes, *unnamed_images(images)]


def find_parts(folder: Path) -> tuple[Path, Path]:
    """Return where the images and the texts of a folder are: in the distributed zips, or unpacked in the folder."""
    images, text = folder / "Flickr8k_Dataset.zip", folder / "Flickr8k_text.zip"
    return (images if images.is_file() else folder), (text if text.is_file() else folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="zip, http(s) URL of a zip, or folder with the images")
    parser.add_argument("--text", help=f"zip, http(s) URL of a zip, or folder with {TOKEN_FILE} and the split lists")
    add_table_options(parser)
    add_archive_option(parser)
    arguments = parser.parse_args(argv)
    with one_line_errors(), ExitStack() as stack:
        if arguments.text is None and not Path(arguments.source).is_dir():
            raise UserError(f"--text is needed, because {arguments.source} is not a folder that holds both")
        parts = (arguments.source, arguments.text) if arguments.text else find_parts(Path(arguments.source))
        images, text_files = (stack.enter_context(open_files(part, arguments.max_unpacked_gigabytes)) for part in parts)
        prepare(flickr8k_rows(images, text_files), arguments, "Flickr8k as distributed")


if __name__ == "__main__":
    main()
