"""What in a caption is true of the drawn scene that it describes.

A caption is read by the word lists and wordings of `data_scripts.scenes`; the scene is read the same way from the references, which
are true by construction.
"""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache

from data_scripts.scenes import (
    COLORS,
    PAIR_WORDINGS,
    PLACES,
    RELATION_WORDS,
    SHAPES,
    SINGLE_WORDINGS,
    SIZE_WORDS,
    Figure,
    Scene,
)

FIGURE_PARTS = ("size", "color", "shape")
OPPOSITES = {"to": "from_", "from_": "to", "here": "there", "there": "here"}  # of `RELATION_WORDS`
TRUTHS = ("all", "number", *FIGURE_PARTS, "relation")

_SIZE_OF_WORD = {word: size for size, words in SIZE_WORDS.items() for word in words}
_FIGURE = re.compile(rf"(?<!\S)a\s+({'|'.join(_SIZE_OF_WORD)})\s+({'|'.join(COLORS)})\s+({'|'.join(SHAPES)})(?!\S)")
_MARK = "#"  # stands for a figure in a frame


@cache
def _frames() -> dict[str, tuple[str, tuple[int, ...], frozenset[int]]]:
    """Every wording without its figures, as "there is # left of #".

    Returns:
        For each frame its place or relation, the position in the scene of each figure in the order named, and the words that say the
        place or relation.
    """
    wordings = [
        (wording, place, {"place": (words,)}, "ab")
        for wording in SINGLE_WORDINGS
        for place, (_, words) in PLACES.items()
    ]
    for wording, (relation, words) in itertools.product(PAIR_WORDINGS, RELATION_WORDS.items()):
        # Also the other way round, which `describe_scene` does not use in every wording: "the image shows {b} {from_} {a}".
        turned = {name: words[opposite] for name, opposite in OPPOSITES.items()}
        wordings += [(wording, relation, words, "ab"), (wording, relation, turned, "ba")]
    frames = {}
    for wording, relation, words, figures in wordings:
        order = tuple(figures.index(figure) for figure in re.findall(r"{([ab])}", wording))
        # In "{b} is {from_} {a}", the field {from_} says the relation, in one of several ways.
        choices = {f"{{{name}}}": options for name, options in words.items()}
        fields = re.sub(r"{[ab]}", _MARK, wording).split()
        for chosen in itertools.product(*(choices.get(field, (field,)) for field in fields)):
            says = [field in choices for field, part in zip(fields, chosen, strict=True) for _ in part.split()]
            relation_words = frozenset(index for index, says_it in enumerate(says) if says_it)
            frames[" ".join(chosen)] = (relation, order, relation_words)
    return frames


def _named_figures(caption: str) -> list[Figure]:
    """The figures that a caption names, in its order."""
    return [Figure(_SIZE_OF_WORD[size], color, shape) for size, color, shape in _FIGURE.findall(caption)]


def _frame(caption: str) -> list[str]:
    """The words of a caption with a mark in place of each figure."""
    return _FIGURE.sub(_MARK, caption.replace(_MARK, "?")).split()


def parse_caption(caption: str) -> Scene | None:
    """The scene that a caption describes, or None if its wording is none of the scenes'."""
    frame = _frames().get(" ".join(_frame(caption)))
    if frame is None:
        return None
    relation, order, _ = frame
    named = _named_figures(caption)
    return Scene(tuple(named[order.index(position)] for position in range(len(order))), relation)


def _pairing(named: tuple[Figure, ...], figures: tuple[Figure, ...]) -> tuple[int | None, ...]:
    """Which figure of the scene each named one means most likely; None where more are named than drawn.

    The pairing with the most sizes, colors and shapes in common; of equally good ones the first, which keeps the order.
    """

    def agreement(pairing: tuple[int | None, ...]) -> int:
        return sum(
            getattr(figure, part) == getattr(figures[place], part)
            for figure, place in zip(named, pairing, strict=True)
            if place is not None
            for part in FIGURE_PARTS
        )

    places = [*range(len(figures)), *[None] * (len(named) - len(figures))]
    return max(itertools.permutations(places, len(named)), key=agreement)


def caption_truth(caption: str, scene: Scene) -> dict[str, bool]:
    """What in a caption is true of a scene, by the names of `TRUTHS`.

    Returns:
        all: every figure named is there with its size, color and shape, the place or relation holds, nothing is missing or invented.
        number: as many figures are named as there are.
        size, color, shape: those of the figures named are those of the scene's figures, in any order.
        relation: the place or relation holds, each figure named taken for the most similar one of the scene: it may hold although
            a shape is wrong.
        A caption of another wording is not true and says no place or relation; its figures count.
    """
    described = parse_caption(caption)
    named = _named_figures(caption)
    truth = {"all": described == scene, "number": len(named) == len(scene.figures)}
    for part in FIGURE_PARTS:
        truth[part] = Counter(getattr(figure, part) for figure in named) == Counter(
            getattr(figure, part) for figure in scene.figures
        )
    truth["relation"] = described is not None and _relation_holds(described, scene)
    return truth


def _relation_holds(described: Scene, scene: Scene) -> bool:
    in_order = tuple(range(len(scene.figures)))
    return described.relation == scene.relation and _pairing(described.figures, scene.figures) == in_order


def false_words(caption: str, scene: Scene) -> list[list[int]]:
    """The words of a caption that are false, as [start, end] in characters, for a page to mark them.

    Figures are paired as in `caption_truth`; of a figure that is one too many every word is false. Where the place or relation does
    not hold, the words that say it are false; in a caption of another wording, every word outside the figures. What a caption
    leaves out marks no word.
    """
    described, named, frame = parse_caption(caption), _named_figures(caption), _frame(caption)
    if described is None:
        pairing, relation_words = _pairing(tuple(named), scene.figures), frozenset(range(len(frame)))
    else:
        _, order, relation_words = _frames()[" ".join(frame)]
        in_scene_order = _pairing(described.figures, scene.figures)
        pairing = tuple(in_scene_order[position] for position in order)
        relation_words = frozenset() if _relation_holds(described, scene) else relation_words
    meanings = iter(zip(named, pairing, strict=True))
    are_false = []  # of each word of the caption, where a figure is four words and one mark in the frame
    for index, word in enumerate(frame):
        if word != _MARK:
            are_false.append(index in relation_words)
            continue
        figure, place = next(meanings)
        invented = place is None
        are_false += [invented]
        are_false += [invented or getattr(figure, part) != getattr(scene.figures[place], part) for part in FIGURE_PARTS]
    words = [list(match.span()) for match in re.finditer(r"\S+", caption)]
    return [word for word, is_false in zip(words, are_false, strict=True) if is_false]


def scene_truths(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[dict] | None:
    """What is true in each caption, if the references are captions of drawn scenes; else None.

    Args:
        captions: One of each image.
        references: Of each image.

    Returns:
        Of each image `caption_truth` and, as "false_words", `false_words`.
    """
    scenes = []
    for of_image in references:
        scenes.append(parse_caption(of_image[0]) if of_image else None)
        if scenes[-1] is None:
            return None
    return [
        {**caption_truth(caption, scene), "false_words": false_words(caption, scene)}
        for caption, scene in zip(captions, scenes, strict=True)
    ]
