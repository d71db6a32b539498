"""A job: images in, captions out, batch by batch, shared by the processes of a launcher and resumed after a kill."""

import json
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from captioning.lines import json_line
from captioning.outputs import Output
from captioning.processes import Processes
from captioning.sources import ImageDecoder, ImageRef
from system.errors import UserError, printable
from system.files import write_file

if TYPE_CHECKING:
    import torch

    from captioning.onnx_captioner import OnnxCaptioner
    from modeling.captioner import Captioner

BATCHES_AHEAD = 2  # decoded while the model generates
SECONDS_BEFORE_PROGRESS = 5
SECONDS_BETWEEN_LINES = 60  # of progress, where there is no terminal
# Of a generation config: no caption depends on them.
NOT_DECODING = ("transformers_version", "return_dict_in_generate", "use_cache")


@dataclass
class Counts:
    """Images of one process."""

    captioned: int = 0
    there: int = 0  # from a run before
    bad: int = 0
    doubtful: int = 0


class ImageCollator:
    """Items of `ImageDecoder` as one batch, made where the images are decoded: (items, inputs of those without a problem).

    Args:
        preprocess: The captioner's.
        image_side: Longest side of the images that the items keep, in pixels; 0 keeps none.
    """

    def __init__(self, preprocess: Callable[[list], dict], image_side: int = 0):
        self.preprocess = preprocess
        self.image_side = image_side

    def __call__(self, items: list[dict]) -> tuple[list[dict], dict | None]:
        from PIL import Image

        inputs = self._inputs([item for item in items if "image" in item])
        for item in items:
            if "image" in item and self.image_side:
                item["image"].thumbnail((self.image_side, self.image_side), Image.Resampling.LANCZOS)
            else:
                item.pop("image", None)
        return items, inputs

    def _inputs(self, items: list[dict]) -> dict | None:
        """Inputs of the items' images; one that the model's processor does not take gets a problem in place of its image."""
        if not items:
            return None
        try:
            return self.preprocess([item["image"] for item in items])
        except UserError:
            good = []
            for item in items:
                try:
                    self.preprocess([item["image"]])
                    good.append(item)
                except UserError as error:
                    item["problem"] = str(error)
                    del item["image"]
            if len(good) == len(items):
                raise
            return self._inputs(good)


@dataclass
class Job:
    """What one process does.

    Args:
        captioner: In eval, on its device.
        output: Where captions go; recovered and open.
        processes: Those that share the images.
        encode: Pixels to the encoder's output; the captioner encodes by itself where None.
        doubtful: Where captions below `min_confidence` go instead.
        min_confidence: Of a caption, see `Captioner.generate`.
        with_confidence: Whether captions get their confidence.
        num_inspected: Number of first captions that are inspected, see `Captioner.inspect`.
    """

    captioner: "Captioner | OnnxCaptioner"
    output: Output
    processes: Processes = field(default_factory=Processes)
    encode: "Callable[[torch.Tensor], object] | None" = None
    doubtful: Output | None = None
    min_confidence: float = 0.0
    with_confidence: bool = False
    num_inspected: int = 0
    counts: Counts = field(default_factory=Counts)
    notes: Counter = field(default_factory=Counter)  # what of image files is not used

    def is_there(self, ref: ImageRef) -> bool:
        """Whether a run before has captioned an image."""
        if ref.problem:  # such as another image's sidecar, which may be there
            return False
        return self.output.has(ref) or (self.doubtful is not None and self.doubtful.has(ref))

    def batches(self, refs: Iterable[ImageRef], batch_size: int) -> Iterator[list[ImageRef]]:
        """This process's part of the images that are not there yet: every n-th of all, whatever is there."""
        batch = []
        for index, ref in enumerate(refs):
            if index % self.processes.number != self.processes.index:
                continue
            if self.is_there(ref):
                self.counts.there += 1
                continue
            batch.append(ref)
            if len(batch) == batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def run(self, batches: Iterable[tuple[list[dict], dict | None]], total: int) -> None:
        """Caption what `ImageCollator` makes, and write it as it comes.

        Args:
            total: Number of images of all processes, for the progress.
        """
        with progress_bar(total // self.processes.number, self.processes.is_first) as bar:
            for items, inputs in batches:
                for item in items:
                    if "problem" in item:
                        bar.write(f"{printable(item['ref'].name)}: {item['problem']}", file=sys.stderr)
                    self.notes.update(item.pop("notes", ()))
                good = [item for item in items if "problem" not in item]
                self.counts.bad += len(items) - len(good)
                if good:
                    self._write([item | caption for item, caption in zip(good, self._captions(inputs), strict=True)])
                done = self.counts.there + self.counts.captioned + self.counts.bad
                bar.initial = self.counts.there  # which took no time
                bar.set_postfix({"bad": self.counts.bad} if self.counts.bad else {}, refresh=False)
                bar.update(done - bar.n)
        for note, number in sorted(self.notes.items()):
            print(f"{note}: {number:,}", file=sys.stderr)
        self.output.close()
        if self.doubtful:
            self.doubtful.close()

    def _captions(self, inputs: dict) -> list[dict]:
        inputs = self.captioner.on_device(inputs)
        if self.encode:
            inputs = {"encoder_outputs": self.encode(inputs["pixel_values"])}
        options = {"confidence": True} if self.with_confidence else {}
        return self.captioner.generate(inputs, self.counts.captioned < self.num_inspected, **options)

    def _write(self, items: list[dict]) -> None:
        self.counts.captioned += len(items)
        if self.doubtful:
            doubtful = [item for item in items if item["confidence"] < self.min_confidence]
            self.counts.doubtful += len(doubtful)
            if doubtful:
                self.doubtful.write(doubtful)
            items = [item for item in items if item["confidence"] >= self.min_confidence]
        if items:
            self.output.write(items)


def progress_bar(total: int, shown: bool):
    """Images of all, images a second and the time left: a bar on a terminal, elsewhere a line a minute."""
    from tqdm.auto import tqdm

    interval = 0.5 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
    return tqdm(
        total=total,
        unit="image",
        smoothing=0,  # the mean rate: that of single batches says nothing of the end
        mininterval=interval,
        maxinterval=interval,
        delay=SECONDS_BEFORE_PROGRESS,
        disable=not shown,
    )


def load_batches(batches: Iterable[list[ImageRef]], decoder: ImageDecoder, collate: ImageCollator, num_workers: int):
    """Batches decoded ahead: by as many processes, or by a thread of this one where there are none."""
    if num_workers:
        from torch.utils.data import DataLoader

        return iter(DataLoader(decoder, batch_sampler=batches, num_workers=num_workers, collate_fn=collate))
    return decoded_ahead(collate([decoder[ref] for ref in batch]) for batch in batches)


def decoded_ahead(batches: Iterator) -> Iterator:
    """The same batches, made in another thread while they are used here."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as executor:
        pending = deque(executor.submit(next, batches, end) for _ in range(BATCHES_AHEAD))
        while (batch := pending.popleft().result()) is not end:
            pending.append(executor.submit(next, batches, end))
            yield batch


# ---- Settings -------------------------------------------------------------------------------------------------------


def begin_or_resume(
    path: Path, output: Output, settings: dict, resume: bool, is_there: bool, in_folder: bool = False
) -> None:
    """See to it that an output has captions of one kind, and mend what a kill has left; the first process does.

    Args:
        path: File of the settings, beside the output.
        settings: What captions depend on, of JSON's types, see `Captioner.settings`.
        resume: Whether to resume what is there; otherwise it is removed.
        is_there: Whether there is something where the output goes.
        in_folder: Whether the output is a folder, of which nothing is removed unless the settings say that it is ours.

    Raises:
        UserError: It was begun with other settings.
    """
    settings = what_captions_depend_on(settings)
    if is_there and not path.exists() and (resume or in_folder):
        anew = "" if in_folder else ", or --resume false to begin it anew"
        raise UserError(f"{path} is missing, which says how the output was begun: give another --output{anew}")
    if not resume:
        output.remove()
        path.unlink(missing_ok=True)
    elif path.exists():
        try:
            before = what_captions_depend_on(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged, which says how the output was begun: give another --output, or --resume false to begin it anew"
            ) from error
        changed = [name for name in settings.keys() | before.keys() if settings.get(name) != before.get(name)]
        if changed:
            name = min(changed)
            old, new = before.get(name), settings.get(name)
            if isinstance(old, dict) and isinstance(new, dict):  # what of it differs
                keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
                old, new = ({key: values.get(key) for key in keys} for values in (old, new))
            raise UserError(
                f"{path} says that this output was begun with {name} {old}, and not {new}: "
                "give another --output, or --resume false to begin it anew"
            )
    write_file(path, json_line(settings).encode("utf-8", "backslashreplace"))
    output.recover()


def what_captions_depend_on(settings: dict) -> dict:
    """The same without what is no setting in its "decoding": versions, private notes, what `generate()` returns beside captions."""
    decoding = {
        name: value
        for name, value in settings.get("decoding", {}).items()
        if value is not None and name not in NOT_DECODING and not name.startswith(("_", "output_"))
    }
    return settings | {"decoding": decoding}
