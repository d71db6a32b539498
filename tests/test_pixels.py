"""Images of more than 8 bits, of several pages, with palettes and of formats of plug-ins, in tables and as they are captioned."""

import inspect
import io
import struct
import zlib

import numpy as np
import pytest
from datasets import load_from_disk
from PIL import Image

import data_scripts.images as image_files
from data_scripts import image_folder
from data_scripts.images import BadImage, decode_image
from modeling import captioning_pipeline
from modeling.captioning_pipeline import to_rgb

SHADES = np.tile(np.arange(64, dtype=np.float64) / 63, (48, 1))  # black on the left, white on the right
UNCUT = ["--validation_share", "0", "--test_share", "0"]


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_16_bits(values: np.ndarray, exif: bytes = b"") -> bytes:
    """A PNG of color type 2 (RGB), 4 (gray and alpha) or 6 (RGBA), which Pillow cannot write."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = (b"IHDR", header), *([(b"eXIf", exif)] if exif else []), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def tiff(values: np.ndarray, planar: bool = False, **tags: int) -> bytes:
    """An uncompressed little-endian TIFF of one strip a plane, with `tags` in place of the usual ones, written out by TIFF 6.0."""
    channels = 1 if values.ndim == 2 else 3
    height, width = values.shape[:2]
    data = (np.moveaxis(values, -1, 0) if planar else values).astype(values.dtype.newbyteorder("<")).tobytes()
    strips = channels if planar else 1
    bits, kind = values.dtype.itemsize * 8, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries = {256: [width], 257: [height], 258: [bits] * channels, 259: [1], 262: [1 if channels == 1 else 2]}
    entries |= {273: [0] * strips, 277: [channels], 278: [height], 279: [len(data) // strips] * strips}
    entries |= {284: [2 if planar else 1], 339: [kind] * channels}
    entries |= {int(name.removeprefix("tag_")): [value] for name, value in tags.items()}
    end = 8 + 2 + 12 * len(entries) + 4
    extra_size = sum(4 * len(values) for values in entries.values() if len(values) > 1)
    entries[273] = [end + extra_size + number * len(data) // strips for number in range(strips)]
    directory, extra = struct.pack("<H", len(entries)), b""
    for tag, numbers in sorted(entries.items()):
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        where = packed if len(numbers) == 1 else struct.pack("<I", end + len(extra))
        extra += packed if len(numbers) > 1 else b""
        directory += struct.pack("<HHI", tag, 4, len(numbers)) + where
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0) + extra + data


TWELVE_BITS = (SHADES * 4095).round().astype(np.uint16)
DEEP = {
    "png of 16 bits": saved(Image.fromarray((SHADES * 65535).round().astype(np.uint16)), "PNG"),
    "png of 12 in 16 bits": saved(Image.fromarray(TWELVE_BITS), "PNG"),
    "pgm of 16 bits": b"P5 64 48 65535\n" + TWELVE_BITS.astype(">u2").tobytes(),
    "tiff of 16 bits": tiff(TWELVE_BITS),
    "tiff of 16 bits, compressed": saved(Image.fromarray(TWELVE_BITS), "TIFF", compression="tiff_lzw"),
    "tiff of 16 bits, signed": tiff(TWELVE_BITS.astype(np.int16) - np.int16(2000)),
    "tiff of 32 bits": tiff((SHADES * (2**32 - 1)).round().astype(np.uint32)),
    "tiff of 32 bits, signed": tiff(((SHADES - 0.5) * 2**31).round().astype(np.int32)),
    "tiff of floats": tiff(SHADES.astype(np.float32) * 7 - 3),
    "tiff of 16 bits, white is 0": tiff(((1 - SHADES) * 4095).round().astype(np.uint16), tag_262=0),
    "tiff of 8 bits, white is 0": tiff(((1 - SHADES) * 255).round().astype(np.uint8), tag_262=0),
}


def table_of(tmp_path, images: dict[str, bytes], *options: str) -> dict[str, Image.Image]:
    """The images of the table that the command makes of them, as training decodes them."""
    source = tmp_path / "in"
    source.mkdir()
    for name, content in images.items():
        (source / name).write_bytes(content)
        (source / name).with_suffix(".txt").write_text(f"a caption of {name}")
    image_folder.main([str(source), "--output_dir", str(tmp_path / "out"), *UNCUT, *options])
    table = load_from_disk(tmp_path / "out")["train"]
    return dict(zip(table["image_id"], table["image"], strict=True))


def shades_of(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image, dtype=np.float64) / 255


@pytest.mark.parametrize("kind", DEEP)
def test_deep_gray_keeps_its_shades_in_a_table_and_is_captioned_as_it_is_trained_on(tmp_path, capsys, kind):
    (image,) = table_of(tmp_path, {"x.tiff": DEEP[kind]}).values()
    assert np.abs(shades_of(image) - SHADES[..., None]).max() < 1.01 / 255
    assert ("more than 8 bits" in capsys.readouterr().out) == ("8 bits, white" not in kind)
    alike = [decode_image(DEEP[kind]), to_rgb(Image.open(io.BytesIO(DEEP[kind])))]
    assert all(np.array_equal(shades_of(other), shades_of(image)) for other in alike)


def test_a_window_is_black_and_white_at_its_ends(tmp_path):
    options = ["--window", "1000", "3000"]
    (image,) = table_of(tmp_path, {"x.png": DEEP["png of 12 in 16 bits"]}, *options).values()
    expected = np.clip((TWELVE_BITS.astype(np.float64) - 1000) / 2000, 0, 1)
    assert np.abs(shades_of(image) - expected[..., None]).max() < 0.51 / 255
    assert np.array_equal(decode_image(DEEP["png of 12 in 16 bits"], window=(1000, 3000)), image)


def test_a_window_upside_down_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        table_of(tmp_path, {"x.png": DEEP["png of 16 bits"]}, "--window", "9", "1")
    assert stopped.value.code == 2 and "--window" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("values", [[np.nan, 0.0, 2.0], [np.inf, -1.0, 1.0], [np.nan, np.nan, np.nan], [5.0, 5.0, 5.0]])
def test_values_that_are_none_and_images_of_one_value_are_no_noise(values):
    image = to_rgb(Image.fromarray(np.array([values], dtype=np.float32)))
    assert {0, 255} >= set(np.asarray(image).ravel().tolist())


def test_color_of_16_bits_is_counted_and_its_upper_8_are_used(tmp_path, capsys):
    values = np.stack([(SHADES * 65535).round().astype(np.uint16)] * 3, axis=-1)
    found = table_of(tmp_path, {"a.png": png_of_16_bits(values), "b.png": png_of_16_bits(values[..., :2] | 1)})
    for image in found.values():
        assert np.array_equal(np.asarray(image), values >> 8)
    assert "16 bits a channel, the upper 8 used: 2" in capsys.readouterr().out


def test_16_bits_in_planes_are_refused_where_pillow_misreads_them():
    values = np.stack([(SHADES * 65535).round().astype(np.uint16)] * 3, axis=-1)
    assert np.array_equal(np.asarray(decode_image(tiff(values))), values >> 8)
    with pytest.raises(BadImage, match="misreads"):
        decode_image(tiff(values, planar=True))
    assert np.array_equal(np.asarray(decode_image(tiff((values >> 8).astype(np.uint8), planar=True))), values >> 8)


def turned_by_half() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 3
    return exif.tobytes().removeprefix(b"Exif\0\0")


COLORS = np.stack([TWELVE_BITS, TWELVE_BITS[:, ::-1], TWELVE_BITS // 2], axis=-1)
DEEP_COLOR = {
    "png": png_of_16_bits(COLORS),
    "png with alpha": png_of_16_bits(np.concatenate([COLORS, COLORS[..., :1]], axis=-1)),
    "png, turned": png_of_16_bits(COLORS, exif=turned_by_half()),
    "tiff": tiff(COLORS),
    "tiff, turned": tiff(COLORS, tag_274=3),
}


@pytest.mark.parametrize("kind", DEEP_COLOR)
def test_a_window_of_16_bit_color_uses_all_of_its_bits(tmp_path, capsys, kind):
    (image,) = table_of(tmp_path, {"x.png": DEEP_COLOR[kind]}, "--window", "100", "4000").values()
    expected = np.clip((COLORS.astype(np.float64) - 100) / 3900, 0, 1)
    expected = expected[::-1, ::-1] if "turned" in kind else expected
    assert np.abs(shades_of(image) - expected).max() < 0.51 / 255
    assert "scaled to 8: 1" in capsys.readouterr().out


def test_compressed_tiffs_of_16_bit_color_and_gray_with_alpha_under_a_window():
    tifffile = pytest.importorskip("tifffile", reason="needs tifffile, to write such a TIFF")
    expected = np.clip((COLORS.astype(np.float64) - 100) / 3900, 0, 1)
    for options in ({"compression": "zlib"}, {"byteorder": ">"}, {"compression": "zlib", "byteorder": ">"}):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, COLORS, photometric="rgb", **options)
        image = decode_image(buffer.getvalue(), window=(100, 4000))
        assert np.abs(shades_of(image) - expected).max() < 0.51 / 255
    with pytest.raises(BadImage, match="no window"):
        decode_image(png_of_16_bits(COLORS[..., :2]), window=(100, 4000))


def test_ycbcr_is_refused_where_pillow_misreads_it():
    """Pillow 12 misreads it uncompressed, Pillow 13 where pixels share a chroma value, as they do unless a tag says otherwise."""
    image = Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 50).convert("YCbCr")
    values = np.asarray(image)
    for content in (saved(image, "TIFF", save_all=True, append_images=[image]), tiff(values, tag_262=6, tag_530=1)):
        if Image.open(io.BytesIO(content)).mode == "YCbCr":
            assert np.array_equal(decode_image(content), image.convert("RGB"))
            stored, notes = image_files.table_image(content)  # for whoever reads the table with an older Pillow
            assert np.array_equal(Image.open(io.BytesIO(stored)), image.convert("RGB")) and notes[-1:] == [
                "TIFF, stored as PNG"
            ]
        else:
            with pytest.raises(BadImage, match="misreads"):
                decode_image(content)
    for tags in ({}, {"tag_530": 2}):
        with pytest.raises(BadImage, match="misreads"):
            decode_image(tiff(values, tag_262=6, **tags) + bytes(values.size))
    assert np.array_equal(decode_image(saved(image, "TIFF", compression="tiff_lzw")), image.convert("RGB"))


def test_the_first_page_is_used_and_the_others_are_counted(tmp_path, capsys):
    red, blue = (Image.new("RGB", (40, 30), color) for color in ("red", "blue"))
    pages = {
        kind: saved(red, kind, save_all=True, append_images=[blue]) for kind in ("TIFF", "GIF", "WEBP", "PNG", "MPO")
    }
    found = table_of(tmp_path, {f"{kind}.{kind.lower()}" if kind != "MPO" else "m.jpg": c for kind, c in pages.items()})
    assert len(found) == 5
    assert all(image.getpixel((9, 9))[0] > 250 and image.getpixel((9, 9))[2] < 5 for image in found.values())
    printed = capsys.readouterr().out
    assert "pages or frames, the first used: 4" in printed and "m.jpg" not in printed


@pytest.mark.filterwarnings("ignore:Palette images")
def test_palettes_keep_their_colors(tmp_path):
    image = Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 50).convert("RGB").quantize(31)
    kinds = {
        "palette.png": {},
        "transparent.png": {"transparency": 3},
        "alphas.png": {"transparency": bytes(range(31))},
    }
    found = table_of(tmp_path, {name: saved(image, "PNG", **options) for name, options in kinds.items()})
    assert all(np.array_equal(other, image.convert("RGB")) for other in found.values()) and len(found) == 3


def test_what_travels_with_a_model_converts_as_the_table_does():
    assert inspect.getsource(captioning_pipeline.to_rgb) == inspect.getsource(image_files.to_rgb)


# ---- Formats of plug-ins ---------------------------------------------------------------------------------------------


def test_heic_is_stored_so_that_all_can_decode_it(tmp_path, capsys):
    pytest.importorskip("pillow_heif", reason="needs pillow-heif (the extra heif)")
    image_files.image_formats()
    smooth = Image.effect_mandelbrot((160, 120), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    content = saved(smooth, "HEIF", quality=95)
    (image,) = table_of(tmp_path, {"x.heic": content}).values()
    assert image.format == "JPEG" and image.size == smooth.size
    assert np.abs(np.asarray(image, dtype=float) - np.asarray(decode_image(content), dtype=float)).mean() < 1
    assert "stored as JPEG" in capsys.readouterr().out


def test_heic_without_its_plug_in_is_named_with_the_extra_that_reads_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(image_files, "image_formats", lambda: ("PNG", "JPEG"))
    table_of(tmp_path, {"x.heic": b"\0\0\0\x18ftypheic" + bytes(99), "y.png": DEEP["png of 16 bits"]})
    assert "heif" in capsys.readouterr().out
