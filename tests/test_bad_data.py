"""What strangers send: every kind through a real command, skipped by name or refused in one sentence, and nothing left behind."""

import io
import json
import os
import re
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_from_disk
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from data_scripts import flickr8k, hub, image_folder, karpathy, paragraphs, train_tokenizer

UNCUT = ["--validation_share", "0", "--test_share", "0"]
NOISE = Image.effect_noise((64, 64), 90).convert("RGB")


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GOOD = saved(NOISE, "PNG")
JPEG = saved(NOISE, "JPEG")


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with(width: int = 4, height: int = 4, depth: int = 8, color: int = 2, extra: bytes = b"") -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    rows = png_chunk(b"IDAT", zlib.compress(bytes(height * (1 + 3 * width)) if height < 100 else b""))
    return b"\x89PNG\r\n\x1a\n" + header + extra + rows + png_chunk(b"IEND", b"")


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(NOISE, "JPEG", exif=exif)


def with_long_text() -> bytes:
    information = PngImagePlugin.PngInfo()
    information.add_text("comment", "x" * 80_000_000, zip=True)
    return saved(NOISE, "PNG", pnginfo=information)


# ------------------------------------------------------------------------------------------------------- images

KEPT = None
IMAGES = {
    "empty.jpg": (b"", "image file is empty"),
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "image does not decode"),
    "truncated.png": (GOOD[: len(GOOD) // 2], "image does not decode"),
    "truncated.gif": (saved(NOISE, "GIF")[:200], "image does not decode"),
    "truncated.webp": (saved(NOISE, "WEBP")[:200], "image does not decode"),
    "header_alone.jpg": (JPEG[:2], "image does not decode"),
    "text.jpg": (b"I am an image.\n" * 9, "image does not decode"),
    "not_found_page.jpg": (b"<!doctype html><title>404</title><script>alert(1)</script>", "image does not decode"),
    "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image does not decode"),
    "page.pdf": (b"%PDF-1.7\n%", "image does not decode"),
    "page.eps": (saved(NOISE, "EPS"), "image does not decode"),
    "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(99), "image does not decode"),
    "other.jp2": (saved(NOISE, "JPEG2000"), KEPT),
    "icon.ico": (saved(NOISE, "ICO"), KEPT),
    "random.jpg": (bytes(range(256)) * 9, "image does not decode"),
    "no_width.png": (png_with(width=0), "image does not decode"),
    "wrong_sum.png": (GOOD[:20] + b"\xff" + GOOD[21:], "image does not decode"),
    "long_text.png": (with_long_text, "image does not decode"),
    "bomb.png": (png_with(30000, 30000), "image of more than 64,000,000 pixels"),
    "larger_bomb.png": (png_with(2**31 - 1, 2**31 - 1), "image of more than 64,000,000 pixels"),
    "wide.png": (saved(Image.new("L", (20000, 20)), "PNG"), "image more than 100 times as long as it is wide"),
    "high.png": (saved(Image.new("L", (20, 20000)), "PNG"), "image more than 100 times as long as it is wide"),
    "sixteen_bit.png": (saved(Image.new("I;16", (8, 8), 30000), "PNG"), KEPT),
    "floats.tiff": (saved(Image.new("F", (8, 8), 0.5), "TIFF"), KEPT),
    "heavy.png": (GOOD + bytes(20 * 2**20), "image file larger than 20 MiB"),
    "wide_enough.png": (saved(Image.new("L", (20000, 300)), "PNG"), KEPT),
    "png_named.jpg": (GOOD, KEPT),
    "no_suffix": (JPEG, KEPT),
    "cmyk.jpg": (saved(NOISE.convert("CMYK"), "JPEG"), KEPT),
    "palette.png": (saved(NOISE.convert("P"), "PNG"), KEPT),
    "transparent_palette.png": (saved(NOISE.convert("P"), "PNG", transparency=3), KEPT),
    "alpha.png": (saved(NOISE.convert("RGBA"), "PNG"), KEPT),
    "bilevel.png": (saved(NOISE.convert("1"), "PNG"), KEPT),
    "animated.gif": (saved(NOISE, "GIF", save_all=True, append_images=[NOISE.rotate(9)]), KEPT),
    "animated.webp": (saved(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(9)]), KEPT),
    "turned.jpg": (turned, KEPT),
    "broken_exif.jpg": (saved(NOISE, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), KEPT),
    "broken_profile.png": (saved(NOISE, "PNG", icc_profile=b"no profile"), KEPT),
    "junk_behind.jpg": (JPEG + b"junk" * 99, KEPT),
    "pages.tiff": (saved(NOISE, "TIFF", save_all=True, append_images=[NOISE]), KEPT),
    "one_pixel.png": (saved(Image.new("RGB", (1, 1)), "PNG"), KEPT),
    "<script>alert(1)<.png": (GOOD, KEPT),
    "$(touch owned); `touch owned`.png": (GOOD, KEPT),
    "line\nbreak.png": (GOOD, KEPT),
    "كلب \U0001f436.png": (GOOD, KEPT),
}


def run(capsys, command, arguments: list[object]) -> str:
    capsys.readouterr()
    command.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refused(capsys, command, arguments: list[object]) -> str:
    """The one sentence of a command that goes no further."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command.main([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    assert "Traceback" not in shown.err
    (sentence,) = re.findall("^error: (.*)", shown.err.replace("\r", "\n"), flags=re.MULTILINE)
    return sentence


def table_of(folder: Path) -> dict[str, list[str]]:
    return {row["image_id"]: row["captions"] for row in load_from_disk(folder)["train"]}


def metadata(*lines: tuple[str, str], header: str = "file_name,caption") -> bytes:
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines]
    return "\n".join([header, *quoted, ""]).encode("utf-8", "surrogateescape")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", IMAGES)
def test_an_image_of_any_kind_is_kept_or_skipped_by_name(tmp_path, capsys, name):
    content, reason = IMAGES[name]
    source = tmp_path / "in"
    source.mkdir()
    (source / "good.png").write_bytes(GOOD)
    (source / name).write_bytes(content() if callable(content) else content)
    (source / "metadata.csv").write_bytes(metadata(("good.png", "a good one"), (name, "another one")))
    shown = run(capsys, image_folder, [source, "--output_dir", tmp_path / "out", *UNCUT])
    assert set(table_of(tmp_path / "out")) == {"good.png"} | (set() if reason else {name})
    if reason:
        assert re.search(f"skipped, .*{re.escape(reason)}.*: 1\n  metadata.csv, line 3, {re.escape(name)}", shown)
        assert refused(capsys, image_folder, [source, "--output_dir", tmp_path / "strict", "--strict"]).startswith(
            f"metadata.csv, line 3, {name}: "
        )
    for image in load_from_disk(tmp_path / "out")["train"]["image"]:  # as the training decodes them
        assert image.mode == "RGB"
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


# ---------------------------------------------------------------------------- captions and files that name images


@dataclass
class Source:
    """Files of a source, the command for it, and what becomes of it."""

    files: dict[str, bytes]
    expected: dict[str, list[str]] | str  # the captions of each image in the table, or the one sentence's part
    skipped: str = ""  # part of the summary
    command: object = image_folder
    arguments: tuple[str, ...] = ()
    change: Callable[[Path], None] | None = None  # what files alone cannot say

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if self.change:
            self.change(folder)
        return folder


def csv_source(*lines: tuple[str, str], expected, skipped: str = "", **options) -> Source:
    """A good image with a good caption in the second line, the others under it."""
    files = {"good.png": GOOD, "a.png": GOOD, "metadata.csv": metadata(("good.png", "fine"), *lines)}
    return Source(files, {"good.png": ["fine"]} | expected, skipped, **options)


def caption(text: str, problem: str | None = None) -> Source:
    kept = {} if problem else {"a.png": [text.strip()]}
    return csv_source(("a.png", text), expected=kept, skipped=f"skipped, {problem}: 1" if problem else "")


def table(content: bytes, expected, skipped: str = "") -> Source:
    return Source({"good.png": GOOD, "metadata.csv": content}, expected, skipped)


def lines_of_json(content: bytes | str, expected, skipped: str = "") -> Source:
    first = b'{"file_name": "good.png", "captions": ["fine"]}\n'
    content = content.encode() if isinstance(content, str) else content
    return Source({"good.png": GOOD, "a.png": GOOD, "metadata.jsonl": first + content}, expected, skipped)


def karpathy_source(images: object, expected, skipped: str = "") -> Source:
    text = images if isinstance(images, bytes) else json.dumps({"images": images}).encode()
    return Source({"set.json": text, "images/a.png": GOOD}, expected, skipped, command=karpathy)


def entry(**changes) -> dict:
    good = {"filename": "a.png", "split": "train", "sentences": [{"raw": "fine"}]}
    return {key: value for key, value in (good | changes).items() if value is not ...}


def flickr_source(tokens: bytes, expected, skipped: str = "", **lists: bytes) -> Source:
    files = {"Flickr8k.token.txt": tokens, "a.png": GOOD, "b.png": GOOD}
    files |= {f"Flickr_8k.{name}Images.txt": content for name, content in lists.items()}
    return Source(files, expected, skipped, command=flickr8k)


def link(name: str, target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).symlink_to(target)


FINE = {"good.png": ["fine"]}
SOURCES = {
    # What a caption may be.
    "caption empty": caption("", "empty caption"),
    "caption of blanks": caption(" \t  ", "empty caption"),
    "caption of 10,000 words": caption("word " * 10_000, "caption longer than 10,000 characters"),
    "caption of punctuation": caption("... !? --", "caption without a word"),
    "caption of emoji": caption("\U0001f600\U0001f436", "caption without a word"),
    "caption of an unseen blank": caption("\u200b\u200b", "caption without a word"),
    "caption right to left": caption("كلب أحمر يجري"),
    "caption with an override of direction": caption("a dog \u202egod a\u202c runs"),
    "caption of markup": caption("<script>alert('x')</script> & <b>a dog</b>"),
    "caption of a formula": caption('=HYPERLINK("http://example.org","a dog")'),
    "caption of a shell": caption("$(touch owned) `touch owned`; a dog"),
    "caption of a template": caption("{{ 7 * 7 }} {% for a in b %} a dog"),
    "caption that says nan": caption("nan"),
    "caption with an end token": caption("a dog</s> <s> [PAD]"),
    # What a csv may be.
    "csv with null bytes": (
        csv_source(("a.png", "a\0dog"), expected={}, skipped="null character")
        if sys.version_info >= (3, 11)  # whose csv reads them
        else table(metadata(("good.png", "fine"), ("a.png", "a\0dog")), "metadata.csv, line 3: not valid CSV")
    ),
    "csv not UTF-8": table(b"file_name,caption\ngood.png,fine\na.png,caf\xe9\n", "metadata.csv, line 3: not UTF-8"),
    "csv of UTF-16": table("file_name,caption\ngood.png,fine\n".encode("utf-16"), "metadata.csv, line 1: not UTF-8"),
    "csv with a byte order mark": table(b"\xef\xbb\xbffile_name,caption\ngood.png,fine\n", FINE),
    "csv with semicolons": table(b"file_name;caption\ngood.png;fine\n", "no column 'file_name'"),
    "csv with tabs": table(b"file_name\tcaption\ngood.png\tfine\n", "no column 'file_name'"),
    "csv without file names": table(b"name,caption\ngood.png,fine\n", "no column 'file_name'"),
    "csv without captions": table(b"file_name,x\ngood.png,fine\n", "no caption column"),
    "csv with a column twice": table(
        b"file_name,caption,caption\ngood.png,other,fine\n", "has the column 'caption' twice"
    ),
    "csv without a row": table(b"file_name,caption\n", "the source has no image"),
    "csv that is empty": table(b"", "no column 'file_name'"),
    "csv of old line ends": table(b"file_name,caption\rgood.png,fine\r", FINE),
    "csv with empty lines": table(b"file_name,caption\n\n\ngood.png,fine\n\n", FINE),
    "csv with too few cells": table(
        b"file_name,caption\ngood.png,fine\na.png\n", FINE, "empty caption: 1\n  metadata.csv, line 3"
    ),
    "csv with too many cells": table(
        b"file_name,caption\ngood.png,fine\na.png,a dog, running\n",
        FINE,
        "skipped, more cells than columns: a caption that holds commas needs quotes: 1\n  metadata.csv, line 3",
    ),
    "csv of captions without quotes": table(
        b"file_name,caption\ngood.png,fine, really\na.png,a dog, running\nb.png,a cat\n", "needs quotes"
    ),
    "csv with commas at line ends": table(b"file_name,caption\ngood.png,fine,,\n", FINE),
    "csv with an open quote": table(
        b'file_name,caption\ngood.png,fine\na.png,"a dog\nb.png,x\n', "metadata.csv, line 3: not valid CSV"
    ),
    "csv of bytes": table(bytes(range(256)) * 4, "not UTF-8"),
    "row twice": csv_source(("a.png", "a dog"), ("a.png", "a dog"), expected={"a.png": ["a dog"]}),
    "no such image": csv_source(
        ("gone.png", "x"), expected={}, skipped="no such image file: 1\n  metadata.csv, line 3"
    ),
    "image above the folder": csv_source(("../good.png", "x"), expected={}, skipped="no such image file"),
    "image by absolute path": csv_source(("/etc/hostname", "x"), expected={}, skipped="no such image file"),
    "image by Windows path": csv_source(("sub\\a.png", "x"), expected={}, skipped="no such image file"),
    "image by address": csv_source(("http://127.0.0.1/a.png", "x"), expected={}, skipped="no such image file"),
    "image of a long name": csv_source(("a" * 5000 + ".png", "x"), expected={}, skipped="no such image file"),
    "image that is a folder": csv_source(
        ("sub", "x"), expected={}, skipped="no such image file", change=lambda folder: (folder / "sub").mkdir()
    ),
    "image that is a pipe": csv_source(
        ("pipe", "x"), expected={}, skipped="cannot be read", change=lambda folder: os.mkfifo(folder / "pipe")
    ),
    "image that is a link outside": csv_source(
        ("link.png", "x"), expected={}, skipped="no such image file", change=link("link.png", "/etc/hostname")
    ),
    "image that is a link to nothing": csv_source(
        ("link.png", "x"), expected={}, skipped="no such image file", change=link("link.png", "gone.png")
    ),
    "image that is a link to itself": csv_source(
        ("link.png", "x"), expected={}, skipped="no such image file", change=link("link.png", "link.png")
    ),
    "folder that is a link to itself": csv_source(
        ("round/a.png", "x"), expected={}, skipped="no such image file", change=link("round", ".")
    ),
    "two tables": Source(
        {"good.png": GOOD, "metadata.csv": metadata(("good.png", "x")), "metadata.jsonl": b"{}"}, "keep one"
    ),
    # What json may be.
    "json that ends": lines_of_json('{"file_name": "a.png"', "metadata.jsonl, line 2: not valid JSON"),
    "json of a list": lines_of_json("[1]", "metadata.jsonl, line 2: not a JSON object"),
    "json not UTF-8": lines_of_json(b'{"file_name": "\xff"}', "metadata.jsonl, line 2: not UTF-8"),
    "json without file name": lines_of_json('{"captions": ["x"]}', "metadata.jsonl, line 2: no 'file_name'"),
    "json with a file name that is a number": lines_of_json(
        '{"file_name": 7, "captions": ["x"]}', "line 2: no 'file_name'"
    ),
    "json nested deep": lines_of_json("[" * 100_000, "metadata.jsonl, line 2: not valid JSON"),
    "json with NaN": lines_of_json('{"file_name": "a.png", "captions": [NaN]}', FINE, "empty caption: 1"),
    "json with null": lines_of_json('{"file_name": "a.png", "captions": null}', FINE, "empty caption: 1"),
    "json with numbers": lines_of_json('{"file_name": "a.png", "captions": [7]}', FINE, "caption is not text: 1"),
    "json with a long number": lines_of_json(
        '{"file_name": "a.png", "captions": [' + "9" * 5000 + "]}", "line 2: not valid JSON"
    ),
    "json with objects": lines_of_json(
        '{"file_name": "a.png", "captions": [{"a": 1}]}', FINE, "caption is not text: 1"
    ),
    "json with no captions": lines_of_json(
        '{"file_name": "a.png", "captions": []}', FINE, "without a usable caption: 1"
    ),
    "json with half a character": lines_of_json(
        '{"file_name": "a.png", "captions": ["\\ud83d dog"]}', FINE, "broken Unicode: 1"
    ),
    "json with half a character in a name": lines_of_json(
        '{"file_name": "\\ud83d.png", "captions": ["x"]}', FINE, "broken one: 1"
    ),
    # What Karpathy's json may be.
    "Karpathy: no object": karpathy_source(b"[1]", "set.json has no list 'images'"),
    "Karpathy: half a file": karpathy_source(b'{"images": [', "set.json: not valid JSON"),
    "Karpathy: no sentences": karpathy_source(
        [entry(sentences=...)], "set.json, image 0: 'filename', 'split' or 'sent"
    ),
    "Karpathy: sentences null": karpathy_source([entry(), entry(sentences=None)], "set.json, image 1: "),
    "Karpathy: file name a number": karpathy_source([entry(filename=7)], "set.json, image 0: "),
    "Karpathy: another split": karpathy_source([entry(split="dev2")], "'dev2' is none of train, restval, val, test"),
    "Karpathy: split a list": karpathy_source([entry(split=["train"])], "set.json, image 0: "),
    "Karpathy: folder above": karpathy_source(
        [entry(), entry(filepath="../..", filename="set.json")], {"a.png": ["fine"]}, "no such image file: 1"
    ),
    "Karpathy: one number twice": karpathy_source([entry(cocoid=1), entry(cocoid=1)], {"1": ["fine"]}),
    "Karpathy: number null": karpathy_source([entry(cocoid=None)], {"a.png": ["fine"]}),
    # What Flickr8k's lists may be.
    "Flickr8k: no tab": flickr_source(
        b"a.png#0\tfine\nb.png#0 fine\n", "Flickr8k.token.txt, line 2: not 'image.jpg#number'"
    ),
    "Flickr8k: no number": flickr_source(b"a.png\tfine\n", "Flickr8k.token.txt, line 1: "),
    "Flickr8k: not UTF-8": flickr_source(b"a.png#0\tcaf\xe9\n", "Flickr8k.token.txt, line 1: not UTF-8"),
    "Flickr8k: empty": flickr_source(b"", "the source has no image"),
    "Flickr8k: no training list": flickr_source(b"a.png#0\tfine\n", "but no Flickr_8k.trainImages.txt", dev=b"a.png"),
    "Flickr8k: an image in two lists": flickr_source(
        b"a.png#0\tfine\n", {"train/a.png": ["fine"]}, train=b"a.png", dev=b"a.png"
    ),
    "Flickr8k: an image without captions": flickr_source(
        b"a.png#0\tfine\n", {"a.png": ["fine"]}, "without a usable caption: 1", train=b"a.png\nb.png"
    ),
}


def arguments_for(source: Source, folder: Path) -> list[object]:
    if source.command is karpathy:
        return [folder / "set.json", "--images", folder / "images", *source.arguments]
    return [folder, *source.arguments]


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_of_any_kind_is_prepared_or_refused_in_one_sentence(tmp_path, capsys, monkeypatch, kind):
    source = SOURCES[kind]
    folder = source.write(tmp_path / "in")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    arguments = [*arguments_for(source, folder), "--output_dir", tmp_path / "out", *UNCUT]
    if isinstance(source.expected, str):
        assert source.expected in refused(capsys, source.command, arguments)
        assert {path.name for path in tmp_path.iterdir()} == {"in", "here"}
        run(capsys, image_folder, [csv_source(expected={}).write(tmp_path / "next"), *arguments[-6:]])
        assert table_of(tmp_path / "out") == FINE
    else:
        shown = run(capsys, source.command, arguments)
        assert table_of(tmp_path / "out") == source.expected
        assert source.skipped in shown and ("skipped" in shown) == bool(source.skipped)
    assert not list(Path().iterdir())  # no `owned`


# ------------------------------------------------------------------------------------------------ archives, tables


def write_zip(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes], **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


TABLE = ("metadata.csv", metadata(("good.png", "fine"), ("a.png", "x")))


def symbolic_link() -> zipfile.ZipInfo:
    member = zipfile.ZipInfo("a.png")
    member.external_attr = 0o120777 << 16
    return member


def locked(path: Path) -> Path:
    """A zip whose members say that they are encrypted."""
    write_zip(path, TABLE, ("good.png", GOOD))
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.find(signature)
        while place >= 0:
            content[place + offset] |= 1
            place = content.find(signature, place + 4)
    path.write_bytes(content)
    return path


def tar(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("a.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(member)
    return path


def cut(path: Path) -> Path:
    write_zip(path, TABLE, ("good.png", GOOD))
    path.write_bytes(path.read_bytes()[:-40])
    return path


ARCHIVES = {
    "no zip": (lambda path: path.write_bytes(b"PK no zip") and path, "cannot be read as a zip"),
    "half a zip": (cut, "cannot be read as a zip"),
    "a tar with a link": (tar, "cannot be read as a zip"),
    "a locked zip": (locked, "damaged or locked"),
    "a zip of nothing": (lambda path: write_zip(path), "no metadata.csv"),
    "a bomb": (
        lambda path: write_zip(path, TABLE, ("0", bytes(50 * 2**20)), compression=zipfile.ZIP_DEFLATED),
        "unpacks to",
    ),
    "a member above": (lambda path: write_zip(path, TABLE, ("good.png", GOOD), ("../a.png", GOOD)), FINE),
    "an absolute member": (lambda path: write_zip(path, TABLE, ("good.png", GOOD), ("/a.png", GOOD)), FINE),
    "a symbolic link": (
        lambda path: write_zip(path, TABLE, ("good.png", GOOD), (symbolic_link(), b"/etc/hostname")),
        FINE,
    ),
    "a zip in a zip": (
        lambda path: write_zip(path, TABLE, ("good.png", GOOD), ("a.png", write_zip(path, TABLE).read_bytes())),
        FINE,
    ),
    "lzma": (
        lambda path: write_zip(path, TABLE, ("good.png", GOOD), ("a.png", GOOD), compression=zipfile.ZIP_LZMA),
        FINE | {"a.png": ["x"]},
    ),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_an_archive_of_any_kind_is_prepared_or_refused_in_one_sentence(tmp_path, capsys, kind):
    make, expected = ARCHIVES[kind]
    arguments = [make(tmp_path / "in.zip"), "--output_dir", tmp_path / "out", *UNCUT]
    arguments += ["--max_unpacked_gigabytes", "0.04"]
    if isinstance(expected, str):
        assert expected in refused(capsys, image_folder, arguments)
        assert [path.name for path in tmp_path.iterdir()] == ["in.zip"]
    else:
        run(capsys, image_folder, arguments)
        assert table_of(tmp_path / "out") == expected
        assert {path.name for path in tmp_path.iterdir()} == {"in.zip", "out"}


def parquet(folder: Path, columns: dict[str, pa.Array], images: bool = True) -> None:
    features = {"info": {"features": {"image": {"_type": "Image"}}}} if images else None
    rows = pa.table(columns)
    if features:
        names = {name: {"dtype": str(rows[name].type), "_type": "Value"} for name in columns if name != "image"}
        for name, column in columns.items():
            if pa.types.is_list(column.type):
                names[name] = {"feature": {"dtype": str(column.type.value_type), "_type": "Value"}, "_type": "List"}
        features["info"]["features"] |= names
        rows = rows.replace_schema_metadata({"huggingface": json.dumps(features)})
    folder.mkdir(exist_ok=True)
    pq.write_table(rows, folder / "train.parquet")


def images(*contents: tuple[bytes | None, str | None]) -> pa.Array:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.array([{"bytes": content, "path": path} for content, path in contents], kind)


TWO = images((GOOD, None), (JPEG, None))
ONE_KEPT = {"train_0": ["fine"]}
TABLES = {
    "NaN for a caption": (
        {"image": TWO, "text": pa.array(["fine", None])},
        ONE_KEPT,
        "empty caption: 1\n  train, row 1",
    ),
    "numbers for captions": ({"image": TWO, "text": pa.array([1.5, float("nan")])}, "no image can be used", ""),
    "null in a list": ({"image": TWO, "text": pa.array([["fine"], [None]])}, ONE_KEPT, "empty caption: 1"),
    "null byte": ({"image": TWO, "text": pa.array(["fine", "a\0b"])}, ONE_KEPT, "null character"),
    "no image": ({"image": images((GOOD, None), (None, None)), "text": pa.array(["fine", "x"])}, ONE_KEPT, "no such"),
    "no image's bytes": (
        {"image": images((GOOD, None), (b"x", None)), "text": pa.array(["fine", "x"])},
        ONE_KEPT,
        "decode",
    ),
    "a path that is not there": (
        {"image": images((GOOD, None), (None, "gone.png")), "text": pa.array(["fine", "x"])},
        ONE_KEPT,
        "outside the dataset's own folder: 1",
    ),
    "a path of this machine": (
        {"image": images((GOOD, None), (None, "{outside}")), "text": pa.array(["fine", "stolen"])},
        ONE_KEPT,
        "outside the dataset's own folder: 1",
    ),
    "no captions": ({"image": TWO, "label": pa.array([0, 1])}, "has no column captions or caption or text", ""),
    "no images": ({"text": pa.array(["fine"])}, "holds no images", ""),
    "no rows": ({"image": TWO[:0], "text": pa.array([], pa.string())}, "cannot be opened", ""),
}


@pytest.mark.parametrize("kind", TABLES)
def test_a_hub_table_of_any_kind_is_prepared_or_refused_in_one_sentence(tmp_path, capsys, kind):
    columns, expected, skipped = TABLES[kind]
    (tmp_path / "secret.png").write_bytes(GOOD)
    if "image" in columns and "{outside}" in str(columns["image"]):
        columns = {**columns, "image": images((GOOD, None), (None, str(tmp_path / "secret.png")))}
    parquet(tmp_path / "in", columns, images="image" in columns)
    arguments = [tmp_path / "in", "--output_dir", tmp_path / "out", *UNCUT]
    if isinstance(expected, str):
        assert expected in refused(capsys, hub, arguments)
        assert not (tmp_path / "out").exists()
    else:
        assert skipped in run(capsys, hub, arguments)
        assert table_of(tmp_path / "out") == expected


BROKEN_SETS = {
    "parquet.parquet": b"PAR1 no parquet",
    "train.arrow": b"ARROW1 no arrow",
    "script.py": b"raise SystemExit('run')",
    "empty.json": b"",
    "state.json": b"{}",
}


@pytest.mark.parametrize("name", BROKEN_SETS)
def test_a_broken_saved_set_ends_in_one_sentence(tmp_path, capsys, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(BROKEN_SETS[name])
    sentence = refused(capsys, hub, [tmp_path / "in", "--output_dir", tmp_path / "out"])
    assert str(tmp_path / "in") in sentence
    (tmp_path / "in" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert str(tmp_path / "in") in refused(capsys, train_tokenizer, [tmp_path / "in", "--output_dir", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [paragraphs, flickr8k, image_folder, karpathy, hub, train_tokenizer])
def test_an_empty_folder_ends_in_one_sentence(tmp_path, capsys, command):
    (tmp_path / "in").mkdir()
    source = [tmp_path / "in"] if command is not karpathy else [tmp_path / "in", "--images", tmp_path / "in"]
    refused(capsys, command, [*source, "--output_dir", tmp_path / "out"])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_there_are_sixty_kinds_at_least():
    assert len(IMAGES) + len(SOURCES) + len(ARCHIVES) + len(TABLES) + len(BROKEN_SETS) >= 60


# ------------------------------------------------------------------------------------------------------ properties

HEADER = "file_name,caption"


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


CELLS = st.text(max_size=12) | st.sampled_from(["good.png", "../good.png", "a dog", '"', "file_name", "caption", "nan"])
CSV_BYTES = (
    st.binary(max_size=120)
    | st.lists(st.lists(CELLS, max_size=3).map(",".join), max_size=6).map("\n".join).map(encoded)
    | st.lists(st.lists(CELLS, max_size=3).map(",".join), max_size=6).map(
        lambda rows: encoded("\n".join([HEADER, *rows]))
    )
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=CSV_BYTES)
@example(content=b'file_name,caption\ngood.png,"a dog\n')
@example(content=b"file_name,caption\r\r\ngood.png\n,")
def test_any_bytes_for_a_csv_are_prepared_or_refused_in_one_sentence(tmp_path_factory, capsys, content):
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "in").mkdir()
    (folder / "in" / "good.png").write_bytes(GOOD)
    (folder / "in" / "metadata.csv").write_bytes(content)
    arguments = [folder / "in", "--output_dir", folder / "out", *UNCUT]
    try:
        run(capsys, image_folder, arguments)
    except SystemExit as stopped:
        assert stopped.code == 2 and capsys.readouterr().err.replace("\r", "\n").count("\nerror: ") <= 1
        assert [path.name for path in folder.iterdir()] == ["in"]
    else:
        assert set(table_of(folder / "out")) == {"good.png"}


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=40))
@example(name="-rf")
@example(name="~")
@example(name="*.png")
@example(name="a\nb")
@example(name="metadata.csv ")
def test_any_name_of_an_image_is_kept_as_it_is(tmp_path_factory, capsys, name):
    """In a folder as in a zip; but a csv cannot tell some line ends from others, and json can."""
    assume(name not in (".", "..", "good.png", "metadata.csv", "metadata.jsonl") and len(name.encode()) < 250)
    folder = tmp_path_factory.mktemp("name")
    lines = [{"file_name": "good.png", "caption": "fine"}, {"file_name": name, "caption": "also fine"}]
    table = "\n".join(map(json.dumps, lines)).encode()
    (folder / "in").mkdir()
    for place, content in (("good.png", GOOD), (name, JPEG), ("metadata.jsonl", table)):
        (folder / "in" / place).write_bytes(content)
    run(capsys, image_folder, [folder / "in", "--output_dir", folder / "out", *UNCUT])
    assert table_of(folder / "out") == {"good.png": ["fine"], name: ["also fine"]}
    packed = write_zip(folder / "in.zip", ("good.png", GOOD), (name, JPEG), ("metadata.jsonl", table))
    run(capsys, image_folder, [packed, "--output_dir", folder / "zipped", *UNCUT])
    # zipfile itself changes what means something to it: the other slash, and what follows a null byte.
    assert set(table_of(folder / "zipped")) >= {"good.png"}
    if "\\" not in name:
        assert table_of(folder / "zipped") == {"good.png": ["fine"], name: ["also fine"]}
