"""Read a file of captions that a captioner generated: captions.jsonl of a training run or of evaluate_captions.py."""

import json
import os
from pathlib import Path
from typing import Any

from data_scripts.text_files import decode_text, json_objects
from system.errors import UserError


def read_captions(path: str | os.PathLike) -> list[dict]:
    """Read one JSON object {"image_id", "caption", "references"} per line; empty lines are skipped.

    Raises:
        UserError: The file cannot be read, or a line is not JSON, lacks a key, has a value of the wrong type, or repeats an
            image; the sentence names file and line.
    """
    try:
        text = decode_text(Path(path).read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    records, line_of = [], {}
    for line, record in json_objects(text, str(path)):
        _check_record(record, f"{path}, line {line}")
        earlier = line_of.setdefault(record["image_id"], line)
        if earlier != line:
            raise UserError(
                f"{path}, line {line}: image_id {record['image_id']!r} is on line {earlier} already; keep one of them"
            )
        records.append(record)
    return records


def _check_record(record: dict[str, Any], place: str) -> None:
    for key in ("image_id", "caption", "references"):
        if key not in record:
            raise UserError(f'{place}: "{key}" is missing')
    for key in ("image_id", "caption"):
        if not isinstance(record[key], str):
            raise UserError(f'{place}: "{key}" must be a string, not {json.dumps(record[key])[:40]}')
    references = record["references"]
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise UserError(f'{place}: "references" must be a list of strings')
