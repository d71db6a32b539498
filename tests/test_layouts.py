"""Each layout that captioned images come in: made, recognized, read and trained on for a step."""

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from small_captioners import COLORS, IMAGES, build

import data_scripts.__main__ as data_scripts_command
from captioning.sources import ImageSources
from data_scripts import img2dataset, load_captions, load_for_training
from data_scripts.images import decode_image
from data_scripts.shards import read_shard
from training.batches import CaptionCollator, CaptionPairs
from training.shards import CaptionStream, StreamedCaption

UNCUT = ["--validation_share", "0", "--test_share", "0"]
CAPTIONS = [[f"a {color} dog", f"the small cat sits on a {color} dog"] for color in COLORS]


def content(number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    IMAGES[number].save(buffer, kind)
    return buffer.getvalue()


def save_images(folder: Path, name: str = "{}.png") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [name.format(number) for number in range(len(COLORS))]
    for number, file_name in enumerate(names):
        (folder / file_name).parent.mkdir(parents=True, exist_ok=True)
        (folder / file_name).write_bytes(content(number))
    return names


def write_csv(path: Path, rows: list[list[str]]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


# ---- Layouts: each makes one in a folder, and gives the words of the command line ------------------------------------


def metadata_csv(folder: Path) -> list[str]:
    names = save_images(folder)
    write_csv(
        folder / "metadata.csv",
        [["file_name", "captions"], *([n, str(c)] for n, c in zip(names, CAPTIONS, strict=True))],
    )
    return [str(folder)]


def metadata_jsonl(folder: Path) -> list[str]:
    lines = [json.dumps({"file_name": n, "captions": c}) for n, c in zip(save_images(folder), CAPTIONS, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return [str(folder)]


def metadata_parquet(folder: Path) -> list[str]:
    pq.write_table(pa.table({"file_name": save_images(folder), "captions": CAPTIONS}), folder / "metadata.parquet")
    return [str(folder)]


def sidecars(folder: Path) -> list[str]:
    for number, captions in enumerate(CAPTIONS):
        save_images(folder)
        (folder / f"{number}.txt").write_text("\n".join(captions))
    return [str(folder)]


def sidecars_zip(folder: Path) -> list[str]:
    sidecars(folder)
    return [shutil.make_archive(str(folder), "zip", folder)]


def paragraphs(folder: Path) -> list[str]:
    names = save_images(folder / "train")
    rows = [[name, text] for name, texts in zip(names, CAPTIONS, strict=True) for text in texts]
    write_csv(folder / "train.csv", [["filename", "caption"], *rows])
    return [str(folder)]


def flickr8k(folder: Path) -> list[str]:
    names = save_images(folder)
    lines = [f"{n}#{k}\t{text}" for n, texts in zip(names, CAPTIONS, strict=True) for k, text in enumerate(texts)]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines))
    return [str(folder)]


def flickr30k_kaggle(folder: Path) -> list[str]:
    names = save_images(folder / "flickr30k_images" / "flickr30k_images")
    lines = [f"{n}| {k}| {text} ." for n, texts in zip(names, CAPTIONS, strict=True) for k, text in enumerate(texts)]
    lines[3] = lines[3].replace("| 1|", "| 1  ")  # as one line of the real file is
    text = "\n".join(["image_name| comment_number| comment", *lines, ""])
    (folder / "flickr30k_images" / "results.csv").write_text(text)
    return [str(folder)]


def flickr30k_hub(folder: Path) -> list[str]:
    names = save_images(folder / "flickr30k-images")
    header = ["raw", "sentids", "split", "filename", "img_id"]
    rows = [
        [json.dumps(texts), json.dumps([2 * number, 2 * number + 1]), "train", names[number], number]
        for number, texts in enumerate(CAPTIONS)
    ]
    write_csv(folder / "flickr_annotations_30k.csv", [header, *rows])
    images = shutil.make_archive(str(folder / "flickr30k-images"), "zip", folder, "flickr30k-images")
    return [str(folder / "flickr_annotations_30k.csv"), "--images", images]


def flickr30k_zip(folder: Path) -> list[str]:
    """As it is downloaded from the Hub."""
    flickr30k_hub(folder)
    shutil.rmtree(folder / "flickr30k-images")
    return [str(folder)]


def coco_annotations(names: list[str]) -> dict:
    images = [{"id": number + 7, "file_name": name} for number, name in enumerate(names)]
    texts = [(number + 7, text) for number, texts in enumerate(CAPTIONS) for text in texts]
    return {
        "info": {},
        "images": images,
        "annotations": [{"id": k, "image_id": number, "caption": text} for k, (number, text) in enumerate(texts)],
    }


def coco_folder(folder: Path) -> list[str]:
    names = save_images(folder / "train2017")
    (folder / "annotations").mkdir()
    annotations = coco_annotations(names)
    (folder / "annotations" / "captions_train2017.json").write_text(json.dumps(annotations))
    boxes = annotations | {"annotations": [{"id": 0, "image_id": 7, "bbox": [0, 0, 1, 1]}]}
    (folder / "annotations" / "instances_train2017.json").write_text(json.dumps(boxes))
    return [str(folder)]


def coco_file(folder: Path) -> list[str]:
    annotations = coco_annotations(save_images(folder / "images"))
    (folder / "nocaps_train.json").write_text(json.dumps(annotations))
    return [str(folder / "nocaps_train.json"), "--images", str(folder / "images")]


def textcaps(folder: Path) -> list[str]:
    names = save_images(folder / "train_images", "{}.jpg")
    data = [
        {"image_id": Path(name).stem, "caption_id": k, "caption_str": text}
        for name, texts in zip(names, CAPTIONS, strict=True)
        for k, text in enumerate(texts)
    ]
    (folder / "TextCaps_0.1_train.json").write_text(json.dumps({"data": data}))
    return [str(folder)]


def karpathy(folder: Path) -> list[str]:
    names = save_images(folder / "images")
    images = [
        {"filename": name, "split": "train", "sentences": [{"raw": text} for text in texts]}
        for name, texts in zip(names, CAPTIONS, strict=True)
    ]
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    return [str(folder)]


KEYS = [f"{number:09}" for number in range(len(COLORS))]
STATS = {"count": 7, "successes": 5, "failed_to_download": 1, "failed_to_resize": 1}


def img2dataset_table(folder: Path, **images: list) -> None:
    """00000.parquet as img2dataset 1.47 writes it: a row for each URL, whether it could be downloaded or not."""
    statuses = ["success"] * 5 + ["failed_to_download", "failed_to_resize"]
    columns = {
        "url": [f"https://example.org/{number}" for number in range(7)],
        "key": [f"{number:09}" for number in range(7)],
        "caption": [*(texts[0] for texts in CAPTIONS), "a red dog", "a red dog"],
        "status": statuses,
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns | images), folder / "00000.parquet", row_group_size=3)
    (folder / "00000_stats.json").write_text(json.dumps(STATS))


def img2dataset_sample(number: int) -> dict[str, bytes]:
    caption = CAPTIONS[number][0]
    about = {"caption": caption, "key": KEYS[number], "status": "success", "width": 50}
    return {"jpg": content(number, "JPEG"), "txt": caption.encode(), "json": json.dumps(about, indent=4).encode()}


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for key, members in samples.items():
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def img2dataset_tars(folder: Path) -> list[str]:
    img2dataset_table(folder)
    write_tar(folder / "00000.tar", {key: img2dataset_sample(number) for number, key in enumerate(KEYS)})
    return [str(folder)]


def img2dataset_files(folder: Path) -> list[str]:
    img2dataset_table(folder)
    for number, key in enumerate(KEYS):
        for suffix, data in img2dataset_sample(number).items():
            path = folder / "00000" / f"{key}.{suffix}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
    return [str(folder)]


def img2dataset_parquet(folder: Path) -> list[str]:
    img2dataset_table(folder, jpg=[*(content(number, "JPEG") for number in range(5)), None, None])
    return [str(folder)]


def webdataset(folder: Path) -> list[str]:
    folder.mkdir()
    for shard in range(2):
        samples = {f"{n:03}": {"png": content(n), "txt": CAPTIONS[n][0].encode()} for n in range(5) if n % 2 == shard}
        write_tar(folder / f"train-{shard}.tar", samples)
    return [str(folder / "train-{0..1}.tar")]


def saved_dataset(folder: Path) -> list[str]:
    features = Features({"image": ImageFeature(), "text": List(Value("string"))})
    Dataset.from_dict({"image": IMAGES, "text": CAPTIONS}, features=features).save_to_disk(folder)
    return [str(folder)]


def parquet_file(folder: Path) -> list[str]:
    folder.mkdir()
    images = [{"bytes": content(number), "path": None} for number in range(5)]
    pq.write_table(pa.table({"image": images, "caption": CAPTIONS}), folder / "train.parquet")
    return [str(folder / "train.parquet")]


LAYOUTS = {  # what makes it: what it is recognized as, how many captions each image has
    metadata_csv: ("metadata", 2),
    metadata_jsonl: ("metadata", 2),
    metadata_parquet: ("metadata", 2),
    sidecars: ("text files", 2),
    sidecars_zip: ("text files", 2),
    paragraphs: ("per split", 2),
    flickr8k: ("Flickr8k", 2),
    flickr30k_kaggle: ("Flickr30k csv", 2),
    flickr30k_hub: ("Flickr30k csv", 2),
    flickr30k_zip: ("Flickr30k csv", 2),
    coco_folder: ("COCO", 2),
    coco_file: ("COCO", 2),
    textcaps: ("COCO", 2),
    karpathy: ("Karpathy", 2),
    img2dataset_tars: ("img2dataset's output in tars", 1),
    img2dataset_files: ("img2dataset's output in files", 1),
    img2dataset_parquet: ("img2dataset's output in Parquet", 1),
    webdataset: ("webdataset", 1),
    saved_dataset: ("dataset", 2),
    parquet_file: ("dataset", 2),
}


@pytest.fixture(scope="module")
def captioner():
    return build("lstm", num_layers=1)


def assert_trains(captioner, items: list[dict]) -> None:
    """One step on items changes the weights and lowers their loss."""
    model = captioner.model.train()
    batch = CaptionCollator(captioner.processor)(items)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = model(**batch).loss
    before.backward()
    optimizer.step()
    optimizer.zero_grad()
    assert torch.isfinite(before) and model(**batch).loss < before


def color_of(image: Image.Image) -> str:
    return min(
        COLORS,
        key=lambda name: sum(
            abs(a - b)
            for a, b in zip(Image.new("RGB", (1, 1), name).getpixel((0, 0)), image.getpixel((9, 9)), strict=True)
        ),
    )


@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
def test_a_layout_is_recognized_read_and_trained_on(tmp_path, capsys, captioner, make):
    title, num_captions = LAYOUTS[make]
    data_scripts_command.main([*make(tmp_path / "in"), "--output_dir", str(tmp_path / "out"), *UNCUT])
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("recognized: ")]
    assert title in line and "5 images" in line and f"{num_captions} caption" in line
    assert ("failed_to_download: 1" in printed) == ("failed_to_resize: 1" in printed) == ("img2dataset" in title)
    table = load_captions(str(tmp_path / "out"))["train"]
    assert len(table) == 5
    for row in table:
        assert len(row["captions"]) == num_captions
        assert all(color_of(row["image"]) in caption for caption in row["captions"])
    pairs = CaptionPairs(table, captioner.tokenizer)
    assert_trains(captioner, [pairs[number] for number in range(len(pairs))])


@pytest.mark.parametrize("make", [img2dataset_tars, img2dataset_parquet], ids=lambda make: make.__name__)
def test_what_img2dataset_wrote_is_streamed_too(tmp_path, captioner, make):
    for shard in range(2):
        make(tmp_path / "in")
        for path in (tmp_path / "in").glob("00000*"):
            path.rename(path.with_name(path.name.replace("00000", f"1000{shard}")))
    splits, captions = load_for_training(str(tmp_path / "in"), streaming=True)
    assert captions == [texts[0] for texts in CAPTIONS] and len(splits["validation"]) == 5
    assert len(splits["train"].addresses) == 1
    stream = CaptionStream(splits["train"], captioner.tokenizer)
    token_ids = [list(captioner.tokenizer(text).input_ids) for text in captions]
    items = [StreamedCaption(n, content(n), ids, 0, "", None) for n, ids in enumerate(token_ids)]
    assert_trains(captioner, stream.__getitems__(items))


def test_photos_that_img2dataset_laid_on_their_side_are_upright(tmp_path):
    """In tars, files, Parquet, streamed and captioned: by its notes, unless the bytes are the download's or were changed since."""
    upright = Image.new("RGB", (20, 40), "blue")
    upright.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    written, download = io.BytesIO(), io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(written, "JPEG")  # the pixels as the camera stored them
    upright.transpose(Image.Transpose.ROTATE_90).save(download, "JPEG", exif=exif)
    turned = io.BytesIO()
    upright.save(turned, "JPEG")
    images = [file.getvalue() for file in (written, download, turned)]
    noted = {"caption": "red above blue", "width": 40, "height": 20, "exif": '{"Image Orientation": "Rotated 90 CW"}'}
    samples = {str(n): {"jpg": image, "json": json.dumps(noted).encode()} for n, image in enumerate(images)}
    for folder in ("tars", "files", "table"):
        (tmp_path / folder).mkdir()
    write_tar(tmp_path / "tars" / "0.tar", samples)
    for key, members in samples.items():
        for suffix, data in members.items():
            (tmp_path / "files" / f"{key}.{suffix}").write_bytes(data)
    columns = {name: [value] * 3 for name, value in noted.items()} | {"jpg": images, "key": list(samples)}
    pq.write_table(pa.table(columns), tmp_path / "table" / "0.parquet")
    read = []
    for folder in ("tars", "files", "table"):
        img2dataset.main([str(tmp_path / folder), "--output_dir", str(tmp_path / "out" / folder), *UNCUT])
        read += [row["image"] for row in load_captions(str(tmp_path / "out" / folder))["train"]]
        captioned = [ref.read() for ref in ImageSources([str(tmp_path / folder)])]
        assert captioned[1:] == images[1:]
        read += map(decode_image, captioned)
    for shard in ("tars/0.tar", "table/0.parquet"):
        streamed = [sample.image for _, sample in read_shard(str(tmp_path / shard), 0, True)]
        assert streamed[1:] == images[1:]
        read += map(decode_image, streamed)
    assert len(read) == 24
    for image in read:
        assert image.size == (20, 40) and image.getpixel((10, 5))[0] > 200 > 60 > image.getpixel((10, 35))[0]


def refused(capsys, *argv: object) -> str:
    """The one sentence of a command that goes no further."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        data_scripts_command.main([str(word) for word in argv])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_a_folder_of_two_layouts_is_refused_until_one_is_named(tmp_path, capsys):
    folder = Path(sidecars(tmp_path / "in")[0])
    write_csv(folder / "metadata.csv", [["file_name", "caption"], ["0.png", "a red dog of the table"]])
    output = ["--output_dir", tmp_path / "out"]
    sentence = refused(capsys, folder, *output)
    assert "--layout metadata" in sentence and "--layout sidecars" in sentence and not (tmp_path / "out").exists()
    for layout, num_images in {"sidecars": 5, "metadata": 1}.items():
        words = [folder, "--layout", layout, "--output_dir", tmp_path / layout, *UNCUT]
        data_scripts_command.main([str(word) for word in words])
        assert len(load_captions(str(tmp_path / layout))["train"]) == num_images


@pytest.mark.parametrize(
    "kind",
    ["no layout", "other name", "missing", "url", "boxes", "metadata file", "no images", "no source", "wrong layout"],
)
def test_what_has_no_layout_is_refused(tmp_path, capsys, kind):
    save_images(tmp_path / "in")
    boxes, metadata = tmp_path / "boxes.json", tmp_path / "metadata.csv"
    boxes.write_text(json.dumps({"images": [], "annotations": [{"bbox": [0, 0, 1, 1]}]}))
    metadata.write_text("file_name,caption\n")
    save_images(tmp_path / "table")
    (tmp_path / "table" / "captions.csv").write_text("photo,text\na.png,a dog\n")
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "captions_train2017.json").write_text(json.dumps(coco_annotations(["a.png"])))
    words, part = {
        "no layout": ([tmp_path / "in"], "no layout"),
        "other name": ([tmp_path / "table"], "rename captions.csv to metadata.csv"),
        "missing": ([tmp_path / "gone"], "gone"),
        "url": (["https://127.0.0.1:9/a.zip"], "--layout"),
        "boxes": ([boxes], "boxes.json"),
        "metadata file": ([metadata], "folder"),
        "no images": ([tmp_path / "coco"], "--images"),
        "no source": ([], "SOURCE"),
        "wrong layout": ([tmp_path / "in", "--layout", "sidecars"], "text file"),
    }[kind]
    assert part in refused(capsys, *words, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_are_those_of_the_layouts_own_command(tmp_path, capsys):
    (folder,) = sidecars(tmp_path / "in")
    data_scripts_command.main([folder, "--one_caption", "--output_dir", str(tmp_path / "out"), *UNCUT])
    assert load_captions(str(tmp_path / "out"))["train"][0]["captions"] == [" ".join(CAPTIONS[0])]
    assert "restval" in refused(capsys, folder, "--restval", "none", "--output_dir", tmp_path / "again")


def test_flickr30k_keeps_the_splits_of_its_csv(tmp_path, capsys):
    table, _, images = flickr30k_hub(tmp_path / "in")
    text = Path(table).read_text()
    for name, split in {"1.png": "val", "2.png": "test", "3.png": "elsewhere"}.items():
        text = text.replace(f",train,{name}", f",{split},{name}")
    Path(table).write_text(text)
    data_scripts_command.main([table, "--images", images, "--output_dir", str(tmp_path / "out")])
    found = {name: part["image_id"] for name, part in load_captions(str(tmp_path / "out")).items()}
    assert {name: list(ids) for name, ids in found.items()} == {
        "train": ["0.png", "4.png"],
        "validation": ["1.png"],
        "test": ["2.png"],
    }
    assert "3.png" in capsys.readouterr().out


def test_what_of_a_tar_is_not_used_is_named(tmp_path, capsys):
    samples = {
        "a": {"jpg": content(0, "JPEG"), "txt": b"a red dog"},
        "b": {"txt": b"a dog without an image"},
        "c": {"png": content(2), "json": b'{"caption": ["a blue dog", "the blue dog"]}', "txt": b"not this"},
        "d.1": {"png": content(3), "txt": b"a white dog"},
        "d.2": {"png": content(3), "txt": b"a white cat"},
        "e": {"png": content(4)},
        "f": {"cls": b"3"},
    }
    write_tar(tmp_path / "val-0.tar", samples)
    with tarfile.open(tmp_path / "val-0.tar", "a") as archive:
        link = tarfile.TarInfo("g.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a.jpg"
        archive.addfile(link)
    (tmp_path / "val-1.tar").write_bytes((tmp_path / "val-0.tar").read_bytes()[:4000])
    output = tmp_path / "out"
    data_scripts_command.main([str(tmp_path / "val-*.tar"), "--output_dir", str(output)])
    table = load_captions(str(output))["validation"]
    captions = dict(zip(table["image_id"], table["captions"], strict=True))
    assert captions["c"] == ["a blue dog", "the blue dog"] and captions["a"] == ["a red dog"]
    printed = capsys.readouterr().out
    assert "sample without an image: 5\n" in printed
    for place in (
        "val-0.tar, b",
        "d.1.png",
        "d.2.png",
        "val-0.tar, e",
        "val-0.tar, f",
        "val-0.tar, g.jpg",
        "val-1.tar",
    ):
        assert place in printed, place


def test_one_of_many_rows_of_a_parquet_file_is_read_with_its_own_image(tmp_path):
    folder = tmp_path / "in"
    img2dataset_parquet(folder)
    data_scripts_command.main([str(folder / "00000.parquet"), "--output_dir", str(tmp_path / "out"), *UNCUT])
    table = load_captions(str(tmp_path / "out"))["train"]
    assert list(table["image_id"]) == KEYS  # of two row groups
    assert [color_of(image) for image in table["image"]] == list(COLORS)
