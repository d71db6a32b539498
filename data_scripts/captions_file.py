"""Read a file of captions that a captioner generated: captions.jsonl of ours, or a list as COCO's results are."""

import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_scripts.text_files import decode_text, json_objects, parse_json
from system.errors import UserError


def read_captions(path: str | os.PathLike, with_references: bool = True) -> list[dict]:
    """Read one JSON object {"image_id", "caption", "references"} per line, or a JSON list of them; empty lines are skipped.

    Args:
        with_references: Whether "references" must be there; if not, all records have them or none has.

    Returns:
        The records, `image_id` as text where it is a whole number, texts in Unicode's composed form (NFC).

    Raises:
        UserError: The file cannot be read, has no records, or a record is not an object, lacks a key, has a value of the wrong
            type, or repeats an image; the sentence names file and line.
    """
    try:
        text = decode_text(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    records, place_of = [], {}
    for place, record in _objects(text, str(path)):
        keys = ("image_id", "caption", "references")
        if not with_references and "references" not in (records[0] if records else record):
            keys = keys[:2]
            if "references" in record:
                raise UserError(
                    f'{path}, {place}: "references" is there, which the first record lacks: give all or none'
                )
        record = _checked(record, keys, f"{path}, {place}")
        earlier = place_of.setdefault(record["image_id"], place)
        if earlier != place:
            raise UserError(
                f"{path}, {place}: image_id {record['image_id']!r} is on {earlier} already; keep one of them"
            )
        records.append(record)
    return records


def _objects(text: str, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not text.lstrip().startswith("["):
        yield from ((f"line {line}", record) for line, record in json_objects(text, path))
        return
    for number, record in enumerate(parse_json(text, path), start=1):
        if not isinstance(record, dict):
            raise UserError(f"{path}, item {number}: not a JSON object")
        yield f"item {number}", record


def _checked(record: dict[str, Any], keys: Sequence[str], place: str) -> dict[str, Any]:
    """The record's `keys`, each of its type."""
    for key in keys:
        if key not in record:
            raise UserError(f'{place}: "{key}" is missing')
    image_id = record["image_id"]
    if type(image_id) is int or (isinstance(image_id, float) and image_id.is_integer()):
        record = record | {"image_id": str(int(image_id))}
    for key in ("image_id", "caption"):
        if not isinstance(record[key], str):
            raise UserError(f'{place}: "{key}" must be a string, not {json.dumps(record[key])[:40]}')
    if "references" in keys:
        references = record["references"]
        if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
            raise UserError(f'{place}: "references" must be a list of strings')
        record = record | {"references": [unicodedata.normalize("NFC", text) for text in references]}
    record = record | {"caption": unicodedata.normalize("NFC", record["caption"])}
    return {key: record[key] for key in keys}
