"""A data set that is pushed comes back: streamed, loaded, and by the name that a training script is given."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard

from data_scripts import load_captions, push

ROOT = Path(__file__).parent.parent
COME_BACK = """
import hashlib, json, sys
from datasets import Image, load_dataset
from data_scripts import load_captions

def digest(rows):
    return [
        (row["image_id"], row["captions"], hashlib.sha256(row["image"].convert("RGB").tobytes()).hexdigest())
        for row in rows
    ]

name = sys.argv[1]
streamed = load_dataset(name, split="test", streaming=True)
first = next(iter(streamed))["image_id"]
table = load_captions(name)
print(json.dumps([digest(streamed), digest(table["test"]), {split: len(part) for split, part in table.items()}, first]))
"""


def test_what_is_pushed_comes_back_streamed_and_loaded(small_scenes, hub, tmp_path, capsys):
    hub.fail("PUT", "/lfs/")
    hub.fail("POST", "/commit/", first=2, status=500)
    push.main([small_scenes, "scenes", "--private", "--license", "cc0-1.0", "--tag", "v1"])
    assert capsys.readouterr().out.strip().endswith("/datasets/me/scenes")
    repository = hub.repositories["dataset", "me/scenes"]
    assert repository.private and [fault.seen > 1 for fault in hub.faults] == [True, True]
    shards = [path for path in repository.tags["v1"].files if path.endswith(".parquet")]
    assert len(shards) == 3 and all(repository.files("main")[path].is_lfs for path in shards)

    ours = load_captions(small_scenes)
    expected = [
        [row["image_id"], row["captions"], hashlib.sha256(row["image"].tobytes()).hexdigest()] for row in ours["test"]
    ]
    environment = hub.environment | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", COME_BACK, "me/scenes"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    streamed, loaded, lengths, first = json.loads(run.stdout.splitlines()[-1])
    assert streamed == loaded == expected and first == expected[0][0]
    assert lengths == {"train": 24, "validation": 10, "test": 9}
    # It streamed before it loaded, and for that it fetched nothing of the other splits.
    (shard,) = (file for path, file in repository.files("main").items() if path.startswith("data/test-"))
    assert (
        next(path for method, path, _ in hub.requests if method == "GET" and "/lfs/" in path) == f"/lfs/{shard.sha256}"
    )


def test_the_card_tells_what_is_in_it_and_how_to_load_it(small_scenes, hub):
    repo_id = push.push_captions(load_captions(small_scenes), "scenes", license="cc0-1.0")
    card = DatasetCard.load(repo_id)
    card.validate()
    assert (card.data.license, card.data.task_categories) == ("cc0-1.0", ["image-to-text"])
    assert card.data.size_categories == ["n<1K"]
    info = card.data.dataset_info
    assert {split["name"]: split["num_examples"] for split in info["splits"]} == {
        "train": 24,
        "validation": 10,
        "test": 9,
    }
    assert "| train | 24 | 120 | " in card.text and 'load_dataset("me/scenes"' in card.text
    unnamed = push.dataset_card(load_captions(small_scenes), "me/x", None)
    assert "license" not in DatasetCard(unnamed).data.to_dict() and "Not stated" in unnamed


def test_pushed_again_nothing_is_sent_twice(small_scenes, hub):
    for revision in (None, None, "trial/one"):
        push.push_captions(load_captions(small_scenes), "scenes", revision=revision)
    assert len([path for method, path, _ in hub.requests if method == "PUT"]) == 3
    repository = hub.repositories["dataset", "me/scenes"]
    assert repository.files("trial/one") == repository.files("main")
    assert repository.branches.keys() == {"main", "trial/one"}


@pytest.mark.parametrize(
    ("source", "repo_id", "token", "sentence"),
    [
        ("no/such/data", "me/x", "hf_me", "no/such/data"),
        ("SCENES", "me/x", "hf_wrong", "401"),
        ("SCENES", "somebody/x", "hf_me", "somebody/x (403)"),
    ],
)
def test_a_push_that_cannot_be_is_one_sentence(
    source, repo_id, token, sentence, small_scenes, hub, monkeypatch, capsys
):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit) as ended:
        push.main([source.replace("SCENES", small_scenes), repo_id])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(told) == 1 and sentence in told[0]
