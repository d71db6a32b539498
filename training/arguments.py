"""How a run is told what to do: a recipe (YAML), and the command line over it."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from data_scripts.augmentations import MAX_AUGMENTATIONS
from system.errors import UserError

# What no run can do with less, in any script.
LOWEST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("eval_epochs", "save_epochs", "save_steps", "save_total_limit", "early_stopping_patience"), 1),
    **dict.fromkeys(("max_length", "num_beams", "num_return_sequences", "max_caption_length"), 1),
    **dict.fromkeys(("max_train_samples", "max_eval_samples", "image_size", "patch_size", "image_embed_dim"), 1),
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads"), 1),
    "num_augmentations": 1,
    "num_trainable_encoder_blocks": 0,
    **dict.fromkeys(("learning_rate", "encoder_learning_rate", "weight_decay", "warmup_steps", "max_grad_norm"), 0),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size", "seed", "dataloader_num_workers"), 0),
    **dict.fromkeys(("sample_no_repeat_ngram_size", "sample_min_length", "bleu_weight", "rouge_weight", "kl_coef"), 0),
    "logit_adjustment_tau": 0,
    **dict.fromkeys(("eval_steps", "num_samples", "batch_size", "num_beams", "max_length"), 1),
    **dict.fromkeys(("num_workers", "min_length"), 0),
    "vocab_size": 8,  # the four special tokens, and something to say
}
SHARES = ("dropout", "attention_dropout", "label_smoothing_factor", "xe_weight", "init_weight_share", "ema_decay")
CHOICES = {
    "lr_scheduler_type": ("constant", "constant_with_warmup", "cosine", "linear", "polynomial", "inverse_sqrt"),
    "mixed_precision": ("no", "bf16", "fp16"),
}


@dataclass
class ImageArguments:
    """The captioned images of a run; the same for every script."""

    dataset_name: str = field(
        default="scenes",
        metadata={
            "help": "Folder made by a data_scripts command, data set on the Hub, or `scenes`, drawn on the spot."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many images."})
    max_eval_samples: int | None = field(
        default=None,
        metadata={
            "help": "Generate for so many validation images at each evaluation, always the same; all if not given."
        },
    )
    max_caption_length: int | None = field(
        default=None,
        metadata={"help": "Cut training captions to so many tokens, EOS included; none is cut if not given."},
    )
    num_augmentations: int = field(
        default=1,
        metadata={
            "help": "Views of each training image that take turns: 2 adds its mirror image, with left and right swapped in "
            "its captions, more (up to 10) large parts of both."
        },
    )
    cache_features: bool = field(
        default=True, metadata={"help": "Keep what a frozen encoder says of each image on disk, in float16."}
    )
    int8_features: bool = field(
        default=False, metadata={"help": "Keep it in 8 bits a number: half the disk, and not quite the same."}
    )
    compile_encoder: bool = field(
        default=False,
        metadata={"help": "Compile the encoder before it sees the images: minutes, for a few per cent on a CPU."},
    )
    publish_images: bool | None = field(
        default=None,
        metadata={"help": "Put test images on the card and push the page of them; if not given, only drawn scenes."},
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that decode images; 0 decodes in the training process."}
    )

    def __post_init__(self):
        if self.compile_encoder and not self.cache_features:
            raise UserError("--compile_encoder true is for what --cache_features true keeps: give one of them up")
        if self.publish_images is None:
            self.publish_images = self.dataset_name == "scenes"  # drawn here, so nobody else's


@dataclass
class DataArguments(ImageArguments):
    """The same, where a new captioner learns the captions."""

    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a tokenizer; the LSTM captioner trains its own where none is given."},
    )
    train_sampling_strategy: Literal["group_by_length", "random"] = field(
        default="group_by_length", metadata={"help": "Which captions share a batch: those of like length, or any."}
    )
    group_by_image: bool = field(
        default=False, metadata={"help": "Put the captions of an image into one batch, which reads the image once."}
    )


@dataclass
class LoopArguments:
    """A training loop under Accelerate; names as in transformers.TrainingArguments."""

    output_dir: str = field(default="outputs/run", metadata={"help": "Where model, results and checkpoints go."})
    num_train_epochs: int = field(default=300, metadata={"help": "Times each caption is seen."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Captions a step on each device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Captions or images at once in evaluation."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches whose gradients make one step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of AdamW, at its highest."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of AdamW."})
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "constant, constant_with_warmup, cosine, linear."}
    )
    warmup_steps: float = field(default=0, metadata={"help": "Steps of warm-up; below 1, their share of all steps."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are cut to this length; 0 cuts none."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16; as `accelerate` is set up if not given."}
    )
    seed: int = field(default=42, metadata={"help": "Of weights, order and dropout."})
    eval_epochs: int = field(default=1, metadata={"help": "Epochs between two evaluations."})
    save_epochs: int = field(default=1, metadata={"help": "Epochs between two checkpoints."})
    save_steps: int | None = field(
        default=None, metadata={"help": "Steps between two checkpoints inside an epoch; none there if not given."}
    )
    save_total_limit: int | None = field(
        default=None, metadata={"help": "Checkpoints kept, the newest, and the best beside them; all if not given."}
    )
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Leave the model of the best validation CIDEr in output_dir, else the last."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better validation CIDEr."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest caption generated, in tokens; the training captions' 99th percentile if not given."},
    )
    min_length: int = field(
        default=0, metadata={"help": "Shortest caption generated, in tokens; the end of one comes no earlier."}
    )
    num_beams: int = field(default=1, metadata={"help": "Beams; 1 is greedy."})
    length_penalty: float = field(
        default=1.0, metadata={"help": "Of beams: the power of its length that a caption's score is divided by."}
    )
    no_repeat_ngram_size: int = field(
        default=0, metadata={"help": "No run of so many tokens is generated twice; 0 allows all."}
    )
    report_to: str = field(
        default="tensorboard", metadata={"help": "Trackers of Accelerate, with commas between; or none."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint folder, `last`, or OWNER/NAME[@REVISION] on the Hub."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Remove the checkpoints that another run has left in output_dir."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Upload output_dir at the end."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository to push to; output_dir's name if not given."}
    )
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Make the repository a private one."})
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to; main if not given."})
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = field(
        default="end",
        metadata={
            "help": "When to push: at the end only, or the model, the last or all checkpoints when one is saved."
        },
    )

    def __post_init__(self):
        check_lengths(self)


def parse_recipe(
    dataclasses: Sequence[type], argv: Sequence[str] | None = None, description: str | None = None
) -> tuple:
    """Read `[recipe.yaml] [--name value ...]`: the recipe over the defaults, the command line over the recipe.

    Ends the program with one sentence and exit code 2 where a file or an option is wrong.
    """
    parser = HfArgumentParser(list(dataclasses), description=description)
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].endswith((".yaml", ".yml")):
        parser.set_defaults(**read_recipe(argv.pop(0), dataclasses, parser))
    try:
        *groups, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:  # transformers' own checks
        parser.error(str(error))
    if unknown:
        parser.error(f"there is no option {unknown[0]}; --help lists them")
    for group in groups:
        kinds = get_type_hints(type(group))
        for option in fields(group):
            value, kind = getattr(group, option.name), kinds[option.name]
            problem = value_problem(option.name, value)
            if get_origin(kind) is Literal and value not in get_args(kind):  # argparse does not look at a recipe's
                problem = f"it must be one of {', '.join(map(str, get_args(kind)))}"
            if problem:
                parser.error(f"--{option.name} {value}: {problem}")
    return tuple(groups)


def check_lengths(args) -> None:
    """See to it that a caption may be as long as it has to be.

    Raises:
        ValueError: It may not.
    """
    longest = args.max_length
    if longest and (args.min_length or 0) > longest:
        raise UserError(f"--min_length {args.min_length}: it must not be more than --max_length {longest}")


def value_problem(name: str, value: Any) -> str | None:
    """Say why an option cannot have a value, or None if it can; None is always possible."""
    if name in CHOICES and value is not None and value not in CHOICES[name]:
        return f"it must be one of {', '.join(CHOICES[name])}"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if not math.isfinite(value):
        return "it must be a finite number"
    if name in LOWEST and value < LOWEST[name]:
        return f"it must be {LOWEST[name]} or more"
    if name == "num_train_epochs" and value <= 0:
        return "it must be more than 0"
    if name == "length_penalty" and abs(value) > 100:  # a power of the length
        return "it must be between -100 and 100"
    if name == "seed" and value >= 2**32:
        return f"it must be less than {2**32}"
    if name == "top_p" and not 0 < value <= 1:
        return "it must be more than 0, and 1 at most"
    if name == "num_augmentations" and value > MAX_AUGMENTATIONS:
        return f"there are {MAX_AUGMENTATIONS} views at most"
    if name in SHARES and not 0 <= value < 1:
        return "it must be 0 or more, and less than 1"
    return None


def read_recipe(path: str, dataclasses: Sequence[type], parser: HfArgumentParser) -> dict:
    """The options a recipe sets."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        parser.error(f"{path} cannot be read: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"{path} is not YAML: {error}")
    if not isinstance(recipe, dict):
        parser.error(f"{path} holds no options: lines of `name: value` are expected")
    known = {option.name: option for kind in dataclasses for option in fields(kind)}
    unknown = sorted(set(map(str, recipe)) - known.keys())
    if unknown:
        parser.error(f"{path}: there is no option {', '.join(unknown)}; --help lists them")
    for name, value in recipe.items():
        if isinstance(value, list | dict | None) and isinstance(known[name].default, str | int | float):
            parser.error(f"{path}: {name} wants one value, as in `{name}: {known[name].default}`")
    # argparse converts defaults that are strings, as it does what stands on the command line: "1e-3" becomes a number.
    return {
        name: str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        for name, value in recipe.items()
    }
