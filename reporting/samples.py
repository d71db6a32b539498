"""A dozen captioned images of a run for its model card, if its images may be published."""

import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from PIL import Image

from reporting.results import read_json
from system.errors import UserError
from system.files import write_file

NUM_SAMPLES = 12
SAMPLE_SIZE = 256  # longest side in pixels


def write_samples(output_dir: str | os.PathLike, rows: Dataset, captions: Sequence[str], publish: bool) -> None:
    """Write samples/: images at even intervals over a split, as small JPEGs without metadata, and their captions.

    Args:
        rows: Rows with an `image`.
        captions: One generated caption for each row.
        publish: Whether the images may be published; if not, the samples of an earlier run are removed.
    """
    folder = Path(output_dir) / "samples"
    shutil.rmtree(folder, ignore_errors=True)
    if not publish:
        return
    number = min(NUM_SAMPLES, len(rows))
    samples = []
    for index, row in enumerate(round(index * len(rows) / number) for index in range(number)):
        image = rows[row]["image"].convert("RGB")
        image.thumbnail((SAMPLE_SIZE, SAMPLE_SIZE), Image.Resampling.LANCZOS)
        image.info.clear()  # Pillow would save a comment again
        content = io.BytesIO()
        image.save(content, format="JPEG", quality=88)
        name = f"{index + 1:02}.jpg"
        write_file(folder / name, content.getvalue())
        samples.append({"file": name, "caption": captions[row]})
    listing = json.dumps(samples, ensure_ascii=False, indent=1)
    write_file(folder / "samples.json", listing.encode("utf-8", "backslashreplace"))


def read_samples(output_dir: str | os.PathLike) -> list[dict]:
    """Return {"file", "caption"} of each sample; an empty list if the run has none.

    Raises:
        UserError: samples.json is damaged, or names a file outside samples/.
    """
    path = Path(output_dir) / "samples" / "samples.json"
    samples = read_json(path) if path.exists() else []
    if not isinstance(samples, list) or not all(_is_sample(sample) for sample in samples):
        raise UserError(f'{path} does not list samples: objects with a "file" of that folder and a "caption"')
    return samples


def _is_sample(sample: object) -> bool:
    if not isinstance(sample, dict) or not all(isinstance(sample.get(key), str) for key in ("file", "caption")):
        return False
    return Path(sample["file"]).name == sample["file"]
