"""The plain files of a run: results.json, captions.jsonl (data_scripts.captions_file reads it), history.json."""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from system.errors import UserError
from system.files import write_file

# The six metrics in the order of every table, with their names in papers.
METRIC_TITLES = {
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
}
# Those that are scored where they are asked for; the last two count errors, so that less is better.
OPTIONAL_TITLES = {
    "meteor": "METEOR",
    "spice": "SPICE",
    "clip_score": "CLIPScore",
    "ref_clip_score": "RefCLIPScore",
    "chair_i": "CHAIRi",
    "chair_s": "CHAIRs",
}
ALL_TITLES = METRIC_TITLES | OPTIONAL_TITLES
# Aspects in which a caption is true of its image or not, where the truth is known.
TRUTH_TITLES = {
    "all": "True captions",
    "number": "Number",
    "shape": "Shape",
    "color": "Color",
    "size": "Size",
    "relation": "Relation",
    "background": "Background",  # where scenes have one
}
RESULT_KEYS = (
    *(
        "dataset",
        "split",
        "num_images",
        "references_per_image",
        "tokenizer",
        "decoding",
        "metrics",
        "true_captions",
        "intervals",
    ),
    *("shuffled", "constant", "diagnostics", "beats_shuffled", "warning", "train", "publish_images"),
)


def write_results(output_dir: str | os.PathLike, results: dict) -> Path:
    """Write results.json, in the order of `RESULT_KEYS` and `ALL_TITLES`; other keys follow.

    Raises:
        ValueError: `results` has a NaN or infinite number; the message names its key.
    """
    ordered = _in_order(results, RESULT_KEYS)
    for key in ("metrics", "intervals", "shuffled", "constant"):
        if isinstance(ordered.get(key), dict):
            ordered[key] = _in_order(ordered[key], ALL_TITLES)
    path = Path(output_dir) / "results.json"
    for key, number in _numbers(ordered):
        if not math.isfinite(number):
            raise ValueError(f"{path} is not written: {key} is {number}, not a finite number")
    return write_file(path, _json_bytes(ordered, indent=2))


def read_results(output_dir: str | os.PathLike) -> dict:
    """Read the results.json of a run.

    Raises:
        UserError: The file is missing, is not JSON, or its metrics are not numbers.
    """
    path = Path(output_dir) / "results.json"
    results = read_json(path)
    metrics = results.get("metrics") if isinstance(results, dict) else None
    if not isinstance(metrics, dict) or not all(isinstance(score, int | float) for score in metrics.values()):
        raise UserError(f'{path} does not have results: an object with "metrics", each a number, is expected')
    return results


def write_captions(output_dir: str | os.PathLike, records: Iterable[dict], name: str = "captions.jsonl") -> Path:
    """Write a file of captions, one line {"image_id", "caption", "references"} per record; other keys are left out."""
    rows = ({key: record[key] for key in ("image_id", "caption", "references")} for record in records)
    return write_file(Path(output_dir) / name, b"".join(_json_bytes(row) for row in rows))


def write_history(output_dir: str | os.PathLike, history: list[dict]) -> Path:
    """Write history.json, the rows that `draw_curves` draws; NaN and infinity become null.

    Unlike in results.json they are not refused: the curves of a run that diverged are worth having.
    """
    rows = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in history
    ]
    return write_file(Path(output_dir) / "history.json", _json_bytes(rows, indent=1))


def read_history(output_dir: str | os.PathLike) -> list[dict]:
    """Read the history.json of a run; without one the history is empty.

    Raises:
        UserError: The file is not a JSON list of objects.
    """
    path = Path(output_dir) / "history.json"
    if not path.exists():
        return []
    history = read_json(path)
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise UserError(f"{path} does not have a history: a list of objects is expected")
    return history


def is_hub_id(name: str) -> bool:
    """Whether a name has the form OWNER/NAME of the Hub."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name, re.ASCII) is not None


def true_caption_rates(truth: Sequence[dict]) -> dict[str, float]:
    """The rate of captions that are true, as a whole and by aspect: the keys of `TRUTH_TITLES` that every caption has."""
    keys = [key for key in TRUTH_TITLES if all(key in caption for caption in truth)]
    return {key: sum(bool(caption[key]) for caption in truth) / len(truth) for key in keys}


def read_json(path: Path) -> Any:
    """Read a JSON file; UserError if it cannot be read or is not JSON."""
    return _parse(_read_text(path), str(path))


def _in_order(mapping: dict, keys: Iterable[str]) -> dict:
    """The same mapping with `keys` first and the others after them."""
    return {key: mapping[key] for key in keys if key in mapping} | mapping


def _numbers(value: Any, key: str = "") -> Iterable[tuple[str, float]]:
    """Every float in nested dicts and lists with its key, as in ("metrics.cider", 0.9)."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict | list | tuple):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(item, f"{key}.{name}" if key else str(name))


def _json_bytes(value: Any, indent: int | None = None) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent) + "\n"
    # A lone surrogate has no UTF-8; as \udXXX it is its own JSON escape and reads back the same.
    return text.encode("utf-8", "backslashreplace")


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # some editors on Windows write a byte order mark
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error})") from error
