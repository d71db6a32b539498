"""The floor that `make demo` promises: nearly all captions true of their scenes, and attention on the figure that is named.

python -m tests.demo_floor --seeds 0 1 2                                     # trains both recipes with each seed, minutes each
python -m tests.demo_floor --runs outputs/demo/lstm outputs/demo/vit_gpt2    # runs that are there
python -m tests.demo_floor --captions outputs/demo/*/captions.jsonl          # captions alone

Prints a table, a row for each. Other options go to the training scripts. Exit code 1 if a captioner falls short.
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from data_scripts.scene_grammar import COLORS, SHAPES
from data_scripts.scene_truth import parse_caption, scene_truths
from data_scripts.scenes import scene_rows
from modeling.captioner import Captioner
from reporting.results import TRUTH_TITLES

MIN_TRUE_CAPTIONS = 0.95
RECIPES = {"train_lstm.py": "recipes/lstm_demo.yaml", "train_vit_gpt2.py": "recipes/vit_gpt2_demo.yaml"}
COLUMNS = {
    "all": "true captions",
    "figures": "every figure right",
    "named": "every named figure exists",
    **{name: title.lower() for name, title in TRUTH_TITLES.items() if name not in ("all", "relation")},
    "relation": "kind of relation or place",
    "on_figure": "attention on the named figure",
    "other_figure": "on the other alone",
    "uniform": "on it if uniform",
}


def caption_rates(captions_file: str | Path) -> dict[str, float]:
    """The rates of the captions of a captions.jsonl that are true, as a whole and in part, by the names of `COLUMNS`.

    Attention apart. The relation is that of the scene here, whatever the figures; in results.json, it holds of the figures named.
    """
    lines = [json.loads(line) for line in Path(captions_file).read_text(encoding="utf-8").splitlines()]
    truths = scene_truths([line["caption"] for line in lines], [line["references"] for line in lines])
    if truths is None:
        raise SystemExit(f"{captions_file}: the references are not captions of drawn scenes")
    for line, truth in zip(lines, truths, strict=True):
        described, scene = (parse_caption(caption) for caption in (line["caption"], line["references"][0]))
        figures = {*described.figures} if described else set()
        truth["figures"] = figures == {*scene.figures}
        truth["named"] = bool(figures) and figures <= {*scene.figures}
        truth["relation"] = described is not None and described.relation == scene.relation
    return {name: sum(truth[name] for truth in truths) / len(truths) for name in COLUMNS if name in truths[0]}


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


def measure(run: str | Path) -> dict[str, float]:
    """All of `COLUMNS` of the output directory of a run."""
    return caption_rates(Path(run, "captions.jsonl")) | attention_on_figures(Captioner.load(run))


def train_and_measure(seeds: list[int], num_threads: int, options: list[str]) -> Iterator[tuple[str, dict[str, float]]]:
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for script, recipe in RECIPES.items():
                run = Path(folder, f"{Path(recipe).stem}_seed_{seed}")
                command = [script, recipe, "--seed", str(seed), "--output_dir", str(run), "--disable_tqdm", "true"]
                subprocess.run([sys.executable, *command, *options], env=environment, check=True, stdout=sys.stderr)
                yield run.name, measure(run)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--runs", nargs="+", metavar="RUN", help="output directories of runs to measure; none is trained"
    )
    parser.add_argument("--captions", nargs="+", metavar="FILE", help="captions.jsonl to count; none is trained")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="random seeds of the runs (default: 0)")
    parser.add_argument("--num_threads", type=int, default=1, help="threads of each training (default: %(default)s)")
    arguments, options = parser.parse_known_args()
    if arguments.captions:
        measured = ((file, caption_rates(file)) for file in arguments.captions)
    elif arguments.runs:
        measured = ((run, measure(run)) for run in arguments.runs)
    else:
        measured = train_and_measure(arguments.seeds, arguments.num_threads, options)
    high_enough, titles = [], None
    for name, rates in measured:
        if titles != (titles := [COLUMNS[key] for key in rates]):  # rich scenes have a column more
            print(f"| run | {' | '.join(titles)} |\n|---|{'---:|' * len(titles)}")
        print(f"| {name} | {' | '.join(f'{rate:.3f}' for rate in rates.values())} |", flush=True)
        high_enough.append(rates["all"] >= MIN_TRUE_CAPTIONS)
    print(f"{sum(high_enough)} of {len(high_enough)} have at least {MIN_TRUE_CAPTIONS:g} true captions")
    raise SystemExit(0 if all(high_enough) else 1)


if __name__ == "__main__":
    main()
