"""Score captions in COCO's format: BLEU, ROUGE-L and CIDEr-D with 95 % intervals, beside two baselines without the image."""

import argparse
import json
import sys
import warnings
from pathlib import Path

from .coco_caption import InputError, read_coco
from .intervals import interval_of_images
from .java_metrics import JavaMetricError, measure_java
from .object_hallucination import ObjectVocabulary, count_mentions, objects_of, read_objects, read_synonyms
from .scorer import METRIC_NAMES, CaptionScorer
from .tokenizers import TOKENIZERS


def main(argv: list[str] | None = None) -> int:
    """Print the scores; 0, or 2 on bad input."""
    names = "".join(f"\n  {name:13} {what}" for name, what in TOKENIZERS.items())
    parser = argparse.ArgumentParser(
        prog="caption-scores",
        description=__doc__,
        epilog=f"tokenizers:\n  auto          by what the references are written in{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="JSON list of {image_id, caption}, one row per image")
    parser.add_argument("annotations", type=Path, help="JSON of COCO's form: {annotations: [{image_id, caption}, ...]}")
    parser.add_argument("--tokenizer", default="auto", choices=["auto", *TOKENIZERS], help="tokenizer, default auto")
    parser.add_argument("--meteor", action="store_true", help="METEOR as well (needs Java and pycocoevalcap)")
    parser.add_argument(
        "--spice", action="store_true", help="SPICE as well (needs Java and pycocoevalcap with its models)"
    )
    parser.add_argument(
        "--objects",
        type=Path,
        metavar="FILE",
        help="COCO instances json, or {image_id: [objects]}: rates of hallucinated objects (CHAIR) as well",
    )
    parser.add_argument(
        "--synonyms", type=Path, metavar="FILE", help="other words for objects, lines of: object, word, word"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="file for all of the report, CIDEr-D of each image included"
    )
    arguments = parser.parse_args(argv)
    try:
        images, captions, references, num_missing = read_coco(arguments.results, arguments.annotations)
        report = _score(captions, references, arguments.tokenizer)
        names = list(METRIC_NAMES)
        for name in ("meteor", "spice"):
            if getattr(arguments, name):
                names.append(name)
                _add_java(name, captions, references, report)
        if arguments.objects:
            names += ["chair_i", "chair_s"]
            _add_objects(arguments.objects, arguments.synonyms, images, captions, references, report)
    except (InputError, JavaMetricError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if num_missing:
        print(
            f"{num_missing} annotated images have no caption in {arguments.results} and are not scored", file=sys.stderr
        )
    print(f"{len(images)} images, tokenizer {report['tokenizer']}")
    print(f"{'':8} {'score':>7}  {'95 % interval':16}  {'shuffled':>8}  {'constant':>8}")
    for name in names:
        low, high = report["intervals"][name]
        baselines = "  ".join(f"{report[of][name]:8.4f}" for of in ("shuffled", "constant") if name in report[of])
        print(f"{name:8} {report['metrics'][name]:7.4f}  {low:.4f} to {high:.4f}  {baselines}".rstrip())
    if report["warning"]:
        print(report["warning"])
    if arguments.json:
        for image, row in zip(images, report["per_image"], strict=True):
            row["image_id"] = image
        arguments.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _add_java(name: str, captions: list[str], references: list[list[str]], report: dict) -> None:
    score, of_images = measure_java(name, captions, references)
    report["metrics"][name] = score
    report["intervals"][name] = interval_of_images(score, of_images)


def _add_objects(
    objects_file: Path, synonyms_file: Path | None, images: list, captions: list[str], references: list, report: dict
) -> None:
    of_images, names = read_objects(objects_file)
    objects = objects_of(images, of_images, objects_file)
    vocabulary = ObjectVocabulary(names, read_synonyms(synonyms_file) if synonyms_file else None)
    mentions = count_mentions(captions, objects, references, vocabulary)
    report["metrics"] |= mentions.scores()
    report["intervals"] |= mentions.intervals()
    if len(captions) > 1:
        shuffled = CaptionScorer.shuffle(captions)
        report["shuffled"] |= count_mentions(shuffled, objects, references, vocabulary).scores()


def _score(captions: list[str], references: list[list[str]], tokenizer: str) -> dict:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            scorer = CaptionScorer(references, tokenizer=tokenizer)
        except ValueError as error:  # a tokenizer that is not installed: the captions were checked
            raise InputError(str(error)) from None
    for warning in caught:
        print(warning.message, file=sys.stderr)
    return scorer.report(captions)


if __name__ == "__main__":
    sys.exit(main())
