"""A run's captioned pictures on one sheet, for a README or a talk.

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

from reporting.results import write_file
from reporting.samples import read_samples

COLUMNS = 4
WIDTH = 26  # characters of a caption's line


def draw_sheet(path: Path, output_dir: str | Path, num_pictures: int) -> Path:
    """Draw the first of a run's samples, each over its caption.

    Raises:
        ValueError: The run has left no samples: it is none, or its pictures may not be shown.
    """
    samples = read_samples(output_dir)[:num_pictures]
    if not samples:
        raise ValueError(f"{output_dir} has no samples/: train there with --show_pictures true")
    columns = min(COLUMNS, len(samples))
    rows = -(-len(samples) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.65 * rows), dpi=100, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, sample in zip(axes, samples, strict=False):
        with Image.open(Path(output_dir) / "samples" / sample["file"]) as picture:
            axis.imshow(picture, interpolation="bilinear")
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
        prog="python -m reporting.sheet", description="A run's captioned pictures on one sheet."
    )
    parser.add_argument("run", metavar="RUN", help="output directory of a run whose pictures may be shown")
    parser.add_argument("--output", default="sheet.png", metavar="FILE", help="where it goes (default: sheet.png)")
    parser.add_argument("--num_pictures", type=int, default=8, help="pictures on it")
    arguments = parser.parse_args(argv)
    if arguments.num_pictures < 1:
        parser.error(f"--num_pictures {arguments.num_pictures}: give 1 or more")
    try:
        print(draw_sheet(Path(arguments.output), arguments.run, arguments.num_pictures))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
