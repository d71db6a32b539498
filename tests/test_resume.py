"""Nothing of a run is lost, whatever ends it: SIGKILL, SIGTERM, a full disk, another run, a damaged checkpoint."""

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import kill_points
import pytest
from kill_points import SCRIPTS, Comparison, differences, log_of, run_script, what_is_left

from training import checkpoints as whole
from training.checkpoints import (
    checkpoint_problem,
    checkpoint_to_resume,
    checkpoints,
    clear_leftovers,
    copy_best_model,
    drop_old,
    lock_output_dir,
    new_checkpoint,
)


@pytest.fixture(scope="module")
def context():
    return kill_points.start_server()


@pytest.fixture(scope="module")
def runs(context, small_scenes, tmp_path_factory):
    """An undisturbed run of each script, made when it is asked for."""
    made = {}

    def undisturbed(script: str) -> Comparison:
        if script not in made:
            made[script] = Comparison(context, script, small_scenes, tmp_path_factory.mktemp(script))
        return made[script]

    return undisturbed


# ---------------------------------------------------------------------------------------------------------- killed

# One of each kind; `python tests/kill_points.py --runs 20` takes them at many more places and at times of the clock.
SAMPLE = [
    ("train_lstm", ("step", 9)),  # in the second epoch, four steps after its beginning
    ("train_lstm", ("rename", 4)),
    ("train_lstm", ("encoder", 2)),  # the features of the encoder are not all there
    ("train_vit_gpt2", ("step", 9)),
    ("train_vit_gpt2", ("sync", 17)),
    ("train_vit_gpt2", ("evaluation", 2)),
]


def not_asked(option: str, output_dir: str):
    raise AssertionError(f"the Hub is asked for {option}")


@pytest.mark.parametrize(("script", "moment"), SAMPLE)
def test_a_killed_run_ends_on_every_bit_of_an_undisturbed_one(runs, script, moment):
    killed, found = runs(script).kill_and_resume(moment)
    assert killed == -signal.SIGKILL, "the moment never came"
    assert not found, "\n".join(found)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_curve_has_each_evaluation_once(runs, script):
    curve = runs(script).expected["curve"]
    tag = {"train_lstm": "cider", "train_vit_gpt2": "eval/cider"}[script]
    assert [step for step, _ in curve[tag]] == [5, 10, 15]


@pytest.mark.parametrize("script", SCRIPTS)
def test_sigterm_saves_and_leaves_with_a_message(runs, script, tmp_path):
    """At the end of the step in which it comes: the seventh, where no checkpoint is due."""
    run = runs(script)
    arguments = [*run.arguments, "--output_dir", str(tmp_path / "run")]
    code = run_script(run.context, script, arguments, tmp_path / "cache", ("step", 7), by=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; checkpoint-7 is saved" in log_of(script, tmp_path / "cache").read_text()
    assert checkpoints(tmp_path / "run")[-1].name == "checkpoint-7"
    assert run_script(run.context, script, [*arguments, "--resume_from_checkpoint", "last"], tmp_path / "cache") == 0
    left, expected = what_is_left(tmp_path / "run"), dict(run.expected)
    # Which checkpoints are there may differ; how it ends may not.
    for name in ("weights", "history", "captions", "curve"):
        assert not differences(left[name], expected[name], name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_stopped_early_stays_stopped(runs, script, tmp_path):
    run = runs(script)
    options = ["--learning_rate", "0", "--early_stopping_patience", "1", "--output_dir", str(tmp_path / "run")]
    arguments = [*run.arguments, *options]
    assert run_script(run.context, script, arguments, tmp_path / "cache") == 0
    before = what_is_left(tmp_path / "run")
    assert len(before["history"]) == 2
    assert run_script(run.context, script, [*arguments, "--resume_from_checkpoint", "last"], tmp_path / "cache") == 0
    after = what_is_left(tmp_path / "run")
    assert not differences({**after, "files": 0}, {**before, "files": 0})


# ------------------------------------------------------------------------------------------- whole, absent, damaged


def small_checkpoint(output_dir: Path, step: int, state_file: str = "progress.json") -> Path:
    with new_checkpoint(output_dir, step) as folder:
        (folder / state_file).write_text(str(step))
        (folder / "weights").write_bytes(bytes(1000))
    return output_dir / f"checkpoint-{step}"


def test_a_checkpoint_is_whole_and_says_so(tmp_path):
    folder = small_checkpoint(tmp_path, 8)
    assert checkpoint_problem(folder) is None and [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]
    assert checkpoint_to_resume("last", str(tmp_path), "progress.json", not_asked) == folder


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda folder: (folder / "weights").write_bytes(bytes(999) + b"\1"), "weights is not what was written"),
        (lambda folder: (folder / "weights").write_bytes(bytes(10)), "weights is not what was written"),
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: (folder / "checksums.json").unlink(), "checksums.json is missing"),
        (lambda folder: (folder / "checksums.json").write_text("{"), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(tmp_path, monkeypatch, harm, problem):
    before, newest = small_checkpoint(tmp_path, 8), small_checkpoint(tmp_path, 16)
    harm(newest)
    with pytest.raises(ValueError, match="is damaged") as refused:
        checkpoint_to_resume("last", str(tmp_path), "progress.json", not_asked)
    sentence = str(refused.value)
    assert str(newest) in sentence and problem in sentence and f"--resume_from_checkpoint {before}" in sentence
    assert checkpoint_to_resume(str(before), str(tmp_path), "progress.json", not_asked) == before
    monkeypatch.chdir(tmp_path)  # the same folder by another name is still not the one before it
    with pytest.raises(ValueError, match=f"--resume_from_checkpoint {before}$"):
        checkpoint_to_resume("checkpoint-16", str(tmp_path), "progress.json", not_asked)


def test_a_checkpoint_is_never_half_replaced(tmp_path, monkeypatch):
    """The second of one name: killed between the two renames, the first comes back."""
    first = small_checkpoint(tmp_path, 8)
    (first / "mark").write_text("first")
    plain, calls = os.replace, []

    def killed(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        plain(*paths)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        small_checkpoint(tmp_path, 8)
    monkeypatch.setattr(os, "replace", plain)
    assert not first.exists()
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"] and (first / "mark").is_file()
    small_checkpoint(tmp_path, 8)
    assert not (first / "mark").exists() and checkpoint_problem(first) is None


def test_old_ones_go_only_after_the_newest_and_never_the_best(tmp_path, monkeypatch):
    for step in (8, 16, 24, 32):
        small_checkpoint(tmp_path, step)
    drop_old(tmp_path, None, 32)
    small_checkpoint(tmp_path, 40)  # of a run that went back, and is at step 32 again
    drop_old(tmp_path, 1, 32, keep_steps={16})
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-16", "checkpoint-32", "checkpoint-40"]
    monkeypatch.setattr(whole.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        drop_old(tmp_path, 1, 40)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path)] == [
        "checkpoint-32",
        "checkpoint-40",
    ]  # none that is half removed


def test_checkpoints_of_another_run_are_in_the_way_until_they_may_go(tmp_path):
    """By their steps they would be kept in place of the new run's, and taken for its last."""
    other, run = small_checkpoint(tmp_path / "other", 16), tmp_path / "run"
    (other.parent / "config.json").write_text("{}")
    (other.parent / "model.safetensors").write_bytes(b"best of the other")
    small_checkpoint(run, 1000)
    for option in (None, str(other)):
        with pytest.raises(ValueError, match="holds checkpoints of another run, the last checkpoint-1000: go on"):
            checkpoint_to_resume(option, str(run), "progress.json", not_asked)
    assert checkpoint_to_resume(None, str(run), "progress.json", not_asked, overwrite=True) is None
    assert not checkpoints(run) and checkpoint_to_resume(None, str(run), "progress.json", not_asked) is None
    # Its best model goes with a checkpoint that goes on elsewhere, and takes no other's place unless it may.
    assert checkpoint_to_resume(str(other), str(run), "progress.json", not_asked) == other
    copy_best_model(other, str(run))
    assert (run / "model.safetensors").read_bytes() == b"best of the other" and (run / "config.json").exists()
    checkpoint_to_resume(
        str(other), str(run), "progress.json", not_asked
    )  # as after a kill before its first checkpoint
    (run / "model.safetensors").write_bytes(b"best of the run's")
    with pytest.raises(ValueError, match="holds the model of another run"):
        checkpoint_to_resume(str(other), str(run), "progress.json", not_asked)
    copy_best_model(checkpoint_to_resume(str(other), str(run), "progress.json", not_asked, overwrite=True), str(run))
    assert (run / "model.safetensors").read_bytes() == b"best of the other"


def test_a_checkpoint_of_another_script_is_refused(tmp_path):
    folder = small_checkpoint(tmp_path, 8, "trainer_state.json")
    with pytest.raises(ValueError, match="a checkpoint of another training script"):
        checkpoint_to_resume(str(folder), str(tmp_path), "progress.json", not_asked)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_damaged_checkpoint_and_a_busy_folder_end_in_one_sentence(runs, script, tmp_path):
    run = runs(script)
    shutil.copytree(run.folder / "undisturbed", tmp_path / "run")
    newest = checkpoints(tmp_path / "run")[-1]
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    arguments = [*run.arguments, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "last"]
    with lock_output_dir(tmp_path / "run"):  # by this process; a script's own is another
        assert one_sentence(run, script, arguments, tmp_path).startswith("another run writes into")
    sentence = one_sentence(run, script, arguments, tmp_path)
    assert f"{newest} is damaged (model.safetensors" in sentence and "checkpoint-12" in sentence
    other = "train_vit_gpt2" if script == "train_lstm" else "train_lstm"
    arguments[-1] = str(checkpoints(runs(other).folder / "undisturbed")[-1])
    assert "another training script" in one_sentence(run, script, arguments, tmp_path)


def one_sentence(run: Comparison, script: str, arguments: list[str], folder: Path, **limits) -> str:
    """What a run says that cannot go on: exit code 2, one line, no traceback."""
    assert run_script(run.context, script, arguments, folder / "cache", **limits) == 2
    log = log_of(script, folder / "cache").read_text()
    assert "Traceback" not in log
    (sentence,) = re.findall("^error: (.*)$", log, flags=re.MULTILINE)
    return sentence


# ------------------------------------------------------------------------------------------------------- full disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte, that can grow. Needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root; the limit on the size of a file stands in for it")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def disk_usage(folder: Path) -> int:
    return int(subprocess.run(["du", "-sk", folder], capture_output=True, text=True, check=True).stdout.split()[0])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_full_disk_leaves_the_last_checkpoint_and_one_sentence(runs, script, small_disk, tmp_path):
    run = runs(script)
    whole_run = disk_usage(run.folder / "undisturbed")
    one = disk_usage(run.folder / "undisturbed" / "checkpoint-15")
    room = whole_run - 2 * one  # no third checkpoint has room while two are there
    subprocess.run(["mount", "-o", f"remount,size={room}k", small_disk], check=True)
    arguments = [*run.arguments, "--output_dir", str(small_disk / "run")]
    sentence = one_sentence(run, script, arguments, tmp_path)
    assert "could not be written (no space is left on the disk)" in sentence or "No space left on device" in sentence
    left = checkpoints(small_disk / "run")
    assert left and all(checkpoint_problem(checkpoint) is None for checkpoint in left)
    assert not [path.name for path in (small_disk / "run").iterdir() if path.name.startswith(".")]
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    assert run_script(run.context, script, [*arguments, "--resume_from_checkpoint", "last"], tmp_path / "cache") == 0
    assert not differences(what_is_left(small_disk / "run"), run.expected)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkpoint_that_cannot_be_written_is_absent(runs, script, tmp_path):
    """The same with a limit on the size of a file, for which no rights are needed: here it forbids the optimizer's state."""
    run = runs(script)
    checkpoint = run.folder / "undisturbed" / "checkpoint-15"
    optimizer = next(path for path in checkpoint.iterdir() if path.name.startswith("optimizer."))
    arguments = [*run.arguments, "--output_dir", str(tmp_path / "run"), "--report_to", "none"]
    sentence = one_sentence(run, script, arguments, tmp_path, max_file_bytes=optimizer.stat().st_size - 4096)
    assert "checkpoint-3 could not be written" in sentence and "there is no checkpoint before it" in sentence
    assert not [path.name for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_read_only_folder_is_refused_before_any_work(runs, script, small_disk, tmp_path):
    run = runs(script)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    sentence = one_sentence(run, script, [*run.arguments, "--output_dir", str(small_disk / "run")], tmp_path)
    assert "Read-only file system" in sentence and str(small_disk) in sentence
