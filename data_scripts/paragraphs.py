"""Prepare a zip, the URL of a zip, or a folder that has one csv and one image folder per split.

    python -m data_scripts.paragraphs custom_captions_dataset.zip --output_dir data/paragraphs

The layout of the course report that this project reimplements: `train.csv`, `val.csv` and `test.csv` (columns `filename` and
`caption`; others, like an unnamed index, are ignored) beside the folders `train/`, `val/` and `test/` with the images.
"""

import argparse
from pathlib import PurePosixPath

from data_scripts.archives import SourceFiles, open_files
from data_scripts.command_line import add_archive_option, add_table_options, prepare
from data_scripts.row_checks import SourceRow, note_row
from data_scripts.splits import SplitNames
from data_scripts.text_files import ImageRef, gather_images, read_table
from system.errors import UserError, one_line_errors


def find_split_tables(files: SourceFiles, split_of: SplitNames) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    """Return the splits' csvs, which lie together in the outermost folder that has one, and those in other folders.

    Raises:
        UserError: There is none.
    """
    paths = [PurePosixPath(name) for name in files.names]
    tables = [path for path in paths if path.suffix.lower() == ".csv" and split_of(path.stem)]
    if not tables:
        raise UserError(f"{files.location} has no train.csv, val.csv or test.csv")
    folder = min((path.parent for path in tables), key=lambda folder: (len(folder.parts), str(folder)))
    return [path for path in tables if path.parent == folder], [path for path in tables if path.parent != folder]


def paragraph_rows(files: SourceFiles) -> list[SourceRow]:
    """Return one row per image of the csvs. Its ID is the file name.

    Raises:
        UserError: The csvs are missing, or are not what they should be.
    """
    split_of = SplitNames()
    tables, others = find_split_tables(files, split_of)
    rows = []
    for path in tables:
        table = read_table(files, str(path))
        name_column, caption_column = table.column("filename"), table.column("caption")
        folder = f"{path.with_suffix('')}/"
        refs = [
            ImageRef(
                split=split_of(path.stem),
                file_name=str(PurePosixPath(folder, cells[name_column] or "")),
                captions=[cells[caption_column]],
                place=f"{table.name}, line {line}, {cells[name_column]}",
            )
            for line, cells in table.rows
        ]
        rows += [*gather_images(files, refs, folder, short_ids=True), *table.problems]
    return rows + [note_row(str(path), "csv not used: others lie further out") for path in others]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="zip, http(s) URL of a zip, or folder")
    add_table_options(parser)
    add_archive_option(parser)
    arguments = parser.parse_args(argv)
    with one_line_errors(), open_files(arguments.source, arguments.max_unpacked_gigabytes) as files:
        prepare(paragraph_rows(files), arguments, "a csv and an image folder per split")


if __name__ == "__main__":
    main()
