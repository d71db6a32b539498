"""Annotation files of COCO's form, and of those who follow it."""

import json

import pytest
from datasets import load_from_disk
from PIL import Image

from data_scripts import coco, image_folder


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images" / "train2017"
    folder.mkdir(parents=True)
    for number, name in enumerate(("000000000009.jpg", "000000000025.jpg", "000000000030.jpg")):
        Image.new("RGB", (40, 30), (number * 80, 0, 0)).save(folder / name)
    return tmp_path / "images"


def annotations() -> dict:
    images = [{"id": number, "file_name": f"{number:012}.jpg", "height": 30, "width": 40} for number in (9, 25, 30)]
    captions = [(9, "a dog"), (9, "an old dog"), (25, "a cat"), (30, "quality issues are too severe"), (77, "a bird")]
    made = [{"id": 100 + number, "image_id": image, "caption": text} for number, (image, text) in enumerate(captions)]
    made[3]["is_rejected"] = True
    return {"info": {}, "images": images, "annotations": made}


def prepared(tmp_path, sources: list[str], images) -> dict:
    uncut = ["--validation_share", "0", "--test_share", "0"]
    coco.main([*sources, "--images", str(images), "--output_dir", str(tmp_path / "out"), *uncut])
    splits = load_from_disk(str(tmp_path / "out"))
    return {name: dict(zip(table["image_id"], table["captions"], strict=True)) for name, table in splits.items()}


def test_captions_of_images_and_what_is_not_used_is_named(tmp_path, images, capsys):
    path = tmp_path / "captions_train2017.json"
    path.write_text(json.dumps(annotations()))
    assert prepared(tmp_path, [str(path)], images) == {"train": {"9": ["a dog", "an old dog"], "25": ["a cat"]}}
    printed = capsys.readouterr().out
    for name in ("annotation 103", "annotation 104", "000000000030.jpg"):  # rejected, of no image, without a caption
        assert name in printed


def test_textcaps(tmp_path, images):
    texts = [("000000000009", "a dog"), ("000000000025", "a cat"), ("000000000009", "an old dog")]
    data = [{"image_id": name, "caption_id": n, "caption_str": text} for n, (name, text) in enumerate(texts)]
    path = tmp_path / "TextCaps_0.1_val.json"
    path.write_text(json.dumps({"dataset_name": "textcaps", "data": data}))
    captions = {"000000000009": ["a dog", "an old dog"], "000000000025": ["a cat"]}
    assert prepared(tmp_path, [str(path)], images) == {"validation": captions}
    assert prepared(tmp_path / "again", [f"test={path}"], images) == {"test": captions}


@pytest.mark.parametrize("harm", ["no split", "no images", "twice", "no caption"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, images, harm, capsys):
    content = annotations()
    if harm == "no images":
        del content["images"]
    if harm == "twice":
        content["images"].append(content["images"][0])
    if harm == "no caption":
        del content["annotations"][1]["caption"]
    path = tmp_path / ("captions.json" if harm == "no split" else "captions_train.json")
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stopped:
        coco.main([str(path), "--images", str(images), "--output_dir", str(tmp_path / "out")])
    assert stopped.value.code == 2 and "captions" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("metadata", [False, True])
def test_an_option_of_another_layout_is_refused(tmp_path, images, metadata):
    folder = images / "train2017"
    (folder / "000000000009.txt").write_text("a dog")
    if metadata:
        (folder / "metadata.csv").write_text("file_name,caption\n000000000009.jpg,a dog\n")
    option = ["--one_caption"] if metadata else ["--caption_column", "caption"]
    with pytest.raises(SystemExit) as stopped:
        image_folder.main([str(folder), "--output_dir", str(tmp_path / "out"), *option])
    assert stopped.value.code == 2
