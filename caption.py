"""Caption images: files, folders, URLs, webdataset tars or parquet files in, captions out, a dozen or a million.

    python caption.py --model_name_or_path outputs/demo/lstm image.jpg folder/ https://example.org/image.jpg
    python caption.py --model_name_or_path outputs/demo/lstm folder/ --output captions.jsonl
    python caption.py --model_name_or_path outputs/demo/lstm_onnx image.jpg   # of export_onnx.py: starts without torch
    accelerate launch caption.py --model_name_or_path outputs/demo/lstm shards/ --output captions.parquet

The suffix of --output says what it is: text (`name<TAB>caption`), .jsonl, .html, or .parquet, a folder of parts; a folder without a
suffix gets a sidecar, a text file, for each image. Captions are written as they come: the same command resumes a run that was
killed. Images that cannot be read, and files of a folder that are no images, are counted and named on stderr.
"""

import gc
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from captioning.descriptions import Descriptions, load_exiv2
from captioning.job import ImageCollator, Job, begin_or_resume, load_batches
from captioning.onnx_captioner import OnnxCaptioner, is_exported, load_exported
from captioning.outputs import Lines, Output, Page, Parquet, Screen, Sidecars, WebDataset
from captioning.processes import Processes
from captioning.sources import ImageDecoder, ImageRef, ImageSources, one_for_each_sidecar, without_repeats
from system.errors import UserError, one_line_errors, printable
from training.arguments import GenerationArguments, option, parse_recipe

if TYPE_CHECKING:
    from modeling.captioner import Captioner

# What takes seconds to import is imported where it is used, so that `--help` and a wrong option answer at once.

FORMATS = {".txt": "txt", ".jsonl": "jsonl", ".html": "html", ".parquet": "parquet", "": "sidecars"}
FOLDERS = ("parquet", "sidecars", "webdataset", "xmp")
BESIDE = ("sidecars", "xmp")  # may go to where the images are
NUM_NAMED = 5  # images of a dry run
SIDECAR_OPTIONS = ("existing", "prefix", "suffix", "separator", "sidecar_suffix")


@dataclass
class CaptionArguments:
    images: list[str] = option(
        help="Image files, folders (with all below them), http(s) URLs, uncompressed tars (webdataset) and parquet files.",
        positional="+",
    )
    model_name_or_path: str = option(
        help="Folder, training checkpoint or Hub id of a captioner, trained here or third-party; or folder of export_onnx.py."
    )
    prompt: str | None = option(
        None, "Prompt of a third-party model: request of a chat model, or text to continue; by its kind if not given."
    )
    output: str | None = option(
        None,
        "File to write, .txt, .jsonl or .html, or folder: NAME.parquet, or NAME for sidecars; text on the screen if not given.",
    )
    output_format: Literal["txt", "jsonl", "html", "parquet", "sidecars", "webdataset", "xmp"] | None = option(
        None,
        "Format of the output; by its suffix if not given. sidecars without --output stand beside the images; xmp is "
        "the description in the images' own metadata.",
    )
    resume: bool = option(
        True,
        "Caption only what the output does not have yet, if it was begun with the same settings; false begins it anew.",
    )
    dry_run: bool = option(False, "Print what would be captioned and where it would be saved, and exit.")
    existing: Literal["skip", "overwrite", "append", "prepend"] = option(
        "skip", "Action for an image that has a sidecar already; an empty one counts as none."
    )
    prefix: str = option("", "Text before the caption in a sidecar.")
    suffix: str = option("", "Text after the caption in a sidecar.")
    separator: str = option(", ", "Text between a caption and what was there, with existing append or prepend.")
    sidecar_suffix: str = option(".txt", "Suffix of sidecars.")
    confidence: bool = option(
        False, "Add log_probability, confidence and the least sure word to each caption; for .jsonl, .parquet, tars."
    )
    min_confidence: float | None = option(
        None,
        "Confidence, the geometric mean of its tokens' probabilities, below which a caption goes to OUTPUT.doubtful.jsonl instead.",
        min=0,
        max=1,
    )
    image_column: str | None = option(
        None, "Column of the images in parquet files; the only one of bytes if not given."
    )
    id_column: str | None = option(None, "Column of unique names in parquet files; FILE.parquet#ROW if not given.")
    window: list[float] | None = option(
        None,
        "Values that become black and white of gray images with more than 8 bits; each image's minimum and maximum if not given.",
        metavar=("LOW", "HIGH"),
    )
    batch_size: int = option(32, "Images per batch.", min=1)
    num_workers: int | None = option(
        None, "Number of processes that decode images; if not given up to 8 on a GPU, and 0, a thread, on a CPU.", min=0
    )
    device: str | None = option(None, "Device: cpu, cuda, mps; cuda if not given and available, else cpu.")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "Data type of weights and activations; auto is bfloat16, which changes a word now and then, where the device "
        "has instructions for it.",
    )
    encoder_engine: Literal["auto", "torch"] = option(
        "auto",
        "Engine of the encoder on a CPU; auto is onnxruntime where it is installed and measured faster with equal "
        "features, for 256 images or more.",
    )
    seed: int = option(42, "Seed of sampling.", min=0, below=2**32)

    def __post_init__(self):
        suffix = Path(self.output).suffix if self.output else None
        if self.output_format is None and self.output:
            if suffix not in FORMATS:
                raise UserError(
                    f"--output {self.output}: the name must end in {', '.join(filter(None, FORMATS))}, or be a folder's"
                )
            self.output_format = FORMATS[suffix]
        self._check_format(suffix)
        if self.window and not self.window[0] < self.window[1]:
            raise UserError("--window: the first value must be below the second")
        if self.output_format not in BESIDE:
            for name in SIDECAR_OPTIONS:
                if getattr(self, name) != getattr(CaptionArguments, name):
                    raise UserError(f"--{name} has no effect without --output_format sidecars")
        if self.sidecar_suffix[:1] != "." or Path("x" + self.sidecar_suffix).suffix != self.sidecar_suffix:
            raise UserError(f"--sidecar_suffix {self.sidecar_suffix}: give one like .txt or .caption")

    def _check_format(self, suffix: str | None) -> None:
        if self.output_format == "xmp" and (self.output or self.sidecar_suffix != ".txt"):
            raise UserError(
                "--output_format xmp goes into the images themselves: leave out --output and --sidecar_suffix"
            )
        if self.output_format not in (None, *BESIDE) and not self.output:
            raise UserError(f"--output_format {self.output_format} needs --output")
        if self.output_format in ("txt", "jsonl", "html") and suffix != f".{self.output_format}":
            raise UserError(f"--output {self.output}: the name of this format must end in .{self.output_format}")
        if self.min_confidence is not None and (not self.output or self.output_format == "html"):
            raise UserError(
                "--min_confidence needs an --output that is not .html, beside which the doubtful captions go"
            )
        if self.confidence and self.output_format in (None, "txt", *BESIDE):
            raise UserError("--confidence has no effect on text: give a .jsonl, .html, .parquet or webdataset --output")
        if self.dry_run and self.output_format == "html":
            raise UserError("--dry_run has no effect on a page, which is made anew each time")


def main(argv: list[str] | None = None) -> None:
    args, generation_args = parse_recipe((CaptionArguments, GenerationArguments), argv, __doc__)
    with one_line_errors(), quiet_ends():
        processes = Processes.launched()
        ignored = (args.sidecar_suffix,) if args.output_format == "sidecars" else ()
        sources = ImageSources(
            without_repeats(args.images, quiet=not processes.is_first), args.image_column, args.id_column, ignored
        )
        check_sources(args, sources, processes)
        total = sources.count(quiet=not processes.is_first)
        if args.dry_run:
            return dry_run(args, sources, total)
        if is_exported(args.model_name_or_path):
            captioner = load_exported(args.model_name_or_path, args, generation_args, **generation_args.settings())
        else:
            captioner = load_captioner(args, generation_args, processes)
        outcome = caption_sources(captioner, sources, total, args, processes)
        processes.end()
    if not outcome:
        raise SystemExit(2)


@contextmanager
def quiet_ends() -> Iterator[None]:
    """No traceback where somebody stops the run, or closes the pipe that reads it, as `| head` does."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its exit
        raise SystemExit(128 + 13) from None  # as a program ends that SIGPIPE has ended
    except KeyboardInterrupt:
        print("stopped; with an --output, the same command resumes", file=sys.stderr)
        raise SystemExit(128 + 2) from None


def check_sources(args: CaptionArguments, sources: ImageSources, processes: Processes) -> None:
    """Refuse what does not go with the output.

    Raises:
        UserError: It does not.
    """
    if processes.number > 1 and args.output_format == "html":
        raise UserError("a page needs one process: caption into a .jsonl")
    if args.output_format == "xmp":
        load_exiv2()
    if args.output_format == "webdataset" and (around := [name for name in sources.names if holds(name, args.output)]):
        raise UserError(
            f"--output {args.output} is in {printable(around[0])}, and the next run would caption its tars: give a folder elsewhere"
        )
    if args.output_format not in BESIDE:
        return
    if not args.output and (others := [name for name in sources.names if not is_local_image(name)]):
        raise UserError(f"{printable(others[0])} has no place for captions beside its images: give --output FOLDER")
    tops = [os.path.basename(os.path.normpath(name)) for name in sources.names]
    if args.output and len(set(tops)) < len(tops):
        raise UserError(
            "two inputs have the same name, and so would their folders of sidecars: caption one after the other"
        )


def holds(name: str, output: str) -> bool:
    """Whether an input is a folder that the output lies in, or is."""
    return os.path.isdir(name) and Path(output).resolve().is_relative_to(Path(name).resolve())


def is_local_image(name: str) -> bool:
    """Whether an input is a folder or an image file of this machine."""
    return "://" not in name and not name.endswith((".tar", ".parquet"))


def load_captioner(args: CaptionArguments, generation_args: GenerationArguments, processes: Processes) -> "Captioner":
    """The captioner, on its device and with the decoding settings of the command line."""
    gc.disable()  # or it goes through all that is imported again and again: a tenth of the time to the first caption
    try:
        import torch
        import transformers

        from modeling.image_text_to_text import load_captioner as load
        from modeling.loading import is_trained_here

        transformers.logging.disable_progress_bar()
        torch.manual_seed(args.seed)
        device = args.device or (
            "cuda" if torch.cuda.is_available() and "ACCELERATE_USE_CPU" not in os.environ else "cpu"
        )
        if device == "cuda" and processes.number > 1:
            device = f"cuda:{processes.local_index % torch.cuda.device_count()}"
        if (args.confidence or args.min_confidence is not None) and not is_trained_here(args.model_name_or_path):
            option = "confidence" if args.confidence else "min_confidence"
            raise UserError(
                f"--{option} does not go with {args.model_name_or_path}, a third-party model, whose probabilities are not computed"
            )
        captioner = load(args.model_name_or_path, args.prompt).to(device, args.dtype)
    finally:
        if not gc.get_freeze_count():  # once a process, or what earlier calls have left would stay
            gc.freeze()  # what is imported stays: going through it later took a quarter of the time of one image
        gc.enable()
    captioner.set_decoding(**generation_args.settings())
    return captioner


def caption_sources(
    captioner: "Captioner | OnnxCaptioner",
    sources: ImageSources,
    total: int,
    args: CaptionArguments,
    processes: Processes,
) -> bool:
    """Caption the images, say what became of them, and return whether there is a caption."""
    output, doubtful = open_outputs(args, processes, captioner.num_captions)
    if processes.is_first and settings_path(args):
        settings, in_folder = settings_of(captioner, args), args.output_format in FOLDERS
        begin_or_resume(settings_path(args), output, settings, args.resume, is_there(args), in_folder)
        if doubtful:
            doubtful.recover() if args.resume else doubtful.remove()
    processes.wait_for_all()
    output.open()
    if doubtful:
        doubtful.open()
    on_page = args.output_format == "html"
    job = Job(captioner, output, processes, choose_encoder(captioner, args, total, processes), doubtful)
    job.min_confidence = args.min_confidence or 0.0
    job.with_confidence = (on_page and not captioner.captions_only) or args.confidence or doubtful is not None
    job.num_inspected = Page.num_images if on_page and not captioner.captions_only else 0
    refs = refs_for(output, sources)
    if args.num_workers is None:
        args.num_workers = 0 if str(captioner.device) == "cpu" else min(8, os.cpu_count())
    decoder = ImageDecoder(captioner.min_image_side, args.output_format == "webdataset", args.window)
    collate = ImageCollator(captioner.preprocess, Page.image_size() if on_page else 0)
    job.run(load_batches(job.batches(refs, args.batch_size), decoder, collate, args.num_workers), total)
    num_empty = output.num_empty if isinstance(output, Sidecars) else 0
    captioned, there, num_bad, num_doubtful, num_empty = processes.total(*vars(job.counts).values(), num_empty)
    if processes.is_first:
        output.finish()
        if doubtful:
            doubtful.finish()
        summary = f"{captioned:,} of {total:,} images captioned"
        summary += f", {there:,} were captioned before" if there else ""
        summary += f", {num_bad:,} cannot be read or written" if num_bad else ""
        summary += f"; {num_empty:,} had an empty sidecar" if num_empty else ""
        summary += (
            f"; {num_doubtful:,} captions are below --min_confidence: {doubtful.file.path}" if num_doubtful else ""
        )
        summary += f": {args.output}" if args.output else ""
        if args.output or captioned < total or num_doubtful or num_empty:
            print(summary, file=sys.stderr)
    return bool(captioned or there)


def refs_for(output: Output, sources: ImageSources) -> Iterable[ImageRef]:
    """The images, with a problem where they cannot have a sidecar."""
    if not isinstance(output, Sidecars):
        return sources
    refs = sources
    if not isinstance(output, Descriptions):
        refs = one_for_each_sidecar(sources, output.path_of, beside=output.folder is None)
    return (ref if ref.problem else replace(ref, problem=output.problem_of(ref)) for ref in refs)


def choose_encoder(captioner: "Captioner | OnnxCaptioner", args: CaptionArguments, total: int, processes: Processes):
    """The encoder by the fastest engine; None where the captioner encodes by itself."""
    if args.encoder_engine == "torch" or captioner.captions_only:
        return None
    from modeling.onnx_encoder import fastest_encoder

    report = partial(print, file=sys.stderr) if processes.is_first else lambda sentence: None
    encoder = fastest_encoder(captioner.encoder, total // processes.number, report)
    return None if encoder is captioner.encoder else encoder


# ---- Output ---------------------------------------------------------------------------------------------------------


def open_outputs(args: CaptionArguments, processes: Processes, num_captions: int) -> tuple[Output, Lines | None]:
    """Where captions go, and where those go that are doubtful."""
    index = processes.index
    doubtful = None
    if args.min_confidence is not None:
        place = args.output or args.images[0]  # of sidecars beside their images
        doubtful = Lines(Path(f"{os.path.normpath(place)}.doubtful.jsonl"), process=index)
    if args.output_format is None:
        return Screen(), None
    if args.output_format in BESIDE:
        folder = Path(args.output) if args.output else None
        texts = (args.prefix, args.suffix, args.separator)
        journal = beside_output(args, "journal")
        if args.output_format == "xmp":
            return Descriptions(None, journal, args.existing, texts=texts, process=index), doubtful
        return Sidecars(folder, journal, args.existing, args.sidecar_suffix, texts, index), doubtful
    path = Path(args.output)
    if args.output_format == "html":
        return Page(path), None
    if args.output_format == "webdataset":
        return WebDataset(path), doubtful
    if args.output_format == "parquet":
        return Parquet(path, index), doubtful
    return Lines(path, num_captions, index), doubtful


def beside_output(args: CaptionArguments, name: str) -> Path:
    """A file of ours that belongs to the output: beside a file, hidden in a folder, where readers of parquet pass it over."""
    if args.output_format not in FOLDERS:
        return Path(f"{args.output}.{name}")
    first = Path(args.output or args.images[0])
    return (first if args.output or first.is_dir() else first.parent) / f".showtell.{args.output_format}.{name}"


def settings_path(args: CaptionArguments) -> Path | None:
    """Where the settings of an output stand; None for one that is made anew each time."""
    return None if args.output_format in (None, "html") else beside_output(args, "settings.json")


def is_there(args: CaptionArguments) -> bool:
    """Whether the output has something already; sidecars are judged one by one."""
    if args.output_format in BESIDE:
        return False
    path = Path(args.output)
    return path.exists() and (args.output_format not in FOLDERS or any(path.iterdir()))


def settings_of(captioner: "Captioner | OnnxCaptioner", args: CaptionArguments) -> dict:
    """What captions and their output depend on."""
    names = ("output_format", "dtype", "confidence", "min_confidence", "id_column", "seed")
    names += SIDECAR_OPTIONS if args.output_format in BESIDE else ()
    names += ("window",) if args.window else ()
    return captioner.settings() | {name: getattr(args, name) for name in names}


def dry_run(args: CaptionArguments, sources: ImageSources, total: int) -> None:
    """Say how many images would be captioned, and of the first few where to; nothing is written."""
    output, doubtful = open_outputs(args, Processes(), num_captions=1)
    if args.resume or args.existing == "skip":
        output.open()
        if doubtful:
            doubtful.open()
    job = Job(None, output, doubtful=doubtful)
    refs = refs_for(output, sources)
    num_new = num_bad = num_with_sidecar = 0
    for ref in (ref for batch in job.batches(refs, args.batch_size) for ref in batch):
        if num_new + num_bad < NUM_NAMED:
            print(f"{printable(ref.name)}\t{printable(where(ref, output, args))}")
        if ref.problem:
            num_bad += 1
            continue
        num_new += 1
        num_with_sidecar += args.output_format == "sidecars" and output.path_of(ref).exists()
    verb = {"skip": "filled", "overwrite": "overwritten", "append": "appended to", "prepend": "prepended to"}
    kind = "empty sidecars" if args.existing == "skip" else "sidecars"
    sidecars = f", {num_with_sidecar:,} {kind} {verb[args.existing]}" if num_with_sidecar else ""
    there = f"; {job.counts.there:,} have a caption already" if job.counts.there else ""
    bad = f"; {num_bad:,} cannot be captioned" if num_bad else ""
    print(f"{num_new:,} of {total:,} images would be captioned{sidecars}{there}{bad}")


def where(ref: ImageRef, output: Output, args: CaptionArguments) -> str:
    """Where the caption of an image would go."""
    if ref.problem:
        return ref.problem
    return str(output.path_of(ref)) if isinstance(output, Sidecars) else args.output or "the screen"


if __name__ == "__main__":
    main()
