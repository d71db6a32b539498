"""Images with captions in text files of the same name."""

from pathlib import Path

import pytest
from datasets import load_from_disk
from PIL import Image

from data_scripts import image_folder
from data_scripts.__main__ import main as data_scripts_main


@pytest.mark.parametrize("one_caption", [False, True])
def test_sidecars(tmp_path: Path, one_caption: bool, capsys: pytest.CaptureFixture) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for index, name in enumerate("abcd"):
        Image.new("RGB", (32, 32), (index * 60, 0, 0)).save(source / f"{name}.png")
    (source / "a.txt").write_text("a red dog\nan old dog\n")
    (source / "b.caption").write_text("a cat")
    (source / "c.txt").write_bytes(b"\xff\xfe\x00")
    (source / "notes.txt").write_text("bought in May")
    uncut = ["--validation_share", "0", "--test_share", "0"]
    options = ["--one_caption"] if one_caption else []
    image_folder.main([str(source), "--output_dir", str(tmp_path / "out"), *uncut, *options])
    table = load_from_disk(str(tmp_path / "out"))["train"]
    a = ["a red dog an old dog"] if one_caption else ["a red dog", "an old dog"]
    assert dict(zip(table["image_id"], table["captions"], strict=True)) == {"a.png": a, "b.png": ["a cat"]}
    printed = capsys.readouterr().out
    for name in ("c.txt", "d.png", "notes.txt"):
        assert name in printed


def test_an_image_of_two_text_files_and_a_text_file_of_two_images_are_named(tmp_path, capsys):
    for name in ("a.png", "a.jpg", "b.png"):
        Image.new("RGB", (32, 32), (len(name) * 9, ord(name[-3]), 0)).save(tmp_path / name)
    for name, caption in {"a.txt": "a dog", "b.txt": "a cat", "b.caption": "an old cat"}.items():
        (tmp_path / name).write_text(caption)
    uncut = ["--validation_share", "0", "--test_share", "0"]
    image_folder.main([str(tmp_path), "--output_dir", str(tmp_path / "out"), *uncut])
    table = load_from_disk(str(tmp_path / "out"))["train"]
    captions = {name: set(texts) for name, texts in zip(table["image_id"], table["captions"], strict=True)}
    assert captions == {"a.png": {"a dog"}, "a.jpg": {"a dog"}, "b.png": {"a cat", "an old cat"}}
    printed = capsys.readouterr().out
    assert "a.txt" in printed and ("b.txt" in printed or "b.caption" in printed)


def test_links_that_are_not_followed_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    for folder in (source, elsewhere):
        folder.mkdir()
        Image.new("RGB", (32, 32)).save(folder / "a.png")
        (folder / "a.txt").write_text("a dog")
    (source / "more").symlink_to(elsewhere)
    (source / "b.png").symlink_to(elsewhere / "a.png")
    uncut = ["--validation_share", "0", "--test_share", "0"]
    image_folder.main([str(source), "--output_dir", str(tmp_path / "out"), *uncut])
    assert load_from_disk(str(tmp_path / "out"))["train"]["image_id"] == ["a.png"]
    printed = capsys.readouterr().out
    assert "not followed: copy the files: 2\n" in printed and "  more\n" in printed and "  b.png\n" in printed
    for path in (source / "a.png", source / "a.txt"):
        path.unlink()
    with pytest.raises(SystemExit):
        data_scripts_main([str(source), "--output_dir", str(tmp_path / "none")])
    assert "links" in capsys.readouterr().err
