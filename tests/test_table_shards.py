"""A caption table written shard by shard: resumed after a kill, by several processes, on disk once."""

import hashlib
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from datasets import load_from_disk

from data_scripts import table_shards
from data_scripts.archives import open_files
from data_scripts.caption_table import write_caption_table
from data_scripts.row_checks import SourceRow
from data_scripts.scenes import scene_rows


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(table_shards, "ROWS_PER_SHARD", 10)
    monkeypatch.setattr(table_shards, "ROWS_PER_BATCH", 4)
    return [
        SourceRow("train", f"i{n}", [f"caption {n}"], f"row {n}", row.read)
        for n, row in enumerate(scene_rows({"train": 45}))
    ]


def content(folder: Path) -> dict[str, list[tuple]]:
    table = load_from_disk(folder)
    return {
        split: [(row["image_id"], row["captions"], row["content_hash"], row["image"].tobytes()) for row in part]
        for split, part in table.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("num_proc", "can_fork"), [(1, True), (3, True), (3, False)])
def test_the_table_does_not_depend_on_shards_or_processes(rows, tmp_path, monkeypatch, capsys, num_proc, can_fork):
    """Nor on whether the system can fork a process, as macOS and Windows cannot."""
    monkeypatch.setattr(table_shards, "CAN_FORK", can_fork)
    if not can_fork:
        monkeypatch.setattr(table_shards.multiprocessing, "get_context", None)
    ours = write_caption_table(rows, tmp_path / "shards", num_proc=num_proc)
    assert ("--num_proc" in capsys.readouterr().err) == (not can_fork)
    monkeypatch.setattr(table_shards, "ROWS_PER_SHARD", 1000)
    theirs = write_caption_table(rows, tmp_path / "whole")
    assert content(tmp_path / "shards") == content(tmp_path / "whole") and str(ours) == str(theirs)
    assert {path.name for path in tmp_path.iterdir()} == {"shards", "whole"}
    assert len(list((tmp_path / "shards" / "train").glob("*.arrow"))) == 5
    for split, part in load_from_disk(tmp_path / "shards").items():
        for row in part.cast_column("image", part.features["image"].__class__(decode=False)):
            assert hashlib.sha256(row["image"]["bytes"]).hexdigest() == row["content_hash"], split


def killed_after(number: int, monkeypatch, name: str, plain) -> Counter:
    calls = Counter()

    def maybe_killed(*arguments):
        calls[name] += 1
        if calls[name] > number:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(table_shards, name, maybe_killed)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number", "reads"), [("check_row", 27, 25), ("_copy_rows", 1, 0), ("describe_split", 1, 0)]
)
def test_a_kill_costs_a_shard_and_changes_nothing(rows, tmp_path, monkeypatch, name, number, reads):
    """In the third of five shards; between two shards that become splits' files; and at the very end."""
    write_caption_table(rows, tmp_path / "undisturbed")
    plain = getattr(table_shards, name)
    killed_after(number, monkeypatch, name, plain)
    with pytest.raises(KeyboardInterrupt):
        write_caption_table(rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(table_shards, name, plain)
    calls = killed_after(10**6, monkeypatch, "check_row", table_shards.check_row)
    write_caption_table(rows, tmp_path / "out")
    assert calls["check_row"] == reads and content(tmp_path / "out") == content(tmp_path / "undisturbed")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "undisturbed"}


@pytest.mark.slow
def test_other_captions_are_another_table(rows, tmp_path, monkeypatch):
    write_caption_table(rows, tmp_path / "one")
    write_caption_table(rows, tmp_path / "same")
    other = [SourceRow(row.split, row.image_id, ["another one"], row.place, row.read) for row in rows]
    write_caption_table(other, tmp_path / "other")
    fingerprints = [load_from_disk(tmp_path / name)["train"]._fingerprint for name in ("one", "same", "other")]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@pytest.mark.slow
def test_processes_read_a_zip_each_for_itself(rows, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for row in rows:
            archive.writestr(f"{row.image_id}.png", row.read())
    with open_files(tmp_path / "images.zip") as files:
        zipped = [
            SourceRow("train", row.image_id, row.captions, row.place, files.reader(name, files.find(name)))
            for row in rows
            for name in [f"{row.image_id}.png"]
        ]
        write_caption_table(zipped, tmp_path / "zipped", num_proc=4)
    write_caption_table(rows, tmp_path / "plain")
    assert content(tmp_path / "zipped") == content(tmp_path / "plain")
