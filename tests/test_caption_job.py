"""Laws of captioning many images: what a kill costs, what is done twice or not at all, which formats come back, who shares the work.

python tests/test_caption_job.py --images 100000     the long version: 20 kills, and the memory of a tenth of the images and of all
"""

import argparse
import errno
import io
import json
import os
import random
import resource
import signal
import sys
import tarfile
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk
from kill_points import log_of, run_together, start_server
from PIL import Image
from small_captioners import build

import caption
from captioning.outputs import Parquet, WebDataset
from captioning.sources import ImageSources

NUM_IMAGES = 60


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    build("lstm").save(folder)
    return str(folder)


def make_images(folder: Path, number: int, num_kinds: int = 20) -> Path:
    """A folder of links to images of different colors, in folders of fifty."""
    kinds = folder.parent / f"kinds of {folder.name}"
    kinds.mkdir(parents=True)
    draw = random.Random(0)
    for kind in range(num_kinds):
        Image.new("RGB", (40, 30), tuple(draw.randrange(256) for _ in range(3))).save(kinds / f"{kind}.png")
    for index in range(number):
        (folder / f"{index // 50:03d}").mkdir(parents=True, exist_ok=True)
        os.link(kinds / f"{index % num_kinds}.png", folder / f"{index // 50:03d}" / f"{index:06d}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "images", NUM_IMAGES)


def run(model: str, *arguments) -> None:
    caption.main(
        ["--model_name_or_path", model, "--batch_size", "8", "--encoder_engine", "torch", *map(str, arguments)]
    )


def read_output(path: Path) -> list[tuple[str, str]]:
    """(image, caption) of any output, as another program would read it."""
    if path.suffix == ".jsonl":
        return [(row["image_id"], row["caption"]) for row in map(json.loads, path.read_text().splitlines())]
    if path.suffix == ".txt":
        return [tuple(line.split("\t")) for line in path.read_text().splitlines()]
    if path.suffix == ".parquet":
        rows = pq.read_table(path, columns=["image_id", "caption"]).to_pylist() if list(path.glob("*.parquet")) else []
        return [(row["image_id"], row["caption"]) for row in rows]
    found = []
    for tar in sorted(path.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    row = json.load(archive.extractfile(member))
                    found.append((row["image_id"], row["caption"]))
    return found


@pytest.fixture(scope="module")
def undisturbed(model, images, tmp_path_factory) -> dict[str, str]:
    path = tmp_path_factory.mktemp("undisturbed") / "captions.jsonl"
    run(model, images, "--output", path)
    captions = dict(read_output(path))
    assert len(captions) == NUM_IMAGES and len(set(captions.values())) > 1
    return captions


FORMATS = {"c.jsonl": (), "c.txt": (), "c.parquet": (), "tars": ("--output_format", "webdataset")}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_each_image_once_with_the_same_caption(name, model, images, undisturbed, tmp_path):
    run(model, images, "--output", tmp_path / name, *FORMATS[name])
    found = read_output(tmp_path / name)
    assert len(found) == NUM_IMAGES and dict(found) == undisturbed
    assert not list(tmp_path.rglob("*.part-*")) and not list(tmp_path.rglob("*journal*"))


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("harm", [7, 700])
def test_a_run_cut_anywhere_is_resumed_without_a_half_or_a_double(
    name, harm, model, images, undisturbed, tmp_path, monkeypatch, capsys
):
    """Ended after two batches and then cut by some bytes, as a kill inside a write leaves it."""
    monkeypatch.setattr("captioning.outputs.ROWS_PER_PART", 10)
    generate, calls = build("lstm").generate.__func__, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return generate(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("modeling.captioner.Captioner.generate", interrupted)
        with pytest.raises(Killed):
            run(model, images, "--output", tmp_path / name, *FORMATS[name])
    path = tmp_path / name
    growing = path if path.is_file() else max(path.glob(".*.jsonl" if name == "c.parquet" else "*.tar"))
    os.truncate(growing, max(0, growing.stat().st_size - harm))
    run(model, images, "--output", path, *FORMATS[name])
    found = read_output(path)
    assert len(found) == NUM_IMAGES and dict(found) == undisturbed
    before = capsys.readouterr().err
    assert "were captioned before" in before


def test_parquet_killed_between_a_part_and_its_journal_has_no_row_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("captioning.outputs.ROWS_PER_PART", 3)
    rows = [{"ref": ref, "caption": "a"} for ref in ImageSources([f"{number}.png" for number in range(3)])]
    output = Parquet(tmp_path / "c.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(output.journal, "rewrite", lambda lines: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            output.write(rows)
    again = Parquet(tmp_path / "c.parquet")
    again.recover()
    again.open()
    assert all(again.has(row["ref"]) for row in rows)
    again.finish()
    assert [name for name, _ in read_output(tmp_path / "c.parquet")] == ["0.png", "1.png", "2.png"]


@pytest.mark.slow
def test_a_second_run_captions_what_is_new_and_refuses_other_settings(model, images, tmp_path, capsys):
    folder, output = make_images(tmp_path / "few", 3, 3), tmp_path / "c.jsonl"
    run(model, folder, "--output", output)
    first = output.read_bytes()
    os.link(images / "000" / "000000.png", folder / "new.png")
    capsys.readouterr()
    run(model, folder, "--output", output)
    assert output.read_bytes().startswith(first) and len(read_output(output)) == 4
    assert "1 of 4 images captioned, 3 were captioned before" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        run(model, folder, "--output", output, "--num_beams", "2")
    assert refused.value.code == 2 and "num_beams" in capsys.readouterr().err
    run(model, folder, "--output", output, "--num_beams", "2", "--resume", "false")
    assert len(read_output(output)) == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x.tar").write_text("precious\n")
    for resume in ("true", "false"):
        with pytest.raises(SystemExit) as refused:
            run(model, folder, "--output", tmp_path / "mine", "--output_format", "webdataset", "--resume", resume)
        assert refused.value.code == 2 and (tmp_path / "mine" / "x.tar").read_text() == "precious\n"
    (tmp_path / "mine.jsonl").write_text("precious\n")
    with pytest.raises(SystemExit) as refused:
        run(model, folder, "--output", tmp_path / "mine.jsonl")
    assert refused.value.code == 2 and (tmp_path / "mine.jsonl").read_text() == "precious\n"


@pytest.mark.slow
def test_several_captions_in_text_are_whole_after_a_cut(model, images, tmp_path):
    options = ["--output", tmp_path / "c.txt", "--num_beams", 2, "--num_return_sequences", 2]
    run(model, images, *options)
    whole = (tmp_path / "c.txt").read_text()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "c.txt").write_text("".join(lines[:41]) + "torn")
    run(model, images, *options)
    assert (tmp_path / "c.txt").read_text() == whole


# ---- SIGKILL --------------------------------------------------------------------------------------------------------


def captioned(arguments: list[str], peak=None) -> None:
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (of the process)
    caption.main(arguments)
    if peak:
        peak.value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def kill_and_resume(model: str, folder: Path, output: Path, kills: int, options=(), seconds: float = 0.8) -> None:
    """Start a run as often as there are kills, each killed at a random moment, and once more to its end."""
    context = start_server()
    arguments = ["--model_name_or_path", model, str(folder), "--batch_size", "4", "--encoder_engine", "torch"]
    arguments += ["--output", str(output), *options]
    moment = random.Random(7)
    for _ in range(kills):
        process = context.Process(target=captioned, args=(arguments,))
        process.start()
        process.join(moment.uniform(0.3, seconds))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    process = context.Process(target=captioned, args=(arguments,))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.fixture(scope="module")
def many(model, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder of 300 images, and their captions."""
    folder = tmp_path_factory.mktemp("many")
    images = make_images(folder / "images", 300)
    run(model, images, "--output", folder / "whole.jsonl")
    return images, dict(read_output(folder / "whole.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_kills_cost_nothing(name, model, many, tmp_path):
    images, captions = many
    kill_and_resume(model, images, tmp_path / name, 5, FORMATS[name])
    found = read_output(tmp_path / name)
    assert len(found) == 300 and dict(found) == captions


@pytest.mark.slow
def test_two_processes_share_the_images(model, images, undisturbed, tmp_path):
    """As `accelerate launch` starts them."""
    arguments = ["--model_name_or_path", model, str(images), "--batch_size", "2", "--output", str(tmp_path / "c.jsonl")]
    codes = run_together(start_server(), "caption", arguments, tmp_path / "cache", [None, None])
    assert codes == [0, 0], log_of("caption", tmp_path / "cache").read_text()[-2000:]
    found = read_output(tmp_path / "c.jsonl")
    assert len(found) == NUM_IMAGES and dict(found) == undisturbed and not list(tmp_path.glob("*.part-*"))


@pytest.mark.slow
def test_what_other_processes_have_left_is_added_once(model, images, undisturbed, tmp_path, monkeypatch):
    """The second of two processes, here one after the other, and a kill after its part was added and before it was removed."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("captioning.processes.Processes.total", lambda self, *numbers: list(numbers))
    path = tmp_path / "c.jsonl"
    run(model, images, "--output", path)
    part = tmp_path / "c.jsonl.part-1"
    half = dict(read_output(part.rename(tmp_path / "half.jsonl")))
    assert list(half) == sorted(undisturbed)[1::2]
    lines = (tmp_path / "half.jsonl").read_text()
    path.write_text(lines[: len(lines) // 2])
    part.write_text(lines)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    (tmp_path / "c.jsonl.settings.json").unlink(missing_ok=True)
    with pytest.raises(SystemExit):  # nobody knows how it was begun
        run(model, images, "--output", path)
    (path.rename(tmp_path / "kept"), part.rename(tmp_path / "kept.part"))
    run(model, images / "000" / "000000.png", "--output", path)
    (path.write_text((tmp_path / "kept").read_text()), (tmp_path / "kept.part").rename(part))
    run(model, images, "--output", path)
    found = read_output(path)
    assert len(found) == NUM_IMAGES and dict(found) == undisturbed and not part.exists()


@pytest.mark.parametrize("harmed", ["c.jsonl", "c.jsonl.settings.json"])
def test_an_output_that_was_damaged_is_refused_by_name(harmed, model, tmp_path, capsys):
    folder = make_images(tmp_path / "images", 2, 2)
    run(model, folder, "--output", tmp_path / "c.jsonl")
    content = (tmp_path / harmed).read_text()
    (tmp_path / harmed).write_text("{no JSON\n" + content)
    with pytest.raises(SystemExit):
        run(model, folder, "--output", tmp_path / "c.jsonl")
    assert harmed in (error := capsys.readouterr().err) and "--resume false" in error
    run(model, folder, "--output", tmp_path / "c.jsonl", "--resume", "false")
    assert len(read_output(tmp_path / "c.jsonl")) == 2


def test_a_refusal_names_what_of_the_decoding_differs(model, tmp_path, capsys):
    folder = make_images(tmp_path / "images", 2, 2)
    run(model, folder, "--output", tmp_path / "c.jsonl", "--num_beams", 2)
    with pytest.raises(SystemExit):
        run(model, folder, "--output", tmp_path / "c.jsonl", "--num_beams", 3)
    assert "decoding {'num_beams': 2}, and not {'num_beams': 3}" in capsys.readouterr().err


def test_what_is_no_decoding_setting_does_not_stop_a_resumed_run(model, tmp_path, capsys, monkeypatch):
    """As after an upgrade of transformers, and where the settings were saved by a version of ours that kept its notes."""
    folder = make_images(tmp_path / "images", 2, 2)
    run(model, folder, "--output", tmp_path / "c.jsonl")
    monkeypatch.setattr("transformers.generation.configuration_utils.__version__", "6.0.0")
    path = tmp_path / "c.jsonl.settings.json"
    settings = json.loads(path.read_text())
    notes = {"transformers_version": "5.9.0", "_from_model_config": False, "output_scores": True, "top_k": None}
    for decoding in (settings["decoding"], settings["decoding"] | notes):
        path.write_text(json.dumps(settings | {"decoding": decoding}))
        capsys.readouterr()
        run(model, folder, "--output", tmp_path / "c.jsonl")
        assert "0 of 2 images captioned, 2 were captioned before" in capsys.readouterr().err


def test_a_part_that_somebody_took_away_costs_no_other(model, tmp_path, monkeypatch):
    monkeypatch.setattr("captioning.outputs.ROWS_PER_PART", 2)
    output = tmp_path / "c.parquet"
    run(model, make_images(tmp_path / "first", 6, 3), "--output", output, "--batch_size", 2)
    first = sorted(output.glob("part-*"))
    first[0].rename(tmp_path / "taken.parquet")
    kept = {path: path.read_bytes() for path in first[1:]}
    run(model, make_images(tmp_path / "second", 2, 2), "--output", output)
    assert all(path.read_bytes() == content for path, content in kept.items()) and len(read_output(output)) == 6


def test_a_full_disk_ends_in_one_sentence(model, tmp_path, capsys, monkeypatch):
    folder = make_images(tmp_path / "images", 2, 2)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("captioning.lines.LineFile.append", full)
        with pytest.raises(SystemExit) as ended:
            run(model, folder, "--output", tmp_path / "c.jsonl")
    assert ended.value.code == 2 and "space" in capsys.readouterr().err
    run(model, folder, "--output", tmp_path / "c.jsonl")
    assert len(read_output(tmp_path / "c.jsonl")) == 2


@pytest.mark.parametrize(
    "output", [[], ["--output", "c.txt"], ["--output", "sidecars"], ["--output_format", "sidecars"]]
)
def test_confidence_is_refused_where_it_has_no_place(output, model, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run(model, images, "--confidence", *output)
    assert "--confidence has no effect" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---- Sidecars -------------------------------------------------------------------------------------------------------


def sidecars(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.rglob("*.txt"))}


@pytest.mark.parametrize(
    ("existing", "wanted"),
    {"skip": "old\n", "overwrite": "{}\n", "append": "old; {}\n", "prepend": "{}; old\n"}.items(),
)
def test_sidecars_beside_images(existing, wanted, model, tmp_path, capsys):
    folder = make_images(tmp_path / "images", 2, 2)
    run(model, folder, "--output", tmp_path / "c.jsonl")
    first, second = (text for _, text in read_output(tmp_path / "c.jsonl"))
    (folder / "000" / "000000.txt").write_text("old\n")
    options = [
        "--output_format",
        "sidecars",
        "--existing",
        existing,
        "--prefix",
        "sks ",
        "--suffix",
        ".",
        "--separator",
        "; ",
    ]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run(model, folder, *options, "--dry_run")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert f"{1 if existing == 'skip' else 2} of 2 images would be captioned" in capsys.readouterr().out
    for _ in range(2):  # the second has nothing to do
        run(model, folder, *options)
        assert sidecars(folder) == {"000000.txt": wanted.format(f"sks {first}."), "000001.txt": f"sks {second}.\n"}


def test_an_empty_sidecar_is_none_and_is_counted(model, tmp_path, capsys):
    folder = make_images(tmp_path / "images", 6, 6)
    run(model, folder, "--output", tmp_path / "c.jsonl")
    captions = {Path(name).with_suffix(".txt").name: text + "\n" for name, text in read_output(tmp_path / "c.jsonl")}
    texts = [b"", b" \n\t", b"\xef\xbb\xbf\r\n", b".", b"\xff\xfe"]
    for number, text in enumerate(texts):
        (folder / "000" / f"{number:06d}.txt").write_bytes(text)
    kept = {f"{number:06d}.txt": texts[number] for number in (3, 4)}
    capsys.readouterr()
    options = ["--output_format", "sidecars"]
    run(model, folder, *options, "--dry_run")
    assert (
        "4 of 6 images would be captioned, 3 empty sidecars filled; 2 have a caption already" in capsys.readouterr().out
    )
    summaries = ("4 of 6 images captioned, 2 were captioned before; 3 had an empty sidecar", "0 of 6 images captioned")
    for summary in summaries:
        run(model, folder, *options)
        error = capsys.readouterr().err
        assert summary in error and ("empty" in error) == (summary == summaries[0])
        found = {path.name: path.read_bytes() for path in folder.rglob("*.txt")}
        assert found == {name: text.encode() for name, text in captions.items()} | kept


def test_captions_beside_images_are_not_told_of_and_the_output_is(model, tmp_path, capsys):
    folder = make_images(tmp_path / "images", 2, 2)
    for name in ("000000.txt", "000001.caption", "alone.txt"):
        (folder / "000" / name).write_text("a dog")
    run(model, folder, "--output", tmp_path / "c.txt")
    error = capsys.readouterr().err
    assert "1 of 3 files" in error and "alone.txt" in error and "000000.txt" not in error
    assert f"2 of 2 images captioned: {tmp_path / 'c.txt'}" in error


def test_sidecars_in_a_folder_of_their_own_and_images_of_one_stem(model, tmp_path, capsys):
    folder = make_images(tmp_path / "images", 2, 2)
    Image.new("RGB", (9, 9)).save(folder / "000" / "000000.bmp")
    run(model, folder, "--output", tmp_path / "texts", "--sidecar_suffix", ".caption")
    found = sorted(path.relative_to(tmp_path / "texts").as_posix() for path in (tmp_path / "texts").rglob("*.caption"))
    assert found == ["000/000000.caption", "000/000001.caption"]
    assert "000000.png" in (error := capsys.readouterr().err) and "2 of 3 images captioned, 1 cannot be" in error


def test_what_a_sidecar_has_is_joined_whole_or_stays(model, tmp_path, capsys):
    folder = make_images(tmp_path / "images", 4, 4) / "000"
    latin, with_mark, utf_16 = (folder / f"{index:06d}.txt" for index in range(3))
    latin.write_bytes("caf\u00e9".encode("latin-1"))
    with_mark.write_bytes(b"\xef\xbb\xbfold\r\n")
    utf_16.write_bytes("old".encode("utf-16"))
    (folder / "000003.png").rename(folder / "UPPER.PNG")
    (folder / "UPPER.TXT").write_text("old")
    options = ["--output_format", "sidecars", "--existing", "prepend"]
    run(model, folder, *options, "--dry_run")
    assert "2 of 4 images would be captioned, 2 sidecars prepended to; 2 " in capsys.readouterr().out
    run(model, folder, *options)
    error = capsys.readouterr().err
    assert all(path.name in error for path in (latin, utf_16)) and "2 of 4 images captioned, 2 cannot be" in error
    assert latin.read_bytes() == "caf\u00e9".encode("latin-1") and utf_16.read_bytes() == "old".encode("utf-16")
    assert with_mark.read_text().endswith(", old\n") and "\ufeff" not in with_mark.read_text()
    assert (folder / "UPPER.TXT").read_text().endswith(", old\n") and not (folder / "UPPER.txt").exists()


def test_an_image_whose_sidecar_is_anothers_is_named_by_every_run(model, tmp_path, capsys):
    folder = make_images(tmp_path / "images", 2, 2)
    Image.new("RGB", (9, 9)).save(folder / "000" / "000000.bmp")
    for summary in (
        "2 of 3 images captioned, 1 cannot be",
        "0 of 3 images captioned, 2 were captioned before, 1 cannot be",
    ):
        run(model, folder, "--output_format", "sidecars")
        assert "000000.png" in (error := capsys.readouterr().err) and summary in error


def test_a_sidecar_is_appended_to_once_whenever_the_kill_comes(model, tmp_path, monkeypatch):
    import captioning.outputs as outputs

    folder = make_images(tmp_path / "images", 6, 3)
    for path in folder.rglob("*.png"):
        path.with_suffix(".txt").write_text("old")
    options = ["--output_format", "sidecars", "--existing", "append"]
    write, calls = outputs.write_file, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "write_file", interrupted)
        with pytest.raises(Killed):
            run(model, folder, *options)
    run(model, folder, *options)
    assert len(sidecars(folder)) == 6 and all(text.count(", ") == 1 for text in sidecars(folder).values())


# ---- Input ----------------------------------------------------------------------------------------------------------


def test_tars_and_parquet_files_give_the_captions_of_their_images(model, images, undisturbed, tmp_path, capsys):
    paths = sorted(map(Path, undisturbed))[:9]
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "0.tar", "w") as archive:
        for path in paths[:5]:
            archive.add(path, path.name)
            text = tarfile.TarInfo(path.stem + ".txt")
            archive.addfile(text, io.BytesIO())
    rows = [{"image": {"bytes": path.read_bytes(), "path": None}, "key": path.name} for path in paths[5:]]
    pq.write_table(
        pa.Table.from_pylist([*rows, {"image": {"bytes": None, "path": None}, "key": "none"}]), shards / "1.parquet"
    )
    run(model, shards, "--output", tmp_path / "c.jsonl", "--id_column", "key")
    found = {Path(name).name: text for name, text in read_output(tmp_path / "c.jsonl")}
    assert found == {path.name: undisturbed[str(path)] for path in paths}
    assert "none" in (error := capsys.readouterr().err) and "9 of 10 images captioned, 1 cannot be" in error
    run(model, shards / "1.parquet", "--output", tmp_path / "rows.jsonl")
    assert [name.rpartition("#")[2] for name, _ in read_output(tmp_path / "rows.jsonl")] == ["0", "1", "2", "3"]


def test_samples_of_tars_without_an_image_are_counted(model, images, undisturbed, tmp_path, capsys):
    path = Path(min(undisturbed))
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as archive:
        archive.add(path, "a.png")
        for name in ("a.seg.cls", "b.cls", "c.json", "c.txt", "d.heif.1"):
            archive.addfile(tarfile.TarInfo(name))
        for kind, name in {tarfile.DIRTYPE: "more", tarfile.LNKTYPE: "more/a.png"}.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.png"
            archive.addfile(member)
    with tarfile.open(folder / "1.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("r.cls"))
    for source, where, number in ((folder, "0.tar/", 5), (folder / "0.tar", "", 4)):
        run(model, source, "--output", tmp_path / f"{number}.jsonl")
        assert [text for _, text in read_output(tmp_path / f"{number}.jsonl")] == [undisturbed[str(path)]]
        error = capsys.readouterr().err
        named = ", ".join(where + name for name in ("b.cls", "c.json", "d.heif.1", "more/a.png"))
        assert f"{number} of {number + 1} samples of tars have no image" in error and named in error
    with pytest.raises(SystemExit) as refused:
        run(model, folder / "1.tar")
    assert refused.value.code == 2 and "1.tar has no images" in (error := capsys.readouterr().err) and "r.cls" in error


@pytest.mark.slow
def test_our_own_tars_are_images_again(model, images, undisturbed, tmp_path):
    run(model, images, "--output", tmp_path / "tars", "--output_format", "webdataset")
    run(model, tmp_path / "tars", "--output", tmp_path / "c.jsonl")
    assert [text for _, text in read_output(tmp_path / "c.jsonl")] == [
        undisturbed[name] for name in sorted(undisturbed)
    ]
    import datasets

    rows = datasets.load_dataset("webdataset", data_files=str(tmp_path / "tars" / "*.tar"), split="train")
    assert [row["json"]["image_id"] for row in rows] == sorted(undisturbed) and rows[0]["png"].size == (40, 30)


def test_tars_of_rows_without_a_file_name_are_read_by_others(model, images, undisturbed, tmp_path):
    from data_scripts import img2dataset

    contents = [Path(name).read_bytes() for name in sorted(undisturbed)[:2]]
    pq.write_table(pa.table({"image": contents}), tmp_path / "rows.parquet")
    run(model, tmp_path / "rows.parquet", "--output", tmp_path / "tars", "--output_format", "webdataset")
    with tarfile.open(tmp_path / "tars" / "00000.tar") as archive:
        assert [name for name in archive.getnames() if name.endswith(".png")]
    uncut = ["--validation_share", "0", "--test_share", "0"]
    img2dataset.main([str(tmp_path / "tars"), "--output_dir", str(tmp_path / "table"), *uncut])
    assert len(load_from_disk(str(tmp_path / "table"))["train"]) == 2


def test_tars_among_the_images_are_refused(model, tmp_path, capsys):
    folder = make_images(tmp_path / "images", 2, 2)
    with pytest.raises(SystemExit):
        run(model, folder, "--output", folder / "tars", "--output_format", "webdataset")
    assert "--output" in capsys.readouterr().err and not (folder / "tars").exists()


def test_images_in_a_tar_have_no_sidecars_beside_them(model, images, tmp_path, capsys):
    run(model, images / "001", "--output", tmp_path / "tars", "--output_format", "webdataset")
    with pytest.raises(SystemExit) as refused:
        run(model, tmp_path / "tars", "--output_format", "sidecars")
    assert refused.value.code == 2 and "--output FOLDER" in capsys.readouterr().err
    assert not sidecars(tmp_path)
    run(model, tmp_path / "tars", "--output", tmp_path / "texts")
    assert len(sidecars(tmp_path / "texts")) == NUM_IMAGES - 50


def test_a_tar_that_is_none_and_a_parquet_without_images_are_refused(model, tmp_path, capsys):
    (tmp_path / "x.tar").write_bytes(b"no tar" * 1000)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "x.parquet")
    for name, words in {"x.tar": "uncompressed tar", "x.parquet": "--image_column"}.items():
        with pytest.raises(SystemExit) as refused:
            run(model, tmp_path / name)
        assert refused.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_the_exit_code_is_2_exactly_where_no_image_has_a_caption(content, model, tmp_path, capsys):
    folder = make_images(tmp_path / "images", 1, 1)
    bad = folder / "bad.png"
    bad.write_bytes(content)
    for _ in range(2):  # captioned by this run, or the one before
        run(model, folder, "--output", tmp_path / "c.jsonl")
        assert f"{bad}: " in (error := capsys.readouterr().err) and "1 cannot be" in error
    with pytest.raises(SystemExit) as ended:
        run(model, bad)
    assert ended.value.code == 2 and "0 of 1 images captioned, 1 cannot be" in capsys.readouterr().err


def test_an_image_that_is_named_twice_is_captioned_once(model, images, tmp_path, capsys):
    folder = images / "000"
    run(model, folder, folder / "000000.png", f"{folder}/../000", "--output", tmp_path / "c.jsonl")
    assert len(read_output(tmp_path / "c.jsonl")) == 50 and "2 of 3 inputs" in capsys.readouterr().err


# ---- Confidence, and the end of a pipe ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lstm", "vit_gpt2"])
def test_confidence_is_that_of_inspection_and_doubtful_captions_go_elsewhere(kind, images, tmp_path):
    captioner = build(kind)
    captioner.save(tmp_path / "model")
    pixels = captioner.processor(
        images=[Image.open(path) for path in sorted((images / "000").iterdir())[:9]], return_tensors="pt"
    )
    made = captioner.generate(dict(pixels), inspect=True, confidence=True, suppress_tokens=[0, 1, 3])
    options = {"suppress_tokens": [0, 1, 3], "return_dict_in_generate": True, "output_logits": True}
    own = captioner.model.generate(**pixels, **options)  # step by step, with a cache
    logs = captioner.model.compute_transition_scores(own.sequences, own.logits, normalize_logits=True)
    for row, steps, ids in zip(made, logs, own.sequences[:, 1:].tolist(), strict=True):
        steps = steps[: ids.index(2) + 1 if 2 in ids else None].double()
        assert row["log_probability"] == pytest.approx(steps.sum().item(), rel=1e-4)
        assert row["confidence"] == pytest.approx(steps.mean().exp().item(), rel=1e-4)
        least = min(row["tokens"], key=lambda token: token["probability"], default=None)  # each token is a word here
        assert (least is None) == (row["least_sure_word"] is None)
        if least:
            assert row["least_sure_word"]["word"] == least["text"].strip()
            assert row["least_sure_word"]["probability"] == pytest.approx(least["probability"], rel=1e-4)
    run(str(tmp_path / "model"), images, "--output", tmp_path / "all.jsonl", "--confidence")
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    limit = sorted(row["confidence"] for row in rows)[NUM_IMAGES // 2]
    for _ in range(2):
        run(str(tmp_path / "model"), images, "--output", tmp_path / "sure.jsonl", "--min_confidence", limit)
        sure = dict(read_output(tmp_path / "sure.jsonl"))
        doubtful = dict(read_output(tmp_path / "sure.jsonl.doubtful.jsonl"))
        assert sure == {row["image_id"]: row["caption"] for row in rows if row["confidence"] >= limit} and doubtful
        assert len(sure) + len(doubtful) == NUM_IMAGES


def test_a_closed_pipe_ends_the_run_quietly(model, images, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as ended:
            run(model, images / "001")
    assert ended.value.code == 128 + signal.SIGPIPE and capsys.readouterr().err == ""


def test_webdataset_cut_in_an_image_of_zeros_is_closed_behind_the_one_before(tmp_path):
    """Where the file ends with as many zeros as a whole tar does."""
    ref = next(iter(ImageSources(["x.bmp"])))
    output = WebDataset(tmp_path)
    output.write([{"ref": ref, "caption": "a", "content": b"BM" + bytes(9000)}] * 2)
    os.truncate(tmp_path / "00000.tar", 512 + 9216 + 2 * 1024 + 512 + 5000)
    again = WebDataset(tmp_path)
    again.recover()
    with tarfile.open(tmp_path / "00000.tar") as archive:
        assert [Path(name).suffix for name in archive.getnames()] == [".bmp", ".txt", ".json"]


# ---- By hand --------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=20)
    args = parser.parse_args()
    context = start_server()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, seconds = str(folder / "model"), 0.0
        build("lstm").save(model)
        for number in (args.images // 10, args.images):
            images, peak = make_images(folder / str(number), number, num_kinds=200), context.Value("q", 0)
            arguments = ["--model_name_or_path", model, str(images), "--output", str(folder / f"{number}.jsonl")]
            started = time.perf_counter()
            process = context.Process(target=captioned, args=(arguments, peak))
            process.start()
            process.join()
            seconds = time.perf_counter() - started
            print(
                f"{number:,} images: {peak.value / 1024:,.1f} MB at most, {number / seconds:,.0f} images a second",
                flush=True,
            )
        # A killed run is on average given half of the time that one more in all would take to be done with.
        kill_and_resume(model, images, folder / "killed.jsonl", args.kills, seconds=1.6 * seconds / args.kills)
        whole, killed = (read_output(folder / f"{name}.jsonl") for name in (args.images, "killed"))
        same = dict(killed) == dict(whole)
        print(
            f"killed {args.kills} times: {len(killed):,} lines of {len(dict(killed)):,} images, same captions: {same}"
        )


if __name__ == "__main__":
    main()
