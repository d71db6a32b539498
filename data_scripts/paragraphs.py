"""Prepare a zip, the URL of a zip, or a folder that has one csv and one image folder per split.

    python -m data_scripts.paragraphs custom_captions_dataset.zip --output_dir data/paragraphs

The layout of the course report that this project reimplements: `train.csv`, `val.csv` and `test.csv` (columns `filename` and
`caption`; others, like an unnamed index, are ignored) beside the folders `train/`, `val/` and `test/` with the images.
"""

import argparse
from collections import Counter
from functools import partial
from pathlib import PurePosixPath

from data_scripts.archives import SourceFiles, open_files
from data_scripts.command_line import add_archive_option, add_table_options, prepare
from data_scripts.row_checks import SourceRow
from data_scripts.splits import SPLIT_NAMES
from data_scripts.text_files import gather_captions, read_csv
from system.errors import UserError, one_line_errors


def find_split_tables(files: SourceFiles) -> list[str]:
    """Return the names of the splits' csvs, which lie together somewhere in the source, the outermost place first.

    Raises:
        UserError: There is none.
    """
    tables: dict[PurePosixPath, list[str]] = {}
    for name in files.names:
        path = PurePosixPath(name)
        if path.suffix == ".csv" and path.stem in SPLIT_NAMES:
            tables.setdefault(path.parent, []).append(name)
    if not tables:
        raise UserError(f"{files.location} has no train.csv, val.csv or test.csv")
    return tables[min(tables, key=lambda folder: (len(folder.parts), str(folder)))]


def paragraph_rows(files: SourceFiles) -> list[SourceRow]:
    """Return one row per image of the csvs. Its id is the file name, with the split's folder where two have it.

    Raises:
        UserError: The csvs are missing, or are not what they should be.
    """
    images = []
    for table in find_split_tables(files):
        folder = PurePosixPath(table).with_suffix("")
        lines = (
            (row["filename"] or "", row["caption"], f"{table}, line {line}, {row['filename']}")
            for line, row in read_csv(files, table, columns=("filename", "caption"))
        )
        for file_name, (captions, place) in gather_captions(lines).items():
            images.append((folder, file_name, captions, place))
    times_named = Counter(file_name for _, file_name, _, _ in images)
    return [
        SourceRow(
            split=SPLIT_NAMES[folder.name],
            image_id=file_name if times_named[file_name] == 1 else f"{folder.name}/{file_name}",
            captions=captions,
            place=place,
            read=partial(files.read, f"{folder}/{file_name}"),
        )
        for folder, file_name, captions, place in images
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="zip, http(s) URL of a zip, or folder")
    add_table_options(parser)
    add_archive_option(parser)
    arguments = parser.parse_args(argv)
    with one_line_errors(), open_files(arguments.source, arguments.max_unpacked_gigabytes) as files:
        prepare(paragraph_rows(files), arguments)


if __name__ == "__main__":
    main()
