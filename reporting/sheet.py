"""Draw the sample images of a run on one sheet, each above its caption.

python -m reporting.sheet outputs/demo/lstm --output docs/scenes.png
"""

import argparse
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from reporting.samples import read_samples
from system.errors import UserError, one_line_errors
from system.files import write_file

COLUMNS = 4
WIDTH = 26  # characters per line of a caption


def draw_sheet(path: Path, output_dir: str | Path, num_images: int) -> Path:
    """Draw the first `num_images` samples of a run, each above its caption.

    Raises:
        UserError: The output directory has no samples: it is not a run's, or its images may not be published.
    """
    samples = read_samples(output_dir)[:num_images]
    if not samples:
        raise UserError(f"{output_dir} has no samples/: train there with --publish_images true")
    columns = min(COLUMNS, len(samples))
    rows = -(-len(samples) // columns)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.1 * columns, 2.65 * rows), dpi=100, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, sample in zip(axes, samples, strict=False):
        with Image.open(Path(output_dir) / "samples" / sample["file"]) as image:
            axis.imshow(image, interpolation="bilinear")
        caption = "\n".join(textwrap.wrap(sample["caption"], WIDTH, max_lines=3, placeholder=" …")) or "(empty caption)"
        # Matplotlib would read text between dollar signs as a formula.
        axis.set_title(caption, y=-0.04, va="top", fontsize=9, color="#222222", parse_math=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    palette = Image.open(content).convert("RGB").quantize(256, kmeans=1)  # a third of the size
    small = io.BytesIO()
    palette.save(small, format="PNG", optimize=True)
    return write_file(path, small.getvalue())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m reporting.sheet", description="Draw the sample images of a run on one sheet."
    )
    parser.add_argument("run", metavar="RUN", help="output directory of a run with --publish_images true")
    parser.add_argument("--output", default="sheet.png", metavar="FILE", help="file of the sheet (default: sheet.png)")
    parser.add_argument("--num_images", type=int, default=8, help="number of images (default: 8; a run has up to 12)")
    arguments = parser.parse_args(argv)
    if arguments.num_images < 1:
        parser.error(f"--num_images {arguments.num_images}: must be at least 1")
    with one_line_errors():
        print(draw_sheet(Path(arguments.output), arguments.run, arguments.num_images))


if __name__ == "__main__":
    main()
