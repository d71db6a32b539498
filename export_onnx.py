"""Export a captioner of either kind to ONNX: its encoder, and one step of its decoder.

    python export_onnx.py outputs/demo/lstm outputs/demo/lstm_onnx

It leaves encoder.onnx, step.onnx, the processor and the decoding settings; `caption_images` below captions with them, greedily, and
shows how: it imports onnxruntime and numpy alone. Install with `pip install -e '.[onnx]'`.

    encoder.onnx  pixel_values (batch, 3, height, width)  ->  image.*: what every step attends to
    step.onnx     input_ids (batch, length), position (), image.*, state.*  ->  logits (batch, vocabulary) after the last of
                  them, and new.*: the state for the next step; zeros, or of length 0, before the first
"""

import json
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from system.errors import UserError, one_line_errors
from system.files import atomic_folder
from training.arguments import parse_recipe

# What takes seconds to import is imported where it is used, so that `--help` and a wrong option answer at once.

DEFAULT_NEW_TOKENS = 20  # of transformers' `generate()`, where the generation config has no limit
# Settings of a generation config that `caption_images` applies, and those without effect on greedy captions.
APPLIED = {
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size", "repetition_penalty"),
    *("suppress_tokens", "sequence_bias", "bad_words_ids"),
    *("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"),
}
WITHOUT_EFFECT = {
    *("transformers_version", "_from_model_config", "use_cache", "cache_implementation", "return_dict_in_generate"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
}


@dataclass
class ExportArguments:
    model_name_or_path: str = field(
        metadata={"help": "Folder, training checkpoint or Hub id of a captioner of either kind.", "positional": None}
    )
    output_dir: str = field(
        metadata={"help": "Folder for the exported model; must be new or empty.", "positional": None}
    )
    format: Literal["showtell", "transformers.js"] = field(
        default="showtell",
        metadata={"help": "Files of the export: for caption_images here, or ViT-GPT2's for transformers.js 4."},
    )


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_recipe((ExportArguments,), argv, __doc__)
    with one_line_errors():
        if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
            raise UserError(f"the export needs {' and '.join(missing)}: pip install --editable '.[onnx]'")
        import transformers

        from modeling.captioner import Captioner
        from modeling.onnx_export import export_captioner

        transformers.logging.disable_progress_bar()
        captioner = Captioner.load(args.model_name_or_path)
        settings = captioner.model.generation_config.to_diff_dict()  # as saved, before any is left out
        with atomic_folder(args.output_dir) as (folder, _):
            if args.format == "showtell":
                export_captioner(captioner, folder)
            else:
                export_for_transformers_js(captioner, folder, args.model_name_or_path)
    for path in sorted(Path(args.output_dir).rglob("*.onnx")):
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")
    if ignored := ignored_settings(settings):
        listed = ", ".join(f"{name}={json.dumps(value)[:60]}" for name, value in ignored.items())
        print(f"warning: captions of the exported model are generated greedily, without {listed}", file=sys.stderr)


def export_for_transformers_js(captioner, folder: Path, name: str) -> None:
    """Write the files of `--format transformers.js`.

    Raises:
        UserError: transformers.js has no such captioner, or its image processor cannot be put into the encoder's graph.
    """
    from modeling.transformers_js import export_transformers_js

    if captioner.model.config.model_type != "vision-encoder-decoder":
        raise UserError(f"model {name}: transformers.js runs ViT-GPT2 captioners alone; leave out --format")
    try:
        export_transformers_js(captioner, folder)
    except ValueError as error:
        raise UserError(f"model {name} cannot be exported for transformers.js: {error}; leave out --format") from error


def ignored_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What a generation_config.json has that `caption_images` does not apply."""
    ignored = {name: value for name, value in settings.items() if name not in APPLIED | WITHOUT_EFFECT}
    if ignored.get("num_beams") == 1:
        del ignored["num_beams"]
    biases = [sequence for sequence, _ in settings.get("sequence_bias") or []]
    for name, sequences in (("sequence_bias", biases), ("bad_words_ids", settings.get("bad_words_ids") or [])):
        if longer := [sequence for sequence in sequences if len(sequence) > 1]:
            ignored[f"{name} of several tokens"] = longer
    return {name: value for name, value in ignored.items() if value not in (None, False)}


def caption_images(folder: str | Path, pixel_values: np.ndarray, max_length: int | None = None) -> list[list[int]]:
    """The token ids of each image's caption, by onnxruntime: what `generate()` returns without beams.

    Args:
        folder: The exported model.
        pixel_values: float32 (batch, 3, height, width), as the processor of the folder returns them.
        max_length: Max length of a caption in tokens, start tokens included; the exported model's own where None.

    Returns:
        As many ids for each image, start tokens left out, padded after EOS: what the folder's tokenizer decodes.
    """
    import onnxruntime

    encoder, step = (onnxruntime.InferenceSession(Path(folder) / f"{name}.onnx") for name in ("encoder", "step"))
    settings = json.loads((Path(folder) / "generation_config.json").read_text(encoding="utf-8"))
    start = start_token_ids(settings)
    max_length = max_length or length_limit(settings, "max", len(start)) or len(start) + DEFAULT_NEW_TOKENS
    min_length = length_limit(settings, "min", len(start)) or 0
    eos = np.atleast_1d(settings.get("eos_token_id") if settings.get("eos_token_id") is not None else []).astype(int)
    pad = settings.get("pad_token_id")
    pad = pad if pad is not None else next(iter(eos.tolist()), 0)  # as `generate()`: the first EOS
    bias = token_bias(settings)
    names = [output.name for output in encoder.get_outputs()]
    image = dict(zip(names, encoder.run(None, {"pixel_values": pixel_values}), strict=True))
    sizes = {"batch": len(pixel_values), "past": 0}
    state = {
        wanted.name: np.zeros([sizes.get(size, size) for size in wanted.shape], dtype=np.float32)
        for wanted in step.get_inputs()
        if wanted.name.startswith("state.")
    }
    captions = tokens = np.tile(start, (len(pixel_values), 1))  # (batch, start tokens)
    position, ended = 0, np.zeros(len(pixel_values), dtype=bool)
    while captions.shape[1] < max_length and not ended.all():
        logits, *new = step.run(None, {"input_ids": tokens, "position": np.array(position), **image, **state})
        state = dict(zip(state, new, strict=True))
        position += tokens.shape[1]
        logits[:, list(bias)] += np.array(list(bias.values()), dtype=np.float32)
        penalize_repetition(logits, captions, settings.get("repetition_penalty") or 1.0)
        if captions.shape[1] < min_length:
            logits[:, eos] = -np.inf
        for row, repeats in enumerate(repeated_tokens(captions, settings.get("no_repeat_ngram_size") or 0)):
            logits[row, repeats] = -np.inf
        logits[
            :, [ids[0] for ids in settings.get("bad_words_ids") or [] if len(ids) == 1 and ids[0] not in eos]
        ] = -np.inf
        logits[:, settings.get("suppress_tokens") or []] = -np.inf
        tokens = np.where(ended, pad, logits.argmax(-1))[:, None]  # (batch, 1)
        ended |= np.isin(tokens[:, 0], eos)
        captions = np.concatenate([captions, tokens], axis=1)
    return captions[:, len(start) :].tolist()


def start_token_ids(settings: dict[str, Any]) -> np.ndarray:
    """The token ids that every caption starts from: a start token, and a prompt's behind it, which make a list in a list."""
    start = settings.get("decoder_start_token_id")
    return np.atleast_1d(np.squeeze(settings["bos_token_id"] if start is None else start))


def length_limit(settings: dict[str, Any], kind: str, num_start: int) -> int | None:
    """Tokens of a caption, start tokens included, at least ("min") or at most ("max"); None where nothing limits them."""
    new_tokens = settings.get(f"{kind}_new_tokens")  # takes precedence
    return settings.get(f"{kind}_length") if new_tokens is None else new_tokens + num_start


def token_bias(settings: dict[str, Any]) -> dict[int, float]:
    """What is added to the logits of single tokens."""
    return {ids[0]: bias for ids, bias in settings.get("sequence_bias") or [] if len(ids) == 1}


def penalize_repetition(logits: np.ndarray, captions: np.ndarray, penalty: float) -> None:
    """Scale the logits, (batch, vocabulary), of the tokens in captions, (batch, length), away from 0 or to it, in place."""
    seen = np.take_along_axis(logits, captions, axis=1)
    np.put_along_axis(logits, captions, np.where(seen < 0, seen * penalty, seen / penalty), axis=1)


def repeated_tokens(captions: np.ndarray, size: int) -> list[list[int]]:
    """For each caption so far, (batch, length), the tokens that would complete an n-gram of `size` which it has already."""
    if not size or captions.shape[1] < size:
        return []
    ngrams = np.lib.stride_tricks.sliding_window_view(captions, size, axis=1)  # (batch, ngrams, size)
    last = captions[:, None, captions.shape[1] - size + 1 :]  # (batch, 1, size - 1)
    known = (ngrams[..., :-1] == last).all(-1)  # (batch, ngrams)
    return [row[same, -1].tolist() for row, same in zip(ngrams, known, strict=True)]


if __name__ == "__main__":
    main()
