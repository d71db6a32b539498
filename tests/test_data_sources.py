"""Every source becomes the same caption table; what cannot be used is left out by name; nothing leads out of a source."""

import csv
import hashlib
import http.server
import io
import json
import subprocess
import sys
import tracemalloc
import unicodedata
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops
from serving import serving, serving_folder

from data_scripts import (
    archives,
    dataset_rows,
    flickr8k,
    hub,
    image_folder,
    karpathy,
    load_captions,
    paragraphs,
    recaption,
)
from data_scripts.caption_table import FEATURES, write_caption_table
from data_scripts.images import BadImage, decode_image
from data_scripts.row_checks import MAX_CAPTION_CHARACTERS, SourceRow, caption_problem, check_row
from data_scripts.splits import cut_missing_splits
from system.downloads import download


def image(color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (9, 7), kind: str = "PNG") -> bytes:
    return saved(Image.new("RGB", size, color), kind)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_images(number: int, start: int = 0) -> list[bytes]:
    return [image((i % 256, i // 256, 77)) for i in range(start, start + number)]


def report_files(rows: dict[str, list[tuple[str, str]]]) -> dict[str, bytes]:
    """The report's layout: csvs with an unnamed index beside the splits' folders, each image of another color."""
    files, colors = {}, iter(make_images(1000))
    for split, lines in rows.items():
        quoted = [f'{i},{name},"{caption}"' for i, (name, caption) in enumerate(lines)]
        files[f"set/{split}.csv"] = "\n".join([",filename,caption", *quoted, ""]).encode()
        files |= {f"set/{split}/{name}": next(colors) for name, _ in lines}
    return files


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def ids(dataset: DatasetDict) -> dict[str, list[str]]:
    return {split: list(part["image_id"]) for split, part in dataset.items()}


def raw_images(part: Dataset) -> list[bytes]:
    return [row["image"]["bytes"] for row in part.cast_column("image", datasets.Image(decode=False))]


def contents(folder: Path) -> dict[str, tuple[list[str], list[list[str]], list[bytes]]]:
    dataset = load_from_disk(folder)
    return {
        split: (list(part["image_id"]), list(part["captions"]), raw_images(part)) for split, part in dataset.items()
    }


UNCUT = ["--validation_share", "0", "--test_share", "0"]
REPORT_ROWS = {
    "train": [("a.png", "One dog.\r\nTwo, dogs."), ("b.png", "A cat."), ("c.png", "A cow.")],
    "val": [("a.png", "A ship.")],
    "test": [("z.png", "A car.")],
}


@pytest.fixture(scope="module")
def flickr_files() -> tuple[dict[str, bytes], dict[str, bytes]]:
    names = [f"{i}_ab.jpg" for i in range(6)]
    images = {f"Flicker8k_Dataset/{name}": image((i * 40, 0, 0), kind="JPEG") for i, name in enumerate(names)}
    tokens = [f"{name}#{i}\t{name} caption {i} ." for name in [*names, "2258277193_586949ec62.jpg.1"] for i in range(5)]
    text = {
        "Flickr8k.token.txt": "\n".join(tokens).encode(),
        "Flickr_8k.trainImages.txt": "\n".join(names[:3]).encode() + b"\n",
        "Flickr_8k.devImages.txt": names[3].encode(),
        "Flickr_8k.testImages.txt": names[4].encode(),
        "readme.txt": b"x",
    }
    return images, text


# ------------------------------------------------------------------------------------------------------- sources


def test_report_zip_folder_and_url_give_the_same_table(tmp_path: Path) -> None:
    files = report_files(REPORT_ROWS)
    folder, archive = write_folder(tmp_path / "folder", files), write_zip(tmp_path / "set.zip", files)
    with serving_folder(tmp_path) as address:
        for number, source in enumerate([str(folder), str(archive), f"{address}/set.zip"]):
            paragraphs.main([source, "--output_dir", str(tmp_path / f"out{number}")])
    tables = [contents(tmp_path / f"out{number}") for number in range(3)]
    assert tables[0] == tables[1] == tables[2]
    image_ids, captions, images = tables[0]["train"]
    assert image_ids == ["train/a.png", "b.png", "c.png"]  # two images are called a.png
    assert captions[0] == ["One dog.\r\nTwo, dogs."]
    assert images == [files[f"set/train/{name}"] for name in ("a.png", "b.png", "c.png")]
    assert tables[0]["validation"][0] == ["validation/a.png"] and tables[0]["test"][0] == ["z.png"]


def test_saved_table_has_the_contract_and_loads_by_name(tmp_path: Path) -> None:
    files = report_files(REPORT_ROWS)
    files["set/train/b.png"] = saved(Image.new("L", (4, 4), 9), "PNG")
    source = write_folder(tmp_path / "in", files)
    paragraphs.main([str(source), "--output_dir", str(tmp_path / "t")])
    dataset = load_captions(str(tmp_path / "t"))
    assert list(dataset) == ["train", "validation", "test"]
    assert dataset["train"].features == FEATURES
    assert [image.mode for image in dataset["train"]["image"]] == ["RGB"] * 3
    assert dataset["train"][0]["image"].getpixel((0, 0)) == (0, 0, 77)
    assert dataset["train"][1]["image"].getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize("packed", [True, False])
def test_flickr8k_follows_its_lists(tmp_path: Path, flickr_files, packed: bool) -> None:
    images, text = flickr_files
    if packed:
        write_zip(tmp_path / "Flickr8k_Dataset.zip", images)
        write_zip(tmp_path / "Flickr8k_text.zip", text)
    else:
        write_folder(tmp_path, images | text)
    flickr8k.main([str(tmp_path), "--output_dir", str(tmp_path / "out"), "--strict"])
    table = contents(tmp_path / "out")
    assert {split: part[0] for split, part in table.items()} == {
        "train": ["0_ab.jpg", "1_ab.jpg", "2_ab.jpg"],
        "validation": ["3_ab.jpg"],
        "test": ["4_ab.jpg"],
    }
    assert table["test"][1] == [[f"4_ab.jpg caption {i} ." for i in range(5)]]
    assert table["test"][2] == [images["Flicker8k_Dataset/4_ab.jpg"]]


def test_flickr8k_without_lists_takes_all_and_names_the_missing_image(tmp_path: Path, flickr_files, capsys) -> None:
    images, text = flickr_files
    images_zip = write_zip(tmp_path / "p.zip", images)
    text_folder = write_folder(tmp_path / "t", {"Flickr8k.token.txt": text["Flickr8k.token.txt"]})
    flickr8k.main([str(images_zip), "--text", str(text_folder), "--output_dir", str(tmp_path / "out"), *UNCUT])
    assert ids(load_from_disk(tmp_path / "out")) == {"train": [f"{i}_ab.jpg" for i in range(6)]}
    shown = capsys.readouterr().out
    assert "no such image file: 1\n" in shown and "2258277193_586949ec62.jpg.1" in shown


@pytest.mark.parametrize(("restval", "train"), [("train", ["11", "12"]), ("none", ["11"])])
def test_karpathy_json(tmp_path: Path, restval: str, train: list[str]) -> None:
    entries = [
        {"filepath": "train2014", "filename": "a.jpg", "split": "train", "cocoid": 11},
        {"filepath": "val2014", "filename": "b.jpg", "split": "restval", "cocoid": 12},
        {"filepath": "val2014", "filename": "c.jpg", "split": "val", "cocoid": 13},
        {"filename": "d.jpg", "split": "test"},
    ]
    for entry in entries:
        entry["sentences"] = [{"raw": f"{entry['filename']} {i}", "tokens": []} for i in range(5)]
    table = tmp_path / "dataset_coco.json"
    table.write_text(json.dumps({"images": entries, "dataset": "coco"}))
    # One image lies where the json says, one in an outer folder, two without their folder.
    files = dict(zip(["train2014/a.jpg", "coco/val2014/b.jpg", "c.jpg", "x/d.jpg"], make_images(4), strict=True))
    images = write_folder(tmp_path / "images", files)
    out = tmp_path / "out"
    karpathy.main([str(table), "--images", str(images), "--restval", restval, "--output_dir", str(out), "--strict"])
    result = contents(out)
    assert {split: part[0] for split, part in result.items()} == {
        "train": train,
        "validation": ["13"],
        "test": ["d.jpg"],
    }
    assert result["train"][1][0] == [f"a.jpg {i}" for i in range(5)]
    assert result["train"][2] == make_images(4)[: len(train)]


def test_image_folder_csv_and_jsonl(tmp_path: Path) -> None:
    first, second, third = make_images(3)
    lines = [{"file_name": "sub/b.png", "captions": ["one", "two"]}, {"file_name": "c.png", "captions": ["three"]}]
    files = {
        "train/metadata.csv": "\ufefffile_name,text\na.png,hello\na.png,hello\na.png,again\n".encode(),
        "train/a.png": first,
        "val/metadata.jsonl": "\n".join(map(json.dumps, lines)).encode(),
        "val/sub/b.png": second,
        "val/c.png": third,
    }
    source = write_folder(tmp_path / "in", files)
    image_folder.main([str(source), "--output_dir", str(tmp_path / "out"), "--test_share", "0"])
    table = contents(tmp_path / "out")
    assert table["train"] == (["train/a.png"], [["hello", "again"]], [first])  # a copied row counts once
    assert table["validation"] == (["val/sub/b.png", "val/c.png"], [["one", "two"], ["three"]], [second, third])


def test_image_folder_agrees_with_the_hubs_own_reader(tmp_path: Path) -> None:
    files = {f"{i}.png": content for i, content in enumerate(make_images(4))}
    # No csv: pandas 3 reads it into a type of string that datasets 4.0 does not take for a file name.
    metadata = "".join(json.dumps({"file_name": name, "caption": f"about, {name}"}) + "\n" for name in files)
    source = write_folder(tmp_path / "in", files | {"metadata.jsonl": metadata.encode()})
    image_folder.main([str(source), "--output_dir", str(tmp_path / "ours"), *UNCUT])
    theirs = datasets.load_dataset("imagefolder", data_dir=str(source))["train"]
    ours = load_from_disk(tmp_path / "ours")["train"]
    told = {row["captions"][0]: row["image"].getpixel((0, 0)) for row in ours}
    assert told == {row["caption"]: row["image"].getpixel((0, 0)) for row in theirs} and len(told) == 4


def test_hub_parquet_with_other_columns(tmp_path: Path) -> None:
    table = Dataset.from_dict(
        {
            "photo": [{"bytes": p, "path": None} for p in make_images(3)],
            "c0": ["a", "b", "c"],
            "c1": [["d", "e"], [], ["f"]],
        },
        features=datasets.Features(
            {"photo": datasets.Image(), "c0": datasets.Value("string"), "c1": datasets.List(datasets.Value("string"))}
        ),
    )
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "train.parquet")
    options = ["--image_column", "photo", "--caption_column", "c0", "c1", "--output_dir", str(tmp_path / "out"), *UNCUT]
    hub.main([str(tmp_path / "set"), *options])
    expected = (["train_0", "train_1", "train_2"], [["a", "d", "e"], ["b"], ["c", "f"]], make_images(3))
    assert contents(tmp_path / "out") == {"train": expected}


def test_any_saved_set_loads_prepared_and_cached(tmp_path: Path) -> None:
    images = [{"bytes": p, "path": None} for p in make_images(40)]
    columns = {"image": [images[0], *images], "text": ["first", *map(str, range(40))], "image_id": [0, *range(40)]}
    Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    dataset = load_captions(str(tmp_path / "set"))
    assert {split: part.num_rows for split, part in dataset.items()} == {"train": 36, "validation": 2, "test": 2}
    captions = {row["image_id"]: row["captions"] for part in dataset.values() for row in part}
    assert captions["0"] == ["first", "0"] and captions["7"] == ["7"]  # rows of one image_id are one image
    again = load_captions(str(tmp_path / "set"))
    assert dataset["train"].cache_files == again["train"].cache_files


# ---------------------------------------------------------------------------------------------- missing splits


def test_cut_is_by_image_and_repeatable(tmp_path: Path) -> None:
    hashes = [str(i // 2) for i in range(200)]  # every image twice
    shares = {"validation": 0.1, "test": 0.05}
    cut = cut_missing_splits({"train": list(range(200))}, hashes, shares, seed=3)
    assert sorted(row for rows in cut.values() for row in rows) == list(range(200))
    assert {split: len(rows) for split, rows in cut.items()} == {"train": 170, "validation": 20, "test": 10}
    sides = [{hashes[row] for row in rows} for rows in cut.values()]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert cut == cut_missing_splits({"train": list(range(200))}, hashes, shares, seed=3)
    assert cut != cut_missing_splits({"train": list(range(200))}, hashes, shares, seed=4)


def test_cut_leaves_an_existing_split_alone() -> None:
    rows = {"train": list(range(100)), "validation": [100, 101]}
    cut = cut_missing_splits(rows, [str(i) for i in range(102)], {"validation": 0.5, "test": 0.1}, seed=0)
    assert cut["validation"] == [100, 101] and len(cut["test"]) == 10 and set(cut["test"]) < set(range(100))
    assert cut_missing_splits({"test": [0]}, ["x"], {"validation": 0.5, "test": 0.5}, seed=0) == {"test": [0]}


def test_several_captions_of_an_image_stay_on_one_side(tmp_path: Path) -> None:
    files = {f"{i}.png": content for i, content in enumerate(make_images(60))}
    lines = [f"{name},{name} told {i}" for i in range(3) for name in files]
    source = write_folder(tmp_path / "in", files | {"metadata.csv": "\n".join(["file_name,text", *lines]).encode()})
    image_folder.main([str(source), "--output_dir", str(tmp_path / "out")])
    dataset = load_from_disk(tmp_path / "out")
    assert {split: part.num_rows for split, part in dataset.items()} == {"train": 54, "validation": 3, "test": 3}
    for part in dataset.values():
        assert all(row["captions"] == [f"{row['image_id']} told {i}" for i in range(3)] for row in part)


def test_same_image_in_two_splits_is_reported_and_kept(tmp_path: Path, capsys) -> None:
    files = report_files({"train": [("a.png", "x"), ("b.png", "y"), ("c.png", "z")], "val": [("v.png", "w")]})
    files["set/val/v.png"] = files["set/train/b.png"]
    files["set/train/c.png"] = files["set/train/a.png"]
    source = write_folder(tmp_path / "in", files)
    paragraphs.main([str(source), "--output_dir", str(tmp_path / "out"), "--test_share", "0"])
    shown = capsys.readouterr().out
    assert "same image in two splits: 1\n  b.png (train) = v.png (validation)" in shown
    assert "same image twice in one split: 1\n  a.png (train) = c.png (train)" in shown
    assert ids(load_from_disk(tmp_path / "out")) == {"train": ["a.png", "b.png", "c.png"], "validation": ["v.png"]}


# ------------------------------------------------------------------------------------------------- unusable rows


NOISE = Image.effect_noise((64, 64), 90).convert("RGB")
TURNED = Image.Exif()
TURNED[0x0112] = 6  # by a quarter
GOOD_IMAGES = {
    "turned": saved(NOISE.crop((0, 0, 64, 32)), "JPEG", exif=TURNED),
    "one pixel": image(size=(1, 1)),
    "cmyk": saved(NOISE.convert("CMYK"), "JPEG"),
    "palette": saved(NOISE.convert("P"), "PNG"),
    "alpha": saved(NOISE.convert("RGBA"), "PNG"),
    "gray and alpha": saved(NOISE.convert("LA"), "PNG"),
    "bilevel": saved(NOISE.convert("1"), "PNG"),
    "animated": saved(NOISE, "GIF", save_all=True, append_images=[NOISE.rotate(90)]),
    "webp": saved(NOISE, "WEBP"),
    "tiff": saved(NOISE, "TIFF"),
    "bmp": saved(NOISE, "BMP"),
    "two images in one jpeg": saved(NOISE, "MPO", save_all=True, append_images=[NOISE.rotate(90)]),
}
BAD_IMAGES = {
    "empty": (b"", "empty"),
    "text": (b"I am an image.", "does not decode"),
    "truncated": (saved(NOISE, "JPEG")[:-900], "does not decode"),
    "truncated png": (saved(NOISE, "PNG")[:-900], "does not decode"),
    "postscript": (saved(NOISE, "EPS"), "does not decode"),
    "thread": (image(size=(20000, 1)), "times as long"),
    "bomb": (saved(Image.new("1", (12000, 12000)), "PNG"), "pixels"),
    "larger bomb": (saved(Image.new("1", (20000, 20000)), "PNG"), "pixels"),
}


@pytest.mark.parametrize("kind", GOOD_IMAGES)
def test_every_good_image_is_decoded_as_the_table_does_it(kind: str) -> None:
    image = decode_image(GOOD_IMAGES[kind])
    table = datasets.Image(mode="RGB").decode_example({"bytes": GOOD_IMAGES[kind], "path": None})
    assert image.size == table.size and ImageChops.difference(image, table).getbbox() is None


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_image_is_refused_for_its_reason(kind: str) -> None:
    content, reason = BAD_IMAGES[kind]
    with pytest.raises(BadImage, match=reason):
        decode_image(content)


def test_large_jpeg_is_decoded_smaller_and_looks_the_same() -> None:
    smooth = Image.effect_mandelbrot((1600, 1200), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    whole, small = (decode_image(saved(smooth, "JPEG"), side) for side in (None, 299))
    assert whole.size == (1600, 1200) and small.size == (400, 300)
    assert decode_image(saved(smooth, "PNG"), 299).size == whole.size
    resized = [np.asarray(image.resize((200, 150), Image.Resampling.BICUBIC), dtype=float) for image in (whole, small)]
    assert np.abs(resized[0] - resized[1]).mean() < 3


def test_rotated_image_is_upright_in_the_table(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    content = saved(Image.new("RGB", (20, 10)), "JPEG", exif=exif)
    write_caption_table([SourceRow("train", "a", ["x"], "a", lambda: content)], tmp_path / "t", False, 0, 0)
    assert load_from_disk(tmp_path / "t")["train"][0]["image"].size == (10, 20)


def test_postscript_is_never_run(monkeypatch) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    with pytest.raises(BadImage, match="does not decode"):
        decode_image(BAD_IMAGES["postscript"][0])


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("", "empty"),
        (" \n\t ", "empty"),
        (None, "empty"),
        (float("nan"), "empty"),
        (7, "not text"),
        ({"raw": "x"}, "not text"),
        ("a\0b", "null"),
        ("a \ud800", "broken"),
        ("... !?", "without a word"),
        ("\U0001f600", "without a word"),
        ("word " * MAX_CAPTION_CHARACTERS, "longer"),
    ],
)
def test_bad_caption_is_refused_for_its_reason(caption: object, reason: str) -> None:
    assert reason in caption_problem(caption)
    row = check_row(SourceRow("train", "a", [caption, " kept "], "a", image))
    assert row.usable and row.captions == ["kept"] and reason in row.problems[0]
    assert not check_row(SourceRow("train", "a", [caption], "a", image)).usable


def test_captions_of_other_scripts_are_kept() -> None:
    for caption in ("كلب أحمر", "赤い犬。", "a dog \U0001f436", "don't"):
        assert caption_problem(caption) is None


def bad_source(folder: Path) -> Path:
    rows = [("good.png", "fine"), ("text.png", "x"), ("gone.png", "x"), ("mute.png", " "), ("good2.png", "fine too")]
    files = report_files({"train": rows})
    files["set/train/text.png"] = b"not an image"
    del files["set/train/gone.png"]
    return write_folder(folder, files)


def test_skipped_rows_are_counted_and_named(tmp_path: Path, capsys) -> None:
    paragraphs.main([str(bad_source(tmp_path / "in")), "--output_dir", str(tmp_path / "out"), *UNCUT])
    assert ids(load_from_disk(tmp_path / "out")) == {"train": ["good.png", "good2.png"]}
    shown = capsys.readouterr().out
    assert "train: 2 images, 2 captions" in shown
    assert "skipped, image does not decode: 1\n  set/train.csv, line 3, text.png" in shown
    assert "skipped, no such image file: 1\n  set/train.csv, line 4, gone.png" in shown
    assert "skipped, empty caption: 1\n  set/train.csv, line 5, mute.png" in shown


@pytest.mark.slow
def test_strict_stops_with_one_sentence_and_writes_nothing(tmp_path: Path) -> None:
    source = bad_source(tmp_path / "in")
    command = [sys.executable, "-m", "data_scripts.paragraphs", str(source), "--output_dir", str(tmp_path / "o" / "t")]
    result = subprocess.run(
        [*command, "--strict"], capture_output=True, text=True, cwd=Path(paragraphs.__file__).parents[1]
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: set/train.csv, line 3, text.png: image does not decode")
    assert not any((tmp_path / "o").iterdir())


def test_images_of_one_id_are_kept_apart(tmp_path: Path) -> None:
    splits = ["train", "train", "test", "test"]
    names = ["same", "same", "other", "same"]
    rows = [
        SourceRow(split, name, ["x"], f"row {i}", lambda p=p: p)
        for i, (split, name, p) in enumerate(zip(splits, names, make_images(4), strict=True))
    ]
    summary = write_caption_table(rows, tmp_path / "t", False, 0, 0)
    assert ids(load_from_disk(tmp_path / "t")) == {
        "train": ["train/same", "train/same#2"],
        "test": ["other", "test/same"],
    }
    assert contents(tmp_path / "t")["train"][2] == make_images(2)
    assert [len(places) for places in summary.notes.values()] == [3] and not summary.skipped


def test_more_rows_than_one_batch_keep_their_order(tmp_path: Path) -> None:
    contents_in = make_images(333)
    rows = [SourceRow("train", str(i), [f"number {i}"], str(i), lambda p=p: p) for i, p in enumerate(contents_in)]
    write_caption_table(rows, tmp_path / "t", True, 0, 0)
    image_ids, captions, images = contents(tmp_path / "t")["train"]
    assert image_ids == [str(i) for i in range(333)] and captions == [[f"number {i}"] for i in range(333)]
    assert [hashlib.sha256(p).digest() for p in images] == [hashlib.sha256(p).digest() for p in contents_in]


# ------------------------------------------------------------------------------------- unusable sources and options


def fails(capsys, main, arguments: list[object]) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return next(line for line in error if line.startswith("error: "))


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (b"a.png;x\n", "no column 'filename'"),
        (b",filename,text\n0,a.png,x\n", "no column 'caption'"),
        (b"", "no column 'filename'"),
        (b",filename,caption\n0,a.png,ok\n1,b.png,caf\xe9\n", "train.csv, line 3: not UTF-8"),
        (b",filename,caption\n0,a.png,\n", "no image can be used"),
        (b",filename,caption\n", "the source has no image"),
    ],
)
def test_bad_csv_ends_in_one_sentence(tmp_path: Path, capsys, table: bytes, sentence: str) -> None:
    source = write_folder(tmp_path / "in", {"train.csv": table, "train/a.png": image()})
    assert sentence in fails(capsys, paragraphs.main, [source, "--output_dir", tmp_path / "out"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"{", "dataset.json: not valid JSON"),
        (b"[1]", "not one of Karpathy's"),
        (b'{"images": [{"filename": "a"}]}', "image 0: 'filename', 'split'"),
        (b'{"images": [{"filename": "a", "split": "x", "sentences": []}]}', "none of train, restval"),
        (b'{"images": [{"filename": 3, "split": [], "sentences": [{}]}]}', "image 0"),
    ],
)
def test_bad_karpathy_json_ends_in_one_sentence(tmp_path: Path, capsys, text: bytes, sentence: str) -> None:
    source = write_folder(tmp_path / "in", {"dataset.json": text}) / "dataset.json"
    assert sentence in fails(capsys, karpathy.main, [source, "--images", tmp_path, "--output_dir", tmp_path / "out"])


def test_other_bad_sources_end_in_one_sentence(tmp_path: Path, capsys) -> None:
    out = ["--output_dir", tmp_path / "out"]
    good = write_folder(tmp_path / "good", report_files(REPORT_ROWS))
    assert "neither a folder nor a file" in fails(capsys, paragraphs.main, [tmp_path / "nowhere", *out])
    assert "cannot be read as a zip" in fails(capsys, paragraphs.main, [good / "set/train/a.png", *out])
    assert "no train.csv" in fails(capsys, paragraphs.main, [good / "set/train", *out])
    assert "not an http" in fails(capsys, paragraphs.main, ["ftp://example.org/x.zip", *out])
    assert "no Flickr8k.token.txt" in fails(capsys, flickr8k.main, [good, *out])
    assert "no metadata.csv" in fails(capsys, image_folder.main, [good, *out])
    sentence = fails(capsys, hub.main, [tmp_path / "nowhere", *out])
    assert "cannot be opened" in sentence and f"no folder '{tmp_path / 'nowhere'}'" in sentence
    ragged = write_folder(tmp_path / "ragged", {"train.csv": b"image,text\na,b\nc,d,e\n"})
    # The reason, which datasets wraps into a sentence that tells only that there was an error.
    assert "Expected 2 fields in line 3" in fails(capsys, hub.main, [ragged, *out])
    assert "less than 1 together" in fails(capsys, paragraphs.main, [good, *out, "--validation_share", "1"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    assert "already exists" in fails(capsys, paragraphs.main, [good, *out])
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep me"


def test_images_of_a_hub_set_that_have_no_id_are_not_taken_for_one(tmp_path: Path) -> None:
    images = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (10, 20, 30)]
    columns = {"image": images, "text": ["one", "two", "three"], "image_id": [None, None, "mine"]}
    Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    rows = dataset_rows.dataset_rows(dataset_rows.open_dataset(str(tmp_path / "set")))
    assert {row.image_id: list(row.captions) for row in rows} == {
        "train_0": ["one"],
        "train_1": ["two"],
        "mine": ["three"],
    }


def test_hub_set_of_another_schema_ends_in_one_sentence(tmp_path: Path, capsys) -> None:
    Dataset.from_dict({"image": ["a.png"], "text": ["x"]}).save_to_disk(tmp_path / "set")
    out = ["--output_dir", tmp_path / "out"]
    assert "holds no images" in fails(capsys, hub.main, [tmp_path / "set", *out])
    assert "no column words" in fails(capsys, hub.main, [tmp_path / "set", "--caption_column", "words", *out])


# ------------------------------------------------------------------------------------------------------ security


@pytest.mark.parametrize("name", ["../secret.png", "/secret.png", "link.png", "train/../../secret.png"])
def test_csv_cannot_name_a_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(image())
    name = str(secret) if name == "/secret.png" else name
    table = f"file_name,text\nown.png,mine\n{name},stolen\n".encode()
    source = write_folder(tmp_path / "in", {"metadata.csv": table, "own.png": image((1, 2, 3))})
    (source / "link.png").symlink_to(secret)
    image_folder.main([str(source), "--output_dir", str(tmp_path / "out"), *UNCUT])
    assert ids(load_from_disk(tmp_path / "out")) == {"train": ["own.png"]}


def test_zip_members_that_lead_outside_are_not_there(tmp_path: Path) -> None:
    archive = write_zip(
        tmp_path / "a.zip", {"../up.png": b"1", "/root.png": b"2", "a/../../b.png": b"3", "in.png": b"4"}
    )
    with archives.open_files(archive) as files:
        assert files.names == ["in.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    archive = write_zip(tmp_path / "bomb.zip", {f"{i}.png": bytes(2**20) for i in range(20)})
    with pytest.raises(ValueError, match="max_unpacked_gigabytes"), archives.open_files(archive, 10 / 1024):
        pass
    with archives.open_files(archive, 21 / 1024) as files:
        assert files.read("3.png") == bytes(2**20)


def test_zip_member_that_lies_about_its_size_is_not_unpacked(tmp_path: Path) -> None:
    honest = write_zip(tmp_path / "a.zip", {"a.png": bytes(50_000_000)}).read_bytes()
    lying = honest.replace((50_000_000).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    (tmp_path / "b.zip").write_bytes(lying)
    tracemalloc.start()
    with archives.open_files(tmp_path / "b.zip") as files, pytest.raises(OSError, match="damaged"):
        files.read("a.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lying != honest and peak < 5_000_000


def test_damaged_zip_member_is_a_skipped_row(tmp_path: Path, capsys) -> None:
    files = report_files(REPORT_ROWS)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:  # stored, so that the image's bytes are found again
        for name, content in files.items():
            archive.writestr(name, content)
    content = files["set/train/b.png"]
    path.write_bytes(path.read_bytes().replace(content, content[:-20] + bytes(20)))
    paragraphs.main([str(path), "--output_dir", str(tmp_path / "out")])
    assert ids(load_from_disk(tmp_path / "out"))["train"] == ["train/a.png", "c.png"]
    assert "image file cannot be read: 1" in capsys.readouterr().out


def test_download_stops_at_its_limit(tmp_path: Path) -> None:
    class Endless(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(2**16))
            except OSError:
                pass

        def log_message(self, *_: object) -> None:
            pass

    with serving(Endless) as address, pytest.raises(ValueError, match="larger than"):
        download(address, tmp_path / "x", max_bytes=3 * 2**20)
    assert (tmp_path / "x").stat().st_size < 8 * 2**20


# ------------------------------------------------------------------------------------------------------- property

FILE_NAMES = st.sampled_from(["0.png", "./1.png", "2.png", "sure.png"]) | st.text(max_size=12)
CAPTIONS = st.text(max_size=30)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines=st.lists(st.tuples(FILE_NAMES, CAPTIONS), max_size=6))
@example(lines=[("0.png", "\uf978")])  # a character whose composed form is another
def test_any_csv_is_prepared_without_its_bad_rows(tmp_path_factory, lines: list[tuple[str, str]]) -> None:
    lines = [("sure.png", "a word"), *lines]
    if sys.version_info < (3, 11):  # whose csv module refuses null characters
        lines = [(name.replace("\0", ""), caption.replace("\0", "")) for name, caption in lines]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("file_name", "caption"), *lines])
    folder = tmp_path_factory.mktemp("csv")
    images = {name: image() for name in ("0.png", "1.png", "2.png", "sure.png")}
    archive = write_zip(folder / "a.zip", images | {"metadata.csv": text.getvalue().encode()})
    with archives.open_files(archive) as files:
        write_caption_table(image_folder.image_folder_rows(files), folder / "out", False, 0, 0)
    expected: dict[str, list[str]] = {}
    for name, caption in lines:
        name, composed = name.removeprefix("./"), unicodedata.normalize("NFC", caption).strip()
        if name in images and caption_problem(caption) is None and composed not in expected.get(name, []):
            expected.setdefault(name, []).append(composed)
    stored = load_from_disk(folder / "out")["train"]
    assert {row["image_id"]: list(dict.fromkeys(row["captions"])) for row in stored} == expected


# ------------------------------------------------------------------------------------------------ captions of a captioner


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """A table of three training images and one to validate on."""
    splits = ["train", "train", "train", "validation"]
    rows = [
        SourceRow(split, f"{i}.png", [f"own {i}", f"other {i}"], str(i), lambda p=p: p)
        for i, (split, p) in enumerate(zip(splits, make_images(4), strict=True))
    ]
    write_caption_table(rows, tmp_path / "own", True, 0, 0)
    return tmp_path / "own"


def captions_file(path: Path, captions: dict[str, str]) -> Path:
    records = [{"image_id": name, "caption": text, "references": []} for name, text in captions.items()]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_recaption_changes_the_training_captions_and_nothing_else(tmp_path: Path, captioned: Path, capsys) -> None:
    first = captions_file(tmp_path / "first.jsonl", {"2.png": " c", "0.png": "a", "9.png": "of no image", "1.png": "b"})
    second = captions_file(tmp_path / "second.jsonl", {"0.png": "d", "1.png": "e", "2.png": "f"})
    recaption.main([str(captioned), str(first), str(second), "--output_dir", str(tmp_path / "new")])
    before, after = contents(captioned), contents(tmp_path / "new")
    assert after["train"] == (before["train"][0], [["a", "d"], ["b", "e"], ["c", "f"]], before["train"][2])
    assert after.keys() == before.keys() and after["validation"] == before["validation"]
    assert load_captions(str(tmp_path / "new"))["train"].features == FEATURES
    assert "train: 3 images, 6 captions\nvalidation: 1 images" in capsys.readouterr().out


def test_recaption_leaves_out_and_names_an_image_without_a_usable_caption(
    tmp_path: Path, captioned: Path, capsys
) -> None:
    file = captions_file(tmp_path / "written.jsonl", {"0.png": "a", "1.png": "  ", "2.png": "c"})
    recaption.main([str(captioned), str(file), "--output_dir", str(tmp_path / "new")])
    assert contents(tmp_path / "new")["train"][:2] == (["0.png", "2.png"], [["a"], ["c"]])
    assert "skipped, empty caption: 1\n  train, row 1, 1.png" in capsys.readouterr().out


def test_recaption_wants_a_caption_of_every_training_image(tmp_path: Path, captioned: Path, capsys) -> None:
    whole = captions_file(tmp_path / "whole.jsonl", {"0.png": "a", "1.png": "b", "2.png": "c"})
    part = captions_file(tmp_path / "part.jsonl", {"0.png": "a", "2.png": "c", "3.png": "d"})
    said = fails(capsys, recaption.main, [captioned, whole, part, "--output_dir", tmp_path / "new"])
    assert f"{part} has no caption for the training image 1.png" in said
    assert not (tmp_path / "new").exists()
