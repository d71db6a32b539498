"""Captions as descriptions in the images' own metadata: the pixels stay, and what cannot have one is named."""

import hashlib
import io
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image, ImageSequence
from small_captioners import IMAGES, build

import caption
from captioning import descriptions
from captioning.sources import ImageRef

exiv2 = pytest.importorskip("exiv2", reason="needs python-exiv2 (the extra xmp)")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    build("vit_gpt2").save(folder)
    return str(folder)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


RED, NOISE = IMAGES[0], Image.effect_noise((60, 40), 90).convert("RGB")
PAGES = {"save_all": True, "append_images": [NOISE.rotate(90)]}
WRITTEN = {
    "a.jpg": {"exif": turned(), "quality": 83},
    "b.png": {},
    "c.tif": {"compression": "tiff_lzw"},
    "d.webp": {"lossless": True},
    "e.jp2": {},
    "pages.tif": PAGES,
    "moving.webp": PAGES,
    "two.jpg": {"format": "MPO"} | PAGES,
}
NO_PLACE = ("f.gif", "g.bmp")


def digest(path: Path) -> str:
    """Of every page as Pillow decodes it."""
    with Image.open(path) as image:
        pages = [(page.mode, page.size, page.tobytes()) for page in ImageSequence.Iterator(image)]
        return hashlib.sha256(repr((pages, image.getexif().get(0x0112))).encode()).hexdigest()


def describe(model: str, folder: Path, *options: str) -> None:
    caption.main(["--model_name_or_path", model, str(folder), "--output_format", "xmp", *options])


def descriptions_of(folder: Path, names: Iterable[str] = WRITTEN) -> dict[str, str]:
    return {
        name: descriptions.read_description((folder / name).read_bytes()) for name in names if (folder / name).exists()
    }


def test_descriptions_are_written_and_no_pixel_changes(model, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, options in WRITTEN.items():
        NOISE.save(folder / name, **options)
    for name in NO_PLACE:
        NOISE.save(folder / name)
    (folder / "a.jpg").chmod(0o640)
    before = {path.name: digest(path) for path in folder.iterdir()}
    bytes_before = {name: (folder / name).read_bytes() for name in NO_PLACE}
    describe(model, folder, "--prefix", 'sks "ü" ')
    assert {name: digest(folder / name) for name in before} == before
    made = descriptions_of(folder)
    assert made.keys() == WRITTEN.keys() and all(text.startswith('sks "ü"') for text in made.values())
    assert {name: (folder / name).read_bytes() for name in NO_PLACE} == bytes_before
    assert (folder / "a.jpg").stat().st_mode & 0o777 == 0o640
    error = capsys.readouterr().err
    assert all(name in error for name in NO_PLACE) and "8 of 10 images captioned" in error


def test_what_there_is_stays_or_is_added_to(model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    RED.save(folder / "a.jpg")
    (folder / "a.jpg").write_bytes(descriptions.with_description((folder / "a.jpg").read_bytes(), "as it was"))
    RED.save(folder / "b.png")
    describe(model, folder)
    made = descriptions_of(folder)
    assert made["a.jpg"] == "as it was" and made["b.png"]
    RED.save(folder / "b.png")
    describe(model, folder, "--existing", "append", "--resume", "false")
    describe(model, folder, "--existing", "append")  # once, however often it is given
    assert descriptions_of(folder) == {"a.jpg": f"as it was, {made['b.png']}", "b.png": made["b.png"]}


def test_other_languages_stay_and_iptc_follows_where_it_can():
    buffer = io.BytesIO()
    RED.save(buffer, "JPEG")
    image = exiv2.ImageFactory.open(buffer.getvalue())
    image.readMetadata()
    image.xmpData()["Xmp.dc.description"] = exiv2.LangAltValue({"x-default": "old", "de-DE": "alt"})
    image.iptcData()["Iptc.Application2.Caption"] = "old"
    image.writeMetadata()
    found = {}
    for text in ("a red dog", "ein Hündchen"):
        read = exiv2.ImageFactory.open(descriptions.with_description(bytes(image.data()), text))
        read.readMetadata()
        texts = dict(read.xmpData()["Xmp.dc.description"].value())
        found[text] = (texts["x-default"], texts["de-DE"], read.iptcData()["Iptc.Application2.Caption"].toString())
    assert found == {"a red dog": ("a red dog", "alt", "a red dog"), "ein Hündchen": ("ein Hündchen", "alt", "old")}


@pytest.mark.parametrize("options", [["--output", "out"], ["--sidecar_suffix", ".caption"]])
def test_options_that_do_not_go_with_it_are_refused(model, tmp_path, options):
    RED.save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as refused:
        describe(model, tmp_path, *options)
    assert refused.value.code == 2


def test_a_batch_that_a_kill_has_cut_is_written_once(tmp_path, monkeypatch):
    items = []
    for name in ("a.png", "b.png"):
        RED.save(tmp_path / name)
        described = descriptions.with_description((tmp_path / name).read_bytes(), "old")
        (tmp_path / name).write_bytes(described)
        items.append({"ref": ImageRef(name, str(tmp_path / name), name), "caption": "a red dog"})

    def killed(output: descriptions.Descriptions, path: Path, text: str) -> None:
        if path.name == "b.png":
            raise KeyboardInterrupt
        write(output, path, text)

    write = descriptions.Descriptions.write_text
    output = descriptions.Descriptions(None, tmp_path / "journal", "append")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(descriptions.Descriptions, "write_text", killed)
        output.open()
        output.write(items)
    output.close()
    resumed = descriptions.Descriptions(None, tmp_path / "journal", "append")
    resumed.recover()
    resumed.open()
    assert all(resumed.has(item["ref"]) for item in items)
    assert set(descriptions_of(tmp_path, ("a.png", "b.png")).values()) == {"old, a red dog"}


def test_a_file_whose_pixels_would_change_is_left(tmp_path, monkeypatch, capsys):
    RED.save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    numbers = iter(range(9))
    monkeypatch.setattr(descriptions, "pixels_digest", lambda content: next(numbers))
    output = descriptions.Descriptions(None, tmp_path / "journal")
    output.write_text(tmp_path / "a.png", "a red dog")
    assert (tmp_path / "a.png").read_bytes() == before and "a.png" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="needs ExifTool")
def test_exiftool_reads_what_is_written(tmp_path):
    buffer = io.BytesIO()
    RED.save(buffer, "JPEG")
    (tmp_path / "a.jpg").write_bytes(descriptions.with_description(buffer.getvalue(), "a red dog — ü"))
    command = ["exiftool", "-s3", "-XMP-dc:Description", str(tmp_path / "a.jpg")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "a red dog — ü"
