"""Export a captioner of either kind to ONNX: its image processor, its encoder, and one step of its decoder.

    python export_onnx.py outputs/demo/lstm outputs/demo/lstm_onnx
    python export_onnx.py outputs/demo/vit_gpt2 outputs/demo/js --format transformers.js --dtype fp32,q8 --dataset_name scenes

It leaves the graphs below, the processor and the decoding settings; `caption_images` captions with them, greedily or with
beams, by onnxruntime and numpy alone. Install with `pip install -e '.[onnx]'`.

    preprocess.onnx  pixels (batch, 3, height, width) from 0 to 255, of any size  ->  pixel_values
    encoder.onnx     pixel_values (batch, 3, height, width)  ->  image.*: what every step attends to
    step.onnx        input_ids (batch, length), position (), image.*, state.*  ->  logits (batch, vocabulary) after the last of
                     them, new.*: the state for the next step; zeros, or of length 0, before the first; and attention
                     (batch, positions), the mean over layers and heads
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.version import Version

from captioning.onnx_decoding import SUFFIXES, ExportedCaptioner, caption_images
from system.errors import UserError, one_line_errors
from system.files import atomic_folder
from training.arguments import option, parse_recipe

if TYPE_CHECKING:
    from modeling.captioner import Captioner

# What takes seconds to import is imported where it is used, so that `--help` and a wrong option answer at once.

__all__ = ["caption_images", "main"]

MIN_TORCH = "2.7"  # the exporter of 2.6 ends on a BatchNorm, and on a matrix product of images of any size
MAX_FALL = 0.02  # of CIDEr, below torch's, before the export warns
# Settings of a generation config that `caption_images` applies, and those without effect on its captions.
APPLIED = {
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size", "repetition_penalty"),
    *("suppress_tokens", "sequence_bias", "bad_words_ids", "num_beams", "length_penalty", "early_stopping"),
    *("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id"),
}
BEAMS = ("num_beams", "length_penalty", "early_stopping")
WITHOUT_EFFECT = {
    *("transformers_version", "_from_model_config", "use_cache", "cache_implementation", "return_dict_in_generate"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
}


@dataclass
class ExportArguments:
    model_name_or_path: str = option(
        help="Folder, training checkpoint or Hub id of a captioner of either kind.", positional=None
    )
    output_dir: str = option(help="Folder for the exported model; must be new or empty.", positional=None)
    format: Literal["showtell", "transformers.js"] = option(
        "showtell", "Files of the export: for caption_images here, or ViT-GPT2's for transformers.js 4."
    )
    dtype: str = option(
        "fp32",
        "Data types of the weights, a set of files each, comma-separated: fp32, fp16, q8 (8 bits), q4 (4 bits, ViT-GPT2).",
    )
    dataset_name: str | None = option(
        None,
        "Folder made by a data_scripts command, dataset on the Hub, or `scenes`, to score each data type on; not scored if not given.",
    )
    split: str = option("validation", "Split of the dataset: train, validation or test.")
    max_eval_samples: int | None = option(None, "Number of images to score, evenly spread; all if not given.", min=1)
    web: bool = option(
        False, "Add a static page that captions in the browser, ready for any host.", needs={"format": ["showtell"]}
    )
    onnxruntime_web: str | None = option(
        None, "Folder of the npm package onnxruntime-web; installed by npm if not given.", needs={"web": [True]}
    )
    push_to_hub: bool = option(False, "Push the page to the Hub as a static Space.", needs={"web": [True]})
    hub_model_id: str | None = option(None, "Space to push to; the name of output_dir if not given.")
    hub_private_repo: bool | None = option(None, "Create the Space as a private one.", needs={"push_to_hub": [True]})

    def __post_init__(self):
        unknown = [dtype for dtype in self.dtypes if dtype not in SUFFIXES]
        if unknown:
            raise UserError(f"--dtype {self.dtype}: {unknown[0]!r} is none of {', '.join(SUFFIXES)}")

    @property
    def dtypes(self) -> list[str]:
        return list(dict.fromkeys(self.dtype.split(",")))


def main(argv: list[str] | None = None) -> None:
    (args,) = parse_recipe((ExportArguments,), argv, __doc__)
    with one_line_errors():
        if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
            raise UserError(f"the export needs {' and '.join(missing)}: pip install --editable '.[onnx]'")
        if Version(version("torch")) < Version(MIN_TORCH):
            raise UserError(f"the export needs torch {MIN_TORCH} or newer; {version('torch')} is installed")
        import transformers

        from modeling.captioner import Captioner

        transformers.logging.disable_progress_bar()
        captioner = Captioner.load(args.model_name_or_path)
        settings = captioner.model.generation_config.to_diff_dict()  # as saved, before any is left out
        with atomic_folder(args.output_dir) as (folder, _):
            write_export(captioner, folder, args)
            if args.dataset_name:
                scores = score_exports(captioner, folder, args)
                (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
            if args.format == "transformers.js":
                write_card(folder, Path(args.model_name_or_path).name, scores if args.dataset_name else None)
    for path in sorted(Path(args.output_dir).rglob("*.onnx")):
        print(f"{path}: {path.stat().st_size / 1e6:,.1f} MB")
    if args.dataset_name:
        print_scores(scores)
    elif args.dtypes != ["fp32"]:
        print("warning: not scored: give --dataset_name to compare its CIDEr with torch's", file=sys.stderr)
    if args.push_to_hub:
        print(push_space(args))
    ignored = ignored_settings(settings)
    if args.format == "transformers.js":
        ignored |= {name: settings[name] for name in (*BEAMS, "sequence_bias") if settings.get(name) not in (None, 1)}
    if ignored:
        listed = ", ".join(f"{name}={json.dumps(value)[:60]}" for name, value in ignored.items())
        print(f"warning: captions of the exported model are generated without {listed}", file=sys.stderr)


def write_export(captioner: "Captioner", folder: Path, args: ExportArguments) -> None:
    """Write the files of the chosen format.

    Raises:
        UserError: The format or the data type does not suit the captioner.
    """
    from modeling.onnx_export import export_captioner
    from modeling.transformers_js import export_transformers_js

    suffixes = {dtype: SUFFIXES[dtype] for dtype in args.dtypes}
    name, is_vit_gpt2 = args.model_name_or_path, captioner.model.config.model_type == "vision-encoder-decoder"
    if args.format == "showtell":
        if "q4" in args.dtypes and not is_vit_gpt2:
            raise UserError(
                f"--dtype {args.dtype}: onnxruntime has no LSTMs with weights of 4 bits; give fp32, fp16 or q8"
            )
        if reason := export_captioner(captioner, folder, suffixes):
            print(f"warning: there is no preprocess.onnx: {reason}", file=sys.stderr)
        if args.web:
            from modeling.onnx_page import write_page

            title = Path(args.model_name_or_path).name
            write_page(captioner, folder, title, suffixes, args.onnxruntime_web)
        return
    if not is_vit_gpt2:
        raise UserError(f"model {name}: transformers.js runs ViT-GPT2 captioners alone; leave out --format")
    try:
        export_transformers_js(captioner, folder, suffixes)
    except ValueError as error:
        raise UserError(f"model {name} cannot be exported for transformers.js: {error}; leave out --format") from error


def push_space(args: ExportArguments) -> str:
    """Push the page as a static Space, created if it does not exist, and return the commit's address.

    Raises:
        UserError: The Hub refuses it or cannot be reached; the page is complete on disk.
    """
    from huggingface_hub import HfApi

    from reporting.push import HUB_ERRORS
    from system.retries import error_summary, retried

    api, space = HfApi(), args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        created = retried(api.create_repo)(
            space, repo_type="space", space_sdk="static", private=args.hub_private_repo, exist_ok=True
        )
        upload = retried(api.upload_folder)
        return str(upload(repo_id=created.repo_id, repo_type="space", folder_path=args.output_dir))
    except HUB_ERRORS as error:
        raise UserError(f"{args.output_dir} was not pushed to {space}: {error_summary(error, space)}") from error


def score_exports(captioner: "Captioner", folder: Path, args: ExportArguments) -> dict[str, Any]:
    """CIDEr and time of each data type's captions, and of torch's, image by image."""
    from data_scripts import load_captions
    from metrics import CaptionScorer
    from training.batches import subsample_evenly

    dataset = load_captions(args.dataset_name)
    if args.split not in dataset:
        raise UserError(f"{args.dataset_name} has no split {args.split!r}; it has {', '.join(dataset)}")
    (rows,) = subsample_evenly(args.max_eval_samples, dataset[args.split])
    scorer = CaptionScorer(rows["captions"])
    greedy = {"num_beams": 1, "do_sample": False}

    def score(caption: Callable[[Any], str]) -> dict[str, float]:
        started, captions = time.perf_counter(), [caption(row["image"].convert("RGB")) for row in rows]
        milliseconds = (time.perf_counter() - started) / len(captions) * 1000
        return {"cider": float(scorer.score(captions)["cider"]), "milliseconds": round(milliseconds, 1)}

    def by_torch(image, **settings) -> str:
        pixels = captioner.processor(images=[image], return_tensors="pt")["pixel_values"]
        return captioner.generate({"pixel_values": pixels}, **settings)[0]["caption"]

    scores = {"torch": score(by_torch)}
    if args.format == "transformers.js" and (captioner.model.generation_config.num_beams or 1) > 1:
        scores["torch, greedy"] = score(lambda image: by_torch(image, **greedy))
    for dtype in args.dtypes:
        exported = ExportedCaptioner(folder, dtype)
        scores[dtype] = score(lambda image, exported=exported: by_onnxruntime(exported, captioner, image))
        scores[dtype]["megabytes"] = round(sum(path.stat().st_size for path in exported.files) / 1e6, 2)
    return {"dataset": Path(args.dataset_name).name, "split": args.split, "num_images": len(rows), "scores": scores}


def by_onnxruntime(exported: ExportedCaptioner, captioner: "Captioner", image) -> str:
    """One image's caption by an exported model."""
    import numpy as np

    if exported.has_pixel_processor:
        pixels = exported.preprocess(np.asarray(image))
    else:
        pixels = captioner.processor(images=[image], return_tensors="np")["pixel_values"]
    (token_ids,) = exported.generate(pixels)
    return captioner.processor.decode(token_ids, skip_special_tokens=True).strip()


def write_card(folder: Path, title: str, scores: dict[str, Any] | None) -> None:
    """Write the README.md of a folder for transformers.js, with the scores of each data type where there are any."""
    lines = ["---", "library_name: transformers.js", "pipeline_tag: image-to-text", "---", f"# {title}", ""]
    lines += ["```js", 'import { pipeline } from "@huggingface/transformers";', ""]
    lines += ['const captioner = await pipeline("image-to-text", FOLDER, { dtype: "fp32" });']
    lines += ["const [{ generated_text }] = await captioner(IMAGE);", "```", ""]
    lines += ["transformers.js generates greedily: it ignores beams. Images are resized inside the encoder's graph."]
    if scores:
        lines += ["", f"CIDEr on {scores['num_images']:,} images of {scores['dataset']}, {scores['split']} split:", ""]
        lines += ["| Captions by | CIDEr | MB |", "|---|---:|---:|"]
        # Torch generates as saved, with beams where there are any; the rest is greedy.
        names = {"torch": "torch, saved decoding"}
        for name, row in scores["scores"].items():
            lines.append(f"| {names.get(name, name)} | {row['cider']:.3f} | {row.get('megabytes', '')} |")
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def print_scores(scores: dict[str, Any]) -> None:
    """Print a line for each data type, and warn of those below torch."""
    print(f"{scores['dataset']}, {scores['split']}, {scores['num_images']:,} images, one at a time:")
    rows = scores["scores"]
    reference = rows.get("torch, greedy", rows["torch"])["cider"]
    for name, row in rows.items():
        size = f", {row['megabytes']:,.1f} MB" if "megabytes" in row else ""
        print(f"  {name}: CIDEr {row['cider']:.3f}, {row['milliseconds']:,.0f} ms a caption{size}")
    for name, row in rows.items():
        if "megabytes" in row and row["cider"] < reference - MAX_FALL:
            fall = f"{reference - row['cider']:.3f}"
            print(f"warning: {name} is {fall} below torch in CIDEr: choose another --dtype", file=sys.stderr)


def ignored_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What a generation_config.json has that `caption_images` does not apply."""
    ignored = {name: value for name, value in settings.items() if name not in APPLIED | WITHOUT_EFFECT}
    biases = [sequence for sequence, _ in settings.get("sequence_bias") or []]
    for name, sequences in (("sequence_bias", biases), ("bad_words_ids", settings.get("bad_words_ids") or [])):
        if longer := [sequence for sequence in sequences if len(sequence) > 1]:
            ignored[f"{name} of several tokens"] = longer
    return {name: value for name, value in ignored.items() if value not in (None, False)}


if __name__ == "__main__":
    main()
