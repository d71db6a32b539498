"""Laws of caption.py and evaluate_captions.py: which images are read and how, what is passed over, which options there are."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from small_captioners import COLORS, IMAGES, build

import app
import caption
import evaluate_captions
import export_onnx
import serve
from data_scripts import images, load_captions
from data_scripts.row_checks import valid_id
from modeling.captioner import Captioner
from modeling.captioning_pipeline import to_rgb
from reporting.compare import comparison_table
from system.errors import UserError

REPOSITORY = Path(caption.__file__).parent


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    build("vit_gpt2").save(folder)
    return str(folder)


def captions_of(model: str, *images, options=()) -> dict[str, str]:
    output = Path(model) / "captions.jsonl"
    options = ["--resume", "false", *options]
    caption.main(["--model_name_or_path", model, *map(str, images), "--output", str(output), *options])
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return {Path(line["image_id"]).name: line["caption"] for line in lines}


@pytest.mark.parametrize(
    "script", [caption, evaluate_captions, app, export_onnx, serve], ids=lambda script: script.__name__
)
def test_help_imports_none_of_the_large_libraries(script):
    code = f"""
import sys, {script.__name__}
try:
    {script.__name__}.main(["--help"])
except SystemExit:
    pass
print(sorted({{"torch", "transformers", "datasets", "timm", "accelerate", "gradio", "fastapi", "pyarrow"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_one_image_needs_neither_datasets_nor_timm(model, tmp_path):
    IMAGES[0].save(tmp_path / "image.png")
    arguments = ["--model_name_or_path", model, str(tmp_path / "image.png")]
    unneeded = {
        "datasets",
        "timm",
        "matplotlib",
        "requests",
        "pyarrow",
        "pandas",
        "sklearn",
        "scipy",
        "peft",
        "onnxruntime",
    }
    code = f"import gc, sys, caption; caption.main({arguments}); print(sorted({unneeded} & sys.modules.keys()))"
    code += "; print(gc.isenabled() and gc.get_freeze_count() > len(gc.get_objects()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["[]", "True"]  # most of all objects are left out of every collection


def test_a_folder_gives_every_image_that_pillow_reads_and_names_the_rest(model, tmp_path, capsys, monkeypatch):
    formats = tuple(name for name in images.image_formats() if name != "HEIF")  # as without the plug-in
    monkeypatch.setattr(images, "image_formats", lambda: formats)
    folder = tmp_path / "images"
    (folder / "below.png").mkdir(parents=True)  # a folder, whatever its name
    red = IMAGES[0]
    for name, kind in {
        "a.avif": "AVIF",
        "b.jfif": "JPEG",
        "c": "PNG",
        "below.png/d.webp": "WEBP",
        "e.jp2": "JPEG2000",
    }.items():
        red.save(folder / name, kind)
    red.save(folder / "png named.dat", "PNG")
    (folder / "notes.txt").write_text("no image")
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "empty").touch()
    expected = {"a.avif", "b.jfif", "c", "d.webp", "e.jp2", "png named.dat"}
    assert captions_of(model, folder).keys() == expected
    error = capsys.readouterr().err
    assert "3 of 9 files" in error and "showtell[heif]" in error
    assert all(name in error for name in ("notes.txt", "photo.heic", "empty"))


def test_an_image_that_is_broken_is_named_not_passed_over(model, tmp_path, capsys):
    IMAGES[0].save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    assert captions_of(model, tmp_path).keys() == {"whole.png"}
    error = capsys.readouterr().err
    assert "half.png" in error and "1 of 2 images captioned" in error


GRADIENT = np.tile(np.arange(64, dtype=np.float64) / 63, (64, 1))  # black on the left, white on the right


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray((GRADIENT * 65535).round().astype(np.uint16)),
        Image.fromarray((GRADIENT * 65535).round().astype(np.int32)),
        Image.fromarray(((GRADIENT - 0.5) * 2**31).round().astype(np.int32)),
        Image.fromarray(GRADIENT.astype(np.float32)),
        Image.fromarray((GRADIENT * 255).astype(np.float32)),
        Image.fromarray((GRADIENT * 255).round().astype(np.uint8)),
    ],
    ids=["16 bits", "16 of 32 bits", "32 bits, signed", "floats to 1", "floats to 255", "8 bits"],
)
def test_gray_of_any_depth_keeps_its_shades(image):
    shades = np.asarray(to_rgb(image), dtype=np.float64)
    assert np.abs(shades - GRADIENT[..., None] * 255).max() <= 1


def test_depth_and_orientation_change_no_caption(tmp_path):
    build("lstm", "attention").save(tmp_path / "model")
    upright = Image.fromarray((GRADIENT * 255).round().astype(np.uint8))
    ImageOps.expand(upright, (0, 0, 0, 40)).convert("RGB").save(tmp_path / "plain.png")
    Image.fromarray(np.asarray(Image.open(tmp_path / "plain.png").convert("L")).astype(np.uint16) * 257).save(
        tmp_path / "deep.png"
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.open(tmp_path / "plain.png").rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    made = captions_of(str(tmp_path / "model"), *(tmp_path / f"{name}.png" for name in ("plain", "deep", "turned")))
    assert len(set(made.values())) == 1 and len(made) == 3


def test_a_window_changes_captions_and_pages_are_counted(model, tmp_path, capsys):
    Image.fromarray((GRADIENT * 65535).round().astype(np.uint16)).save(tmp_path / "deep.tif")
    IMAGES[0].save(tmp_path / "pages.tif", save_all=True, append_images=[IMAGES[1].copy()])
    IMAGES[0].save(tmp_path / "plain.png")
    made = captions_of(model, tmp_path)
    error = capsys.readouterr().err
    assert "several pages or frames, the first used: 1" in error and "more than 8 bits, scaled to 8: 1" in error
    assert made["pages.tif"] == made["plain.png"]
    IMAGES[COLORS.index("white")].save(tmp_path / "white.png")
    windowed = captions_of(model, tmp_path, options=["--window", "-2", "-1"])  # all of it lies above
    assert windowed["deep.tif"] == windowed["white.png"] != made["deep.tif"]
    with pytest.raises(SystemExit) as refused:
        captions_of(model, tmp_path, options=["--window", "2", "1"])
    assert refused.value.code == 2 and "--window" in capsys.readouterr().err


def test_several_captions_of_an_image(model, tmp_path, capsys):
    IMAGES[0].save(tmp_path / "image.png")
    options = ["--num_beams", "3", "--num_return_sequences", "2"]
    caption.main(["--model_name_or_path", model, str(tmp_path / "image.png"), *options])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 and lines[0][0] == lines[1][0] and lines[0][1] != lines[1][1]
    with pytest.raises(SystemExit) as refused:
        caption.main(["--model_name_or_path", model, str(tmp_path / "image.png"), "--num_return_sequences", "2"])
    assert refused.value.code == 2 and "--num_beams" in capsys.readouterr().err


def test_links_that_are_not_followed_are_named(model, tmp_path, capsys):
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for place in (folder, elsewhere):
        place.mkdir()
        IMAGES[0].save(place / "a.png")
    (folder / "more.png").symlink_to(elsewhere)
    (folder / "lost.png").symlink_to("nowhere.png")
    (folder / "b.png").symlink_to(elsewhere / "a.png")
    assert captions_of(model, folder).keys() == {"a.png", "b.png"}
    error = capsys.readouterr().err
    assert "1 of 4 files" in error and "more.png" in error and "lost.png: " in error and "2 of 3 images" in error


@pytest.mark.parametrize("option", ["image_column", "id_column"])
def test_columns_have_no_effect_without_parquet(option, model, tmp_path, capsys):
    IMAGES[0].save(tmp_path / "a.png")
    with pytest.raises(SystemExit):
        captions_of(model, tmp_path, f"--{option}", "key")
    assert f"--{option} has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("ids", [[1.0, float("nan"), 2.0, None], ["a", "", " ", "b"]])
def test_rows_without_an_id_are_named_by_their_file_and_ids_have_to_be_unique(model, tmp_path, capsys, ids):
    contents = []
    for image in IMAGES[:4]:
        image.save(tmp_path / "image.png")
        contents.append((tmp_path / "image.png").read_bytes())
    (tmp_path / "rows").mkdir()
    pq.write_table(pa.table({"image": contents, "key": ids}), tmp_path / "rows" / "0.parquet")
    options = ["--id_column", "key"]
    named = ["1", "2"] if isinstance(ids[0], float) else ["a", "b"]
    missing = {number for number, value in enumerate(ids) if valid_id(value) is None}
    made = captions_of(model, tmp_path / "rows", options=options)
    assert made.keys() == {*named, *(f"0.parquet#{number}" for number in missing)}
    assert "2 of 4 rows have no key" in capsys.readouterr().err
    pq.write_table(pa.table({"image": contents, "key": ids}), tmp_path / "rows" / "1.parquet")  # IDs that begin anew
    with pytest.raises(SystemExit) as refused:
        captions_of(model, tmp_path / "rows", options=options)
    assert refused.value.code == 2 and "2 of 8 rows" in capsys.readouterr().err


def test_an_internal_error_keeps_its_traceback(model, tmp_path, monkeypatch):
    IMAGES[0].save(tmp_path / "image.png")

    monkeypatch.setattr(caption, "caption_sources", lambda *_: dict([(1, 2, 3)]))
    with pytest.raises(ValueError, match="update sequence"):
        caption.main(["--model_name_or_path", model, str(tmp_path / "image.png")])


# ------------------------------------------------------------------------------------------------- predictions


def evaluated(folder: Path, *options) -> dict:
    evaluate_captions.main([*map(str, options), "--output_dir", str(folder / "scores")])
    return json.loads((folder / "scores" / "results.json").read_text())


def test_predictions_as_lines_lists_and_numbers_score_alike(small_scenes, tmp_path):
    rows = load_captions(small_scenes)["test"]
    numbers = {image_id: number for number, image_id in enumerate(rows["image_id"])}
    records = [
        {"image_id": numbers[row["image_id"]], "caption": row["captions"][0], "references": row["captions"][1:]}
        for row in rows
    ]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "list.json").write_text(json.dumps(records, indent=1))
    text = [record | {"image_id": str(record["image_id"])} for record in records]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(record) + "\n" for record in text))
    metrics = [
        evaluated(tmp_path, "--predictions", tmp_path / name)["metrics"]
        for name in ("lines.jsonl", "list.json", "text.jsonl")
    ]
    assert metrics[0] == metrics[1] == metrics[2] and metrics[0]["cider"] > 0


def test_cocos_result_format_takes_the_datasets_references(small_scenes, tmp_path, capsys):
    rows = load_captions(small_scenes)["test"]
    results = [{"image_id": row["image_id"], "caption": row["captions"][0]} for row in rows]
    (tmp_path / "results.json").write_text(json.dumps(results))
    options = ["--predictions", tmp_path / "results.json", "--dataset_name", small_scenes]
    assert evaluated(tmp_path, *options)["metrics"]["bleu_4"] == pytest.approx(1)
    (tmp_path / "results.json").write_text(json.dumps(results[:4]))
    capsys.readouterr()
    assert evaluated(tmp_path, *options)["num_images"] == 4
    assert f"4 of the split's {len(rows)} images" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        evaluated(tmp_path, *options, "--split", "validation")
    assert refused.value.code == 2 and repr(results[0]["image_id"]) in capsys.readouterr().err


def test_one_image_has_no_shuffled_score(tmp_path, capsys):
    for number in (1, 2):
        records = [{"image_id": str(n), "caption": "a dog", "references": ["a dog runs"]} for n in range(number)]
        (tmp_path / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        evaluated(tmp_path, "--predictions", tmp_path / "captions.jsonl")
        scores = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("BLEU", "ROUGE", "CIDEr"))]
        assert len(scores) == 6 and all(("shuffled" in line) == (number == 2) for line in scores)
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    rows = comparison_table({"two": results, "one": results | {"num_images": 1}}).splitlines()[2:4]
    assert [row.count("—") for row in rows] == [2, 3]


def test_captions_of_caption_py_meet_the_images_of_a_table(small_scenes, tmp_path, capsys):
    """By the names that caption.py gives a folder's images; those of other splits are counted."""
    dataset = load_captions(small_scenes)
    names = [(split, row["image_id"], row["captions"][0]) for split in ("test", "train") for row in dataset[split]]
    lines = [json.dumps({"image_id": f"images/deep/{name}", "caption": caption}) for _, name, caption in names]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    options = ["--predictions", tmp_path / "captions.jsonl", "--dataset_name", small_scenes]
    results = evaluated(tmp_path, *options, "--split", "test")
    assert results["metrics"]["bleu_4"] == pytest.approx(1) and results["num_images"] == len(dataset["test"])
    assert f"{len(dataset['train'])} of {len(names)} images are in other splits" in capsys.readouterr().out
    (tmp_path / "captions.jsonl").write_text("\n".join([*lines, json.dumps({"image_id": "else/x", "caption": "a"})]))
    with pytest.raises(SystemExit) as refused:
        evaluated(tmp_path, *options, "--split", "test")
    assert refused.value.code == 2 and "images/deep" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([{"image_id": "test_0", "caption": "a"}], "--dataset_name"),  # the ids of many data sets
        ([{"image_id": "7", "caption": "a", "references": []}], "'7'"),
        ([{"image_id": "0", "caption": "a"}, {"image_id": "1", "caption": "a", "references": ["a"]}], "line 2"),
    ],
)
def test_predictions_are_scored_by_their_own_references_alone(records, said, tmp_path, capsys):
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(SystemExit) as refused:
        evaluated(tmp_path, "--predictions", tmp_path / "captions.jsonl")
    error = capsys.readouterr().err
    assert refused.value.code == 2 and said in error and "captions.jsonl" in error


def test_a_missing_tokenizer_costs_no_captioning(model, small_scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_captions, "caption_split", lambda *_: 1 / 0)
    monkeypatch.setitem(sys.modules, "sacrebleu.tokenizers.tokenizer_zh", None)
    options = ["--dataset_name", small_scenes, "--metric_tokenizer", "zh"]
    with pytest.raises(SystemExit) as refused:
        evaluated(tmp_path, "--model_name_or_path", model, *options)
    assert refused.value.code == 2 and "sacrebleu" in capsys.readouterr().err


def test_an_exported_folder_is_named_where_it_cannot_be_loaded(small_scenes, tmp_path, capsys):
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "config.json").write_text("{}")
    (tmp_path / "exported" / "step.onnx").touch()
    with pytest.raises(SystemExit) as refused:
        evaluated(tmp_path, "--model_name_or_path", tmp_path / "exported", "--dataset_name", small_scenes)
    assert refused.value.code == 2 and "export_onnx.py MODEL FOLDER --dataset_name" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"caption\.py, serve\.py and app\.py"):
        Captioner.load(tmp_path / "exported")


@pytest.mark.parametrize(
    "content", ["[]", '[{"caption": "a"}]', "[1]", '[{"image_id": true, "caption": "a"}]', "[{", ""]
)
def test_predictions_that_are_none_are_refused(content, tmp_path, capsys):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit) as refused:
        evaluated(tmp_path, "--predictions", tmp_path / "results.json")
    assert refused.value.code == 2 and "results.json" in capsys.readouterr().err


def test_a_subset_is_the_one_of_training(model, small_scenes, tmp_path):
    from training.batches import subsample_evenly

    evaluated(
        tmp_path,
        "--model_name_or_path",
        model,
        "--dataset_name",
        small_scenes,
        "--max_eval_samples",
        3,
        "--max_length",
        5,
    )
    lines = (tmp_path / "scores" / "captions.jsonl").read_text().splitlines()
    (rows,) = subsample_evenly(3, load_captions(small_scenes)["test"])
    assert [json.loads(line)["image_id"] for line in lines] == rows["image_id"]


@pytest.mark.parametrize("option", [("--num_beams", 2), ("--max_eval_samples", 2)])
def test_options_without_effect_on_predictions_are_refused(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        evaluated(tmp_path, "--predictions", tmp_path / "results.json", *option)
    assert refused.value.code == 2 and option[0] in capsys.readouterr().err
