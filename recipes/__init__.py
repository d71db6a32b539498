"""How a run is told what to do: a recipe (YAML), and the command line over it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser


@dataclass
class DataArguments:
    """The captioned pictures of a run; the same for both systems."""

    dataset: str = field(
        default="scenes",
        metadata={
            "help": "Folder made by a data_scripts command, data set on the Hub, or `scenes`, drawn on the spot."
        },
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a tokenizer; system A trains its own where none is given."}
    )
    max_train_pictures: int | None = field(default=None, metadata={"help": "Train on the first so many pictures."})
    max_eval_pictures: int | None = field(
        default=None,
        metadata={
            "help": "Generate for so many validation pictures at each evaluation, always the same; all if not given."
        },
    )
    max_caption_length: int | None = field(
        default=None,
        metadata={"help": "Cut training captions to so many tokens, EOS included; none is cut if not given."},
    )
    cache_features: bool = field(
        default=True, metadata={"help": "Keep what a frozen encoder says of each picture on disk, in float16."}
    )
    group_by_length: bool = field(default=True, metadata={"help": "Put captions of like length into one batch."})
    group_by_picture: bool = field(
        default=False, metadata={"help": "Put the captions of a picture into one batch, which reads the picture once."}
    )
    show_pictures: bool | None = field(
        default=None,
        metadata={"help": "Put test pictures on the card and push the page of them; if not given, only drawn scenes."},
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that decode pictures; 0 decodes in the training process."}
    )

    def __post_init__(self):
        if self.show_pictures is None:
            self.show_pictures = self.dataset == "scenes"  # drawn here, so nobody else's


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
    *groups, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        parser.error(f"there is no option {unknown[0]}; --help lists them")
    return tuple(groups)


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
    known = {option.name for kind in dataclasses for option in fields(kind)}
    unknown = sorted(set(map(str, recipe)) - known)
    if unknown:
        parser.error(f"{path}: there is no option {', '.join(unknown)}; --help lists them")
    # argparse converts defaults that are strings, as it does what stands on the command line: "1e-3" becomes a number.
    return {
        name: str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        for name, value in recipe.items()
    }
