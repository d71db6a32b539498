"""Score the captions of a split and write all that it leaves in the output directory."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import GenerationConfig

from reporting.page import write_page
from reporting.results import METRIC_TITLES, write_captions, write_results
from reporting.samples import write_samples


def report_captions(
    output_dir: str | os.PathLike,
    *,
    rows: Dataset,
    dataset: str,
    split: str,
    captions: list[dict],
    scorer,
    decoding: GenerationConfig,
    train: dict | None = None,
    publish_images: bool = False,
) -> dict:
    """Score the captions of a split, write results.json, captions.jsonl and captions.html, and tell the scores.

    Args:
        rows: `image`, `image_id` and `captions` of each image.
        dataset: Its name, as the tables shall show it.
        captions: {"caption", "ended"} of each row, and where known the "tokens" and "center_crop" that the page shows.
        scorer: A `metrics.CaptionScorer` of the rows' captions.
        decoding: The generation config used.
        train: "epochs", "seconds" and "images_per_second" of the training that ends here. Where none does, samples/ stay as
            they are: they belong to the card, which tells of the training.
        publish_images: Whether others may see them: a dozen is then put into samples/, for the card, and the page is pushed.

    Returns:
        The results, as they stand in results.json.
    """
    texts = [made["caption"] for made in captions]
    scores = scorer.report(texts, [made["ended"] for made in captions])
    per_image = scores.pop("per_image")
    columns = zip(rows["image_id"], captions, rows["captions"], per_image, strict=True)
    records = [
        {**made, "image_id": image_id, "references": references, **scored}
        for image_id, made, references, scored in columns
    ]
    results = {
        "dataset": dataset,
        "split": split,
        "num_images": len(rows),
        "references_per_image": round(sum(map(len, rows["captions"])) / len(rows), 2),
        "decoding": decoding_settings(decoding),
        **scores,
        "train": train,
        "publish_images": publish_images,
    }
    write_results(output_dir, results)
    write_captions(output_dir, records)
    if train is not None:
        write_samples(output_dir, rows, texts, publish_images)
    write_page(output_dir, (row["image"] for row in rows), records, results)
    print_results(output_dir, results)
    return results


def decoding_settings(config: GenerationConfig) -> dict[str, Any]:
    """What of a generation config decides on the words: all that differs from the defaults, ids of tokens excepted."""
    settings = {"num_beams": config.num_beams or 1, "do_sample": bool(config.do_sample)} | config.to_diff_dict()
    hidden = ("_from_model_config", "transformers_version", "output_attentions", "output_hidden_states")
    if config.sequence_bias:
        settings["sequence_bias"] = f"of {len(config.sequence_bias):,} tokens"
    return {
        name: value
        for name, value in settings.items()
        if name not in hidden and not name.endswith("token_id") and isinstance(value, bool | int | float | str)
    }


def print_results(output_dir: str | os.PathLike, results: dict) -> None:
    """Print the scores with the shuffled ones beside, the warning if there is one, and where to look."""
    for name, title in METRIC_TITLES.items():
        low, high = results["intervals"][name]
        print(
            f"{title:8} {results['metrics'][name]:.3f}  ({low:.3f} to {high:.3f}; shuffled {results['shuffled'][name]:.3f})"
        )
    if results["warning"]:
        print(f"warning: {results['warning']}")
    for name in ("captions.html", "results.json"):
        if (Path(output_dir) / name).exists():
            print(Path(output_dir) / name)


def command_line() -> str:
    """The command that runs now, as one would type it, the Hub's and others' tokens left out."""
    words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    for place, word in enumerate(words):
        name, equals, _ = word.partition("=")
        if name.startswith("--") and name.endswith("_token"):
            if equals:
                words[place] = f"{name}=..."
            elif place + 1 < len(words):
                words[place + 1] = "..."
    return shlex.join(["accelerate", "launch", *words])
