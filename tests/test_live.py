"""Laws of what a training run logs while it trains, and sends to trackers."""

import json
import logging
import re
import sqlite3

import pytest
from datasets import Dataset

import train_lstm
import train_vit_gpt2
from metrics import CaptionScorer
from reporting.live import EpochProgressBar
from reporting.results import METRIC_TITLES
from training import launch
from training.evaluation import score_and_show
from training.launch import check_trackers

COMMON = [
    *("--num_train_epochs", "2", "--max_train_samples", "12", "--max_eval_samples", "5"),
    *("--per_device_train_batch_size", "4", "--vocab_size", "120", "--hidden_size", "32", "--num_hidden_layers", "1"),
]
SMALL = {
    train_lstm: [
        *("--encoder", "test_efficientnet", "--pretrained_encoder", "false", "--image_size", "64"),
        *("--image_embed_dim", "32", *COMMON),
    ],
    train_vit_gpt2: [
        *("--pretrained_encoder", "false", "--pretrained_decoder", "false", "--image_size", "32", "--prompt", ""),
        *("--num_attention_heads", "2", *COMMON),
    ],
}
SCRIPTS = pytest.mark.parametrize("script", SMALL, ids=lambda script: script.__name__)


@pytest.mark.parametrize("unit", ["captions", "images"])
def test_the_bar_shows_the_loss_what_it_counts_and_the_time_left(unit, capsys):
    bar = EpochProgressBar(epoch=2, num_epochs=5, num_items=100, num_done=20, unit=unit)
    bar.set_loss(9.0)  # nothing trained on since the run was resumed: no pace yet
    bar.start_t -= 10
    bar.update(50)
    bar.set_loss(1.23456)
    bar.close()
    # 50 items took 10 s; 30 of this epoch and three epochs of 100 are left: 66 s.
    last = capsys.readouterr().err.split("\r")[-1]
    assert "epoch 2/5" in last and "70/100" in last and f" {unit}/s" in last
    assert "loss 1.235, training ends in 01:06" in last


def test_an_evaluation_shows_scores_the_shuffled_baseline_and_three_images(caplog):
    rows = Dataset.from_list(
        [{"image_id": f"p{index}", "captions": [f"a {word} dog", "nothing"]} for index, word in enumerate("abcde")]
    )
    captions = [f"a {word} dog runs" for word in "abcde"]
    scorer = CaptionScorer(rows["captions"])
    with caplog.at_level(logging.INFO):
        row = score_and_show(captions, rows, scorer)
    assert {name: row[name] for name in METRIC_TITLES} == scorer.score(captions)
    shuffled = scorer.score(scorer.shuffle(captions))
    assert {name: row[f"shuffled_{name}"] for name in METRIC_TITLES} == shuffled
    titles, ours, theirs, *images = caplog.messages[-1].splitlines()
    assert titles.split() == list(METRIC_TITLES.values())
    assert ours.split()[2:] == [f"{row[name]:.3f}" for name in METRIC_TITLES]
    assert theirs.split()[1:] == [f"{shuffled[name]:.3f}" for name in METRIC_TITLES]
    assert len({len(line) for line in (titles, ours, theirs)}) == 1
    assert images[::2] == ["p0: a a dog runs", "p2: a c dog runs", "p4: a e dog runs"]
    assert images[1::2] == [f"    reference: a {word} dog" for word in "ace"]


def test_two_images_are_shown_once_each(caplog):
    rows = Dataset.from_list([{"image_id": name, "captions": [name]} for name in ("one", "two")])
    with caplog.at_level(logging.INFO):
        score_and_show(["a", "b"], rows, CaptionScorer(rows["captions"]))
    assert caplog.messages[-1].count("reference") == 2


@pytest.mark.slow
@SCRIPTS
def test_a_run_shows_its_progress_and_logs_to_its_trackers(script, small_scenes, tmp_path, monkeypatch, caplog, capsys):
    pytest.importorskip("trackio", reason="needs Trackio (pip install trackio)")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    folder = tmp_path / "run"
    with caplog.at_level(logging.INFO):
        script.main(
            [
                *SMALL[script],
                *("--dataset_name", small_scenes, "--output_dir", str(folder)),
                *("--report_to", "tensorboard,trackio"),
            ]
        )
    said = capsys.readouterr().err
    for epoch in ("1/2", "2/2"):
        assert re.search(rf"epoch {epoch}: +\d+%.* captions/s, loss \d\.\d{{3}}, training ends in \d\d:\d\d", said)
    history = [row for row in json.loads((folder / "history.json").read_text()) if "cider" in row]
    assert len(history) == 2
    tables = [message for message in caplog.messages if "BLEU-1" in message]
    logged_cider = [table.splitlines()[1].split()[-1] for table in tables]
    assert logged_cider == [f"{row['cider']:.3f}" for row in history]
    lines = [message for message in caplog.messages if message.startswith("epoch ")]
    for row in history:
        assert any(f"training loss {row['train_loss']:.4g}" in line for line in lines)
        assert any(f"validation loss {row['eval_loss']:.4g}" in line for line in lines)
    assert list((folder / "logs").rglob("events.*"))
    with sqlite3.connect(tmp_path / "trackio" / "showtell.db") as database:
        logged = database.execute("select run_name, metrics from metrics").fetchall()
    assert {name for name, _ in logged} == {str(folder)}
    logged = [json.loads(metrics) for _, metrics in logged]
    ciders = [value for metrics in logged for name, value in metrics.items() if name in ("cider", "eval/cider")]
    assert ciders == [row["cider"] for row in history]


@SCRIPTS
def test_a_tracker_that_is_not_installed_is_one_sentence_at_the_start(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        script.main([*SMALL[script], "--output_dir", str(tmp_path / "run"), "--report_to", "trackio"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--report_to trackio" in error and "pip install trackio" in error
    assert not (tmp_path / "run").exists()


def test_trackers_that_are_installed_pass():
    check_trackers(["tensorboard"])
