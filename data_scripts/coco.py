"""Prepare a dataset in COCO's own form: its annotation JSON files and an image folder. Also nocaps, VizWiz-Captions and TextCaps.

    python -m data_scripts.coco captions_train2017.json captions_val2017.json --images coco/ --output_dir data/coco

A file's split is the word train, val or test in its name, or what is given before it: validation=annotations.json. In a folder or zip of
both, the files are recognized by what they hold: `python -m data_scripts.coco coco/ --output_dir data/coco`.

Sources: Chen et al., Microsoft COCO Captions (https://arxiv.org/abs/1504.00325), section 2; Gurari et al., Captioning Images Taken
by People Who Are Blind (https://arxiv.org/abs/2002.08565); Sidorov et al., TextCaps (https://arxiv.org/abs/2003.12462).
"""

import argparse
import re
from pathlib import Path, PurePosixPath
from typing import Any

from data_scripts.annotations import IMAGES_HELP, find_json, open_annotations
from data_scripts.archives import SourceFiles
from data_scripts.command_line import add_archive_option, add_table_options, prepare
from data_scripts.row_checks import SourceRow, note_row, valid_id
from data_scripts.splits import SPLIT_NAMES
from data_scripts.text_files import parse_json, unnamed_images
from system.errors import UserError, one_line_errors


def coco_rows(content: Any, split: str, images: SourceFiles, table_name: str) -> list[SourceRow]:
    """Return one row per image of an annotation file that has captions. Its ID is the file's own.

    Captions that VizWiz-Captions marks as rejected or written in advance ("quality issues are too severe ...") are left out and
    counted, as are images without a caption.

    Args:
        content: Content of the JSON file.
        split: Split of its images.
        images: Where the images are, in any folder.
        table_name: Name of the JSON file, for messages.

    Raises:
        UserError: The file is not of COCO's form, nor of TextCaps'.
    """
    content = _from_textcaps(content)
    if not isinstance(content, dict) or not all(
        isinstance(content.get(key), list) for key in ("images", "annotations")
    ):
        raise UserError(f"{table_name} has no lists 'images' and 'annotations': it is no caption file of COCO's form")
    rows, notes = {}, []
    for number, image in enumerate(content["images"]):
        image_id = valid_id(image.get("id")) if isinstance(image, dict) else None
        if image_id is None or not isinstance(image.get("file_name"), str):
            raise UserError(f"{table_name}, image {number}: 'id' or 'file_name' is missing")
        place = f"{table_name}, image {image_id}, {image['file_name']}"
        if image_id in rows:
            raise UserError(f"{place}: this id is there twice")
        found = images.find(image["file_name"], anywhere=True)
        rows[image_id] = SourceRow(split, image_id, [], place, images.reader(image["file_name"], found))
    for number, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation, dict) or "caption" not in annotation:
            raise UserError(f"{table_name}, annotation {number}: 'caption' is missing")
        image_id = valid_id(annotation.get("image_id"))
        place = f"{table_name}, annotation {annotation.get('id', number)}"
        if image_id not in rows:
            notes.append(note_row(place, "caption of an image that the file does not list"))
        elif annotation.get("is_rejected") or annotation.get("is_precanned"):
            notes.append(note_row(place, "rejected caption, not used"))
        else:
            rows[image_id].captions.append(annotation["caption"])
    empty = [row for row in rows.values() if not row.captions]
    notes += [note_row(row.place, "image without a caption, not used") for row in empty]
    return [*(row for row in rows.values() if row.captions), *notes]


def _from_textcaps(content: Any) -> Any:
    """TextCaps' list of captions in COCO's form; anything else as it is."""
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        return content
    captions = [entry for entry in content["data"] if isinstance(entry, dict)]
    return {
        "images": [
            {"id": image_id, "file_name": f"{image_id}.jpg"}
            for image_id in dict.fromkeys(entry.get("image_id") for entry in captions)
        ],
        "annotations": [
            {"id": entry.get("caption_id"), "image_id": entry.get("image_id"), "caption": entry.get("caption_str")}
            for entry in captions
        ],
    }


def find_tables(files: SourceFiles) -> list[str]:
    """The annotation files in a source."""
    return find_json(files, "coco", "textcaps")


def split_and_path(source: str) -> tuple[str, str]:
    """The split, "" if none is given, and the path of `[SPLIT=]FILE`."""
    name, equals, path = source.rpartition("=")
    return (name, path) if equals and name in SPLIT_NAMES else ("", source)


def split_of(name: str, path: str) -> str:
    """The split of an annotation file.

    Raises:
        UserError: Neither is it given as `name`, nor has the file's name one.
    """
    words = [name] if name else [word for word in re.findall("[a-z]+", Path(path).stem.lower()) if word in SPLIT_NAMES]
    if len({SPLIT_NAMES[word] for word in words}) != 1:
        raise UserError(f"{path}: its name has no split; give train={path}, validation={path} or test={path}")
    return SPLIT_NAMES[words[0]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="[SPLIT=]FILE",
        help="annotation JSON files; or folder, zip or URL of a zip that has them",
    )
    parser.add_argument("--images", help=IMAGES_HELP)
    add_table_options(parser)
    add_archive_option(parser)
    arguments = parser.parse_args(argv)
    given, sources = zip(*map(split_and_path, arguments.sources), strict=True)
    opened = open_annotations(sources, arguments.images, find_tables, arguments.max_unpacked_gigabytes)
    with one_line_errors(), opened as (tables, images):
        splits = [
            split_of(*named)
            for named in zip(given if len(given) == len(tables) else [""] * len(tables), tables, strict=True)
        ]
        rows = []
        for split, (path, read) in zip(splits, tables.items(), strict=True):
            name = PurePosixPath(path).name
            rows += coco_rows(parse_json(read(), name), split, images, name)
        rows += unnamed_images(images)
        prepare(rows, arguments, f"annotation files of COCO's or TextCaps' form ({', '.join(tables)})")


if __name__ == "__main__":
    main()
