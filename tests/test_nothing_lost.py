"""Whatever a user brought is used as they meant it, or the summary counts and names it: no caption cut, no image merged or moved."""

import io
import json
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Value, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image, features
from tokenizers import normalizers
from transformers import AutoConfig

from data_scripts import coco, flickr8k, flickr30k, hub, image_folder, karpathy, load_captions, paragraphs
from data_scripts.caption_table import FEATURES, write_caption_table
from data_scripts.captions_file import read_captions
from data_scripts.row_checks import SourceRow, listed_captions
from data_scripts.train_tokenizer import train_tokenizer
from system.errors import UserError
from training.tokenizers import load_or_train_tokenizer

UNCUT = ["--validation_share", "0", "--test_share", "0"]
# Table: split -> image_id -> captions; and each image's color, by which it is known.
Table = dict[str, dict[str, list[str]]]


def image_bytes(number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (number, 10, 20)).save(buffer, kind)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def prepared(command, tmp_path: Path, *arguments: object) -> Table:
    command.main([*map(str, arguments), "--output_dir", str(tmp_path / "out"), *UNCUT])
    return captions_of(load_from_disk(tmp_path / "out"))


def captions_of(dataset: DatasetDict) -> Table:
    return {split: dict(zip(part["image_id"], part["captions"], strict=True)) for split, part in dataset.items()}


def by_color(dataset: DatasetDict) -> dict[str, dict[int, list[str]]]:
    return {
        split: {row["image"].getpixel((0, 0))[0]: row["captions"] for row in part} for split, part in dataset.items()
    }


def refused(capsys, command, *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        command.main([*map(str, arguments)])
    assert ended.value.code == 2
    return next(line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("error: "))


def parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).cast_column("image", ImageFeature()).to_parquet(path)


# ------------------------------------------------------------------------------------------------------ cut captions


def test_a_caption_with_an_unquoted_comma_is_not_cut(tmp_path, capsys):
    rows = ["a.png,a dog, running", "b.png,a cat", 'c.png,"a cow, eating"']
    files = {f"{name}.png": image_bytes(number) for number, name in enumerate("abc")}
    source = write(tmp_path / "in", files | {"metadata.csv": "\n".join(["file_name,caption", *rows])})
    assert prepared(image_folder, tmp_path, source) == {"train": {"b.png": ["a cat"], "c.png": ["a cow, eating"]}}
    told = capsys.readouterr().out
    assert "commas needs quotes: 1\n  metadata.csv, line 2" in told
    assert "metadata.csv, line 2" in refused(
        capsys, image_folder, source, "--output_dir", tmp_path / "strict", "--strict"
    )


def test_a_file_whose_captions_need_quotes_is_refused(tmp_path, capsys):
    table = "filename,caption\na.png,A dog, running. It is brown, too.\nb.png,A cat, asleep.\nc.png,A cow.\n"
    source = write(tmp_path / "in", {"train.csv": table} | {f"train/{name}.png": image_bytes(3) for name in "abc"})
    assert "train.csv, line 2" in refused(capsys, paragraphs, source, "--output_dir", tmp_path / "out")


def test_captions_in_several_columns_are_one_images(tmp_path):
    table = "file_name,caption_0,caption_1\na.png,one,two\n"
    source = write(tmp_path / "in", {"a.png": image_bytes(1), "metadata.csv": table})
    columns = ["--caption_column", "caption_0", "caption_1"]
    assert prepared(image_folder, tmp_path, source, *columns) == {"train": {"a.png": ["one", "two"]}}


def test_file_names_with_blanks_stay_whole_in_flickr8ks_lists(tmp_path):
    files = {"Flickr8k.token.txt": "a dog.png#0\tit runs\n", "Flickr_8k.trainImages.txt": "a dog.png\n"}
    source = write(tmp_path / "in", files | {"a dog.png": image_bytes(1)})
    assert prepared(flickr8k, tmp_path, source) == {"train": {"a dog.png": ["it runs"]}}


# --------------------------------------------------------------------------------------------- rows that are one image


def test_rows_of_one_image_are_its_captions(tmp_path, capsys):
    """As Flickr8k is on the Hub: a row per caption, no ID."""
    rows = [
        {"image": {"bytes": image_bytes(image), "path": None}, "caption": f"image {image} caption {number}"}
        for number in range(5)
        for image in range(4)
    ]
    kind = Features({"image": ImageFeature(), "caption": Value("string")})
    for split, part in {"train": rows[:20], "validation": rows[:4]}.items():
        path = tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(part, features=kind).to_parquet(path)
    expected = {image: [f"image {image} caption {number}" for number in range(5)] for image in range(4)}
    prepared(hub, tmp_path, tmp_path / "set")
    assert by_color(load_from_disk(tmp_path / "out"))["train"] == expected
    told = capsys.readouterr().out
    assert "20 rows are captions of 4 images" in told and "same image in two splits: 4" in told
    loaded = load_captions(str(tmp_path / "set"))
    assert by_color(loaded)["validation"] == {image: expected[image][:1] for image in range(4)}
    assert sum(len(part) for part in loaded.values()) == 8


@pytest.mark.parametrize("missing", [None, float("nan"), "", " "])
def test_rows_without_an_id_are_neither_merged_nor_lost(tmp_path, missing):
    ids = [missing, missing, "b", 7.0 if isinstance(missing, float) else "7"]
    rows = [
        {"image": {"bytes": image_bytes(number), "path": None}, "text": f"text {number}", "image_id": image_id}
        for number, image_id in enumerate(ids)
    ]
    if isinstance(missing, float):  # a column of numbers with gaps, as pandas has it
        rows[2]["image_id"] = 5.0
    parquet(tmp_path / "set" / "train.parquet", rows)
    table = prepared(hub, tmp_path, tmp_path / "set")
    assert by_color(load_from_disk(tmp_path / "out"))["train"] == {number: [f"text {number}"] for number in range(4)}
    known = "5" if isinstance(missing, float) else "b"
    assert list(table["train"]) == ["train_0", "train_1", known, "7"]


def test_one_id_on_different_images_is_not_one_image(tmp_path, capsys):
    rows = [
        {"image": {"bytes": image_bytes(color), "path": None}, "text": text, "image_id": 1}
        for color, text in [(0, "zero"), (5, "five"), (0, "also zero")]
    ]
    parquet(tmp_path / "set" / "train.parquet", rows)
    prepared(hub, tmp_path, tmp_path / "set")
    assert by_color(load_from_disk(tmp_path / "out"))["train"] == {0: ["zero", "also zero"], 5: ["five"]}
    assert "image_id not unique, changed: 1\n  train, row 1, 1 is now 1#2" in capsys.readouterr().out


def test_ids_that_begin_anew_in_each_split_cost_no_image(tmp_path):
    for start, split in enumerate(("train", "validation", "test")):
        rows = [
            {"image": {"bytes": image_bytes(10 * start + i), "path": None}, "text": f"{split} {i}", "image_id": i}
            for i in range(3)
        ]
        parquet(tmp_path / "set" / f"{split}.parquet", rows)
    table = captions_of(load_captions(str(tmp_path / "set")))
    assert table == {
        split: {f"{split}/{i}": [f"{split} {i}"] for i in range(3)} for split in ("train", "validation", "test")
    }


def karpathy_set(root: Path, entries: list[tuple[str, str, str]], files: dict[str, bytes]) -> list[Path | str]:
    """The command's arguments for entries of (filepath, filename, split)."""
    images = [
        {"filepath": folder, "filename": name, "split": split, "sentences": [{"raw": f"{folder} {name}"}]}
        for folder, name, split in entries
    ]
    write(root, {"set.json": json.dumps({"images": images})} | {f"images/{name}": x for name, x in files.items()})
    return [root / "set.json", "--images", root / "images"]


def test_names_that_begin_anew_in_each_split_cost_karpathys_reader_no_image(tmp_path):
    entries = [("a", "1.jpg", "train"), ("b", "1.jpg", "val"), ("c", "1.jpg", "test")]
    files = {f"{folder}/1.jpg": image_bytes(number) for number, folder in enumerate("abc")}
    assert prepared(karpathy, tmp_path, *karpathy_set(tmp_path / "in", entries, files)) == {
        "train": {"train/1.jpg": ["a 1.jpg"]},
        "validation": {"validation/1.jpg": ["b 1.jpg"]},
        "test": {"test/1.jpg": ["c 1.jpg"]},
    }


def test_karpathys_reader_takes_no_image_from_another_images_folder(tmp_path, capsys):
    entries = [("val2014", "1.jpg", "val"), ("train2014", "1.jpg", "train"), ("train2014", "2.jpg", "train")]
    files = {"train2014/1.jpg": image_bytes(1), "all/2.jpg": image_bytes(2)}
    arguments = karpathy_set(tmp_path / "in", entries, files)
    assert prepared(karpathy, tmp_path, *arguments) == {
        "train": {"train/1.jpg": ["train2014 1.jpg"], "2.jpg": ["train2014 2.jpg"]}
    }
    assert "no such image file: 1\n  set.json, image 0, 1.jpg" in capsys.readouterr().out


def test_a_name_that_fits_several_files_is_not_guessed(tmp_path, capsys):
    files = {"x/1.jpg": image_bytes(1), "y/1.jpg": image_bytes(2), "z/2.jpg": image_bytes(3)}
    arguments = karpathy_set(tmp_path / "in", [("", "1.jpg", "train"), ("", "2.jpg", "train")], files)
    assert prepared(karpathy, tmp_path, *arguments) == {"train": {"2.jpg": ["2.jpg"]}}
    assert "several image files of that name: 1" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- splits

FOLDERS = {"train/a.png": image_bytes(1), "test/b.png": image_bytes(2), "val/c.png": image_bytes(3)}


def test_one_metadata_file_names_images_in_the_splits_folders(tmp_path):
    table = "file_name,caption\n" + "".join(f"{name},{name}\n" for name in FOLDERS)
    source = write(tmp_path / "in", FOLDERS | {"metadata.csv": table})
    expected = {
        "train": {"train/a.png": ["train/a.png"]},
        "validation": {"val/c.png": ["val/c.png"]},
        "test": {"test/b.png": ["test/b.png"]},
    }
    assert prepared(image_folder, tmp_path, source) == expected
    assert captions_of(load_captions(str(source))) == expected


def test_metadata_beside_the_splits_folders_counts_too(tmp_path, capsys):
    files = {"a.png": image_bytes(1), "val/b.png": image_bytes(2), "old/x/c.png": image_bytes(3)}
    files |= {"metadata.csv": "file_name,caption\na.png,one\n", "val/metadata.csv": "file_name,caption\nb.png,two\n"}
    files |= {"old/x/metadata.csv": "file_name,caption\nc.png,three\n"}
    source = write(tmp_path / "in", files)
    assert prepared(image_folder, tmp_path, source) == {
        "train": {"a.png": ["one"]},
        "validation": {"val/b.png": ["two"]},
    }
    assert (
        "metadata file not used: others lie further out; see --splits: 1\n  old/x/metadata.csv"
        in capsys.readouterr().out
    )


def test_images_that_no_row_names_are_counted(tmp_path, capsys):
    files = {"a.png": image_bytes(1), "b.PNG": image_bytes(2), "sub/c.jpeg": image_bytes(3), "notes.txt": "x"}
    source = write(tmp_path / "in", files | {"metadata.csv": "file_name,caption\na.png,one\n"})
    assert prepared(image_folder, tmp_path, source) == {"train": {"a.png": ["one"]}}
    assert "image file that no row names: 2\n  b.PNG\n  sub/c.jpeg" in capsys.readouterr().out


@pytest.mark.parametrize("reader", [coco, karpathy, flickr8k, flickr30k], ids=lambda reader: reader.__name__)
def test_images_that_no_annotation_names_are_counted(tmp_path, capsys, reader):
    entries = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "x"}]}
    files = {
        coco: {"captions_train.json": json.dumps(entries)},
        karpathy: {
            "k.json": json.dumps({"images": [{"filename": "a.png", "split": "train", "sentences": [{"raw": "x"}]}]})
        },
        flickr8k: {"Flickr8k.token.txt": "a.png#0\tx\n"},
        flickr30k: {"captions.txt": "image,caption\na.png,x\n"},
    }[reader]
    files |= {"sub/a.png": image_bytes(1), "sub/b.png": image_bytes(2), ".trash/c.png": image_bytes(3)}
    table = prepared(reader, tmp_path, write(tmp_path / "in", files))
    assert list(table["train"].values()) == [["x"]]
    assert "image file that no row names: 1\n  sub/b.png" in capsys.readouterr().out


@pytest.mark.parametrize("column", ["split", "part", "Split", "class"])
def test_a_column_says_which_row_is_in_which_split(tmp_path, column):
    """As Flickr30k is on the Hub: all rows in a split `test`, Karpathy's splits in a column."""
    rows = [
        {"image": {"bytes": image_bytes(number), "path": None}, "caption": [f"one {split}", "two"], column: split}
        for number, split in enumerate(("train", "train", "val", "test"))
    ]
    table = Dataset.from_list(rows).cast_column("image", ImageFeature())
    if column == "class":
        table = table.class_encode_column(column)
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "test.parquet")
    options = [] if column in ("split", "Split") else ["--split_column", column]
    table = prepared(hub, tmp_path, tmp_path / "set", *options)
    assert {split: list(part) for split, part in table.items()} == {
        "train": ["test_0", "test_1"],
        "validation": ["test_2"],
        "test": ["test_3"],
    }
    if column == "split":
        assert captions_of(load_captions(str(tmp_path / "set"), splits=("train", "validation"))) == table
        files = {f"{number}.png": image_bytes(number) for number in range(3)}
        metadata = "file_name,caption,split\n0.png,x,train\n1.png,y,val\n2.png,z,test\n"
        source = write(tmp_path / "folder", files | {"metadata.csv": metadata})
        (tmp_path / "out").rename(tmp_path / "first")
        assert prepared(image_folder, tmp_path, source) == {
            "train": {"0.png": ["x"]},
            "validation": {"1.png": ["y"]},
            "test": {"2.png": ["z"]},
        }


def test_rows_of_other_splits_are_counted(tmp_path, capsys):
    table = "file_name,caption,split\na.png,one,train\nb.png,two,restval\nc.png,three,val\n"
    files = {f"{name}.png": image_bytes(number) for number, name in enumerate("abc")}
    source = write(tmp_path / "in", files | {"metadata.csv": table})
    assert prepared(image_folder, tmp_path, source) == {"train": {"a.png": ["one"]}, "validation": {"c.png": ["three"]}}
    told = capsys.readouterr().out
    assert "see --splits: 1\n  metadata.csv, line 3, b.png, split restval" in told and "no row names" not in told
    parquet(tmp_path / "set" / "x.parquet", [{"image": {"bytes": image_bytes(1), "path": None}, "text": "x"}])
    readme = "configs:\n- config_name: default\n  data_files:\n  - split: extra\n    path: x.parquet"
    (tmp_path / "set" / "README.md").write_text(f"---\n{readme}\n---\n")
    assert "extra" in refused(capsys, hub, tmp_path / "set", "--output_dir", tmp_path / "no")


def test_splits_are_named_by_the_user(tmp_path, capsys):
    for number, name in enumerate(("test", "dev_b", "extra")):
        (tmp_path / "set").mkdir(exist_ok=True)
        image = Dataset.from_list([{"image": {"bytes": image_bytes(number), "path": None}, "text": name}])
        image.cast_column("image", ImageFeature()).to_parquet(tmp_path / "set" / f"{number}.parquet")
    readme = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for number, name in enumerate(("test", "dev_b", "extra")):
        readme += f"  - split: {name}\n    path: {number}.parquet\n"
    (tmp_path / "set" / "README.md").write_text(readme + "---\n")
    table = prepared(hub, tmp_path, tmp_path / "set", "--splits", "train=test,validation=dev_b")
    assert {split: list(part.values()) for split, part in table.items()} == {
        "train": [["test"]],
        "validation": [["dev_b"]],
    }
    assert "split not used, see --splits: 1\n  extra, 1 rows" in capsys.readouterr().out
    for wrong in ("train=nowhere", "train", "dev=test", "train=test,test=test"):
        told = refused(capsys, hub, tmp_path / "set", "--splits", wrong, "--output_dir", tmp_path / "no")
        assert "--splits" in told
    (tmp_path / "out").rename(tmp_path / "first")
    table = prepared(hub, tmp_path, tmp_path / "set", "--splits", "train=test+extra")
    assert list(table["train"].values()) == [["test"], ["extra"]]


# ------------------------------------------------------------------------------------------------------------ captions


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ('["a dog", "two cats, here"]', ["a dog", "two cats, here"]),
        ("['a dog', \"it's two cats\"]", ["a dog", "it's two cats"]),
        ("['a dog' 'two cats'\n \"it's\"]", ["a dog", "two cats", "it's"]),
        ("('a dog', 'two cats')", ["a dog", "two cats"]),
        ("['a dog', None, nan]", ["a dog", None, None]),
        ('["caf\\u00e9"]', ["café"]),
        ('[["a", "b"], ["c"]]', ["a", "b", "c"]),
        (["a", ["b", "c"]], ["a", "b", "c"]),
        ("[a dog] runs", ["[a dog] runs"]),
        ("[a dog]", ["[a dog]"]),
        ("[1, 2]", ["[1, 2]"]),
        ("(a man's dog)", ["(a man's dog)"]),
        ("[__import__('os').getcwd()]", ["[__import__('os').getcwd()]"]),
    ],
)
def test_a_cell_that_holds_a_list_holds_several_captions(cell, captions):
    assert listed_captions(cell) == captions


def test_lists_in_cells_are_read_by_every_command(tmp_path, capsys):
    frame = pandas.DataFrame({"file_name": ["a.png", "b.png"], "caption": [["a dog", "it's brown"], ["a cat"]]})
    source = write(tmp_path / "in", {"a.png": image_bytes(1), "b.png": image_bytes(2), "metadata.csv": frame.to_csv()})
    expected = {"a.png": ["a dog", "it's brown"], "b.png": ["a cat"]}
    assert prepared(image_folder, tmp_path, source) == {"train": expected}
    assert "cell read as a list of captions: 2" in capsys.readouterr().out
    frame["filename"] = frame.file_name
    frame["caption"] = frame.caption.map(json.dumps)
    report = write(
        tmp_path / "r", {"train.csv": frame.to_csv(), "train/a.png": image_bytes(1), "train/b.png": image_bytes(2)}
    )
    (tmp_path / "out").rename(tmp_path / "first")
    assert prepared(paragraphs, tmp_path, report) == {"train": expected}


def test_captions_enter_in_one_unicode_form(tmp_path, capsys):
    texts = ["Tiếng Việt ở café", "한국어 가방", "ガギグ", "ﬁne ½ １２"]  # the last has compatibility forms, which stay
    rows = [
        SourceRow("train", str(i), [unicodedata.normalize("NFD", text)], str(i), lambda i=i: image_bytes(i))
        for i, text in enumerate(texts)
    ]
    write_caption_table(rows, tmp_path / "t", True, 0, 0)
    stored = [captions[0] for captions in load_from_disk(tmp_path / "t")["train"]["captions"]]
    assert stored == [unicodedata.normalize("NFC", text) for text in texts] and stored[3] == "ﬁne ½ １２"


# ----------------------------------------------------------------------------------- tables, shards, names, older tables


@pytest.mark.parametrize("kind", ["bytes", "struct", "large", "struct of bytes alone"])
def test_tables_of_image_bytes_are_images(tmp_path, kind):
    contents = [image_bytes(number) for number in range(3)]
    cells = {
        "bytes": pa.array(contents, pa.binary()),
        "large": pa.array(contents, pa.large_binary()),  # polars
        "struct": pa.array(
            [{"bytes": x, "path": None} for x in contents], pa.struct({"bytes": pa.binary(), "path": pa.string()})
        ),
        "struct of bytes alone": pa.array([{"bytes": x} for x in contents]),
    }[kind]
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"image": cells, "caption": ["a", "b", "c"]}), tmp_path / "set" / "train.parquet")
    prepared(hub, tmp_path, tmp_path / "set")
    assert by_color(load_from_disk(tmp_path / "out"))["train"] == {0: ["a"], 1: ["b"], 2: ["c"]}


@pytest.mark.slow
@pytest.mark.parametrize("order", ["sorted", "mixed"])
def test_shards_of_jpg_and_png_together_keep_both(tmp_path, order):
    kinds = ["jpg"] * 7 + ["png"] * 7 + ["PNG", "jpeg"] if order == "sorted" else ["jpg", "png"] * 8
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "train.tar", "w") as archive:
        for number, kind in enumerate(kinds):
            members = {
                kind: image_bytes(10 * number, "PNG" if kind.lower() == "png" else "JPEG"),
                "txt": f"text {number}".encode(),
            }
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{number:03}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    table = prepared(hub, tmp_path, tmp_path / "set")
    assert sorted(table["train"].values()) == sorted([f"text {number}"] for number in range(16))


def test_tables_of_paths_are_images_of_their_folder_alone(tmp_path, capsys):
    (tmp_path / "secret.png").write_bytes(image_bytes(9))
    rows = ["images/a.png,one", "images/b.png,two", "gone.png,three", "../secret.png,four"]
    files = {
        "images/a.png": image_bytes(1),
        "images/b.png": image_bytes(2),
        "train.csv": "\n".join(["image,caption", *rows]),
    }
    write(tmp_path / "set", files)
    prepared(hub, tmp_path, tmp_path / "set")
    assert by_color(load_from_disk(tmp_path / "out"))["train"] == {1: ["one"], 2: ["two"]}
    told = capsys.readouterr().out
    assert "no such image file: 1" in told and "outside the dataset's own folder: 1" in told


def test_an_images_name_is_not_taken_for_a_split(tmp_path):
    names = ["steam-train-2.png", "a.png", "test.png"]
    table = "file_name,caption\n" + "".join(f"{name},x\n" for name in names)
    source = write(tmp_path / "in", {name: image_bytes(i) for i, name in enumerate(names)} | {"metadata.csv": table})
    assert sorted(prepared(hub, tmp_path, source)["train"]) == sorted(names)


NFD = unicodedata.normalize("NFD", "café.png")


@pytest.mark.parametrize(
    ("named", "there"),
    [("A.PNG", "a.png"), (" a.png ", "a.png"), ("café.png", NFD), (NFD, "café.png"), ("sub\\a.png", "sub/a.png")],
)
def test_names_that_are_almost_right_are_found(tmp_path, capsys, named, there):
    lines = [{"file_name": named, "caption": "x"}, {"file_name": "gone.png", "caption": "y"}]
    source = write(tmp_path / "in", {there: image_bytes(1), "metadata.jsonl": "\n".join(map(json.dumps, lines))})
    assert prepared(image_folder, tmp_path, source) == {"train": {there: ["x"]}}
    told = capsys.readouterr().out
    assert "file name spelled differently" in told and "no such image file: 1" in told


def test_a_name_that_differs_from_two_files_in_case_is_not_guessed(tmp_path, capsys):
    files = {"a.png": image_bytes(1), "A.png": image_bytes(2), "b.png": image_bytes(3)}
    if len({name.lower() for name in files}) == len(list(write(tmp_path / "try", files).iterdir())):
        pytest.skip("the file system knows no case")
    source = write(tmp_path / "in", files | {"metadata.csv": "file_name,caption\nA.PNG,x\na.png,y\nb.png,z\n"})
    assert prepared(image_folder, tmp_path, source)["train"] == {"a.png": ["y"], "b.png": ["z"]}
    assert "several image files of that name: 1" in capsys.readouterr().out


def test_text_files_almost_of_an_images_name_are_found(tmp_path, capsys):
    files = {"café.png": image_bytes(1), f"{NFD[:-4]}.txt": "x", "B.PNG": image_bytes(2), "b.txt": "y"}
    files |= {"c.png": image_bytes(3), "c.txt": "own", "C.TXT": "of none"}
    assert prepared(image_folder, tmp_path, write(tmp_path / "in", files)) == {
        "train": {"café.png": ["x"], "B.PNG": ["y"], "c.png": ["own"]}
    }
    told = capsys.readouterr().out
    assert "file name spelled differently (case, blanks, slashes or Unicode form): 2" in told
    assert "text file without an image of its name: 1\n  C.TXT" in told


@pytest.mark.parametrize("header", ["File_Name, Caption", "file_name , CAPTION ", "FILE_NAME,text"])
def test_headers_that_are_almost_right_are_found(tmp_path, header):
    source = write(tmp_path / "in", {"a.png": image_bytes(1), "Metadata.CSV": f"{header}\na.png,x\n"})
    assert prepared(image_folder, tmp_path, source) == {"train": {"a.png": ["x"]}}
    table = f"{header}\na.png,x\n".replace("_", "").replace("text", "caption")
    source = write(tmp_path / "t", {"train/a.png": image_bytes(1), "Train.csv": table})
    (tmp_path / "out").rename(tmp_path / "first")
    assert prepared(paragraphs, tmp_path, source) == {"train": {"a.png": ["x"]}}


def test_a_zip_of_another_system_has_its_names(tmp_path):
    """macOS stores UTF-8 names without the flag that says so; zipfile then reads code page 437."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(NFD, image_bytes(1))
        archive.writestr("metadata.csv", "file_name,caption\ncafé.png,x\n")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(signature)
        content[place + offset + 1] &= ~0x08 & 0xFF
    (tmp_path / "a.zip").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert NFD not in archive.namelist()
    assert prepared(image_folder, tmp_path, tmp_path / "a.zip") == {"train": {NFD: ["x"]}}


def test_every_image_pillow_reads_is_used_and_others_are_named(tmp_path, capsys):
    files = {
        "jfif.jfif": image_bytes(1, "JPEG"),
        "nosuffix": image_bytes(2),
        "phone.heic": b"\0\0\0\x18ftypheic" + bytes(99),
    }
    files |= {"new.jxl": b"\xff\x0a" + bytes(99)}
    kept = ["jfif.jfif", "nosuffix"]
    if features.check("avif"):
        files["some.avif"] = image_bytes(3, "AVIF")
        kept.append("some.avif")
    table = "file_name,caption\n" + "".join(f"{name},x\n" for name in files)
    source = write(tmp_path / "in", files | {"metadata.csv": table})
    assert sorted(prepared(image_folder, tmp_path, source)["train"]) == sorted(kept)
    told = capsys.readouterr().out
    assert "it is HEIC" in told and "phone.heic" in told and "it is JPEG XL" in told


def test_a_table_without_hashes_loads_with_its_splits(tmp_path):
    rows = [SourceRow("train", str(i), [f"text {i}"], str(i), lambda i=i: image_bytes(i)) for i in range(30)]
    write_caption_table(rows, tmp_path / "new", True, 0, 0)
    new = load_captions(str(tmp_path / "new"))
    assert new["train"].features == FEATURES and len(set(new["train"]["content_hash"])) == 30
    new.remove_columns("content_hash").save_to_disk(tmp_path / "old")
    old = load_captions(str(tmp_path / "old"))
    assert captions_of(old) == captions_of(new) and old["train"]["content_hash"] == new["train"]["content_hash"]


def test_captions_read_from_a_file_are_in_that_form_too(tmp_path):
    text = "Tiếng Việt ở café"
    record = {
        "image_id": "1",
        "caption": unicodedata.normalize("NFD", text),
        "references": [unicodedata.normalize("NFD", text)],
    }
    (tmp_path / "captions.jsonl").write_text(json.dumps(record))
    assert read_captions(tmp_path / "captions.jsonl") == [{"image_id": "1", "caption": text, "references": [text]}]


def test_a_tokenizer_that_changes_captions_is_told_with_a_count(tmp_path, caplog) -> None:
    tokenizer = train_tokenizer(["half a dog, ½ a cat", "Ärger und Öl"], 60)
    captions = ["half a dog", "½ a dog", "Öl", "a dog"]
    for normalizer, num_changed in ((None, 0), (normalizers.NFKC(), 1), (normalizers.Lowercase(), 1)):
        if normalizer:
            tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
                [normalizer, normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")]
            )
        tokenizer.save_pretrained(tmp_path)
        caplog.clear()
        load_or_train_tokenizer(str(tmp_path), captions, 60, None)
        assert len(caplog.messages) == bool(num_changed)
        assert all(f" {num_changed} of the first 4 " in message for message in caplog.messages)


@pytest.mark.parametrize("kind", ["gpt2", "bart", "bert", "t5", "mbart"])
def test_a_folder_without_tokenizer_files_has_no_tokenizer(tmp_path, kind) -> None:
    """transformers makes one of special tokens alone, which has nothing of any caption."""
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no vocabulary"):
        load_or_train_tokenizer(str(tmp_path), ["a dog"], 60, None)
