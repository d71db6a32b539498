"""The drawn scenes: the same everywhere, no combination in two splits, and captions that are true of the image."""

import hashlib
import io
import itertools
import math
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
from PIL import Image

from data_scripts import load_captions, scene_drawing, scenes
from data_scripts.scene_grammar import BACKGROUNDS
from data_scripts.scene_truth import parse_caption

REPOSITORY = Path(scenes.__file__).parents[1]
NUMBERS = {"train": 400, "validation": 60, "test": 60}
FIVE_EACH = dict.fromkeys(NUMBERS, 5)

# The captions are read back by rules of the tests' own, not by the grammar that made them.
SIZES = {"small": "small", "little": "small", "big": "big", "large": "big"}


def digest(seed: int) -> str:
    rows = scenes.scene_rows(NUMBERS, seed=seed)
    return hashlib.sha256(b"".join(row.read() + repr(row.captions).encode() for row in rows)).hexdigest()


def figures_told(caption: str) -> list[tuple[str, str, str]]:
    words = caption.split()
    return [(SIZES[words[i]], words[i + 1], words[i + 2]) for i in range(len(words) - 2) if words[i] in SIZES]


def scene_told(caption: str) -> tuple:
    """Return (figure, place), or (figure, relation, figure) with the left or upper figure first."""
    figures = figures_told(caption)
    if len(figures) == 1:
        words = ("in the middle", "on the left", "on the right", "at the top", "at the bottom")
        return (figures[0], next(place for place in words if place in caption))
    vertical = any(word in caption for word in ("above", "over", "below", "under", "at the top"))
    if " and " not in caption:  # "A left of B" is "right of B there is A"
        backward = any(word in caption for word in ("right of", "below", "under"))
        relation_first = caption.split()[0] in ("to", "left", "right", "above", "over", "below", "under")
        if backward != relation_first:
            figures.reverse()
    return (figures[0], "above" if vertical else "left", figures[1])


@pytest.fixture(scope="module")
def rows() -> list:
    return scenes.scene_rows(NUMBERS, seed=0, num_captions=FIVE_EACH)


@pytest.mark.slow
def test_same_seed_same_bytes_in_another_process() -> None:
    code = "import sys; sys.path.insert(0, 'tests'); from test_scenes import digest; print(digest(5))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert result.stdout.strip() == digest(5) != digest(6)


def test_five_different_captions_tell_one_and_the_same_scene(rows: list) -> None:
    for row in rows:
        assert len(set(row.captions)) == 5
        assert len({scene_told(caption) for caption in row.captions}) == 1, row.captions


def test_which_of_two_figures_is_named_first_is_no_choice(rows: list) -> None:
    """The left or upper one, unless the caption has said before it on which side the other one is."""
    for row in rows:
        for caption in row.captions:
            figures = figures_told(caption)
            if len(figures) == 2 and caption.startswith(("a ", "there", "the ")):
                assert figures[0] == scene_told(caption)[0]


def test_no_combination_is_in_two_splits(rows: list) -> None:
    told = {split: {scene_told(row.captions[0]) for row in rows if row.split == split} for split in NUMBERS}
    assert not told["train"] & told["validation"]
    assert not told["train"] & told["test"]
    assert not told["validation"] & told["test"]


@pytest.mark.slow
def test_default_size_splits_and_words() -> None:
    rows = scenes.scene_rows()
    assert Counter(row.split for row in rows) == {"train": 20_000, "validation": 300, "test": 500}
    assert Counter((row.split, len(row.captions)) for row in rows) == {
        ("train", 1): 20_000,
        ("validation", 5): 300,
        ("test", 5): 500,
    }
    singles = Counter(row.split for row in rows if len(figures_told(row.captions[0])) == 1)
    assert singles == {"train": 4_000, "validation": 60, "test": 100}
    told = {split: {scene_told(row.captions[0]) for row in rows if row.split == split} for split in NUMBERS}
    assert not told["train"] & told["test"] and not told["validation"] & (told["train"] | told["test"])
    words = {split: {w for r in rows if r.split == split for c in r.captions for w in c.split()} for split in NUMBERS}
    assert words["test"] <= words["train"] and words["validation"] <= words["train"]
    figures = {split: {f for r in rows if r.split == split for f in figures_told(r.captions[0])} for split in NUMBERS}
    assert figures["test"] <= figures["train"]  # every figure has been seen, in other company


@pytest.mark.slow
def test_image_shows_what_the_caption_says(rows: list) -> None:
    """Color, size and place of the figures are found again in the pixels."""
    for row in rows[:150]:
        told = scene_told(row.captions[0])
        image = Image.open(io.BytesIO(row.read())).convert("RGB")
        assert image.size == (64, 64)
        centers = []
        for size, color, _ in [part for part in told if isinstance(part, tuple)]:
            pixels = [
                (i % 64, i // 64)
                for i, pixel in enumerate(image.get_flattened_data())
                if math.dist(pixel, scenes.COLORS[color]) < 32
            ]
            assert pixels, (row.captions[0], color)
            centers.append([sum(axis) / len(pixels) for axis in zip(*pixels, strict=True)])
            others = [part for part in told if isinstance(part, tuple) and part[1] == color]
            if len(others) == 1:
                width = max(x for x, _ in pixels) - min(x for x, _ in pixels)
                assert (width > 15.5) == (size == "big"), (row.captions[0], width)
        if len(told) == 3 and told[0][1] != told[2][1]:
            axis = 0 if told[1] == "left" else 1
            assert centers[0][axis] + 4 < centers[1][axis], row.captions[0]
        if len(told) == 2:
            across, down = centers[0]
            wanted = {
                "on the left": (16, 32),
                "on the right": (48, 32),
                "at the top": (32, 16),
                "at the bottom": (32, 48),
            }
            assert math.dist((across, down), wanted.get(told[1], (32, 32))) < 8


def test_figures_stay_on_the_canvas_and_apart() -> None:
    singles, pairs = scenes.all_scenes()
    generator = random.Random(0)
    for scene in generator.sample(pairs, 2000):
        (x1, y1), (x2, y2) = scene_drawing.place_figures(scene, generator)
        reach = [scene_drawing.REACH[figure.size] for figure in scene.figures]
        for x, y, r in ((x1, y1, reach[0]), (x2, y2, reach[1])):
            assert r - 1e-9 <= x <= 1 - r + 1e-9 and r - 1e-9 <= y <= 1 - r + 1e-9
        assert math.dist((x1, y1), (x2, y2)) > sum(reach)
        along, across = (x2 - x1, y2 - y1) if scene.relation == "left" else (y2 - y1, x2 - x1)
        assert along > abs(across)
    assert len(set(singles)) == len(singles) and len(set(pairs)) == len(pairs)


# Rich scenes


@pytest.fixture(scope="module")
def rich_rows() -> list:
    return scenes.scene_rows(NUMBERS, seed=0, num_captions=FIVE_EACH, rich=True)


def rich_scene_told(caption: str) -> tuple[str, Counter]:
    """The background, and how many figures there are of each kind, by rules of the tests' own."""
    numbers = {"a": 1, "two": 2, "three": 3, "four": 4}
    words = caption.split()
    figures = Counter()
    for index, word in enumerate(words):
        if word in SIZES:
            shape = (
                words[index + 2] if words[index - 1] == "a" else re.sub("s$", "", words[index + 2]).replace("sse", "ss")
            )
            figures[SIZES[word], words[index + 1], shape] += numbers[words[index - 1]]
    return words[words.index("background") - 1], figures


def test_rich_scenes_have_every_kind_and_no_combination_in_two_splits(rich_rows: list) -> None:
    told = {split: set() for split in NUMBERS}
    for row in rich_rows:
        assert len(set(row.captions)) == 5
        first, *others = map(rich_scene_told, row.captions)
        assert all(other == first for other in others), row.captions
        scene = parse_caption(row.captions[0])
        told[row.split].add((scene.figures, scene.relation))  # whatever its background
    assert not told["train"] & told["test"] and not told["validation"] & (told["train"] | told["test"])
    kinds = Counter(sum(rich_scene_told(row.captions[0])[1].values()) for row in rich_rows)
    assert {*kinds} == {1, 2, 3, 4} and min(kinds.values()) > 10
    assert {rich_scene_told(row.captions[0])[0] for row in rich_rows} == {*BACKGROUNDS}


def patches(image: Image.Image, color: str) -> list[tuple[float, float]]:
    """The centers of the connected patches of a color."""
    left = {
        (x, y)
        for x in range(image.width)
        for y in range(image.height)
        if math.dist(image.getpixel((x, y)), scenes.COLORS[color]) < 32
    }
    centers = []
    while left:
        patch, border = set(), {left.pop()}
        while border:
            x, y = border.pop()
            patch.add((x, y))
            near = {(x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)} & left
            left -= near
            border |= near
        if len(patch) > 12:
            centers.append(tuple(sum(axis) / len(patch) for axis in zip(*patch, strict=True)))
    return centers


@pytest.mark.slow
def test_a_rich_image_shows_as_many_figures_in_their_order_and_the_background(rich_rows: list) -> None:
    for row in rich_rows[:60]:
        scene = parse_caption(row.captions[0])
        image = Image.open(io.BytesIO(row.read())).convert("RGB")
        assert image.size == (80, 80)
        assert math.dist(image.getpixel((0, 0)), BACKGROUNDS[scene.background]) < 16
        if len({figure.color for figure in scene.figures}) < len(scene.figures):
            continue
        centers = [patches(image, figure.color) for figure in scene.figures]
        assert [len(found) for found in centers] == [figure.count for figure in scene.figures], row.captions[0]
        axis = 0 if scene.relation in ("left", "row") else 1
        for before, after in itertools.pairwise(centers):
            assert max(center[axis] for center in before) + 4 < min(center[axis] for center in after), row.captions[0]


def test_rich_figures_stay_on_the_canvas_and_apart() -> None:
    for scene in scenes.deal_scenes({"train": 2000}, 1, rich=True)["train"]:
        placed = scene_drawing.place_rich_figures(scene, random.Random(repr(scene)))
        reached = [
            (x, y, scene_drawing.RICH_REACH[figure.size])
            for figure, centers in zip(scene.figures, placed, strict=True)
            for x, y in centers
        ]
        assert len(reached) == sum(figure.count for figure in scene.figures)
        assert all(r - 1e-9 <= min(x, y) and max(x, y) <= 1 - r + 1e-9 for x, y, r in reached), scene
        for (x1, y1, r1), (x2, y2, r2) in itertools.combinations(reached, 2):
            assert math.dist((x1, y1), (x2, y2)) > r1 + r2 - 1e-9


def test_command_draws_so_many_images_and_captions_and_counts_them(tmp_path: Path, capsys) -> None:
    numbers = ["--num_images", "20", "7", "8", "--num_captions", "2", "3", "7"]
    scenes.main(["--output_dir", str(tmp_path / "out"), *numbers, "--image_size", "32", "--seed", "4"])
    out = capsys.readouterr().out
    assert [re.search(rf"{split}: (\d+) images, (\d+) captions", out).groups() for split in NUMBERS] == [
        ("20", "40"),
        ("7", "21"),
        ("8", "56"),
    ]
    dataset = load_captions(str(tmp_path / "out"))
    row = scenes.scene_rows({"train": 20, "validation": 7, "test": 8}, 32, 4, dict.fromkeys(NUMBERS, 2))[0]
    assert dataset["train"][0]["captions"] == row.captions
    assert dataset["train"][0]["image"].tobytes() == Image.open(io.BytesIO(row.read())).tobytes()
    assert dataset["train"][0]["image"].size == (32, 32)


@pytest.mark.parametrize(
    "options",
    [
        ["--image_size", "3"],
        ["--num_images", "20", "0", "8"],
        ["--num_images", "20000", "8", "8"],  # 480 combinations of one figure: none is left for 8 images
        ["--num_captions", "1", "1", "8"],
    ],
)
def test_impossible_numbers_are_one_sentence(options: list, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        scenes.main(["--output_dir", str(tmp_path / "out"), *options])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rich", [False, True])
def test_scenes_load_by_name_and_are_cached(rich: bool, tmp_path: Path, monkeypatch) -> None:
    numbers = {"train": 40, "validation": 8, "test": 9}
    monkeypatch.setattr(scenes, "NUM_RICH_SCENES" if rich else "NUM_SCENES", numbers)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    name = "rich_scenes" if rich else "scenes"
    dataset = load_captions(name)
    assert {split: part.num_rows for split, part in dataset.items()} == numbers
    row = scenes.scene_rows(rich=rich)[0]
    assert dataset["train"][0]["captions"] == row.captions
    assert dataset["train"][0]["image"].tobytes() == Image.open(io.BytesIO(row.read())).tobytes()
    assert load_captions(name)["train"].cache_files == dataset["train"].cache_files
    assert rich or load_captions()["train"].cache_files == dataset["train"].cache_files
