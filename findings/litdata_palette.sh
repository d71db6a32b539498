#!/usr/bin/env bash
# litdata 0.2.76 with Pillow 12.3.0 and torch 2.14.1.
#
# Expected: an image given to optimize() comes back from StreamingDataset as it was. PIL images need no format to be named.
# Seen: an image with a palette (a GIF, a PNG of few colors: drawings, charts, screenshots) is stored as mode, size and the
# numbers of its pixels, without the palette. It comes back in mode P with an empty palette: convert("RGB") makes a black
# image of it, whatever its colors and transparency were. No error and no warning. The same image in RGB comes back as it was.
# For users: convert("RGB") before optimize(), or give the file's bytes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HOME="$work" DATA_OPTIMIZER_CACHE_FOLDER="$work/cache" DATA_OPTIMIZER_DATA_CACHE_FOLDER="$work/data"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check litdata==0.2.76 pillow==12.3.0 torch==2.14.1 torchvision==0.29.1

cat >palette.py <<'PY'
import contextlib
import io

from litdata import StreamingDataset, optimize
from PIL import Image


def drawing(number):
    """A drawing in one color, red or blue, as a GIF or PNG of few colors is opened."""
    image = Image.new("P", (8, 8), 1)
    image.putpalette([255, 255, 255, *((255, 0, 0), (0, 0, 255))[number]])
    return image


def sample(number):
    image = drawing(number)
    return {"palette": image, "rgb": image.convert("RGB"), "caption": ("a red square", "a blue square")[number]}


if __name__ == "__main__":
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        optimize(fn=sample, inputs=[0, 1], output_dir="shards", num_workers=1, chunk_size=2)
        rows = list(StreamingDataset("shards"))
    colors = [(row["palette"].convert("RGB").getpixel((0, 0)), row["rgb"].getpixel((0, 0))) for row in rows]
    assert [row["palette"].mode for row in rows] == ["P", "P"], rows
    assert [right for _, right in colors] == [(255, 0, 0), (0, 0, 255)], colors
    (first, _), (second, _) = colors
    assert first == second == (0, 0, 0), colors
    print(f"{rows[0]['caption']} and {rows[1]['caption']} with palettes both come back black, {first}; as RGB they keep their colors")
PY
venv/bin/python -W ignore palette.py 2>log.txt || { tail -5 log.txt; exit 1; }
