"""Prepare Flickr30k with the captions of a csv, in each form that people have, or Flickr8k in Kaggle's.

    python -m data_scripts.flickr30k flickr30k_images/ --output_dir data/flickr30k
    python -m data_scripts.flickr30k flickr_annotations_30k.csv --images flickr30k-images.zip --output_dir data/flickr30k

`flickr_annotations_30k.csv` of the Hub has a row per image with a list of captions (`raw`) and Karpathy's splits. Kaggle's `results.csv`
(`image_name| comment_number| comment`) and `captions.txt` (`image,caption`) have a row per caption, and no splits.

Source: Young et al., From image descriptions to visual denotations (TACL 2014), section 3.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from data_scripts.annotations import IMAGES_HELP, open_annotation_file
from data_scripts.archives import SourceFiles
from data_scripts.command_line import add_archive_option, add_table_options, prepare
from data_scripts.row_checks import SourceRow, note_row, problem_row
from data_scripts.splits import SPLIT_NAMES
from data_scripts.text_files import find_column, first_line, parse_csv, unnamed_images
from system.errors import UserError, one_line_errors

NAME_COLUMNS, CAPTION_COLUMNS = ("filename", "image_name", "image"), ("raw", "comment", "caption")


def is_flickr_header(line: str) -> bool:
    """Whether the first line of a csv is that of one of the forms."""
    columns = [column.strip().strip('"') for column in re.split("[|,]", line)]
    return any(
        set(form) <= set(columns) for form in (("raw", "filename"), ("image_name", "comment"), ("image", "caption"))
    )


def find_tables(files: SourceFiles) -> list[str]:
    """The caption files of Flickr30k in a source, recognized by their first line; those that lie furthest out."""
    found = []
    for name in files.names:
        path = PurePosixPath(name)
        is_candidate = path.suffix.lower() == ".csv" or path.name.lower() == "captions.txt"
        if is_candidate and is_flickr_header(first_line(files, name)):
            found.append(name)
    depth = min((name.count("/") for name in found), default=0)
    return [name for name in found if name.count("/") == depth]


def flickr30k_rows(text: str, images: SourceFiles, table_name: str) -> list[SourceRow]:
    """Return one row per image of a caption file. Its ID is the image's file name.

    Args:
        text: Content of the file.
        images: Where the images are, in any folder.
        table_name: Name of the file, for messages.

    Raises:
        UserError: It is of none of the forms.
    """
    rows: dict[str, SourceRow] = {}
    others = []
    read = _kaggle_lines if "|" in text.partition("\n")[0] else _csv_lines
    for line, file_name, split, captions, note in read(text, table_name):
        place = ", ".join(filter(None, (table_name, f"line {line}", file_name)))
        found = images.find(file_name, anywhere=True)
        read_image = images.reader(file_name, found)
        if captions is None:
            others.append(problem_row(place, note))
            continue
        if note:
            others.append(note_row(place, note))
        if split is None:
            others.append(note_row(place, "row of a split that is none of train, val, test, not used"))
            continue
        if file_name not in rows:
            rows[file_name] = SourceRow(split, file_name, [], place, read_image)
        elif rows[file_name].split != split:
            others.append(note_row(place, f"image of two splits, used in {rows[file_name].split}"))
        rows[file_name].captions.extend(captions)
    return [*rows.values(), *others, *unnamed_images(images)]


def _title(text: str) -> str:
    header = text.partition("\n")[0]
    if "|" in header:
        return "Flickr30k csv of Kaggle"
    return "Flickr30k csv of the Hub" if "raw" in header else "csv of images and captions"


def _csv_lines(text: str, table_name: str) -> Iterator[tuple]:
    """(line, file name, split, captions, note) of a csv with commas; captions may be a list in a cell."""
    table = parse_csv(text, table_name)
    name_column, caption_column = (find_column(table.columns, *names) for names in (NAME_COLUMNS, CAPTION_COLUMNS))
    if name_column is None or caption_column is None:
        raise UserError(
            f"{table_name} has no columns of file names and captions that Flickr30k has, only {table.columns}"
        )
    split_column = find_column(table.columns, "split")
    for line, cells in table.rows:
        split = SPLIT_NAMES.get((cells[split_column] or "").strip().lower()) if split_column else "train"
        yield line, cells[name_column] or "", split, [cells[caption_column]], ""
    for row in table.problems:
        yield row.place.rpartition(" ")[2], "", "train", None, row.problem


def _kaggle_lines(text: str, table_name: str) -> Iterator[tuple]:
    """The same of lines `image| number| caption`, which have no quotes. In one line of Kaggle's file the second bar is missing."""
    lines = text.split("\n")
    columns = [column.strip() for column in lines[0].split("|")]
    if columns != ["image_name", "comment_number", "comment"]:
        raise UserError(f"{table_name}: its first line is not 'image_name| comment_number| comment'")
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        file_name, _, rest = line.partition("|")
        caption_number, bar, caption = rest.partition("|")
        match = re.fullmatch(r"\s*\d+\s+(\S.*?)\s*", caption_number)
        if bar:
            yield number, file_name.strip(), "train", [caption.strip()], ""
        elif match:
            yield number, file_name.strip(), "train", [match[1]], "caption not separated from its number, used"
        else:
            yield number, file_name.strip(), "train", None, "not 'image| number| caption'"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="caption file, or folder, zip or http(s) URL of a zip that has it")
    parser.add_argument("--images", help=IMAGES_HELP)
    add_table_options(parser)
    add_archive_option(parser)
    arguments = parser.parse_args(argv)
    opened = open_annotation_file(arguments.source, arguments.images, find_tables, arguments.max_unpacked_gigabytes)
    with one_line_errors(), opened as (name, text, images):
        prepare(flickr30k_rows(text, images, name), arguments, f"{_title(text)} ({name})")


if __name__ == "__main__":
    main()
