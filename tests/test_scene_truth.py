"""What in a caption is true of a drawn scene: captions that are true by construction, and captions with one thing wrong."""

import random

import pytest

from data_scripts import scenes
from data_scripts.scene_truth import TRUTHS, parse_caption, scene_truths
from data_scripts.scenes import Figure, Scene

RING, STAR = Figure("big", "red", "ring"), Figure("small", "blue", "star")
PAIR, SINGLE = Scene((RING, STAR), "left"), Scene((RING,), "left")
REFERENCES = {
    PAIR: ["a large red ring is to the left of a little blue star"],
    SINGLE: ["on the left there is a large red ring"],
}
# Another word of the same kind for each, which makes a false caption of a true one.
OTHERS = {
    "color": dict(zip(scenes.COLORS, [*scenes.COLORS][1:] + [*scenes.COLORS][:1], strict=True)),
    "shape": dict(zip(scenes.SHAPES, [*scenes.SHAPES][1:] + [*scenes.SHAPES][:1], strict=True)),
    "size": {"small": "large", "little": "big", "big": "little", "large": "small"},
}
OPPOSITES = {"left": "right", "above": "below", "over": "under", "top": "bottom"}
OPPOSITES |= {opposite: word for word, opposite in OPPOSITES.items()}


def judged(caption: str, scene: Scene) -> tuple[set[str], list[str]]:
    """The names of what is false in a caption of the scene, and its false words."""
    (truth,) = scene_truths([caption], [REFERENCES[scene]])
    return {name for name in TRUTHS if not truth[name]}, [caption[start:end] for start, end in truth["false_words"]]


@pytest.fixture(scope="module")
def captioned() -> list[tuple[str, Scene]]:
    """Captions of each wording with their scenes."""
    numbers = {"train": 200, "validation": 20, "test": 20}
    return [
        (caption, scene)
        for split, of_split in scenes.deal_scenes(numbers, 0).items()
        for number, scene in enumerate(of_split)
        for caption in scenes.describe_scene(scene, random.Random(f"{split} {number}"), 7)
    ]


def test_a_captioner_that_is_right_by_construction_is_right_in_everything(captioned):
    captions = [caption for caption, _ in captioned]
    references = [scenes.describe_scene(scene, random.Random(number)) for number, (_, scene) in enumerate(captioned)]
    for truth in scene_truths(captions, references):
        assert all(truth[name] for name in TRUTHS) and truth["false_words"] == []
    assert [parse_caption(caption) for caption in captions] == [scene for _, scene in captioned]


@pytest.mark.parametrize("part", OTHERS)
def test_another_color_shape_or_size_is_wrong_in_just_that(part, captioned):
    """Of one figure alone: where two are alike but for that part, none can say which of them is meant."""
    tried = 0
    for caption, scene in captioned:
        word = next(word for word in caption.split() if word in OTHERS[part])
        wrong = caption.replace(word, OTHERS[part][word], 1)
        if len(scene.figures) == 2:
            first, second = ({figure.size, figure.color, figure.shape} for figure in scene.figures)
            if first & second:
                continue
        (truth,) = scene_truths([wrong], [[caption]])
        assert {name for name in TRUTHS if not truth[name]} == {"all", part}, (wrong, scene)
        assert [wrong[start:end] for start, end in truth["false_words"]] == [OTHERS[part][word]]
        tried += 1
    assert tried > 300


def test_the_opposite_place_or_relation_is_wrong_in_just_that(captioned):
    for caption, scene in captioned:
        wrong = " ".join(OPPOSITES.get(word, word) for word in caption.replace("in the middle", "at the top").split())
        (truth,) = scene_truths([wrong], [[caption]])
        assert {name for name in TRUTHS if not truth[name]} == {"all", "relation"}, (wrong, scene)
        false = {word for start, end in truth["false_words"] for word in wrong[start:end].split()}
        assert false and false <= {*OPPOSITES, "to", "the", "of", "on", "at"}


@pytest.mark.parametrize(
    ("caption", "scene", "wrong", "false_words"),
    [
        # A figure is missing, or invented.
        ("a big red ring on the left", PAIR, {"number", "size", "color", "shape", "relation"}, "on the left"),
        (
            "a big red ring left of a small blue star",
            SINGLE,
            {"number", "size", "color", "shape", "relation"},
            "left of a small blue star",
        ),
        ("a big red ring left of a big red ring", PAIR, {"size", "color", "shape"}, "big red ring"),
        # The figures change places; the direction is turned by naming the other one first.
        ("a small blue star left of a big red ring", PAIR, {"relation"}, "left of"),
        ("a big red ring is right of a small blue star", PAIR, {"relation"}, "right of"),
        ("right of a big red ring there is a small blue star", PAIR, set(), ""),
        ("a small blue star is to the right of a big red ring", PAIR, set(), ""),
        ("a big red ring over a small blue star", PAIR, {"relation"}, "over"),
        # The colors change figures: each color is there, and yet it is false.
        ("a big blue ring left of a small red star", PAIR, set(), "blue red"),
        # A single figure elsewhere; a wording that is none of the scenes'.
        ("a big red ring in the middle", SINGLE, {"relation"}, "in the middle"),
        ("a big red ring ring on the left", SINGLE, {"relation"}, "ring on the left"),
        ("red of of", PAIR, {"number", "size", "color", "shape", "relation"}, "red of of"),
        ("", PAIR, {"number", "size", "color", "shape", "relation"}, ""),
    ],
)
def test_what_is_false_is_named_and_its_words_are_marked(caption, scene, wrong, false_words):
    found, words = judged(caption, scene)
    assert " ".join(words) == false_words
    assert found - {"all"} == wrong
    assert ("all" in found) == bool(wrong or false_words)


def test_blanks_punctuation_and_any_text_do_not_move_the_marks():
    assert judged("a  big blue ring   on the left", SINGLE) == ({"all", "color"}, ["blue"])
    for caption in ("a big red ring, on the left", "# on the left", "“a big red ring on the left", "# # #\n"):
        wrong, false_words = judged(caption, SINGLE)
        assert wrong == {*TRUTHS} and false_words == caption.split()  # no figure by name, and none of the wordings


@pytest.mark.parametrize(
    "references", [[["a dog runs on the beach"]], [REFERENCES[PAIR], ["two children"]], [[]], [["a big red ring"]]]
)
def test_captions_of_photographs_have_no_known_truth(references):
    assert scene_truths(["a big red ring on the left"] * len(references), references) is None
