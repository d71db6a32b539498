"""A dozen captioned images of a run, for its card: only where the images may be shown to others."""

import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from PIL import Image

from system.files import write_file

NUM_SAMPLES = 12
SAMPLE_SIZE = 256  # longest side in pixels


def write_samples(output_dir: str | os.PathLike, rows: Dataset, captions: Sequence[str], shown: bool) -> None:
    """Write samples/: images taken evenly over a split, as small JPEGs without what the camera noted, and their captions.

    Args:
        rows: With an `image` each.
        captions: What the model says of each row.
        shown: Whether they may be; else the folder is taken away, which an earlier run may have left.
    """
    folder = Path(output_dir) / "samples"
    shutil.rmtree(folder, ignore_errors=True)
    if not shown:
        return
    number = min(NUM_SAMPLES, len(rows))
    samples = []
    for place, row in enumerate(round(index * len(rows) / number) for index in range(number)):
        image = rows[row]["image"].convert("RGB")
        image.thumbnail((SAMPLE_SIZE, SAMPLE_SIZE), Image.Resampling.LANCZOS)
        image.info.clear()  # a comment in it would be written again
        content = io.BytesIO()
        image.save(content, format="JPEG", quality=88)
        name = f"{place + 1:02}.jpg"
        write_file(folder / name, content.getvalue())
        samples.append({"file": name, "caption": captions[row]})
    listed = json.dumps(samples, ensure_ascii=False, indent=1)
    write_file(folder / "samples.json", listed.encode("utf-8", "backslashreplace"))


def read_samples(output_dir: str | os.PathLike) -> list[dict]:
    """{"file", "caption"} of each sample; none where the images may not be shown."""
    path = Path(output_dir) / "samples" / "samples.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
