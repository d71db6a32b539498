"""Score captions against references: those a model writes, or those in a file.

    accelerate launch evaluate_captions.py --model_name_or_path outputs/lstm --dataset_name data/flickr8k --output_dir outputs/scores
    python evaluate_captions.py --predictions captions.jsonl --output_dir outputs/scores

The file has lines of {"image_id", "caption", "references"}. results.json says the scores, what they would be shuffled, and
how sure they are.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import transformers
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import set_seed
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from training.captioning import caption_images
from transformers import HfArgumentParser

from data_scripts import load_captions
from data_scripts.captions_file import read_captions
from metrics import CaptionScorer
from modeling.captioner import Captioner
from reporting.page import NUM_IMAGES
from reporting.report import print_results, report_captions
from reporting.results import write_captions, write_results
from system.errors import UserError, one_line_errors
from training.arguments import ImageArguments, value_problem
from training.batches import CaptionCollator, ImageDataset
from training.features import encode_splits


@dataclass
class EvaluationArguments:
    output_dir: str = field(metadata={"help": "Where results.json and, for a model, captions and page go."})
    predictions: str | None = field(default=None, metadata={"help": "File of captions to score, .jsonl."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder or Hub id of a captioner to score."})
    dataset_name: str = field(default="scenes", metadata={"help": "What the model is scored on, as in training."})
    split: str = field(default="test", metadata={"help": "train, validation or test."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Score on the first so many images."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Images captioned at once."})
    cache_features: bool = field(
        default=True,
        metadata={"help": "Take what the encoder says of each image from where training kept it, or keep it there."},
    )
    int8_features: bool = field(
        default=False, metadata={"help": "Of what is kept, take or keep what has 8 bits a number."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that decode images."})
    publish_images: bool | None = field(
        default=None,
        metadata={"help": "The page of the images may be pushed; if not given, only that of drawn scenes."},
    )
    num_beams: int | None = field(default=None, metadata={"help": "Beams; the model's own if not given."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest caption, in tokens; the model's own if not given."}
    )
    min_length: int | None = field(
        default=None, metadata={"help": "Shortest caption, in tokens; the model's own if not given."}
    )
    length_penalty: float | None = field(
        default=None, metadata={"help": "Of beams: the power of its length a caption's score is divided by; likewise."}
    )
    no_repeat_ngram_size: int | None = field(
        default=None, metadata={"help": "No run of so many tokens twice; the model's own if not given."}
    )
    top_p: float | None = field(
        default=None,
        metadata={
            "help": "Sample each word from the likeliest that hold so much of the probability, in place of beams."
        },
    )
    num_return_sequences: int | None = field(
        default=None,
        metadata={
            "help": "Captions of each image, beams or samples: the first is scored, and best_captions.jsonl has that of them "
            "which is most like the references, by CIDEr-D."
        },
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="float32",
        metadata={
            "help": "Numbers to compute in; auto is bfloat16 where the device is fast in it; scores differ a little."
        },
    )
    seed: int = field(
        default=42, metadata={"help": "Of what is sampled; with other numbers of processes it is otherwise."}
    )


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(EvaluationArguments, description=__doc__)
    (args,) = parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    for name, value in vars(args).items():
        if problem := value_problem(name, value):
            parser.error(f"--{name} {value}: {problem}")
    if args.top_p and (args.num_beams or 1) > 1:
        parser.error(f"--top_p {args.top_p} and --num_beams {args.num_beams}: give one of them")
    if (args.predictions is None) == (args.model_name_or_path is None):
        parser.error("give either --model_name_or_path or --predictions")
    transformers.logging.disable_progress_bar()
    with one_line_errors():
        if args.predictions:
            score_file(args)
        else:
            score_model(args)


def score_file(args: EvaluationArguments) -> None:
    """Score a file of captions; only results.json is written."""
    records = read_captions(args.predictions)
    references = [record["references"] for record in records]
    scores = CaptionScorer(references).report([record["caption"] for record in records])
    scores.pop("per_image")
    results = {
        "dataset": Path(args.predictions).name,
        "num_images": len(records),
        "references_per_image": round(sum(map(len, references)) / len(records), 2),
        **scores,
    }
    write_results(args.output_dir, results)
    print_results(args.output_dir, results)


def score_model(args: EvaluationArguments) -> None:
    """Caption a split and score it, under any number of processes."""
    accelerator = Accelerator()
    logging.basicConfig(
        level=logging.INFO if accelerator.is_local_main_process else logging.WARNING, format="%(message)s"
    )
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    set_seed(args.seed, device_specific=True)
    dataset = load_captions(args.dataset_name)
    if args.split not in dataset:
        raise UserError(f"{args.dataset_name} has no split {args.split!r}; it has {', '.join(dataset)}")
    rows = dataset[args.split]
    if args.max_eval_samples:
        rows = rows.select(range(min(args.max_eval_samples, len(rows))))
    captioner = Captioner.load(args.model_name_or_path)
    captioner.set_decoding(
        args.max_length,
        args.min_length,
        num_beams=args.num_beams,
        top_p=args.top_p,
        length_penalty=args.length_penalty,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
        num_return_sequences=args.num_return_sequences,
    )
    captioner.to(accelerator.device)  # cached features are float32, whatever the captions are generated in
    kept = ImageArguments(
        cache_features=args.cache_features,
        int8_features=args.int8_features,
        dataloader_num_workers=args.dataloader_num_workers,
    )
    encoder = captioner.encoder.requires_grad_(False)
    features = encode_splits(DatasetDict({args.split: rows}), encoder, captioner.image_processor, kept)[args.split]
    loader = DataLoader(
        ImageDataset(rows, *features),
        args.per_device_eval_batch_size,
        collate_fn=CaptionCollator(captioner.processor),
        num_workers=args.dataloader_num_workers,
    )
    loader = prepare_data_loader(loader, accelerator.device, put_on_device=True, even_batches=False)
    captioner.to(accelerator.device, args.dtype)
    captions = caption_images(captioner, loader, accelerator, NUM_IMAGES)
    if accelerator.is_main_process:
        training_captions = None
        if "train" in dataset:
            training_captions = [text for texts in dataset["train"]["captions"] for text in texts]
        scorer = CaptionScorer(rows["captions"], training_captions)
        report_captions(
            args.output_dir,
            rows=rows,
            dataset=Path(args.dataset_name).name,
            split=args.split,
            captions=captions,
            scorer=scorer,
            decoding=captioner.model.generation_config,
            publish_images=args.dataset_name == "scenes" if args.publish_images is None else args.publish_images,
        )
        if args.num_return_sequences:
            print(write_captions(args.output_dir, best_captions(rows, captions, scorer), "best_captions.jsonl"))


def best_captions(rows: Dataset, captions: list[dict], scorer: CaptionScorer) -> list[dict]:
    """Of what was written of each image the caption that is most like its references, by CIDEr-D, as captions.jsonl has it."""
    written = [[made["caption"], *made.get("others", [])] for made in captions]
    scores = np.array([scorer.per_image_cider(texts) for texts in zip(*written, strict=True)])  # (captions, images)
    best = [texts[place] for texts, place in zip(written, scores.argmax(axis=0), strict=True)]
    columns = zip(rows["image_id"], best, rows["captions"], strict=True)
    return [{"image_id": image_id, "caption": text, "references": own} for image_id, text, own in columns]


if __name__ == "__main__":
    main()
