"""Score the generated captions of a split and write results.json, captions.jsonl, captions.html and samples/."""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import GenerationConfig

from reporting.optional_metrics import OptionalMetrics, add_scores
from reporting.page import write_page
from reporting.results import (
    ALL_TITLES,
    TRUTH_TITLES,
    is_hub_id,
    true_caption_rates,
    write_captions,
    write_results,
)
from reporting.samples import write_samples

# Options whose value is an access token, abbreviated as argparse allows or not.
TOKEN_OPTION = re.compile(r"--(hub_t\w*|\w+_token)")


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
    truth: list[dict] | None = None,
    optional: OptionalMetrics | None = None,
) -> dict:
    """Score the captions of a split, write results.json, captions.jsonl and captions.html, and print the scores.

    Args:
        rows: Rows with `image`, `image_id` and `captions`.
        dataset: Name of the data set: a Hub id, or a folder, of which the last name is shown.
        captions: {"caption", "ended"} for each row, and optionally the "tokens" and "center_crop" that the page shows.
        scorer: A `metrics.CaptionScorer` of the rows' captions.
        decoding: The generation config used.
        train: Cost of the training run that ends here: "epochs", "seconds", and "captions_per_second" or, if images are
            counted, "images_per_second". If None, samples/ are left alone: they belong to the card, which is about
            training.
        publish_images: Whether the images may be published: a dozen on the card, and all of the page when it is pushed.
        truth: If the truth about the images is known (drawn scenes): for each row whether the caption is true as a
            whole and by aspect, under the keys of `TRUTH_TITLES`, and the "false_words", character spans [start, end)
            of the caption.
        optional: Scores to compute beside those of `scorer`.

    Returns:
        The content of results.json.
    """
    texts = [caption["caption"] for caption in captions]
    scores = scorer.report(texts, [caption["ended"] for caption in captions])
    per_image = scores.pop("per_image")
    if optional:
        scores = add_scores(scores, optional.score(texts, rows["captions"], rows["image_id"], rows))
    columns = zip(rows["image_id"], captions, rows["captions"], per_image, truth or [None] * len(captions), strict=True)
    records = [
        {**caption, "image_id": image_id, "references": references, **scored, "truth": is_true}
        for image_id, caption, references, scored, is_true in columns
    ]
    results = {
        "dataset": dataset_title(dataset),
        "split": split,
        "num_images": len(rows),
        "references_per_image": round(sum(map(len, rows["captions"])) / len(rows), 2),
        "decoding": decoding_settings(decoding),
        **scores,
        **({"true_captions": true_caption_rates(truth)} if truth else {}),
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


def dataset_title(name: str) -> str:
    """The name of a data set to show: a Hub id as it is, of a path the last name."""
    return name if is_hub_id(name) and not os.path.exists(name) else Path(name).name


def decoding_settings(config: GenerationConfig) -> dict[str, Any]:
    """The settings of a generation config that affect captions: beams, sampling, and all that are not the default."""
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
    """Print the scores with intervals and shuffled baseline, the warning if there is one, and the files to open."""
    titles = {name: title for name, title in ALL_TITLES.items() if name in results["metrics"]}
    width = max(map(len, titles.values()), default=0) + 1
    for name, title in titles.items():
        low, high = results["intervals"][name]
        has_shuffled = name in results["shuffled"] and results["num_images"] > 1
        shuffled = f"; shuffled {results['shuffled'][name]:.3f}" if has_shuffled else ""
        print(f"{title:{width}} {results['metrics'][name]:.3f}  ({low:.3f} to {high:.3f}{shuffled})")
    if results.get("tokenizer"):
        print(f"Tokenizer: {results['tokenizer']}")
    if rates := results.get("true_captions"):
        aspects = ", ".join(f"{TRUTH_TITLES[key].lower()} {rate:.3f}" for key, rate in rates.items() if key != "all")
        print(f"{'True':{width}} {rates['all']:.3f}  ({aspects})")
    if results["warning"]:
        print(f"warning: {results['warning']}")
    for name in ("captions.html", "results.json"):
        if (Path(output_dir) / name).exists():
            print(Path(output_dir) / name)


def command_line() -> str:
    """The running command as one would type it, without the values of access tokens."""
    words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
    for index, word in enumerate(words):
        name, equals, _ = word.partition("=")
        if TOKEN_OPTION.fullmatch(name):
            if equals:
                words[index] = f"{name}=..."
            elif index + 1 < len(words):
                words[index + 1] = "..."
    return shlex.join(["accelerate", "launch", *words])
