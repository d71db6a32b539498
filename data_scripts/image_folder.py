"""Prepare a folder of images with a `metadata.csv`, `metadata.jsonl` or `metadata.parquet`, in the Hub's layout.

    python -m data_scripts.image_folder images/ --output_dir data/mine

The metadata have `file_name`, relative to their own folder, and a caption column: `caption`, `text`, or `captions`. A cell may
hold a list of captions, and several rows may name one image. The metadata lie in the folder itself, in the folders `train`,
`validation` and `test`, or both. A row's split is what its column `split` says, else the folder of the metadata or of its image.

Without metadata, captions may lie beside the images: `x.jpg` and `x.txt` or `x.caption`, one caption a line.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data_scripts.archives import SourceFiles, open_files
from data_scripts.command_line import add_archive_option, add_split_options, add_table_options, prepare
from data_scripts.row_checks import SourceRow, note_row
from data_scripts.sidecars import pair_sidecars, sidecar_rows
from data_scripts.splits import SplitNames
from data_scripts.text_files import ImageRef, Table, find_column, gather_images, read_table
from system.errors import UserError, one_line_errors

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTION_COLUMNS = ("captions", "caption", "text")


def has_metadata(source: str | Path) -> bool:
    """Whether a local folder, or a split's folder in it, holds metadata.

    `datasets` reads such folders, too, but takes a word like "train" or "test" in an image's own name for its split, and then
    loses all other images.
    """
    split_of = SplitNames()
    folders = [Path(source)] if Path(source).is_dir() else []
    folders += [path for folder in folders for path in folder.iterdir() if path.is_dir() and split_of(path.name)]
    return any(path.name.casefold() in METADATA_NAMES for folder in folders for path in folder.iterdir())


def rename_hint(files: SourceFiles) -> str:
    """What to do with a table of another name; nothing to say where there is none."""
    tables = [name for name in files.names if PurePosixPath(name).suffix.lower() in (".csv", ".jsonl")]
    return (
        f": rename {tables[0]} to metadata{PurePosixPath(tables[0]).suffix.lower()}, with columns file_name and caption"
        if tables
        else ""
    )


def has_metadata_file(files: SourceFiles) -> bool:
    """Whether there is a metadata file in any folder."""
    return any(PurePosixPath(name).name.casefold() in METADATA_NAMES for name in files.names)


def find_metadata(files: SourceFiles, split_of: SplitNames) -> tuple[PurePosixPath, list[PurePosixPath], list[str]]:
    """Return the outermost folder of the dataset, its metadata files and those of its split folders, and all others.

    Raises:
        UserError: There is none, or one folder has two.
    """
    paths = [PurePosixPath(name) for name in files.names if PurePosixPath(name).name.casefold() in METADATA_NAMES]
    roots = {path: path.parent.parent if split_of(path.parent.name) else path.parent for path in paths}
    if not roots:
        raise UserError(f"{files.location} has no {' or '.join(METADATA_NAMES)}{rename_hint(files)}")
    depth = min(len(root.parts) for root in roots.values())
    used = [path for path, root in roots.items() if len(root.parts) == depth]
    folders: dict[PurePosixPath, PurePosixPath] = {}
    for path in used:
        other = folders.setdefault(path.parent, path)
        if other != path:
            raise UserError(f"{other} and {path} are both for the same images: keep one")
    root = roots[used[0]] if len({roots[path] for path in used}) == 1 else roots[used[0]].parent
    return root, used, [str(path) for path in paths if path not in used]


def read_metadata(
    table: Table,
    folder: PurePosixPath,
    folder_split: str | None,
    caption_columns: Sequence[str] | None,
    split_column: str | None,
    split_of: SplitNames,
) -> Iterator[ImageRef]:
    """Yield the rows of a metadata file.

    Raises:
        UserError: There is no caption column, or a row has no file name.
    """
    file_column = table.column("file_name")
    if caption_columns:
        columns = [table.column(name) for name in caption_columns]
    else:
        columns = [column for column in [find_column(table.columns, *CAPTION_COLUMNS)] if column]
    if not columns and table.rows:
        raise UserError(
            f"{table.name} has no caption column {' or '.join(CAPTION_COLUMNS)}, only {table.columns}: name it with "
            "--caption_column"
        )
    for line, cells in table.rows:
        file_name = cells.get(file_column)
        if not isinstance(file_name, str):
            raise UserError(f"{table.name}, line {line}: no 'file_name'")
        place = f"{table.name}, line {line}, {file_name}"
        if split_column is not None:
            split = split_of(cells.get(split_column))
        else:
            folders = PurePosixPath(file_name.replace("\\", "/")).parts[:-1]
            split = folder_split or next(filter(None, map(split_of, folders)), split_of.default)
        if split is None and split_column is not None:
            place += f", split {cells.get(split_column)}"
        captions: list[Any] = []
        for column in columns:
            cell = cells.get(column)
            captions += cell if isinstance(cell, list) else [cell]
        yield ImageRef(split, str(folder / file_name), captions, place)


def find_split_column(tables: Sequence[Table], given: str | None, split_of: SplitNames) -> dict[str, str | None]:
    """Return the split column of each table, by its name; a column `split` that nobody named counts if it holds splits.

    Raises:
        UserError: There is no column of the name given.
    """
    if given is not None:
        return {table.name: table.column(given) for table in tables}
    columns = {table.name: find_column(table.columns, "split") for table in tables}
    values = [cells.get(columns[table.name]) for table in tables if columns[table.name] for _, cells in table.rows]
    return columns if any(split_of(value) for value in values) else dict.fromkeys(columns)


def image_folder_rows(
    files: SourceFiles,
    caption_columns: Sequence[str] | None = None,
    split_column: str | None = None,
    splits: str | None = None,
) -> list[SourceRow]:
    """Return one row per image of the metadata. Its ID is its path in the source.

    Args:
        files: Where metadata and images are.
        caption_columns: Columns of captions; None for the first of the usual ones.
        split_column: Column of each row's split; None for `split`, where there is one.
        splits: Names of the splits, see `SplitNames`.

    Raises:
        UserError: The metadata are missing, or are not what they should be.
    """
    split_of = SplitNames(splits)
    root, paths, others = find_metadata(files, split_of)
    tables = [read_table(files, str(path)) for path in paths]
    columns = find_split_column(tables, split_column, split_of)
    refs: list[ImageRef] = []
    for path, table in zip(paths, tables, strict=True):
        folder_split = split_of(path.parent.name) if path.parent != root else None
        refs += read_metadata(table, path.parent, folder_split, caption_columns, columns[table.name], split_of)
    prefix = "" if str(root) == "." else f"{root}/"
    return [
        *gather_images(files, refs, prefix),
        *(row for table in tables for row in table.problems),
        *(note_row(name, "metadata file not used: others lie further out; see --splits") for name in others),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, zip, or http(s) URL of a zip")
    parser.add_argument(
        "--layout",
        choices=("metadata", "sidecars"),
        help="where the captions are (default: metadata if there is a metadata file, else sidecars)",
    )
    parser.add_argument("--caption_column", nargs="+", help="caption columns (default: captions, caption or text)")
    parser.add_argument(
        "--one_caption", action="store_true", help="all lines of a text file beside an image as one caption"
    )
    add_split_options(parser)
    add_table_options(parser)
    add_archive_option(parser)
    arguments = parser.parse_args(argv)
    with one_line_errors(), open_files(arguments.source, arguments.max_unpacked_gigabytes) as files:
        metadata = has_metadata_file(files) and arguments.layout != "sidecars"
        num_sidecars = 0 if metadata else sum(map(bool, pair_sidecars(files).values()))
        if arguments.layout == "sidecars" and not num_sidecars:
            raise UserError(f"{arguments.source} has no text file of an image's name")
        num_sidecars = 0 if arguments.layout == "metadata" else num_sidecars
        unused = ("caption_column", "split_column") if num_sidecars else ("one_caption",)
        for name in unused:
            if getattr(arguments, name):
                layout = "captions in text files beside the images" if num_sidecars else "metadata files"
                raise UserError(f"--{name} has no effect: {arguments.source} has {layout}")
        if num_sidecars:
            layout = f"images with captions in {num_sidecars:,} text files of the same name"
            rows = sidecar_rows(files, arguments.one_caption, arguments.splits)
        else:
            layout = "images beside a metadata file"
            rows = image_folder_rows(files, arguments.caption_column, arguments.split_column, arguments.splits)
        prepare(rows, arguments, layout)


if __name__ == "__main__":
    main()
