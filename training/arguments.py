"""Options of the scripts: dataclasses, a recipe (YAML) over their defaults, the command line over the recipe.

Only light imports: `--help` and a wrong option answer before torch or transformers is loaded, by argparse alone.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from data_scripts.augmentations import MAX_AUGMENTATIONS
from data_scripts.scene_grammar import DRAWN_DATASETS
from system.errors import UserError

Scheduler = Literal["constant", "constant_with_warmup", "cosine", "linear", "polynomial", "inverse_sqrt"]


def option(default: Any = MISSING, help: str = "", **metadata) -> Any:
    """An option: a field of a dataclass that `parse_recipe` reads.

    Args:
        default: Its default; without one the option must be given.
        help: What `--help` says.
        metadata: Its bounds, `min` and `max` (inclusive), `above` and `below` (exclusive); `needs`, the values that other options must
            have for this one to have an effect; `metavar`; and `positional`, argparse's `nargs` of what is given without a name.
    """
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class DataArguments:
    """The captioned images of a run."""

    dataset_name: str = option(
        "scenes",
        "Folder made by a data_scripts command, dataset on the Hub, shards by glob or address, drawn `scenes` or `rich_scenes`.",
    )
    streaming: bool = option(
        False,
        "Stream webdataset or Parquet shards of a folder or Hub id; a glob or address of shards always is. Needs max_steps.",
    )
    strict: bool = option(False, "End the run at a shard or sample that cannot be used, in place of skipping it.")
    max_train_samples: int | None = option(None, "Number of training images, the first ones; all if not given.", min=1)
    max_eval_samples: int | None = option(
        None, "Number of validation images captioned at each evaluation, evenly spread; all if not given.", min=1
    )
    max_caption_length: int | None = option(
        None, "Max length of a training caption in tokens, EOS included; longer ones are truncated and counted.", min=1
    )
    num_augmentations: int = option(
        1,
        "Deterministic variants of each image, cycled by epoch; 2 adds the horizontal flip with left/right swapped in "
        "its captions, up to 10 add large crops of both.",
        min=1,
        max=MAX_AUGMENTATIONS,
    )
    feature_cache: Literal["float16", "int8", "none"] = option(
        "float16",
        "Data type of the cached features of a frozen encoder; int8 takes half the disk, lossy; none disables the cache.",
    )
    compile_encoder: bool = option(
        False,
        "Compile a frozen encoder with torch.compile before it encodes the images: takes minutes, saves about 8 % on a CPU.",
        needs={"feature_cache": ["float16", "int8"]},
    )
    publish_images: bool | None = option(
        None, "Show test images on the model card and push captions.html; only drawn scenes if not given."
    )
    dataloader_num_workers: int = option(
        0, "Number of processes that decode images; 0 decodes in the main process.", min=0
    )

    def __post_init__(self):
        if self.publish_images is None:
            self.publish_images = self.dataset_name in DRAWN_DATASETS  # drawn here, so nobody's property


@dataclass
class CaptionDataArguments(DataArguments):
    """The captioned images of a run that trains with cross entropy."""

    tokenizer_name: str | None = option(
        None, "Folder or Hub id of the tokenizer; trained on the captions, or the decoder's, if not given."
    )
    train_sampling_strategy: Literal["group_by_length", "group_by_image", "random"] = option(
        "group_by_length",
        "Batches of captions of similar length, which saves padding; of all captions of images, which are encoded once; "
        "or of any captions.",
    )


@dataclass
class DecodingArguments:
    """How captions are generated; what is not given stays as the model has it, which is greedy for a new one."""

    max_length: int | None = option(
        None, "Max length of a generated caption in tokens, prompt excluded; the captioner's own if not given.", min=1
    )
    min_length: int | None = option(None, "Min length of a generated caption in tokens, prompt excluded.", min=0)
    num_beams: int | None = option(None, "Number of beams; 1 is greedy.", min=1)
    length_penalty: float | None = option(
        None, "Exponential length penalty of beam search; above 0 favors longer captions.", min=-100, max=100
    )
    no_repeat_ngram_size: int | None = option(
        None, "Size of n-grams that occur at most once in a caption; 0 disables.", min=0
    )

    def __post_init__(self):
        if self.max_length and (self.min_length or 0) > self.max_length:
            raise UserError(f"--min_length {self.min_length}: it must not be more than --max_length {self.max_length}")
        if self.length_penalty is not None and self.num_beams == 1:
            raise UserError(
                f"--length_penalty {self.length_penalty} has no effect without beams: give --num_beams 2 or more"
            )

    def settings(self) -> dict[str, Any]:
        """What `Captioner.set_decoding` takes."""
        return asdict(self)

    def within(self, lengths: Sequence[int], max_tokens: int | None = None) -> dict[str, Any]:
        """The settings of a model that is trained on captions of these lengths, by a decoder with room for `max_tokens`.

        Max length is the 99th percentile of the captions' lengths where it is not given, and min length at least.
        """
        import numpy as np  # a quarter of what `--help` takes

        longest = self.max_length or max(math.ceil(np.percentile(lengths, 99)), self.min_length or 0)
        limits = {"max_length": longest, "min_length": self.min_length}
        limits = {name: value and min(value, max_tokens or value) for name, value in limits.items()}
        return self.settings() | limits


@dataclass
class NewDecodingArguments(DecodingArguments):
    """How a captioner that is trained from here on generates captions."""

    max_length: int | None = option(
        None,
        "Max length of a generated caption in tokens, prompt excluded; the 99th percentile of the training captions if not given.",
        min=1,
    )
    num_beams: int = option(1, "Number of beams; 1 is greedy.", min=1)


@dataclass
class GenerationArguments(DecodingArguments):
    """How a trained captioner generates captions."""

    top_p: float | None = option(
        None,
        "Probability mass of nucleus sampling, in place of beam search; 1 samples from the whole vocabulary.",
        above=0,
        max=1,
    )
    num_return_sequences: int | None = option(
        None, "Number of captions per image: the best beams, or samples. 1 if not given.", min=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.top_p is not None and (self.num_beams or 1) > 1:
            raise UserError(f"--top_p {self.top_p} and --num_beams {self.num_beams}: give one of them")


@dataclass
class TrainingArguments:
    """The training loop, the same for every script; names as in transformers.TrainingArguments."""

    output_dir: str = option("outputs/run", "Folder for model, results and checkpoints.")
    num_train_epochs: int = option(300, "Number of epochs.", min=1)
    max_steps: int = option(-1, "Number of optimizer steps, in place of num_train_epochs; -1 disables.", min=-1)
    per_device_train_batch_size: int = option(64, "Captions per batch and device.", min=1)
    per_device_eval_batch_size: int = option(64, "Captions, or images, per batch and device in evaluation.", min=1)
    gradient_accumulation_steps: int = option(1, "Batches accumulated into one optimizer step.", min=1)
    learning_rate: float = option(1e-3, "Peak learning rate of AdamW.", min=0)
    weight_decay: float = option(0.01, "Weight decay of AdamW.", min=0)
    adam_beta1: float = option(0.9, "Beta1 of AdamW.", min=0, below=1)
    adam_beta2: float = option(0.999, "Beta2 of AdamW.", min=0, below=1)
    adam_epsilon: float = option(1e-8, "Epsilon of AdamW.", above=0)
    lr_scheduler_type: Scheduler = option("constant", "Learning rate schedule.")
    warmup_steps: float = option(
        0,
        "Steps of linear warmup of the learning rate; below 1, the fraction of all steps.",
        min=0,
        needs={"lr_scheduler_type": [kind for kind in get_args(Scheduler) if kind != "constant"]},
    )
    max_grad_norm: float = option(1.0, "Clip the gradient norm to this value; 0 disables.", min=0)
    bf16: bool = option(False, "Train in bfloat16 mixed precision, where the device has instructions for it.")
    fp16: bool = option(False, "Train in float16 mixed precision.", needs={"bf16": [False]})
    seed: int = option(42, "Seed of weights, order and dropout.", min=0, below=2**32)
    logging_steps: int | None = option(
        None, "Steps between two logs of the training loss; once an epoch if not given.", min=1
    )
    eval_epochs: int = option(1, "Epochs between two evaluations.", min=1)
    eval_steps: int | None = option(None, "Steps between two evaluations inside an epoch; none if not given.", min=1)
    eval_on_start: bool = option(False, "Evaluate before the first step, too.")
    save_epochs: int = option(1, "Epochs between two checkpoints.", min=1)
    save_steps: int | None = option(None, "Steps between two checkpoints inside an epoch; none if not given.", min=1)
    save_total_limit: int | None = option(
        None, "Number of checkpoints kept: the newest, and the best beside them; all if not given.", min=1
    )
    load_best_model_at_end: bool = option(
        True, "Keep the model of the best validation CIDEr in output_dir, else the last."
    )
    early_stopping_patience: int | None = option(
        None, "Number of evaluations without a better validation CIDEr after which training stops.", min=1
    )
    report_to: str = option("tensorboard", "Trackers of Accelerate, separated by commas; or none.")
    project: str = option("showtell", "Project name in trackers that have projects.")
    run_name: str | None = option(None, "Run name in trackers that have run names; output_dir if not given.")
    disable_tqdm: bool = option(False, "Show no progress bars.")
    resume_from_checkpoint: str | None = option(None, "Checkpoint folder, `last`, or OWNER/NAME[@REVISION] on the Hub.")
    overwrite_output_dir: bool = option(False, "Remove the checkpoints that another run has left in output_dir.")
    push_to_hub: bool = option(False, "Push output_dir to the Hub at the end.")
    hub_model_id: str | None = option(None, "Repository to push to; the name of output_dir if not given.")
    hub_private_repo: bool | None = option(
        None, "Create the repository as a private one.", needs={"push_to_hub": [True]}
    )
    hub_revision: str | None = option(None, "Branch to push to; main if not given.", needs={"push_to_hub": [True]})
    hub_token: str | None = option(None, "Token of the Hub; that of `hf auth login` or HF_TOKEN if not given.")
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = option(
        "end",
        "Push at the end only, or at each save the best model, the last checkpoint too, or all.",
        needs={"push_to_hub": [True]},
    )


@dataclass
class CaptionTrainingArguments(TrainingArguments):
    """Options of training with cross entropy."""

    encoder_learning_rate: float | None = option(
        None, "Peak learning rate of the encoder, where it is trained; learning_rate if not given.", min=0
    )
    activation_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, more time."
    )
    label_smoothing_factor: float = option(0.0, "Label smoothing of the cross entropy.", min=0, below=1)
    ema_decay: float = option(
        0.0,
        "Decay per step of an exponential moving average of the weights, which is then what is evaluated and saved; 0 disables.",
        min=0,
        below=1,
    )


def refuse_what_it_brings(model_args, start: str, brought: Iterable[str]) -> None:
    """Refuse options that a captioner to fine-tune decides, where they are given.

    Raises:
        UserError: One is not at its default.
    """
    for name in brought:
        if getattr(model_args, name) != getattr(type(model_args), name):
            raise UserError(f"--{name} does not go with --model_name_or_path {start}, which has its own")


def parse_recipe(kinds: Sequence[type], argv: Sequence[str] | None = None, description: str | None = None) -> tuple:
    """Read `[recipe.yaml] [--name value ...]`: the recipe over the defaults, the command line over the recipe.

    Ends the program with one sentence and exit code 2 where a file or an option is wrong.
    """
    parser = _build_parser(kinds, description)
    # As with HfArgumentParser, `--max-length` is `--max_length`.
    argv = [
        re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word)
        for word in (sys.argv[1:] if argv is None else argv)
    ]
    if argv and argv[0].endswith((".yaml", ".yml")):
        parser.set_defaults(**_read_recipe(argv.pop(0), kinds, parser))
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"there is no option {unknown[0]}; --help lists them")
    values, options = vars(namespace), _options(kinds)
    for name, declared in options.items():
        if problem := _problem(declared, values):
            parser.error(f"--{name} {values[name]}: {problem}")
    try:
        return tuple(kind(**{declared.name: values[declared.name] for declared in fields(kind)}) for kind in kinds)
    except UserError as error:  # options that do not go together
        parser.error(str(error))


def _options(kinds: Sequence[type]) -> dict[str, Field]:
    return {declared.name: declared for kind in kinds for declared in fields(kind)}


def _build_parser(kinds: Sequence[type], description: str | None) -> argparse.ArgumentParser:
    """A parser of all options; `--flag` alone is `--flag true`, as with transformers' HfArgumentParser."""
    given = [f"{name.upper()} [...]" for name, declared in _options(kinds).items() if "positional" in declared.metadata]
    parser = argparse.ArgumentParser(
        usage=" ".join(["%(prog)s [recipe.yaml]", *given, "[--option value ...]"]),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for kind in kinds:
        types = get_type_hints(kind)
        for declared in fields(kind):
            name = declared.name if "positional" in declared.metadata else f"--{declared.name}"
            parser.add_argument(name, **_settings(declared, types[declared.name]))
    return parser


def _settings(declared: Field, kind: Any) -> dict[str, Any]:
    """What argparse is told of an option of type `kind`: bool, int, float, str, Literal, a list of them, or None as well."""
    optional = NoneType in get_args(kind)
    kind = next(part for part in get_args(kind) if part is not NoneType) if optional else kind
    help_text = declared.metadata["help"].replace("%", "%%")
    if declared.default not in (None, "", MISSING):
        help_text += f" (default: {str(declared.default).lower() if kind is bool else declared.default})"
    settings = {"help": help_text}
    if "positional" in declared.metadata:
        settings["nargs"] = declared.metadata["positional"]
    else:
        settings |= {"required": declared.default is MISSING, "default": declared.default}
        settings["metavar"] = declared.metadata.get("metavar", declared.name.rpartition("_")[2].upper())
        if isinstance(settings["metavar"], tuple):  # a name for each of several values
            settings["nargs"] = len(settings["metavar"])
    if kind is bool:
        return settings | {"type": _boolean, "nargs": "?", "const": True, "metavar": "{true,false}"}
    if get_origin(kind) is Literal:
        del settings["metavar"]
        return settings | {"choices": get_args(kind)}
    if optional and kind in (int, float):
        return settings | {"type": _number_or_none(kind)}
    return settings | {"type": get_args(kind)[0] if get_origin(kind) is list else kind}


def _number_or_none(kind: type) -> Callable[[str], Any]:
    """What reads a number, and takes back one of a recipe where it reads `none`."""

    def read(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse names it: "invalid int value"
    return read


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "t", "y", "1"):
        return True
    if text.lower() in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"true or false is expected, not {text}")


def _problem(declared: Field, values: dict[str, Any]) -> str | None:
    """Why an option cannot have its value, or None if it can."""
    value, bounds = values[declared.name], declared.metadata
    choices = get_args(declared.type) if get_origin(declared.type) is Literal else (value,)
    if value not in choices:  # argparse does not check a recipe's
        return f"it must be one of {', '.join(map(str, choices))}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            return "it must be a finite number"
        if value < bounds.get("min", -math.inf):
            return f"it must be {bounds['min']} or more"
        if value > bounds.get("max", math.inf):
            return f"it must be {bounds['max']} or less"
        if value <= bounds.get("above", -math.inf):
            return f"it must be more than {bounds['above']}"
        if value >= bounds.get("below", math.inf):
            return f"it must be less than {bounds['below']}"
    if value != declared.default:
        for other, allowed in bounds.get("needs", {}).items():
            if values[other] not in allowed:
                needed = " or ".join(str(choice).lower() for choice in allowed)
                return f"it has no effect without --{other} {needed}"
    return None


def _read_recipe(path: str, kinds: Sequence[type], parser) -> dict:
    """The options that a recipe sets."""
    import yaml

    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        parser.error(f"{path} cannot be read: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        parser.error(f"{path} is not YAML: {error}")
    if not isinstance(recipe, dict):
        parser.error(f"{path} holds no options: lines of `name: value` are expected")
    known = _options(kinds)
    if unknown := sorted(set(map(str, recipe)) - known.keys()):
        parser.error(f"{path}: there is no option {', '.join(unknown)}; --help lists them")
    for name, value in recipe.items():
        if isinstance(value, list | dict | None) and isinstance(known[name].default, str | int | float):
            parser.error(f"{path}: {name} needs one value, as in `{name}: {known[name].default}`")
    # argparse converts defaults that are strings, as it does what stands on the command line: "1e-3" becomes a number.
    return {
        name: str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        for name, value in recipe.items()
    }
