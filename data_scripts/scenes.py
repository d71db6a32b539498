"""Draw scenes: one or two colored shapes on a small canvas, with differently worded captions.

    python -m data_scripts.scenes --output_dir data/scenes

A scene is a combination of size, color and shape at a place, or of two such figures and how they lie to each other.
No combination is in two splits: test scores measure generalization to unseen combinations of known words and figures.
"""

import argparse
import io
import itertools
import math
import random
from dataclasses import dataclass
from functools import partial

from PIL import Image, ImageDraw

from data_scripts.command_line import add_output_option, write_table
from data_scripts.row_checks import SourceRow
from system.errors import UserError, one_line_errors

NUM_SCENES = {"train": 20_000, "validation": 300, "test": 500}
# Of each image: in training, more images are worth more than more captions of each.
NUM_CAPTIONS = {"train": 1, "validation": 5, "test": 5}
IMAGE_SIZE = 64  # pixels
SINGLE_SHARE = 0.2  # of the scenes; the others have two figures
OVERSAMPLING = 4  # drawn so many times larger, then averaged: smooth edges

REACH = {"small": 0.12, "big": 0.22}  # of a figure from its center, as a share of the canvas
SIZE_WORDS = {"small": ("small", "little"), "big": ("big", "large")}
COLORS = {
    "red": (214, 40, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 205, 30),
    "purple": (140, 50, 160),
    "orange": (245, 130, 25),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "ring", "square", "triangle", "star", "cross")
# Of the first figure to the second; "right" and "below" are the same scenes described the other way round.
RELATIONS = ("left", "above")
# Where a single figure lies: center as a share of the canvas, and the words for it.
PLACES = {
    "middle": ((0.50, 0.50), "in the middle"),
    "left": ((0.24, 0.50), "on the left"),
    "right": ((0.76, 0.50), "on the right"),
    "top": ((0.50, 0.24), "at the top"),
    "bottom": ((0.50, 0.76), "at the bottom"),
}

SINGLE_WORDINGS = (
    "{a} {place}",
    "there is {a} {place}",
    "{a} is {place}",
    "the image shows {a} {place}",
    "{place} there is {a}",
    "only {a} can be seen {place}",
    "one shape {place} , {a}",
)
# The figure on the left or at the top is named first, except after a relation that begins the caption: every word of a figure then
# follows from the image and the words before it, not from a random choice between two figures.
PAIR_WORDINGS = (
    "{a} is {to} {b}",
    "there is {a} {to} {b}",
    "{a} {to} {b}",
    "the image shows {a} {to} {b}",
    "{a} can be seen {to} {b}",
    "{to} {b} there is {a}",
    "{from_} {a} there is {b}",
    "{from_} {a} you see {b}",
    "{a} {here} and {b} {there}",
    "there is {a} {here} and {b} {there}",
)
RELATION_WORDS = {
    "left": {
        "to": ("to the left of", "left of"),
        "from_": ("to the right of", "right of"),
        "here": ("on the left",),
        "there": ("on the right",),
    },
    "above": {
        "to": ("above", "over"),
        "from_": ("below", "under"),
        "here": ("at the top",),
        "there": ("at the bottom",),
    },
}


@dataclass(frozen=True)
class Figure:
    size: str
    color: str
    shape: str

    def describe(self, generator: random.Random) -> str:
        return f"a {generator.choice(SIZE_WORDS[self.size])} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A combination: one figure at a place of `PLACES`, or two with a relation of `RELATIONS` between them."""

    figures: tuple[Figure, ...]
    relation: str


def all_scenes() -> tuple[list[Scene], list[Scene]]:
    """Return every scene of one figure, and every scene of two different ones, each described one way only."""
    figures = [Figure(*values) for values in itertools.product(REACH, COLORS, SHAPES)]
    singles = [Scene((figure,), place) for figure in figures for place in PLACES]
    pairs = [Scene(pair, relation) for pair in itertools.permutations(figures, 2) for relation in RELATIONS]
    return singles, pairs


def deal_scenes(num_scenes: dict[str, int], seed: int) -> dict[str, list[Scene]]:
    """Deal the combinations to the splits, none to two of them, and return each split's scenes in mixed order.

    A split that has more scenes than combinations draws some again, elsewhere on the canvas.

    Raises:
        UserError: A split is too small beside the others to get a combination of its own.
    """
    generator = random.Random(f"deal {seed}")
    dealt: dict[str, list[Scene]] = {split: [] for split in num_scenes}
    for scenes, share in zip(all_scenes(), (SINGLE_SHARE, 1 - SINGLE_SHARE), strict=True):
        generator.shuffle(scenes)
        start = 0.0
        for split, number in num_scenes.items():
            end = start + len(scenes) * number / sum(num_scenes.values())
            own = scenes[round(start) : round(end)]
            if not own:
                raise UserError(
                    f"{number:,} images are too few for the {split} split beside {sum(num_scenes.values()) - number:,} others: "
                    f"give it at least {math.ceil(sum(num_scenes.values()) / len(scenes)):,}"
                )
            dealt[split] += itertools.islice(itertools.cycle(own), round(number * share))
            start = end
    for scenes in dealt.values():
        generator.shuffle(scenes)
    return dealt


def describe_scene(scene: Scene, generator: random.Random, num_captions: int = 5) -> list[str]:
    """Return captions of a scene, each worded in another way."""
    wordings = SINGLE_WORDINGS if len(scene.figures) == 1 else PAIR_WORDINGS
    captions = []
    for wording in generator.sample(wordings, num_captions):
        words = {name: figure.describe(generator) for name, figure in zip("ab", scene.figures, strict=False)}
        if len(scene.figures) == 1:
            words["place"] = PLACES[scene.relation][1]
        else:
            relation_words = RELATION_WORDS[scene.relation]
            words |= {name: generator.choice(choices) for name, choices in relation_words.items()}
        captions.append(wording.format(**words))
    return captions


def place_figures(scene: Scene, generator: random.Random) -> list[tuple[float, float]]:
    """Return each figure's center (across, down) as a share of the canvas.

    Two figures lie apart along their relation, and shifted by less than that across it.
    """
    if len(scene.figures) == 1:
        (across, down), _ = PLACES[scene.relation]
        return [(across + generator.uniform(-0.04, 0.04), down + generator.uniform(-0.04, 0.04))]
    first, second = (REACH[figure.size] for figure in scene.figures)
    gap = first + second + 0.02
    start = generator.uniform(first, 1 - gap - second)
    end = generator.uniform(start + gap, 1 - second)
    middle = generator.uniform(0.32, 0.68)
    shift = generator.uniform(-0.1, 0.1)
    along_and_across = [(start, middle - shift), (end, middle + shift)]
    return along_and_across if scene.relation == "left" else [(across, along) for along, across in along_and_across]


def corners(shape: str, center: tuple[float, float], reach: float) -> list[tuple[float, float]]:
    """Return the corners of a square, triangle, star or cross."""
    # Angle in turns, clockwise from the top, and distance as a share of the reach.
    directions = {
        "square": [((k + 0.5) / 4, 1.0) for k in range(4)],
        "triangle": [(k / 3, 1.0) for k in range(3)],
        "cross": [
            (k / 4 + turn, distance) for k in range(4) for turn, distance in ((-0.045, 1), (0.045, 1), (0.125, 0.4))
        ],
        "star": [(k / 10, 1.0 if k % 2 == 0 else 0.42) for k in range(10)],
    }[shape]
    return [
        (
            center[0] + reach * distance * math.sin(2 * math.pi * turn),
            center[1] - reach * distance * math.cos(2 * math.pi * turn),
        )
        for turn, distance in directions
    ]


def draw_scene(scene: Scene, seed: str, image_size: int = IMAGE_SIZE) -> bytes:
    """Return the scene as a PNG of `image_size` by `image_size` pixels; the seed decides on jitter and background."""
    generator = random.Random(seed)
    canvas_size = image_size * OVERSAMPLING
    gray = generator.randint(140, 190)  # neither white nor black figures vanish on it
    background = tuple(gray + generator.randint(-8, 8) for _ in range(3))
    canvas = Image.new("RGB", (canvas_size, canvas_size), background)
    draw = ImageDraw.Draw(canvas)
    for figure, (across, down) in zip(scene.figures, place_figures(scene, generator), strict=True):
        reach = REACH[figure.size] * canvas_size * generator.uniform(0.9, 1.0)
        center = (across * canvas_size, down * canvas_size)
        color = tuple(max(0, min(255, value + generator.randint(-12, 12))) for value in COLORS[figure.color])
        if figure.shape == "circle":
            (x, y), radius = center, 0.85 * reach  # a full circle of that reach would look larger than the rest
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        elif figure.shape == "ring":
            (x, y), radius = center, 0.9 * reach
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=color, width=round(0.4 * reach))
        else:
            draw.polygon(corners(figure.shape, center, reach), fill=color)
    buffer = io.BytesIO()
    canvas.resize((image_size, image_size), Image.Resampling.BOX).save(buffer, "PNG")
    return buffer.getvalue()


def scene_rows(
    num_scenes: dict[str, int] | None = None,
    image_size: int = IMAGE_SIZE,
    seed: int = 0,
    num_captions: dict[str, int] | None = None,
) -> list[SourceRow]:
    """Return the rows of the drawn dataset; the same numbers, size and seed give the same bytes and captions."""
    rows = []
    for split, scenes in deal_scenes(num_scenes or NUM_SCENES, seed).items():
        for number, scene in enumerate(scenes):
            name = f"{split}_{number}"
            captions = describe_scene(
                scene, random.Random(f"tell {seed} {name}"), (num_captions or NUM_CAPTIONS)[split]
            )
            draw = partial(draw_scene, scene, f"draw {seed} {name}", image_size)
            rows.append(SourceRow(split, name, captions, name, draw))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_output_option(parser)
    for option, what, defaults in (
        ("--num_images", "number of images in each split", NUM_SCENES),
        ("--num_captions", "number of captions per image in each split", NUM_CAPTIONS),
    ):
        numbers = list(defaults.values())
        shown = " ".join(map(str, numbers))
        splits = tuple(split.upper() for split in defaults)
        parser.add_argument(
            option, type=int, nargs=3, metavar=splits, default=numbers, help=f"{what} (default: {shown})"
        )
    parser.add_argument(
        "--image_size", type=int, default=IMAGE_SIZE, help="width and height in pixels (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of scenes and captions (default: %(default)s)")
    arguments = parser.parse_args(argv)
    with one_line_errors():
        if min(arguments.num_images) < 1:
            raise UserError("--num_images must be at least 1 in each split")
        if not 1 <= min(arguments.num_captions) <= max(arguments.num_captions) <= len(SINGLE_WORDINGS):
            raise UserError(f"--num_captions must be from 1 to {len(SINGLE_WORDINGS)}, the number of wordings")
        if not 16 <= arguments.image_size <= 4096:
            raise UserError("--image_size must be from 16 to 4096 pixels")
        num_images, num_captions = (
            dict(zip(NUM_SCENES, numbers, strict=True)) for numbers in (arguments.num_images, arguments.num_captions)
        )
        rows = scene_rows(num_images, arguments.image_size, arguments.seed, num_captions)
        write_table(rows, arguments.output_dir)


if __name__ == "__main__":
    main()
