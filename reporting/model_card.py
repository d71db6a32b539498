"""README.md of a trained model: the model card that the Hub shows."""

import json
import os
import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from data_scripts.scene_grammar import DRAWN_DATASETS
from reporting.page import TEMPLATES, known_facts, score_rows
from reporting.results import ALL_TITLES, METRIC_TITLES, TRUTH_TITLES, is_hub_id
from reporting.samples import read_samples
from system.files import write_file

Kind = Literal["inception-lstm", "vit-gpt2"]
DESCRIPTIONS = {
    "inception-lstm": (
        "An LSTM captioner: a convolutional encoder encodes the image, and an LSTM generates the caption token by "
        "token from the encoder's pooled features (with `attention: true` it also attends to the encoder's grid of "
        "features at each token)."
    ),
    "vit-gpt2": (
        "ViT-GPT2: a Vision Transformer encodes the image, and GPT-2 generates the caption while attending to the "
        "encoder's features. It is a plain `VisionEncoderDecoderModel` and loads without remote code; only the "
        "pipeline below needs it."
    ),
}
# The LSTM captioner is a class of its own and travels with its code; ViT-GPT2 is a class of transformers.
LOADERS = {
    "inception-lstm": (
        "AutoModelForImageTextToText, AutoProcessor",
        "AutoModelForImageTextToText",
        ", trust_remote_code=True",
    ),
    "vit-gpt2": ("AutoProcessor, VisionEncoderDecoderModel", "VisionEncoderDecoderModel", ""),
}
TAG = "showtell"  # of the cards that are written here
PACKAGES = ("showtell", "transformers", "torch", "timm", "tokenizers", "datasets", "accelerate")


def write_model_card(
    output_dir: str | os.PathLike,
    *,
    kind: Kind,
    model_name: str,
    results: dict,
    command: str,
    options: dict[str, Any],
    started_from: Sequence[str] = (),
    license: str = "apache-2.0",
    training_data: dict[str, int] | None = None,
    self_critical: bool = False,
) -> Path:
    """Write README.md: metadata with a model-index for the Hub, then description, usage, scores, training and limits.

    A curves.png in the output directory is shown on the card, and so are the images in samples/.

    Args:
        model_name: Argument of `from_pretrained`: a Hub id or a folder. As everywhere on the card, only the last name
            of a path outside the working directory is shown.
        results: What `write_results` writes; missing keys are left out of the card.
        command: Command line that trained the model.
        options: Every option of the run, as resolved; tokens are left out.
        started_from: Hub ids and folders of the pretrained weights; empty if all weights were initialized at random.
        license: License of the weights, as the Hub names licenses.
        training_data: Size of the training split: {"images": number, "captions": number}, or {"shards": number}.
        self_critical: Whether the model was trained by self-critical sequence training.

    Returns:
        The path of the card.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    model_name = without_path(model_name)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"line": markdown_line, "number": _number}
    rates = results.get("true_captions")
    card = environment.get_template("model_card.md.jinja").render(
        card_data=card_metadata(kind, model_name, results, started_from, license).to_yaml(),
        title=markdown_line(Path(model_name).name or model_name),
        description=_description(kind, started_from, self_critical, options),
        usage=usage(kind, model_name),
        one_line_usage=one_line_usage(model_name),
        scored_on=_scored_on(results),
        rows=score_rows(results),
        true_captions={TRUTH_TITLES[key]: rate for key, rate in rates.items()} if rates else {},
        constant_caption=(results.get("constant") or {}).get("caption"),
        has_curves=(Path(output_dir) / "curves.png").exists(),
        samples=read_samples(output_dir),
        facts={
            "Decoding": known_facts(results.get("decoding")),
            "Caption statistics": known_facts(results.get("diagnostics")),
            "Training cost": known_facts(results.get("train")),
        },
        dataset=results.get("dataset") or "an unnamed data set",
        command=shlex.join(map(without_path, shlex.split(command))),
        options=_yaml(options),
        started_from=started_from,
        training_data=training_data or {},
        license=license,
        versions=_versions(),
        results=results,
    )
    return write_file(Path(output_dir) / "README.md", card.encode("utf-8", "replace"))


def one_line_usage(model_name: str) -> str:
    """Python that captions one image with the pipeline that is saved beside either model."""
    return f"""\
from transformers import pipeline
captioner = pipeline("image-to-text", model={json.dumps(model_name)}, trust_remote_code=True)
print(captioner("image.jpg")[0]["generated_text"])"""


def usage(kind: Kind, model_name: str) -> str:
    """Python that captions one image with model and processor."""
    imports, loader, remote_code = LOADERS[kind]
    repository = json.dumps(model_name)
    return f"""\
from transformers import {imports}
from transformers.image_utils import load_image
model = {loader}.from_pretrained({repository}{remote_code})
processor = AutoProcessor.from_pretrained({repository}{remote_code})
ids = model.generate(**processor(images=load_image("image.jpg"), return_tensors="pt"))
print(processor.batch_decode(ids, skip_special_tokens=True)[0])"""


def name_on_card(card: str, name: str) -> str:
    """Return a card whose Python loads the model from `name`, in place of where it was when the card was written."""
    return re.sub(r'(\.from_pretrained\(|, model=)"(?:[^"\\]|\\.)*"', lambda found: found[1] + json.dumps(name), card)


def without_path(text: str) -> str:
    """Shorten a path in a word of a command line, or in an option, to its last name.

    A card does not reveal folders of the machine it was written on: existing folders and paths from outside the working
    directory are shortened. A file below it, such as recipes/lstm_reference.yaml, keeps its path.
    """
    option, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    parts = re.split(r"[/\\]", value.rstrip("/\\"))
    outside = re.match(r"[/\\~]|[A-Za-z]:[/\\]|\.\.(?=[/\\]|$)", value)
    return f"{option}{equals}{parts[-1]}" if outside or os.path.isdir(value) else text


def card_metadata(
    kind: Kind, model_name: str, results: dict, started_from: Sequence[str], license: str
) -> ModelCardData:
    """The card's metadata for the Hub: tags, license, base models, and the scores as a model-index."""
    dataset = results.get("dataset") or "unnamed"
    dataset_type = dataset if is_hub_id(dataset) else re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-")
    # The Hub's names of the metrics: bleu, rouge, cider.
    scores = {
        (name.split("_")[0] if name in METRIC_TITLES else name, title): results["metrics"][name]
        for name, title in ALL_TITLES.items()
        if name in results.get("metrics", {})
    }
    if rates := results.get("true_captions"):
        scores["true_captions", TRUTH_TITLES["all"]] = rates["all"]
    eval_results = [
        EvalResult(
            task_type="image-to-text",
            task_name="Image captioning",
            dataset_type=dataset_type or "unnamed",
            dataset_name=dataset,
            dataset_split=results.get("split"),
            metric_type=metric_type,
            metric_name=title,
            metric_value=round(float(score), 4),  # YAML has no NumPy numbers
        )
        for (metric_type, title), score in scores.items()
    ]
    return ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-to-text",
        tags=["image-captioning", TAG, *(["custom_code"] if kind == "inception-lstm" else [])],
        base_model=[name for name in started_from if not os.path.isdir(name)] or None,
        metrics=["bleu", "rouge", "cider"],
        model_name=Path(model_name).name or model_name,
        eval_results=eval_results or None,
    )


@dataclass(frozen=True)
class TrainingData:
    """What a captioner was trained on.

    Attributes:
        dataset: Its name, or names; None if unknown.
        is_scenes: Whether it is known to be drawn scenes.
    """

    dataset: str | None = None
    is_scenes: bool = False


def training_data_of(name_or_path: str) -> TrainingData:
    """What the card of a captioner, trained here or third-party, names as its training data.

    Args:
        name_or_path: Folder or Hub id. Without a card that can be read, its training data are unknown.
    """
    path = Path(name_or_path, "README.md") if os.path.isdir(name_or_path) else name_or_path
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):  # no card, a broken one, or no connection to the Hub
        return TrainingData()
    if TAG not in (data.tags or []):
        datasets = [data.datasets] if isinstance(data.datasets, str) else data.datasets or []
        return TrainingData(", ".join(map(str, datasets)) or None)
    # Ours are scored on a split of what they were trained on.
    results = data.eval_results or []
    names = {result.dataset_name for result in results}
    is_scenes = (bool(names) and names <= {*DRAWN_DATASETS}) or any(
        result.metric_type == "true_captions" for result in results
    )
    return TrainingData(", ".join(sorted(names)) or None, is_scenes)


def markdown_line(text: Any) -> str:
    """Any text as one line of plain Markdown: no HTML, no markup, no break out of a table."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>|#!~$&])", r"\\\1", line)


def _description(kind: Kind, started_from: Sequence[str], self_critical: bool, options: dict[str, Any]) -> str:
    starts = " and ".join(
        markdown_line(without_path(name)) if os.path.isdir(name) else f"[{name}](https://huggingface.co/{name})"
        for name in started_from
    )
    if self_critical:
        weights = {"BLEU-4": "bleu_weight", "ROUGE-L": "rouge_weight"}
        reward = " + ".join(["CIDEr-D", *(name for name, weight in weights.items() if options.get(weight))])
        method = "[self-critical sequence training](https://arxiv.org/abs/1612.00563)"
        return f"{DESCRIPTIONS[kind]} Fine-tuned from {starts} by {method} with {reward} as the reward."
    start = f"Initialized from {starts}." if starts else "Trained from random weights."
    return f"{DESCRIPTIONS[kind]} {start}"


def _scored_on(results: dict) -> str:
    split = results.get("split")
    where = f"the {markdown_line(split)} split of " if split else ""
    sentence = f"On {where}{markdown_line(results.get('dataset') or 'an unnamed data set')}"
    if results.get("num_images"):
        sentence += f", {results['num_images']:,} images"
    if results.get("references_per_image"):
        number = results["references_per_image"]
        sentence += f" with {number:.3g} reference{'' if number == 1 else 's'} each"
    return sentence + ":"


def _yaml(options: dict[str, Any]) -> str:
    # By way of JSON, which turns paths and enumerations into the strings one types; YAML would refuse them.
    shown = {name: value for name, value in options.items() if not name.endswith("_token")}
    plain = json.loads(json.dumps(shown, default=str))
    plain = {name: without_path(value) if isinstance(value, str) else value for name, value in plain.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).strip()


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"


def _versions() -> str:
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue  # ViT-GPT2 does not need timm, for one
    return ", ".join(versions)
