"""What every captioner is loaded through: its kind, what goes wrong, whether its weights are those of its config."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers
from transformers import AutoConfig, VisionEncoderDecoderConfig

from system.errors import UserError

from .modeling_inception_lstm import InceptionLSTMConfig

POOLER = "encoder.pooler."  # weights that no captioner reads


def kind_of(name_or_path: str | os.PathLike) -> str:
    """The model type of a folder or Hub repository, without its weights.

    Raises:
        UserError: There is no config.
    """
    with loading(name_or_path):
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False).model_type


def is_trained_here(name_or_path: str | os.PathLike) -> bool:
    """Whether a model is of a kind that this repository trains; others are loaded by `load_captioner`."""
    return kind_of(name_or_path) in (VisionEncoderDecoderConfig.model_type, InceptionLSTMConfig.model_type)


@contextmanager
def loading(name_or_path: str | os.PathLike) -> Iterator[None]:
    """Make a `UserError` of what goes wrong in loading a model, and silence transformers' table of its weights.

    Raises:
        UserError: Something goes wrong.
    """
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # transformers, safetensors, tokenizers and the Hub's client each have their own
        reason = str(error).strip().splitlines()[0]
        if str(name_or_path).count("/") > 1 and not os.path.exists(name_or_path):  # no name on the Hub
            reason = "there is no such folder; `make demo` and the training scripts make them"
        if any(Path(name_or_path).glob("step*.onnx")):
            reason = (
                "an exported captioner is for caption.py, serve.py and app.py; give the one that it was exported from"
            )
        raise UserError(f"model {name_or_path} cannot be loaded: {reason}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def check_weights(name_or_path: str | os.PathLike, report: dict, allow_unknown: bool = False) -> None:
    """Judge what transformers reports of the weights that it has loaded.

    Args:
        allow_unknown: Whether weights that the model has no place for are passed over.

    Raises:
        UserError: They are not those of the model's config.
    """
    problems = {
        "lacks weights": report["missing_keys"],
        "has unknown weights": [] if allow_unknown else report["unexpected_keys"],
        "has weights of other sizes": [name for name, *_ in report["mismatched_keys"]],
    }
    for problem, names in problems.items():
        names = sorted(name for name in names if not name.startswith(POOLER))
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"model {name_or_path} {problem}: {', '.join(names[:3])}{more}; its weights and its config.json "
                "are not of one model"
            )
