"""Score captions in COCO's format: BLEU, ROUGE-L and CIDEr-D with 95 % intervals, beside two baselines without the image."""

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

from .coco_caption import InputError, find_images, read_coco
from .intervals import interval_of_images
from .java_metrics import JavaMetricError, check_installation, measure_java
from .object_hallucination import ObjectVocabulary, count_mentions, objects_of, read_objects, read_synonyms
from .scorer import CaptionScorer
from .tokenizers import TOKENIZERS


def main(argv: list[str] | None = None) -> int:
    """Print the scores; 0, or 2 on bad input."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.synonyms and not arguments.objects:
        parser.error("--synonyms has no effect without --objects")
    if bool(arguments.clip_model) != bool(arguments.images):
        parser.error("--clip_model and --images belong together: give both")
    try:
        images, captions, references, num_missing = read_coco(arguments.results, arguments.annotations)
        report = _report(arguments, images, captions, references)
        if arguments.json:
            for image, row in zip(images, report["per_image"], strict=True):
                row["image_id"] = image
            _write(arguments.json, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except (InputError, JavaMetricError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if num_missing:
        print(
            f"{num_missing} annotated images have no caption in {arguments.results} and are not scored", file=sys.stderr
        )
    try:
        print_report(report)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def build_parser() -> argparse.ArgumentParser:
    names = "".join(f"\n  {name:13} {what}" for name, what in TOKENIZERS.items())
    parser = argparse.ArgumentParser(
        prog="caption-scores",
        description=__doc__,
        epilog=f"tokenizers:\n  auto          by what the references are written in{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def file(name: str, text: str) -> None:
        parser.add_argument(name, type=Path, metavar="FILE", help=text)

    parser.add_argument("results", type=Path, help="JSON list of {image_id, caption}, one row per image")
    parser.add_argument("annotations", type=Path, help="JSON of COCO's form: {annotations: [{image_id, caption}, ...]}")
    parser.add_argument("--tokenizer", default="auto", choices=["auto", *TOKENIZERS], help="tokenizer, default auto")
    parser.add_argument("--meteor", action="store_true", help="METEOR as well (needs Java and pycocoevalcap)")
    parser.add_argument(
        "--spice", action="store_true", help="SPICE as well (needs Java and pycocoevalcap with its models)"
    )
    parser.add_argument(
        "--clip_model",
        metavar="MODEL",
        help="CLIPScore and RefCLIPScore as well, by this CLIP or SigLIP: folder or Hub id (needs the extra `clip`)",
    )
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="folder of the image files that the annotations name"
    )
    file("--objects", "COCO instances json, or {image_id: [objects]}: rates of hallucinated objects (CHAIR) as well")
    file("--synonyms", "other words for objects, lines of: object, word, word")
    file("--json", "file for all of the report, CIDEr-D of each image included")
    return parser


def print_report(report: dict) -> None:
    """Print one line per score, with its interval and its baselines."""
    metrics, width = report["metrics"], max(8, *map(len, report["metrics"]))
    print(f"{len(report['per_image'])} images, tokenizer {report['tokenizer']}")
    print(f"{'':{width}} {'score':>7}  {'95 % interval':16}  {'shuffled':>8}  {'constant':>8}")
    for name, score in metrics.items():
        low, high = report["intervals"][name]
        baselines = "  ".join(f"{report[of][name]:8.4f}" for of in ("shuffled", "constant") if name in report[of])
        print(f"{name:{width}} {score:7.4f}  {low:.4f} to {high:.4f}  {baselines}".rstrip())
    if report["warning"]:
        print(report["warning"])


def _report(arguments: argparse.Namespace, images: list, captions: list[str], references: list[list[str]]) -> dict:
    """The report of all scores asked for; Java programs and image files are looked for before any is computed."""
    java = [name for name in ("meteor", "spice") if getattr(arguments, name)]
    for name in java:
        check_installation(name)
    clip_files = find_images(arguments.annotations, arguments.images, images) if arguments.images else []
    report = _score(captions, references, arguments.tokenizer)
    for name in java:
        _add_java(name, captions, references, report)
    if arguments.clip_model:
        _add_clip(arguments.clip_model, clip_files, captions, references, report)
    if arguments.objects:
        _add_objects(arguments.objects, arguments.synonyms, images, captions, references, report)
    return report


def _add_java(name: str, captions: list[str], references: list[list[str]], report: dict) -> None:
    score, of_images = measure_java(name, captions, references)
    report["metrics"][name] = score
    report["intervals"][name] = interval_of_images(score, of_images)


def _add_clip(model: str, files: list[Path], captions: list[str], references: list[list[str]], report: dict) -> None:
    from .clip_score import ClipScorer, ImageFiles

    try:
        images = ImageFiles(files)
        scores = ClipScorer(model).report(images, images.hashes(), captions, references)
    except ValueError as error:  # no torch, no such model, a file that is no image
        raise InputError(str(error)) from None
    for part, values in scores.items():
        report[part] |= values
    report["clip_model"] = Path(model).name if os.path.exists(model) else model


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


def _write(file: Path, text: str) -> None:
    """Write beside the file, then rename, so that no half-written report is left."""
    beside = None
    try:
        descriptor, beside = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
        os.replace(beside, file)
    except OSError as error:
        if beside:
            Path(beside).unlink(missing_ok=True)
        raise InputError(
            f"--json {file}: cannot be written ({error.strerror}): give a file in a folder that exists"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
