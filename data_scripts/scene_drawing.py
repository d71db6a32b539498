"""Place and draw the figures of a scene of `data_scripts.scenes`."""

import io
import math
import random

from PIL import Image, ImageDraw

from data_scripts.scene_grammar import ALONE, BACKGROUNDS, COLORS, PLACES, Scene

OVERSAMPLING = 4  # drawn so many times larger, then averaged: smooth edges
# Of a figure from its center, as a share of the canvas; of rich scenes, whose canvas is larger and has up to four.
REACH = {"small": 0.12, "big": 0.22}
RICH_REACH = {"small": 0.09, "big": 0.15}
MIN_GAP = 0.02  # between figures


def place_figures(scene: Scene, generator: random.Random) -> list[tuple[float, float]]:
    """Return the center (across, down) of each figure of a plain scene as a share of the canvas.

    Two figures lie apart along their relation, and shifted by less than that across it.
    """
    if len(scene.figures) == 1:
        (across, down), _ = PLACES[scene.relation]
        return [(across + generator.uniform(-0.04, 0.04), down + generator.uniform(-0.04, 0.04))]
    first, second = (REACH[figure.size] for figure in scene.figures)
    gap = first + second + MIN_GAP
    start = generator.uniform(first, 1 - gap - second)
    end = generator.uniform(start + gap, 1 - second)
    middle = generator.uniform(0.32, 0.68)
    shift = generator.uniform(-0.1, 0.1)
    along_and_across = [(start, middle - shift), (end, middle + shift)]
    return along_and_across if scene.relation == "left" else [(across, along) for along, across in along_and_across]


def place_rich_figures(scene: Scene, generator: random.Random) -> list[list[tuple[float, float]]]:
    """Return for each figure of a rich scene the centers (across, down) of those that are alike, as shares of the canvas.

    Figures alone lie in quadrants of the canvas, one in each. Others lie apart along their relation, and shifted by less than that
    across it; those that are alike lie side by side across it.
    """
    reaches = [RICH_REACH[figure.size] for figure in scene.figures]
    if scene.relation == ALONE:
        slack = 0.25 - reaches[0]
        quadrants = generator.sample([(x, y) for x in (0.25, 0.75) for y in (0.25, 0.75)], scene.figures[0].count)
        return [[(x + generator.uniform(-slack, slack), y + generator.uniform(-slack, slack)) for x, y in quadrants]]
    free = 1 - sum(2 * reach + MIN_GAP for reach in reaches) + MIN_GAP
    starts = sorted(generator.uniform(0, free) for _ in reaches)
    middle = generator.uniform(0.35, 0.65)
    placed = []
    for index, (figure, reach) in enumerate(zip(scene.figures, reaches, strict=True)):
        along = starts[index] + sum(2 * before + MIN_GAP for before in reaches[:index]) + reach
        pitch = 2 * reach + MIN_GAP
        half = (figure.count - 1) / 2 * pitch + reach
        center = min(max(middle + generator.uniform(-0.06, 0.06), half), 1 - half)
        placed.append([(along, center + (k - (figure.count - 1) / 2) * pitch) for k in range(figure.count)])
    if scene.relation in ("left", "row"):
        return placed
    return [[(across, along) for along, across in centers] for centers in placed]


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


def draw_scene(scene: Scene, seed: str, image_size: int) -> bytes:
    """Return the scene as a PNG of `image_size` by `image_size` pixels; the seed decides on jitter and a plain background."""
    generator = random.Random(seed)
    canvas_size = image_size * OVERSAMPLING
    if scene.background is None:
        gray = generator.randint(140, 190)  # neither white nor black figures vanish on it
        background = (gray, gray, gray)
    else:
        background = BACKGROUNDS[scene.background]
    canvas = Image.new("RGB", (canvas_size, canvas_size), varied(background, generator, 8))
    draw = ImageDraw.Draw(canvas)
    if scene.background is None:
        placed, reaches = [[center] for center in place_figures(scene, generator)], REACH
    else:
        placed, reaches = place_rich_figures(scene, generator), RICH_REACH
    for figure, centers in zip(scene.figures, placed, strict=True):
        for across, down in centers:
            reach = reaches[figure.size] * canvas_size * generator.uniform(0.9, 1.0)
            color = varied(COLORS[figure.color], generator, 12)
            draw_figure(draw, figure.shape, (across * canvas_size, down * canvas_size), reach, color)
    buffer = io.BytesIO()
    canvas.resize((image_size, image_size), Image.Resampling.BOX).save(buffer, "PNG")
    return buffer.getvalue()


def varied(color: tuple[int, int, int], generator: random.Random, most: int) -> tuple[int, ...]:
    """The color, each channel changed by up to `most`."""
    return tuple(max(0, min(255, value + generator.randint(-most, most))) for value in color)


def draw_figure(
    draw: ImageDraw.ImageDraw, shape: str, center: tuple[float, float], reach: float, color: tuple[int, ...]
) -> None:
    """Draw one figure; center and reach in pixels of the canvas."""
    x, y = center
    if shape == "circle":
        radius = 0.85 * reach  # a full circle of that reach would look larger than the rest
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    elif shape == "ring":
        radius = 0.9 * reach
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=color, width=round(0.4 * reach))
    else:
        draw.polygon(corners(shape, center, reach), fill=color)
