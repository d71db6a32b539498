"""Score captions against references: those that a captioner generates for a split, or those of a file.

    accelerate launch evaluate_captions.py --model_name_or_path outputs/lstm --dataset_name data/flickr8k --output_dir outputs/scores
    python evaluate_captions.py --predictions captions.jsonl --output_dir outputs/scores
    python evaluate_captions.py --predictions results.json --dataset_name data/coco --output_dir outputs/scores

A file of predictions has lines of {"image_id", "caption", "references"}, or is a list of {"image_id", "caption"}, COCO's result
format, whose references are those of the dataset. results.json has the scores, those of the shuffled baseline, and intervals.
"""

import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data_scripts.scene_grammar import DRAWN_DATASETS
from system.errors import UserError, one_line_errors
from training.arguments import GenerationArguments, option, parse_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate import Accelerator
    from datasets import Dataset

    from metrics import CaptionScorer
    from modeling.captioner import Captioner
    from reporting.optional_metrics import OptionalMetrics

# What takes seconds to import is imported where it is used, so that `--help` and a wrong option answer at once.


@dataclass
class EvaluationArguments:
    output_dir: str = option(help="Folder for results.json and, with a model, captions.jsonl and captions.html.")
    predictions: str | None = option(None, "File of captions to score: .jsonl or .json.")
    model_name_or_path: str | None = option(
        None, "Folder, training checkpoint or Hub id of a captioner to score, trained here or third-party."
    )
    prompt: str | None = option(
        None,
        "Prompt of a third-party model: request of a chat model, or text to continue; by its kind if not given.",
        needs={"predictions": [None]},
    )
    dataset_name: str | None = option(
        None,
        "Folder made by a data_scripts command, dataset on the Hub, `scenes` or `rich_scenes`; for predictions without "
        "references, where these are. For a model scenes if not given.",
    )
    split: str = option("test", "Split of the dataset: train, validation or test.")
    max_eval_samples: int | None = option(
        None, "Number of images, evenly spread, as in training; all if not given.", min=1, needs={"predictions": [None]}
    )
    per_device_eval_batch_size: int = option(64, "Images per batch and device.", min=1)
    feature_cache: Literal["float16", "int8", "none"] = option(
        "float16", "Type in which the encoder's features are cached on disk, and those of training are read."
    )
    compile_encoder: bool = option(
        False,
        "Compile the encoder with torch.compile before it encodes the images.",
        needs={"feature_cache": ["float16", "int8"]},
    )
    dataloader_num_workers: int = option(
        0, "Number of processes that decode images; 0 decodes in the main process.", min=0
    )
    metric_tokenizer: Literal["auto", "ptb", "ptb_in_order", "intl", "char", "none", "13a", "zh", "ja-mecab"] = option(
        "auto",
        "Tokenizer of BLEU, ROUGE-L and CIDEr-D; auto chooses by the script of the references: ptb, coco-caption's, for European ones.",
    )
    meteor: bool = option(False, "Score METEOR as well; needs Java and pycocoevalcap.")
    spice: bool = option(False, "Score SPICE as well; needs Java and pycocoevalcap.")
    clip_model: str | None = option(
        None, "Folder or Hub id of a CLIP or SigLIP to score CLIPScore and RefCLIPScore with as well."
    )
    objects: str | None = option(
        None,
        "COCO instances .json, or .json of {image_id: [objects]}, to score the rates of hallucinated objects (CHAIR) with as well.",
    )
    object_synonyms: str | None = option(
        None, "File of other words for objects: .json {object: [words]}, or lines of object, word, word."
    )
    publish_images: bool | None = option(
        None, "Whether captions.html may be pushed with its images; only drawn scenes if not given."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "float32",
        "Data type of weights and activations; auto is bfloat16, which changes scores a little, where the device has instructions for it.",
    )
    seed: int = option(42, "Seed of sampling; samples depend on the number of processes, too.", min=0, below=2**32)

    def __post_init__(self):
        if (self.predictions is None) == (self.model_name_or_path is None):
            raise UserError("give either --model_name_or_path or --predictions")
        if self.dataset_name is None and self.model_name_or_path:
            self.dataset_name = "scenes"
        if self.object_synonyms and not self.objects:
            raise UserError("--object_synonyms has no effect without --objects")


def main(argv: list[str] | None = None) -> None:
    args, generation_args = parse_recipe((EvaluationArguments, GenerationArguments), argv, __doc__)
    with one_line_errors():
        if args.predictions:
            given = [name for name, value in generation_args.settings().items() if value is not None]
            if given:
                raise UserError(f"--{given[0]} has no effect with --predictions, which are generated already")
            score_predictions(args)
        else:
            refuse_exported(args.model_name_or_path)
            score_model(args, generation_args)


def refuse_exported(name_or_path: str) -> None:
    """Name the command that scores an exported captioner.

    Raises:
        UserError: It is one.
    """
    from captioning.onnx_captioner import is_exported

    if is_exported(name_or_path):
        raise UserError(
            f"{name_or_path} is an exported captioner, which is scored as it is exported: "
            "python export_onnx.py MODEL FOLDER --dataset_name NAME"
        )


def score_predictions(args: EvaluationArguments) -> None:
    """Score a file of captions; only results.json is written."""
    from data_scripts.captions_file import read_captions
    from reporting.optional_metrics import add_scores
    from reporting.report import print_results
    from reporting.results import write_results

    optional = optional_metrics(args)
    records = read_captions(args.predictions, with_references=False)
    for record in records:
        if record.get("references") == []:
            raise UserError(f"{args.predictions}: image_id {record['image_id']!r} has no reference: give at least one")
    if not records:
        raise UserError(f"{args.predictions} has no captions")
    about, rows = {"dataset": Path(args.predictions).name}, None
    has_references = all("references" in record for record in records)
    if not has_references or args.clip_model:
        rows = matching_rows(records, args)
    if not has_references:
        for record, captions in zip(records, rows["captions"], strict=True):
            record["references"] = captions
        about = {"dataset": Path(args.dataset_name).name, "split": args.split}
    captions, references, image_ids = (
        [record[key] for record in records] for key in ("caption", "references", "image_id")
    )
    scores = build_scorer(references, args).report(captions)
    scores.pop("per_image")
    results = {
        **about,
        "num_images": len(records),
        "references_per_image": round(sum(map(len, references)) / len(records), 2),
        **add_scores(scores, optional.score(captions, references, image_ids, rows)),
    }
    write_results(args.output_dir, results)
    print_results(args.output_dir, results)


def optional_metrics(args: EvaluationArguments) -> "OptionalMetrics":
    from reporting.optional_metrics import OptionalMetrics

    return OptionalMetrics(
        meteor=args.meteor,
        spice=args.spice,
        clip_model=args.clip_model,
        objects=args.objects,
        synonyms=args.object_synonyms,
        batch_size=args.per_device_eval_batch_size,
    )


def build_scorer(
    references: list[list[str]], args: EvaluationArguments, training_captions: "Sequence[str] | None" = None
) -> "CaptionScorer":
    """The scorer of references; a tokenizer that cannot split them is warned of in one line."""
    from metrics import CaptionScorer
    from metrics.caption_scores.tokenizers import MissingTokenizer

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            scorer = CaptionScorer(references, training_captions, args.metric_tokenizer)
        except MissingTokenizer as error:
            raise UserError(f"--metric_tokenizer: {error}") from error
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return scorer


def matching_rows(records: list[dict], args: EvaluationArguments) -> "Dataset":
    """The rows of the dataset's split that captions are of, in their order.

    Raises:
        UserError: An image is not in the split.
    """
    if not args.dataset_name:
        what = "images" if "references" in records[0] else "references"
        raise UserError(f"{args.predictions} has no {what}: give the --dataset_name and --split that were captioned")
    rows = load_split(args)[1]
    places = {str(image_id): place for place, image_id in enumerate(rows["image_id"])}
    unknown = [record["image_id"] for record in records if record["image_id"] not in places]
    if unknown:
        lacks = "images are needed" if "references" in records[0] else "it has no references"
        raise UserError(
            f"{args.predictions}: {lacks}, and {len(unknown):,} of its {len(records):,} images, such as {unknown[0]!r}, are not "
            f"in the {args.split} split of {args.dataset_name}: give the --dataset_name and --split that were captioned"
        )
    if len(records) < len(places):
        print(
            f"{args.predictions} has captions of {len(records):,} of the split's {len(places):,} images: scored on these"
        )
    return rows.select([places[record["image_id"]] for record in records])


def load_split(args: EvaluationArguments) -> tuple:
    """The dataset, and its split that is evaluated."""
    from data_scripts import load_captions

    dataset = load_captions(args.dataset_name)
    if args.split not in dataset:
        raise UserError(f"{args.dataset_name} has no split {args.split!r}; it has {', '.join(dataset)}")
    return dataset, dataset[args.split]


def score_model(args: EvaluationArguments, generation_args: GenerationArguments) -> None:
    """Caption a split and score the captions, under any number of processes."""
    import transformers
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from data_scripts.caption_texts import CaptionTexts
    from data_scripts.scene_truth import scene_truths
    from modeling.image_text_to_text import load_captioner
    from modeling.loading import is_trained_here
    from reporting.report import report_captions
    from reporting.results import write_captions
    from training.batches import subsample_evenly

    # ---- Accelerator and seed ---------------------------------------------------------------------------------------
    transformers.logging.disable_progress_bar()
    accelerator = Accelerator()
    level = logging.INFO if accelerator.is_local_main_process else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    set_seed(args.seed, device_specific=True)

    # ---- Data and model ---------------------------------------------------------------------------------------------
    if not is_trained_here(args.model_name_or_path) and (args.feature_cache == "int8" or args.compile_encoder):
        option = "compile_encoder true" if args.compile_encoder else "feature_cache int8"
        raise UserError(
            f"--{option} has no effect: features of {args.model_name_or_path}, a third-party model, are not cached"
        )
    optional = optional_metrics(args) if accelerator.is_main_process else None
    captioner = load_captioner(args.model_name_or_path, args.prompt)  # a wrong one is named before data are prepared
    dataset, rows = load_split(args)
    (rows,) = subsample_evenly(args.max_eval_samples, rows)
    if optional:
        optional.objects_of(rows["image_id"])  # before captions are generated
    captioner.set_decoding(**generation_args.settings())
    if accelerator.is_main_process:  # before captions are generated, too: a tokenizer may be missing
        training_captions = CaptionTexts(dataset["train"]) if "train" in dataset else None
        scorer = build_scorer(rows["captions"], args, training_captions)
    captions = caption_split(captioner, rows, accelerator, args)

    # ---- Scores -----------------------------------------------------------------------------------------------------
    if accelerator.is_main_process:
        report_captions(
            args.output_dir,
            rows=rows,
            dataset=args.dataset_name,
            split=args.split,
            captions=captions,
            scorer=scorer,
            decoding=captioner.decoding,
            publish_images=args.dataset_name in DRAWN_DATASETS if args.publish_images is None else args.publish_images,
            truth=scene_truths([made["caption"] for made in captions], rows["captions"]),
            optional=optional,
        )
        if generation_args.num_return_sequences:
            print(write_captions(args.output_dir, best_captions(rows, captions, scorer), "best_captions.jsonl"))


def caption_split(
    captioner: "Captioner", rows: "Dataset", accelerator: "Accelerator", args: EvaluationArguments
) -> list[dict]:
    """What the captioner generates for each row, under any number of processes."""
    from accelerate.data_loader import prepare_data_loader
    from datasets import DatasetDict
    from torch.utils.data import DataLoader

    from reporting.page import NUM_IMAGES
    from training.batches import CaptionCollator, ImageDataset
    from training.evaluation import caption_images
    from training.features import encode_splits

    if captioner.is_third_party:
        features, collate = None, InputsCollator(captioner.preprocess)
    else:
        # Cached features are float32, whatever the captions are generated in.
        encoder = captioner.to(accelerator.device).encoder.requires_grad_(False)
        splits = DatasetDict({args.split: rows})
        features = encode_splits(splits, encoder, captioner.image_processor, args)[args.split][0]
        collate = CaptionCollator(captioner.processor)
    loader = DataLoader(
        ImageDataset(rows, features),
        args.per_device_eval_batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
    )
    loader = prepare_data_loader(loader, accelerator.device, put_on_device=True, even_batches=False)
    captioner.to(accelerator.device, args.dtype)
    return caption_images(captioner, loader, accelerator, 0 if captioner.is_third_party else NUM_IMAGES)


class InputsCollator:
    """Items of `ImageDataset` as one batch of a third-party model: "index" and what it takes."""

    def __init__(self, preprocess: "Callable[[list], dict]"):
        self.preprocess = preprocess

    def __call__(self, items: list[dict]) -> dict:
        import torch

        images = [item["image"].convert("RGB") for item in items]
        try:
            inputs = self.preprocess(images)
        except UserError:
            for item, image in zip(items, images, strict=True):
                try:
                    self.preprocess([image])
                except UserError as error:
                    raise UserError(f"image {item['index'] + 1:,} of those that are evaluated: {error}") from error
            raise
        return {"index": torch.tensor([item["index"] for item in items]), **inputs}


def best_captions(rows: "Dataset", captions: list[dict], scorer: "CaptionScorer") -> list[dict]:
    """Of each image's captions the one with the highest CIDEr-D against its references, as captions.jsonl has it."""
    import numpy as np

    generated = [[made["caption"], *made.get("others", [])] for made in captions]
    scores = np.array([scorer.per_image_cider(texts) for texts in zip(*generated, strict=True)])  # (captions, images)
    best = [texts[place] for texts, place in zip(generated, scores.argmax(axis=0), strict=True)]
    columns = zip(rows["image_id"], best, rows["captions"], strict=True)
    return [{"image_id": image_id, "caption": text, "references": own} for image_id, text, own in columns]


if __name__ == "__main__":
    main()
