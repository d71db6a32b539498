"""What in a caption is true of a drawn scene: captions that are true by construction, and captions with one thing wrong."""

import random

import pytest

from data_scripts import scenes
from data_scripts.scene_grammar import Figure, Scene, plural
from data_scripts.scene_truth import TRUTHS, parse_caption, scene_truths

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


# Rich scenes

RICH_REFERENCES = {
    "alike": "there are three large red rings on a gray background",
    "pair": "two big red rings are left of a small blue star on a pink background",
    "three": "there is a small blue star between a big red ring at the top and a large green cross at the bottom on a cyan background",
}


@pytest.fixture(scope="module")
def rich_captioned() -> list[tuple[str, Scene]]:
    """Captions of each wording with their rich scenes."""
    numbers = {"train": 300, "validation": 40, "test": 40}
    return [
        (caption, scene)
        for split, of_split in scenes.deal_scenes(numbers, 0, rich=True).items()
        for number, scene in enumerate(of_split)
        for caption in scenes.describe_scene(scene, random.Random(f"{split} {number}"), 7)
    ]


def wrong_in(caption: str, reference: str) -> tuple[set[str], list[str]]:
    (truth,) = scene_truths([caption], [[reference]])
    aspects = [*TRUTHS, "background"]
    return {name for name in aspects if not truth[name]}, [caption[start:end] for start, end in truth["false_words"]]


@pytest.mark.slow
def test_a_captioner_that_is_right_about_rich_scenes_is_right_in_everything(rich_captioned):
    for number, (caption, scene) in enumerate(rich_captioned):
        reference = scenes.describe_scene(scene, random.Random(number), 1)[0]
        assert wrong_in(caption, reference) == (set(), []), (caption, reference)
        assert parse_caption(caption) == scene


@pytest.mark.slow
@pytest.mark.parametrize("part", [*OTHERS, "background", "number"])
def test_one_wrong_word_about_a_rich_scene_is_wrong_in_just_that(part, rich_captioned):
    others = OTHERS | {
        "shape": OTHERS["shape"] | {plural(one): plural(other) for one, other in OTHERS["shape"].items()},
        "background": {"gray": "pink", "pink": "brown", "brown": "cyan", "cyan": "gray"},
        "number": {"two": "three", "three": "four", "four": "two"},
    }
    tried = 0
    for caption, scene in rich_captioned:
        word = next((word for word in caption.split() if word in others[part]), None)
        parts = [value for figure in scene.figures for value in {figure.size, figure.color, figure.shape}]
        if word is None or (
            part in OTHERS and len(set(parts)) < len(parts)
        ):  # figures that could be mistaken for each other
            continue
        wrong = caption.replace(word, others[part][word], 1)
        assert wrong_in(wrong, caption) == ({"all", part}, [others[part][word]]), (wrong, scene)
        tried += 1
    assert tried > 200


@pytest.mark.slow
def test_figures_of_a_rich_scene_that_change_places_are_wrong_in_just_the_relation(rich_captioned):
    tried = 0
    for caption, scene in rich_captioned:
        for first, second in ((0, 1), (1, 2)):
            if second < len(scene.figures) and len({figure.color for figure in scene.figures}) == len(scene.figures):
                figures = [*scene.figures]
                figures[first], figures[second] = figures[second], figures[first]
                moved = Scene(tuple(figures), scene.relation, scene.background)
                wrong = scenes.describe_scene(moved, random.Random(tried), 1)[0]
                assert wrong_in(wrong, caption)[0] == {"all", "relation"}, (wrong, caption)
                tried += 1
    assert tried > 500


@pytest.mark.parametrize(
    ("caption", "kind", "wrong", "false_words"),
    [
        ("three big red rings", "alike", {"relation", "background"}, ""),
        ("three big red rings on a gray background", "alike", set(), ""),
        ("there is three big red rings on a gray background", "alike", set(), ""),  # grammar is not judged
        (
            "three big red ring on a gray background",
            "alike",
            {"number", "size", "color", "shape", "relation"},
            "three big red ring",
        ),
        ("three big red rings in the middle on a gray background", "alike", {"relation"}, "in the middle"),
        ("a small blue star right of two large red rings on a pink background", "pair", set(), ""),
        ("a big red ring left of a small blue star on a pink background", "pair", {"number"}, "a"),
        ("two big red rings left of two small blue stars on a pink background", "pair", {"number"}, "two"),
        ("two big red rings left of a small blue star", "pair", {"background"}, ""),
        (
            "on a pink background two big red rings left of a small blue star on a cyan background",
            "pair",
            {"relation", "background"},
            "on a background left of on a cyan background",
        ),
        (
            "from bottom to top a big green cross , a small blue star and a big red ring on a cyan background",
            "three",
            set(),
            "",
        ),
        (
            "from left to right a big red ring , a small blue star and a big green cross on a cyan background",
            "three",
            {"relation"},
            "from left to right",
        ),
        (
            "a big red ring is above a small blue star on a cyan background",
            "three",
            {"number", "size", "color", "shape", "relation"},
            "above",
        ),
    ],
)
def test_what_is_false_of_a_rich_scene_is_named_and_marked(caption, kind, wrong, false_words):
    found, words = wrong_in(caption, RICH_REFERENCES[kind])
    assert (found - {"all"}, " ".join(words)) == (wrong, false_words)
    assert ("all" in found) == bool(wrong)


def test_a_background_that_a_plain_scene_has_not_is_false():
    assert judged("a big red ring on the left on a gray background", SINGLE) == (
        {"all"},
        ["on", "a", "gray", "background"],
    )
