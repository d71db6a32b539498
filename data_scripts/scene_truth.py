"""What in a caption is true of the drawn scene that it describes.

A caption is read by the words and wordings of `data_scripts.scene_grammar`; the scene is read the same way from the references, which
are true by construction.
"""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from data_scripts.scene_grammar import (
    ALONE,
    ALONE_WORDINGS,
    BACKGROUNDS,
    COLORS,
    COUNT_WORDS,
    LINE_WORDINGS,
    LINES,
    PAIR_WORDINGS,
    PLACES,
    RELATION_WORDS,
    RELATIONS,
    SHAPES,
    SINGLE_WORDINGS,
    SIZE_WORDS,
    Figure,
    Scene,
    plural,
)

FIGURE_PARTS = ("count", "size", "color", "shape")  # in the order of their words
# Of `RELATION_WORDS`, where the figures are named from right to left.
OPPOSITES = {"to": "from_", "from_": "to", "here": "there", "there": "here", "order": "reverse", "reverse": "order"}
TRUTHS = ("all", "number", "size", "color", "shape", "relation")
BACKGROUND = "background"  # the truth that only rich scenes have
RICH_RELATIONS = (ALONE, *LINES)

_SIZE_OF_WORD = {word: size for size, words in SIZE_WORDS.items() for word in words}
_COUNT_OF_WORD = {word: count for count, word in COUNT_WORDS.items()}
_SHAPE_OF_WORD = {shape: shape for shape in SHAPES} | {plural(shape): shape for shape in SHAPES}
_SIZE_AND_COLOR = rf"\s+({'|'.join(_SIZE_OF_WORD)})\s+({'|'.join(COLORS)})\s+"
_SEVERAL = "|".join(word for count, word in COUNT_WORDS.items() if count > 1)
_FIGURE = re.compile(
    rf"(?<!\S)(?:({COUNT_WORDS[1]}){_SIZE_AND_COLOR}({'|'.join(SHAPES)})"
    rf"|({_SEVERAL}){_SIZE_AND_COLOR}({'|'.join(map(plural, SHAPES))}))(?!\S)"
)
_BACKGROUND = re.compile(rf"(?<!\S)on\s+a\s+({'|'.join(BACKGROUNDS)})\s+background(?!\S)")
_MARK, _BACKGROUND_MARK = "#", "##"  # stand for a figure, and for a background, in a frame


@cache
def _frames() -> dict[str, tuple[str, tuple[int, ...], frozenset[int]]]:
    """Every wording without its figures, as "there is # left of #".

    Returns:
        For each frame its place or relation, the position in the scene of each figure in the order named, and the words that say the
        place or relation.
    """
    wordings = [
        (wording, place, {"place": (words,)}, "a")
        for wording in SINGLE_WORDINGS
        for place, (_, words) in PLACES.items()
    ]
    wordings += [(wording, ALONE, {}, "a") for wording in ALONE_WORDINGS]
    for of_relations, relations, figures in ((PAIR_WORDINGS, RELATIONS, "ab"), (LINE_WORDINGS, LINES, "abc")):
        for wording, relation in itertools.product(of_relations, relations):
            words = RELATION_WORDS[relation]
            # Also the other way round, which `describe_scene` does not use in every wording: "the image shows {b} {from_} {a}".
            turned = {name: words[OPPOSITES[name]] for name in words}
            wordings += [(wording, relation, words, figures), (wording, relation, turned, figures[::-1])]
    frames = {}
    for wording, relation, words, figures in wordings:
        order = tuple(figures.index(figure) for figure in re.findall(r"{([abc])}", wording))
        # In "{b} is {from_} {a}", the field {from_} says the relation, in one of several ways.
        choices = {f"{{{name}}}": options for name, options in words.items()}
        fields = re.sub(r"{[abc]}", _MARK, re.sub(r"{is_[abc]}", "is", wording)).split()
        for chosen in itertools.product(*(choices.get(field, (field,)) for field in fields)):
            says = [field in choices for field, part in zip(fields, chosen, strict=True) for _ in part.split()]
            relation_words = frozenset(index for index, says_it in enumerate(says) if says_it)
            # There may be two ways to name the same.
            frames.setdefault(" ".join(chosen), (relation, order, relation_words))
    return frames


@dataclass(frozen=True)
class _Reading:
    """What a caption names, and how.

    Attributes:
        frame: Its words, with a mark in place of each figure and background.
        named: The figures, in the order named.
        background: None if it names none, or several.
        scene: What it describes; None if its wording is none of the scenes'.
        order: The position in the scene of each figure named; empty without a scene.
        relation_words: The indices in the frame of the words that say the place or relation.
    """

    frame: list[str]
    named: tuple[Figure, ...]
    background: str | None
    scene: Scene | None
    order: tuple[int, ...]
    relation_words: frozenset[int]


def _read(caption: str) -> _Reading:
    found = (tuple(filter(None, match)) for match in _FIGURE.findall(caption))
    named = tuple(
        Figure(_SIZE_OF_WORD[size], color, _SHAPE_OF_WORD[shape], _COUNT_OF_WORD[count])
        for count, size, color, shape in found
    )
    frame = _FIGURE.sub(_MARK, caption.replace(_MARK, "?"))
    frame = _BACKGROUND.sub(_BACKGROUND_MARK, frame).split()
    backgrounds = _BACKGROUND.findall(caption)
    background = backgrounds[0] if len(backgrounds) == 1 else None
    start = int(frame[:1] == [_BACKGROUND_MARK])
    end = len(frame) - int(not start and frame[-1:] == [_BACKGROUND_MARK])
    words = ["is" if word == "are" else word for word in frame[start:end]]
    relation, order, relation_words = _frames().get(" ".join(words), (None, (), frozenset()))
    if relation is None or (background is None and relation in RICH_RELATIONS):
        return _Reading(frame, named, background, None, (), frozenset())
    figures = tuple(named[order.index(position)] for position in range(len(order)))
    relation_words = frozenset(start + index for index in relation_words)
    return _Reading(frame, named, background, Scene(figures, relation, background), order, relation_words)


def parse_caption(caption: str) -> Scene | None:
    """The scene that a caption describes, or None if its wording is none of the scenes'; "is" and "are" are not told apart."""
    return _read(caption).scene


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
        number: as many figures are named as there are, and as many of each kind.
        size, color, shape: those of the figures named are those of the scene's figures, in any order.
        relation: the place or relation holds, each figure named taken for the most similar one of the scene: it may hold although
            a shape is wrong.
        background: it is the one named; only of a scene that has one.
        A caption of another wording is not true and says no place or relation; its figures count.
    """
    reading = _read(caption)
    truth = {"all": reading.scene == scene}
    for name, part in zip(("number", "size", "color", "shape"), FIGURE_PARTS, strict=True):
        truth[name] = Counter(getattr(figure, part) for figure in reading.named) == Counter(
            getattr(figure, part) for figure in scene.figures
        )
    truth["relation"] = reading.scene is not None and _relation_holds(reading.scene, scene)
    if scene.background is not None:
        truth[BACKGROUND] = reading.background == scene.background
    return truth


def _relation_holds(described: Scene, scene: Scene) -> bool:
    in_order = tuple(range(len(scene.figures)))
    return described.relation == scene.relation and _pairing(described.figures, scene.figures) == in_order


def false_words(caption: str, scene: Scene) -> list[list[int]]:
    """The words of a caption that are false, as [start, end] in characters, for a page to mark them.

    Figures are paired as in `caption_truth`; of a figure or background that is one too many every word is false. Where the place or
    relation does not hold, the words that say it are false; in a caption of another wording, every word outside the figures. What a
    caption leaves out marks no word.
    """
    reading = _read(caption)
    if reading.scene is None:
        pairing, relation_words = _pairing(reading.named, scene.figures), frozenset(range(len(reading.frame)))
    else:
        in_scene_order = _pairing(reading.scene.figures, scene.figures)
        pairing = tuple(in_scene_order[position] for position in reading.order)
        relation_words = frozenset() if _relation_holds(reading.scene, scene) else reading.relation_words
    meanings = iter(zip(reading.named, pairing, strict=True))
    backgrounds = iter(_BACKGROUND.findall(caption))
    are_false = []  # of each word of the caption, where a figure and a background are four words and one mark in the frame
    for index, word in enumerate(reading.frame):
        if word == _MARK:
            figure, place = next(meanings)
            invented = place is None
            are_false += [
                invented or getattr(figure, part) != getattr(scene.figures[place], part) for part in FIGURE_PARTS
            ]
        elif word == _BACKGROUND_MARK:
            invented = scene.background is None or reading.background is None
            are_false += [invented, invented, next(backgrounds) != scene.background, invented]
        else:
            are_false.append(index in relation_words)
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
