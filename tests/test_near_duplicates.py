"""Near-duplicates across splits: an image that was cropped a little and a caption that was reworded a little are found."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageOps
from small_captioners import build

from benchmarks import near_duplicates as benchmark
from training import near_duplicates
from training.near_duplicates import caption_pairs, main, pairs_above, weighted_words

CAPTIONS = {
    "train": [["A brown dog runs over the grass."], ["Two men sit in a boat."], ["a <b>cat</b> sleeps on a red mat"]],
    "test": [["the two men sit in a boat"], ["A brown horse eats hay."], ["over the grass runs a brown dog"]],
}


def noise(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((16, 16, 1), dtype=np.uint8))


@pytest.fixture(scope="module")
def leaky(tmp_path_factory) -> str:
    """Two splits of three images each; the second test image is the first training image, a little brighter."""
    pixels = {"train": [noise(0), noise(1), noise(2)], "test": [noise(3), np.minimum(noise(0), 250) + 5, noise(4)]}
    features = Features({"image": Image(mode="RGB"), "image_id": Value("string"), "captions": List(Value("string"))})
    table = DatasetDict(
        {
            split: Dataset.from_dict(
                {
                    "image": [PILImage.fromarray(array) for array in arrays],
                    "image_id": [f"{split}{number}" for number in range(3)],
                    "captions": CAPTIONS[split],
                },
                features=features,
            )
            for split, arrays in pixels.items()
        }
    )
    folder = tmp_path_factory.mktemp("leaky") / "table"
    table.save_to_disk(folder)
    return str(folder)


def test_a_changed_image_and_a_reworded_caption_are_found_and_shown(leaky, tmp_path, capsys):
    build("lstm").save(tmp_path / "model")
    main([leaky, "--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "near_duplicates.json").read_text(encoding="utf-8"))
    assert [pair["image_ids"] for pair in found["images"]] == [["train0", "test1"]]
    assert [pair["image_ids"] for pair in found["captions"]] == [["train0", "test2"], ["train1", "test0"]]
    printed = capsys.readouterr().out
    assert "near-duplicate images: 1 pairs" in printed and "train/train0 = test/test1" in printed
    page = (tmp_path / "out" / "near_duplicates.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/jpeg') == 2 and "train0" in page and "<b>" not in page


def test_a_threshold_is_measured_by_changed_copies_and_by_pairs_of_others(leaky, tmp_path, capsys):
    """Against the encoder called on the images themselves, and against a plain product of the captions' rows."""
    captioner = build("lstm")
    captioner.save(tmp_path / "model")
    options = ["--model_name_or_path", str(tmp_path / "model"), "--json", str(tmp_path / "found.json")]
    benchmark.main([leaky, *options, "--images", "3", "--captions", "3"])
    found = json.loads((tmp_path / "found.json").read_text())
    tables = DatasetDict.load_from_disk(leaky)

    def encode(images):
        with torch.inference_mode():
            pixels = captioner.image_processor(images, return_tensors="pt")["pixel_values"]
            return captioner.encoder.eval()(pixels).last_hidden_state.mean(dim=1)

    means = {split: encode(rows["image"][:]) for split, rows in tables.items()}
    center = torch.cat(list(means.values())).mean(dim=0)
    mirrored = encode([ImageOps.mirror(image) for image in tables["test"]["image"]])
    cosines = torch.cosine_similarity(mirrored - center, means["test"] - center)
    of_pairs = torch.cosine_similarity((means["test"] - center)[:, None], (means["train"] - center)[None], dim=2)
    images = found["images"]
    assert images["fifth_percentiles"]["mirrored"] == pytest.approx(float(cosines.quantile(0.05)), abs=5e-3)
    assert images["pairs_compared"] == 9 and images["most_alike"][0][:2] == [1, 0]
    assert images["thresholds"][-1]["pairs"] == int((of_pairs >= 0.5).sum())
    for row in found["captions"]["thresholds"]:
        assert row["of_kinds"]["two words swapped"] == row["of_kinds"]["upper case, no punctuation"] == 1
        assert row["found"] == pytest.approx(np.mean(list(row["of_kinds"].values())))
    assert [row["pairs"] for row in found["captions"]["thresholds"]] == sorted(
        len(caption_pairs(tables, row["threshold"])) for row in found["captions"]["thresholds"]
    )
    assert "| 0.95 | " in capsys.readouterr().out


def test_without_a_model_captions_alone_are_compared(leaky, tmp_path, capsys):
    main([leaky, "--caption_threshold", "0.85"])
    printed = capsys.readouterr().out
    assert "near-duplicate captions: 2 pairs" in printed and "images:" not in printed


def test_cosines_are_those_of_a_plain_product(monkeypatch):
    monkeypatch.setattr(near_duplicates, "ROWS_AT_ONCE", 3)
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 6, 20)
    words = generator.integers(0, 9, lengths.sum())
    matrix = weighted_words(words, lengths, 9)
    dense = matrix.to_dense().double().numpy()
    norms = np.linalg.norm(dense, axis=1)
    assert norms[lengths > 0] == pytest.approx(np.ones((lengths > 0).sum()), abs=1e-6) and not norms[lengths == 0].any()
    expected = {(i, j) for i, j in np.argwhere(dense[:8] @ dense[8:].T >= 0.6).tolist()}
    first, second = (matrix.index_select(0, torch.arange(*ends)) for ends in ((0, 8), (8, 20)))
    sparse = {(i, j) for i, j, _ in pairs_above(first, second, 0.6)}
    as_dense = {(i, j) for i, j, _ in pairs_above(first.to_dense(), second.to_dense(), 0.6)}
    assert expected and sparse == as_dense == expected


def test_captions_in_one_split_are_no_pair():
    tables = DatasetDict({"train": Dataset.from_dict({"image_id": ["1", "2"], "captions": [["a dog"], ["a dog"]]})})
    assert caption_pairs(tables, 0.9) == []


def test_one_split_is_refused_in_one_sentence(leaky, tmp_path, capsys):
    DatasetDict({"train": DatasetDict.load_from_disk(leaky)["train"]}).save_to_disk(tmp_path / "one")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "one")])
    assert stop.value.code == 2 and "has one split, train" in capsys.readouterr().err.splitlines()[-1]
