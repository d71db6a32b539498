"""The floor that `make demo` promises: nearly all captions true of their scenes, and attention on the figure that is named.

python -m tests.demo_floor --seeds 0 1 2 --num_threads 2            # trains both recipes with each seed, minutes each, and measures them
python -m tests.demo_floor --runs outputs/demo/lstm outputs/demo/vit_gpt2                             # measures runs that are there

Other options go to the training scripts. Exit code 1 if a captioner falls short.
"""

import argparse
import io
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from data_scripts.scene_truth import scene_truths
from data_scripts.scenes import COLORS, SHAPES, scene_rows
from modeling.captioner import Captioner
from reporting.results import read_results

MIN_TRUE_CAPTIONS = 0.95
RECIPES = {"train_lstm.py": "recipes/lstm_demo.yaml", "train_vit_gpt2.py": "recipes/vit_gpt2_demo.yaml"}


def colored_cells(image: Image.Image, color: str, side: int) -> set[tuple[int, int]]:
    """The (row, column) of the cells of a grid over an image that have pixels of a figure's color."""
    width, height = image.size
    pixels = image.load()
    return {
        (y * side // height, x * side // width)
        for y in range(height)
        for x in range(width)
        if math.dist(pixels[x, y], COLORS[color]) < 32
    }


def attention_on_figures(captioner: Captioner, num_images: int = 200) -> dict[str, float]:
    """How often the highest attention lies on the named figure, at the words for its color and shape.

    Counted in true captions of test scenes of two colors.

    Returns:
        on_figure: the rate of words; other_figure: the rate of words at which it lies on the other figure alone; uniform: the rate
        that uniform attention would have on the figure.
    """
    sums = {"on_figure": 0.0, "other_figure": 0.0, "uniform": 0.0}
    num_words = 0
    for row in [row for row in scene_rows() if row.split == "test"][:num_images]:
        named = {word for word in row.captions[0].split() if word in COLORS}
        image = Image.open(io.BytesIO(row.read())).convert("RGB")
        pixel_values = captioner.processor(images=[image], return_tensors="pt")["pixel_values"]
        (generated,) = captioner.generate({"pixel_values": pixel_values}, inspect=True)
        (truth,) = scene_truths([generated["caption"]], [row.captions])
        if len(named) != 2 or not truth["all"]:
            continue
        color = None
        for token in generated["tokens"]:
            word, grid = token["text"].strip(), token.get("attention")
            color = word if word in COLORS else color
            if grid is None or not (word in COLORS or (word in SHAPES and color)):
                continue
            side = len(grid)
            highest = max(((y, x) for y in range(side) for x in range(side)), key=lambda cell: grid[cell[0]][cell[1]])
            (other,) = named - {color}
            cells = colored_cells(image, color, side)
            sums["on_figure"] += highest in cells
            sums["other_figure"] += highest in colored_cells(image, other, side) - cells
            sums["uniform"] += len(cells) / side**2
            num_words += 1
    return {name: total / num_words if num_words else math.nan for name, total in sums.items()}


def measure(run: str | Path) -> bool:
    """Print a run's measures; whether its rate of true captions is high enough."""
    rates = read_results(run).get("true_captions") or {}
    attention = attention_on_figures(Captioner.load(run))
    print(f"{run}:", *(f"{name} {rate:.3f}" for name, rate in {**rates, **attention}.items()), flush=True)
    return rates.get("all", 0) >= MIN_TRUE_CAPTIONS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--runs", nargs="+", metavar="RUN", help="output directories of runs to measure; none is trained"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="random seeds of the runs (default: 0)")
    parser.add_argument("--num_threads", type=int, default=1, help="threads of each training (default: %(default)s)")
    arguments, options = parser.parse_known_args()
    if arguments.runs:
        high_enough = [measure(run) for run in arguments.runs]
    else:
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.num_threads)}
        with tempfile.TemporaryDirectory() as folder:
            high_enough = []
            for seed in arguments.seeds:
                for script, recipe in RECIPES.items():
                    run = Path(folder, f"{Path(recipe).stem}_seed_{seed}")
                    command = [script, recipe, "--seed", str(seed), "--output_dir", str(run), *options]
                    subprocess.run([sys.executable, *command], env=environment, check=True)
                    high_enough.append(measure(run))
    print(f"{sum(high_enough)} of {len(high_enough)} have at least {MIN_TRUE_CAPTIONS:g} true captions")
    raise SystemExit(0 if all(high_enough) else 1)


if __name__ == "__main__":
    main()
