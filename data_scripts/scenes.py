"""Draw scenes: colored shapes on a small canvas, with differently worded captions.

    python -m data_scripts.scenes --output_dir data/scenes
    python -m data_scripts.scenes --rich --output_dir data/rich_scenes

A scene is a combination of size, color and shape at a place, or of two such figures and how they lie to each other. A rich scene has
one to four figures that are alike, two or three kinds of figures and how they lie to each other, on a background that is named.
No combination is in two splits: test scores measure generalization to unseen combinations of known words and figures.
"""

import argparse
import itertools
import math
import random
from dataclasses import replace
from functools import partial

from data_scripts.command_line import add_output_option, write_table
from data_scripts.row_checks import SourceRow
from data_scripts.scene_drawing import draw_scene
from data_scripts.scene_grammar import (
    ALONE,
    ALONE_WORDINGS,
    BACKGROUNDS,
    COLORS,
    COUNT_WORDS,
    LINES,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZE_WORDS,
    Figure,
    Scene,
    describe_scene,
)
from system.errors import UserError, one_line_errors

NUM_SCENES = {"train": 20_000, "validation": 300, "test": 500}
NUM_RICH_SCENES = {"train": 40_000, "validation": 300, "test": 500}
# Of each image: in training, more images are worth more than more captions of each.
NUM_CAPTIONS = {"train": 1, "validation": 5, "test": 5}
IMAGE_SIZE = 64  # pixels
RICH_IMAGE_SIZE = 80  # with more and relatively smaller figures, which are about as many pixels wide
# Of the scenes that are of no kind before: a fifth has one figure, the others two; a fifth is alike, two fifths are of two, of three.
SHARES = (0.2, 1.0)
RICH_SHARES = (0.2, 0.5, 1.0)
PAIR_COUNTS = ((1, 1), (2, 1), (3, 1), (1, 2), (1, 3))  # of a rich scene of two


def all_scenes() -> list[list[Scene]]:
    """Return every plain scene of one figure, and every one of two different ones, each described one way only."""
    figures = [Figure(*values) for values in itertools.product(SIZE_WORDS, COLORS, SHAPES)]
    singles = [Scene((figure,), place) for figure in figures for place in PLACES]
    pairs = [Scene(pair, relation) for pair in itertools.permutations(figures, 2) for relation in RELATIONS]
    return [singles, pairs]


def some_rich_scenes(number: int, generator: random.Random) -> list[list[Scene]]:
    """Return unique rich scenes without backgrounds: every one of figures alike, up to `number` of two kinds of figures and of three."""
    figures = [Figure(*values) for values in itertools.product(SIZE_WORDS, COLORS, SHAPES)]
    alike = [Scene((replace(figure, count=count),), ALONE) for figure in figures for count in COUNT_WORDS]
    pairs, triples = {}, {}  # sets would not keep their order
    for _ in range(number):
        both = zip(generator.sample(figures, 2), generator.choice(PAIR_COUNTS), strict=True)
        pairs[Scene(tuple(replace(figure, count=count) for figure, count in both), generator.choice(RELATIONS))] = None
        triples[Scene(tuple(generator.sample(figures, 3)), generator.choice(LINES))] = None
    return [alike, [*pairs], [*triples]]


def deal_scenes(num_scenes: dict[str, int], seed: int, rich: bool = False) -> dict[str, list[Scene]]:
    """Deal the combinations to the splits, none to two of them, and return each split's scenes in mixed order.

    A split that has more scenes than combinations draws some again, elsewhere on the canvas. Rich scenes get a background each, which
    makes no other combination.

    Raises:
        UserError: A split is too small beside the others to get a combination of its own.
    """
    generator = random.Random(f"deal {seed}")
    dealt: dict[str, list[Scene]] = {split: [] for split in num_scenes}
    kinds = some_rich_scenes(sum(num_scenes.values()), generator) if rich else all_scenes()
    for scenes, share in zip(kinds, RICH_SHARES if rich else SHARES, strict=True):
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
            dealt[split] += itertools.islice(itertools.cycle(own), round((number - len(dealt[split])) * share))
            start = end
    for split, scenes in dealt.items():
        generator.shuffle(scenes)
        if rich:
            dealt[split] = [replace(scene, background=generator.choice([*BACKGROUNDS])) for scene in scenes]
    return dealt


def scene_rows(
    num_scenes: dict[str, int] | None = None,
    image_size: int | None = None,
    seed: int = 0,
    num_captions: dict[str, int] | None = None,
    rich: bool = False,
) -> list[SourceRow]:
    """Return the rows of the drawn dataset; the same numbers, size and seed give the same bytes and captions."""
    image_size = image_size or (RICH_IMAGE_SIZE if rich else IMAGE_SIZE)
    num_scenes = num_scenes or (NUM_RICH_SCENES if rich else NUM_SCENES)
    rows = []
    for split, scenes in deal_scenes(num_scenes, seed, rich).items():
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
    parser.add_argument("--rich", action="store_true", help="draw rich scenes")
    splits = tuple(split.upper() for split in NUM_SCENES)
    shown, shown_rich, shown_captions = (
        " ".join(map(str, numbers.values())) for numbers in (NUM_SCENES, NUM_RICH_SCENES, NUM_CAPTIONS)
    )
    for option, what in (
        ("--num_images", f"number of images in each split (default: {shown}; rich: {shown_rich})"),
        ("--num_captions", f"number of captions per image in each split (default: {shown_captions})"),
    ):
        parser.add_argument(option, type=int, nargs=3, metavar=splits, help=what)
    parser.add_argument(
        "--image_size", type=int, help=f"width and height in pixels (default: {IMAGE_SIZE}; rich: {RICH_IMAGE_SIZE})"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of scenes and captions (default: %(default)s)")
    arguments = parser.parse_args(argv)
    with one_line_errors():
        if arguments.num_images and min(arguments.num_images) < 1:
            raise UserError("--num_images must be at least 1 in each split")
        num_wordings = len(ALONE_WORDINGS)  # of every kind of scene there are at least so many
        if (
            arguments.num_captions
            and not 1 <= min(arguments.num_captions) <= max(arguments.num_captions) <= num_wordings
        ):
            raise UserError(f"--num_captions must be from 1 to {num_wordings}, the number of wordings")
        if arguments.image_size is not None and not 16 <= arguments.image_size <= 4096:
            raise UserError("--image_size must be from 16 to 4096 pixels")
        num_images, num_captions = (
            numbers and dict(zip(NUM_SCENES, numbers, strict=True))
            for numbers in (arguments.num_images, arguments.num_captions)
        )
        rows = scene_rows(num_images, arguments.image_size, arguments.seed, num_captions, arguments.rich)
        write_table(rows, arguments.output_dir)


if __name__ == "__main__":
    main()
