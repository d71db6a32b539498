"""Score captions against references: those that a captioner generates for a split, or those of a file.

    accelerate launch evaluate_captions.py --model_name_or_path outputs/lstm --dataset_name data/flickr8k --output_dir outputs/scores
    python evaluate_captions.py --predictions captions.jsonl --output_dir outputs/scores
    python evaluate_captions.py --predictions results.json --dataset_name data/coco --output_dir outputs/scores

A file of predictions has lines of {"image_id", "caption", "references"}, or is a list of {"image_id", "caption"}, COCO's result
format, whose references are those of the dataset. results.json has the scores, those of the shuffled baseline, and intervals.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from system.errors import UserError, one_line_errors
from training.arguments import GenerationArguments, parse_recipe

if TYPE_CHECKING:
    from datasets import Dataset

    from metrics import CaptionScorer

# What takes seconds to import is imported where it is used, so that `--help` and a wrong option answer at once.


@dataclass
class EvaluationArguments:
    output_dir: str = field(
        metadata={"help": "Folder for results.json and, with a model, captions.jsonl and captions.html."}
    )
    predictions: str | None = field(default=None, metadata={"help": "File of captions to score: .jsonl or .json."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder, training checkpoint or Hub id of a captioner to score."}
    )
    dataset_name: str = field(
        default="scenes",
        metadata={
            "help": "Folder made by a data_scripts command, dataset on the Hub, or `scenes`; for predictions without references, "
            "where these are."
        },
    )
    split: str = field(default="test", metadata={"help": "Split of the dataset: train, validation or test."})
    max_eval_samples: int | None = field(
        default=None,
        metadata={
            "help": "Number of images, evenly spread, as in training; all if not given.",
            "min": 1,
            "needs": {"predictions": [None]},
        },
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images per batch and device.", "min": 1})
    cache_features: bool = field(
        default=True, metadata={"help": "Read the encoder's features from the cache on disk, and write them there."}
    )
    int8_features: bool = field(
        default=False,
        metadata={
            "help": "Cache features as int8: half the disk, lossy; read those that training has cached.",
            "needs": {"cache_features": [True]},
        },
    )
    compile_encoder: bool = field(
        default=False,
        metadata={
            "help": "Compile the encoder with torch.compile before it encodes the images.",
            "needs": {"cache_features": [True]},
        },
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Number of processes that decode images; 0 decodes in the main process.", "min": 0}
    )
    publish_images: bool | None = field(
        default=None,
        metadata={"help": "Whether captions.html may be pushed with its images; only drawn scenes if not given."},
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="float32",
        metadata={
            "help": "Data type of weights and activations; auto is bfloat16, which changes scores a little, where the device has "
            "instructions for it."
        },
    )
    seed: int = field(
        default=42,
        metadata={
            "help": "Seed of sampling; samples depend on the number of processes, too.",
            "min": 0,
            "below": 2**32,
        },
    )

    def __post_init__(self):
        if (self.predictions is None) == (self.model_name_or_path is None):
            raise UserError("give either --model_name_or_path or --predictions")


def main(argv: list[str] | None = None) -> None:
    args, generation_args = parse_recipe((EvaluationArguments, GenerationArguments), argv, __doc__)
    with one_line_errors():
        if args.predictions:
            given = [name for name, value in generation_args.settings().items() if value is not None]
            if given:
                raise UserError(f"--{given[0]} has no effect with --predictions, which are generated already")
            score_predictions(args)
        else:
            score_model(args, generation_args)


def score_predictions(args: EvaluationArguments) -> None:
    """Score a file of captions; only results.json is written."""
    from data_scripts.captions_file import read_captions
    from metrics import CaptionScorer
    from reporting.report import print_results
    from reporting.results import write_results

    records = read_captions(args.predictions, with_references=False)
    if not records:
        raise UserError(f"{args.predictions} has no captions")
    about = {"dataset": Path(args.predictions).name}
    if not all("references" in record for record in records):
        add_references(records, args)
        about = {"dataset": Path(args.dataset_name).name, "split": args.split}
    references = [record["references"] for record in records]
    scores = CaptionScorer(references).report([record["caption"] for record in records])
    scores.pop("per_image")
    results = {
        **about,
        "num_images": len(records),
        "references_per_image": round(sum(map(len, references)) / len(records), 2),
        **scores,
    }
    write_results(args.output_dir, results)
    print_results(args.output_dir, results)


def add_references(records: list[dict], args: EvaluationArguments) -> None:
    """Give each record the captions that its image has in the dataset's split.

    Raises:
        UserError: An image is not in the split.
    """
    rows = load_split(args)[1]
    references = dict(zip(map(str, rows["image_id"]), rows["captions"], strict=True))
    unknown = [record["image_id"] for record in records if record["image_id"] not in references]
    if unknown:
        raise UserError(
            f"{args.predictions} has no references, and {len(unknown):,} of its {len(records):,} images, such as {unknown[0]!r}, are not "
            f"in the {args.split} split of {args.dataset_name}: give the --dataset_name and --split that were captioned"
        )
    for record in records:
        record["references"] = references[record["image_id"]]
    if len(records) < len(references):
        print(
            f"{args.predictions} has captions of {len(records):,} of the split's {len(references):,} images: scored on these"
        )


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
    from accelerate.data_loader import prepare_data_loader
    from accelerate.utils import set_seed
    from datasets import DatasetDict
    from torch.utils.data import DataLoader

    from data_scripts.caption_texts import CaptionTexts
    from data_scripts.scene_truth import scene_truths
    from metrics import CaptionScorer
    from modeling.captioner import Captioner
    from reporting.page import NUM_IMAGES
    from reporting.report import report_captions
    from reporting.results import write_captions
    from training.batches import CaptionCollator, ImageDataset, subsample_evenly
    from training.evaluation import caption_images
    from training.features import encode_splits

    # ---- Accelerator and seed ---------------------------------------------------------------------------------------
    transformers.logging.disable_progress_bar()
    accelerator = Accelerator()
    level = logging.INFO if accelerator.is_local_main_process else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    set_seed(args.seed, device_specific=True)

    # ---- Data and model ---------------------------------------------------------------------------------------------
    dataset, rows = load_split(args)
    (rows,) = subsample_evenly(args.max_eval_samples, rows)
    captioner = Captioner.load(args.model_name_or_path)
    captioner.set_decoding(**generation_args.settings())
    captioner.to(accelerator.device)  # cached features are float32, whatever the captions are generated in
    encoder = captioner.encoder.requires_grad_(False)
    features = encode_splits(DatasetDict({args.split: rows}), encoder, captioner.image_processor, args)[args.split]

    # ---- Captions ---------------------------------------------------------------------------------------------------
    loader = DataLoader(
        ImageDataset(rows, features[0]),
        args.per_device_eval_batch_size,
        collate_fn=CaptionCollator(captioner.processor),
        num_workers=args.dataloader_num_workers,
    )
    loader = prepare_data_loader(loader, accelerator.device, put_on_device=True, even_batches=False)
    captioner.to(accelerator.device, args.dtype)
    captions = caption_images(captioner, loader, accelerator, NUM_IMAGES)

    # ---- Scores -----------------------------------------------------------------------------------------------------
    if accelerator.is_main_process:
        training_captions = CaptionTexts(dataset["train"]) if "train" in dataset else None
        scorer = CaptionScorer(rows["captions"], training_captions)
        report_captions(
            args.output_dir,
            rows=rows,
            dataset=args.dataset_name,
            split=args.split,
            captions=captions,
            scorer=scorer,
            decoding=captioner.model.generation_config,
            publish_images=args.dataset_name == "scenes" if args.publish_images is None else args.publish_images,
            truth=scene_truths([made["caption"] for made in captions], rows["captions"]),
        )
        if generation_args.num_return_sequences:
            print(write_captions(args.output_dir, best_captions(rows, captions, scorer), "best_captions.jsonl"))


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
