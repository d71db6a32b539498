"""Prepare a folder of images with a `metadata.csv` or `metadata.jsonl`, as the Hub has it.

    python -m data_scripts.image_folder images/ --output_dir data/mine

The metadata have `file_name`, relative to their own folder, and the caption column: `caption`, `text`, or `captions`
(a list; jsonl only). They lie in the folder itself, whose images are then all training images, or in the folders
`train`, `validation` and `test`. Several lines with one file name are several captions of that image.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from data_scripts.archives import SourceFiles, open_files
from data_scripts.command_line import add_archive_option, add_table_options, prepare
from data_scripts.row_checks import SourceRow
from data_scripts.splits import SPLIT_NAMES
from data_scripts.text_files import gather_captions, json_objects, read_csv, read_text
from system.errors import UserError, one_line_errors

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
CAPTION_COLUMNS = ("captions", "caption", "text")


def find_metadata(files: SourceFiles) -> dict[str, str]:
    """Return the metadata file of each split, the outermost in the source; without split folders all is training.

    Raises:
        UserError: There is none, or there are two for one split.
    """
    paths = [PurePosixPath(name) for name in files.names if PurePosixPath(name).name in METADATA_NAMES]
    in_split_folders = [path for path in paths if path.parent.name in SPLIT_NAMES]
    if in_split_folders:
        root = min((path.parent.parent for path in in_split_folders), key=lambda folder: len(folder.parts))
        found = [(SPLIT_NAMES[path.parent.name], path) for path in in_split_folders if path.parent.parent == root]
    else:
        found = [("train", path) for path in sorted(paths, key=lambda path: len(path.parts))]
        found = [(split, path) for split, path in found if len(path.parts) == len(found[0][1].parts)]
    if not found:
        raise UserError(f"{files.location} has no metadata.csv or metadata.jsonl")
    metadata: dict[str, str] = {}
    for split, path in found:
        if split in metadata:
            raise UserError(f"{metadata[split]} and {path} are both for {split}: keep one")
        metadata[split] = str(path)
    return metadata


def read_metadata(files: SourceFiles, name: str, caption_column: str | None) -> Iterator[tuple[str, Any, str]]:
    """Give (file name, caption, place) for every caption of a metadata file.

    Raises:
        UserError: The file is not what it should be, or has no caption column.
    """
    lines = list(
        read_csv(files, name, ["file_name"]) if name.endswith(".csv") else json_objects(read_text(files, name), name)
    )
    columns = [caption_column] if caption_column else CAPTION_COLUMNS
    column = next((column for column in columns if any(column in row for _, row in lines)), None)
    if column is None and lines:
        raise UserError(f"{name} has no caption column {' or '.join(columns)}: name it with --caption_column")
    for line, row in lines:
        if not isinstance(row.get("file_name"), str):
            raise UserError(f"{name}, line {line}: no 'file_name'")
        captions = row.get(column)
        for caption in captions if isinstance(captions, list) else [captions]:
            yield row["file_name"], caption, f"{name}, line {line}, {row['file_name']}"


def image_folder_rows(files: SourceFiles, caption_column: str | None = None) -> list[SourceRow]:
    """Return one row per image of the metadata. Its id is its path in the source.

    Raises:
        UserError: The metadata are missing, or are not what they should be.
    """
    rows = []
    for split, metadata in find_metadata(files).items():
        folder = PurePosixPath(metadata).parent
        images = gather_captions(read_metadata(files, metadata, caption_column))
        for file_name, (captions, place) in images.items():
            name = str(folder / file_name)
            rows.append(SourceRow(split, name, captions, place, partial(files.read, name)))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, zip, or http(s) URL of a zip")
    parser.add_argument("--caption_column", help="default: captions, caption or text")
    add_table_options(parser)
    add_archive_option(parser)
    arguments = parser.parse_args(argv)
    with one_line_errors(), open_files(arguments.source, arguments.max_unpacked_gigabytes) as files:
        prepare(image_folder_rows(files, arguments.caption_column), arguments)


if __name__ == "__main__":
    main()
