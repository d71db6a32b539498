"""The words of drawn scenes: figures, what they are made of, how they lie, and the wordings of captions.

Scenes come in two kinds. A plain one has one figure at a place, or two. A rich one has a background with a name, and on it one to four
figures that are alike, two figures of which one may be up to three alike, or three in a line.
"""

import random
from dataclasses import dataclass

DRAWN_DATASETS = ("scenes", "rich_scenes")  # names of datasets that are drawn on the spot
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
COUNT_WORDS = {1: "a", 2: "two", 3: "three", 4: "four"}
BACKGROUNDS = {"gray": (165, 165, 165), "pink": (243, 182, 205), "brown": (150, 112, 80), "cyan": (120, 215, 220)}
# Of the first figure to the second; "right" and "below" are the same scenes described the other way round.
RELATIONS = ("left", "above")
ALONE = "alone"  # figures that are alike and lie anywhere
LINES = ("row", "column")  # three figures from left to right, or from top to bottom
# Where a single figure lies: center as a share of the canvas, and the words for it.
PLACES = {
    "middle": ((0.50, 0.50), "in the middle"),
    "left": ((0.24, 0.50), "on the left"),
    "right": ((0.76, 0.50), "on the right"),
    "top": ((0.50, 0.24), "at the top"),
    "bottom": ((0.50, 0.76), "at the bottom"),
}

# {is_a} is "is" or "are", as the figures of {a} are one or several.
SINGLE_WORDINGS = (
    "{a} {place}",
    "there {is_a} {a} {place}",
    "{a} {is_a} {place}",
    "the image shows {a} {place}",
    "{place} there {is_a} {a}",
    "only {a} can be seen {place}",
    "one shape {place} , {a}",
)
# The figure on the left or at the top is named first, except after a relation that begins the caption: every word of a figure then
# follows from the image and the words before it, not from a random choice between two figures.
PAIR_WORDINGS = (
    "{a} {is_a} {to} {b}",
    "there {is_a} {a} {to} {b}",
    "{a} {to} {b}",
    "the image shows {a} {to} {b}",
    "{a} can be seen {to} {b}",
    "{to} {b} there {is_a} {a}",
    "{from_} {a} there {is_b} {b}",
    "{from_} {a} you see {b}",
    "{a} {here} and {b} {there}",
    "there {is_a} {a} {here} and {b} {there}",
)
ALONE_WORDINGS = (
    "{a}",
    "there {is_a} {a}",
    "the image shows {a}",
    "{a} can be seen",
    "only {a} can be seen",
    "nothing but {a}",
    "you see {a}",
)
# Likewise: the one in the middle is named first after "there is" alone.
LINE_WORDINGS = (
    "there {is_b} {b} between {a} {here} and {c} {there}",
    "between {a} {here} and {c} {there} there {is_b} {b}",
    "between {a} {here} and {c} {there} you see {b}",
    "{a} {here} , {b} in the middle and {c} {there}",
    "{order} {a} , {b} and {c}",
    "the image shows {order} {a} , {b} and {c}",
    "{a} , {b} and {c} {order}",
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
    "row": {
        "here": ("on the left",),
        "there": ("on the right",),
        "order": ("from left to right",),
        "reverse": ("from right to left",),
    },
    "column": {
        "here": ("at the top",),
        "there": ("at the bottom",),
        "order": ("from top to bottom",),
        "reverse": ("from bottom to top",),
    },
}
BACKGROUND_WORDINGS = ("{caption} on a {background} background", "on a {background} background {caption}")


@dataclass(frozen=True)
class Figure:
    """A figure, or several that are alike."""

    size: str
    color: str
    shape: str
    count: int = 1

    def describe(self, generator: random.Random) -> str:
        shape = self.shape if self.count == 1 else plural(self.shape)
        return f"{COUNT_WORDS[self.count]} {generator.choice(SIZE_WORDS[self.size])} {self.color} {shape}"


@dataclass(frozen=True)
class Scene:
    """A combination of figures.

    Attributes:
        figures: One, two or three, from left to right or from top to bottom.
        relation: A key of `PLACES` for one figure of a plain scene, `ALONE` for one of a rich scene; of `RELATIONS` for two; of
            `LINES` for three.
        background: A key of `BACKGROUNDS`; None in a plain scene.
    """

    figures: tuple[Figure, ...]
    relation: str
    background: str | None = None


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def wordings_of(scene: Scene) -> tuple[str, ...]:
    if scene.relation == ALONE:
        return ALONE_WORDINGS
    return (SINGLE_WORDINGS, PAIR_WORDINGS, LINE_WORDINGS)[len(scene.figures) - 1]


def describe_scene(scene: Scene, generator: random.Random, num_captions: int = 5) -> list[str]:
    """Return captions of a scene, each worded in another way."""
    captions = []
    for wording in generator.sample(wordings_of(scene), num_captions):
        words = {}
        for name, figure in zip("abc", scene.figures, strict=False):
            words |= {name: figure.describe(generator), f"is_{name}": "is" if figure.count == 1 else "are"}
        if len(scene.figures) == 1:
            words["place"] = "" if scene.relation == ALONE else PLACES[scene.relation][1]
        else:
            relation_words = RELATION_WORDS[scene.relation]
            words |= {name: generator.choice(choices) for name, choices in relation_words.items()}
        caption = wording.format(**words)
        if scene.background is not None:
            wording = generator.choice(BACKGROUND_WORDINGS)
            caption = wording.format(caption=caption, background=scene.background)
        captions.append(caption)
    return captions
