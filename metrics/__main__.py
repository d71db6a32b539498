"""Check the scores against published ones, for people who have COCO and coco-caption's example results.

python -m metrics selfcheck --coco_annotations captions_val2014.json --coco_results captions_val2014_fakecap_results.json
"""

import argparse
import json
import sys
from pathlib import Path

from metrics import CaptionScorer

# what coco-caption's README prints for its example results on 1,000 images of COCO val2014
PUBLISHED = {"bleu_1": 0.579, "bleu_2": 0.404, "bleu_3": 0.279, "bleu_4": 0.191, "rouge_l": 0.396, "cider": 0.600}


def read_coco(annotations_file: Path, results_file: Path) -> tuple[list[str], list[list[str]]]:
    """Read the captions of the images that have a result, and their references.

    Raises:
        ValueError: A file that is missing or not in COCO's caption format, or a result without references.
    """
    annotations = _read_rows(annotations_file, "annotations")
    results = _read_rows(results_file, None)
    references: dict[int, list[str]] = {}
    for row in annotations:
        references.setdefault(row["image_id"], []).append(row["caption"])
    for row in results:
        if row["image_id"] not in references:
            raise ValueError(f"{results_file}: image {row['image_id']} has no caption in {annotations_file}")
    return [row["caption"] for row in results], [references[row["image_id"]] for row in results]


def _read_rows(file: Path, key: str | None) -> list[dict]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror}): give the path of COCO's file") from None
    except ValueError:
        raise ValueError(f"{file}: is not JSON: give the file as COCO publishes it") from None
    rows = content.get(key) if key and isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"image_id", "caption"} <= row.keys() for row in rows
    ):
        raise ValueError(f"{file}: is not a COCO caption file: its rows need `image_id` and `caption`")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Print our scores beside the published ones; 0 if they agree to the three decimals published, 1 if not, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    selfcheck = commands.add_parser("selfcheck", help="compare with coco-caption's published scores")
    selfcheck.add_argument("--coco_annotations", type=Path, required=True, help="captions_val2014.json")
    selfcheck.add_argument("--coco_results", type=Path, required=True, help="captions_val2014_fakecap_results.json")
    arguments = parser.parse_args(argv)
    try:
        predictions, references = read_coco(arguments.coco_annotations, arguments.coco_results)
        scores = CaptionScorer(references).score(predictions)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    agree = True
    for name, published in PUBLISHED.items():
        same = abs(round(scores[name], 3) - published) < 1e-9
        agree &= same
        print(f"{name:8} {scores[name]:.4f}  published {published:.3f}  {'agrees' if same else 'DIFFERS'}")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
