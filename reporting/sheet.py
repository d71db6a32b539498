"""A run's captioned images on one sheet, for a README or a talk.

python -m reporting.sheet outputs/demo/lstm --output docs/scenes.png
"""

import argparse
import io
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from reporting.samples import read_samples
from system.errors import UserError
from system.files import write_file

COLUMNS = 4
WIDTH = 26  # characters of a caption's line


def draw_sheet(path: Path, output_dir: str | Path, num_images: int) -> Path:
    """Draw the first of a run's samples, each over its caption.

    Raises:
        ValueError: The run has left no samples: it is none, or its images may not be shown.
    """
    samples = read_samples(output_dir)[:num_images]
    if not samples:
        raise UserError(f"{output_dir} has no samples/: train there with --publish_images true")
    columns = min(COLUMNS, len(samples))
    rows = -(-len(samples) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.65 * rows), dpi=100, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, sample in zip(axes, samples, strict=False):
        with Image.open(Path(output_dir) / "samples" / sample["file"]) as image:
            axis.imshow(image, interpolation="bilinear")
        caption = "\n".join(textwrap.wrap(sample["caption"], WIDTH, max_lines=3, placeholder=" …")) or "(empty caption)"
        # A caption is text: Matplotlib would read what stands between dollar signs as a formula.
        axis.set_title(caption, y=-0.04, va="top", fontsize=9, color="#222222", parse_math=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    small = io.BytesIO()
    Image.open(content).convert("RGB").quantize(256, kmeans=1).save(
        small, format="PNG", optimize=True
    )  # a third of the size
    return write_file(path, small.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the sheet. Returns the exit code: 2 where the run has no samples."""
    parser = argparse.ArgumentParser(
        prog="python -m reporting.sheet", description="A run's captioned images on one sheet."
    )
    parser.add_argument("run", metavar="RUN", help="output directory of a run whose images may be shown")
    parser.add_argument("--output", default="sheet.png", metavar="FILE", help="where it goes (default: sheet.png)")
    parser.add_argument("--num_images", type=int, default=8, help="images on it")
    arguments = parser.parse_args(argv)
    if arguments.num_images < 1:
        parser.error(f"--num_images {arguments.num_images}: give 1 or more")
    try:
        print(draw_sheet(Path(arguments.output), arguments.run, arguments.num_images))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
