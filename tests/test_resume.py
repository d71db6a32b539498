"""Nothing of a run is lost, whatever ends it: SIGKILL, SIGTERM, a full disk, another run, a damaged checkpoint."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import kill_points
import pytest
from kill_points import OPTIONS, OWN_OPTIONS, SCRIPTS, Comparison, differences, log_of, run_script, what_is_left

from system.errors import UserError
from training import checkpoints as whole
from training.checkpoints import (
    _remove_leftovers,
    checkpoint_problem,
    checkpoint_to_resume,
    checkpoints,
    copy_best_model,
    lock_output_dir,
    new_checkpoint,
    remove_old,
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
            made[script] = Comparison(
                context, script, [*OPTIONS, *OWN_OPTIONS[script]], small_scenes, tmp_path_factory.mktemp(script)
            )
        return made[script]

    return undisturbed


# ---------------------------------------------------------------------------------------------------------- killed

# One of each kind; `python tests/kill_points.py --runs 20` takes them at many more places and at times of the clock.
SAMPLE = [
    ("train_lstm", ("step", 9)),  # in the second epoch, four steps after its beginning
    ("train_lstm", ("rename", 40)),
    ("train_vit_gpt2", ("encoder", 2)),  # the features of the encoder are not all there
    ("train_vit_gpt2", ("sync", 47)),
    ("train_scst", ("stepped", 9)),
    ("train_scst", ("evaluation", 3)),
]


def not_asked(option: str, output_dir: str):
    raise AssertionError(f"the Hub is asked for {option}")


@pytest.mark.slow
@pytest.mark.parametrize(("script", "moment"), SAMPLE)
def test_a_killed_run_ends_on_every_bit_of_an_undisturbed_one(runs, script, moment):
    killed, found = runs(script).kill_and_resume(moment)
    assert killed == -signal.SIGKILL, "the moment never came"
    assert not found, "\n".join(found)


EVALUATIONS = {"train_lstm": [4, 5, 8, 10, 12, 15], "train_vit_gpt2": [5, 10, 15], "train_scst": [0, 5, 10, 15]}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_curve_has_each_evaluation_once(runs, script):
    assert [step for step, _ in runs(script).expected["curve"]["cider"]] == EVALUATIONS[script]


@pytest.mark.slow
def test_sigterm_saves_and_exits_as_the_shell_expects(runs, tmp_path):
    """At the end of the step in which it comes: the seventh, where no checkpoint is due."""
    script = "train_scst"
    run = runs(script)
    arguments = [*run.arguments, "--output_dir", str(tmp_path / "run")]
    code = run_script(run.context, script, arguments, tmp_path / "cache", ("step", 7), by=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert "checkpoint-7" in log_of(script, tmp_path / "cache").read_text()
    assert checkpoints(tmp_path / "run")[-1].name == "checkpoint-7"
    assert run_script(run.context, script, [*arguments, "--resume_from_checkpoint", "last"], tmp_path / "cache") == 0
    assert "checkpoint-7: step 7 of 15" in log_of(script, tmp_path / "cache").read_text()
    left, expected = what_is_left(tmp_path / "run"), dict(run.expected)
    # Which checkpoints are there may differ; how it ends may not.
    for name in ("weights", "history", "captions", "curve"):
        assert not differences(left[name], expected[name], name)


@pytest.mark.slow
def test_a_run_that_stopped_early_stays_stopped(runs, tmp_path):
    script = "train_vit_gpt2"
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


def small_checkpoint(output_dir: Path, step: int, script: str = "train_lstm") -> Path:
    output_dir.mkdir(exist_ok=True)
    with new_checkpoint(output_dir, step) as folder:
        (folder / "trainer_state.json").write_text(json.dumps({"script": script, "step": step}))
        (folder / "weights").write_bytes(bytes(1000))
    return output_dir / f"checkpoint-{step}"


def test_a_checkpoint_is_whole_and_says_so(tmp_path):
    folder = small_checkpoint(tmp_path, 8)
    assert checkpoint_problem(folder) is None and [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]
    assert checkpoint_to_resume("last", str(tmp_path), "train_lstm", not_asked) == folder


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda folder: (folder / "weights").write_bytes(bytes(999) + b"\1"), "weights"),
        (lambda folder: (folder / "weights").write_bytes(bytes(10)), "weights"),
        (lambda folder: (folder / "weights").unlink(), "weights"),
        (lambda folder: (folder / "checksums.json").unlink(), "checksums.json"),
        (lambda folder: (folder / "checksums.json").write_text("{"), ""),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(tmp_path, monkeypatch, harm, named):
    before, newest = small_checkpoint(tmp_path, 8), small_checkpoint(tmp_path, 16)
    harm(newest)
    with pytest.raises(UserError) as refused:
        checkpoint_to_resume("last", str(tmp_path), "train_lstm", not_asked)
    sentence = str(refused.value)
    assert str(newest) in sentence and named in sentence and f"--resume_from_checkpoint {before}" in sentence
    assert checkpoint_to_resume(str(before), str(tmp_path), "train_lstm", not_asked) == before
    monkeypatch.chdir(tmp_path)  # the same folder by another name is still not the one before it
    with pytest.raises(UserError, match=f"--resume_from_checkpoint {before}$"):
        checkpoint_to_resume("checkpoint-16", str(tmp_path), "train_lstm", not_asked)


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
    _remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"] and (first / "mark").is_file()
    small_checkpoint(tmp_path, 8)
    assert not (first / "mark").exists() and checkpoint_problem(first) is None


def test_old_ones_go_only_after_the_newest_and_never_the_best(tmp_path, monkeypatch):
    for step in (8, 16, 24, 32):
        small_checkpoint(tmp_path, step)
    remove_old(tmp_path, None, 32)
    small_checkpoint(tmp_path, 40)  # of a run that went back, and is at step 32 again
    remove_old(tmp_path, 1, 32, keep_steps={16})
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-16", "checkpoint-32", "checkpoint-40"]
    monkeypatch.setattr(whole.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        remove_old(tmp_path, 1, 40)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-32", "checkpoint-40"]  # none is half removed


def test_the_lock_of_a_run_that_ends_leaves_no_room_for_two(tmp_path):
    """One has opened the lock file of a run and waits; when that ends, it has the lock, and a third finds it taken."""
    with lock_output_dir(tmp_path):
        with pytest.raises(UserError, match="--output_dir"), lock_output_dir(tmp_path):
            pass
        waiting = os.open(tmp_path / ".lock", os.O_RDWR)
    fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(UserError), lock_output_dir(tmp_path):
        pass
    os.close(waiting)


def test_checkpoints_of_another_run_are_in_the_way_until_they_may_go(tmp_path):
    """By their steps they would be kept in place of the new run's, and taken for its last."""
    other, run = small_checkpoint(tmp_path / "other", 16), tmp_path / "run"
    (other.parent / "config.json").write_text("{}")
    (other.parent / "model.safetensors").write_bytes(b"best of the other")
    small_checkpoint(run, 1000)
    for option in (None, str(other)):
        with pytest.raises(UserError, match=r"checkpoint-1000.*--overwrite_output_dir"):
            checkpoint_to_resume(option, str(run), "train_lstm", not_asked)
    assert checkpoint_to_resume(None, str(run), "train_lstm", not_asked, overwrite=True) is None
    assert not checkpoints(run) and checkpoint_to_resume(None, str(run), "train_lstm", not_asked) is None
    # Its best model goes with a checkpoint that goes on elsewhere, and takes no other's place unless it may.
    assert checkpoint_to_resume(str(other), str(run), "train_lstm", not_asked) == other
    copy_best_model(other, str(run))
    assert (run / "model.safetensors").read_bytes() == b"best of the other" and (run / "config.json").exists()
    checkpoint_to_resume(str(other), str(run), "train_lstm", not_asked)  # as after a kill before its first checkpoint
    (run / "model.safetensors").write_bytes(b"best of the run's")
    with pytest.raises(UserError, match="--overwrite_output_dir"):
        checkpoint_to_resume(str(other), str(run), "train_lstm", not_asked)
    copy_best_model(checkpoint_to_resume(str(other), str(run), "train_lstm", not_asked, overwrite=True), str(run))
    assert (run / "model.safetensors").read_bytes() == b"best of the other"


def test_a_checkpoint_of_another_script_is_refused(tmp_path):
    folder = small_checkpoint(tmp_path, 8, "train_scst")
    with pytest.raises(UserError, match=f"--resume_from_checkpoint {folder}"):
        checkpoint_to_resume(str(folder), str(tmp_path), "train_lstm", not_asked)


@pytest.mark.slow
def test_a_damaged_checkpoint_and_a_busy_folder_end_in_one_sentence(runs, tmp_path):
    script = "train_lstm"
    run = runs(script)
    shutil.copytree(run.folder / "undisturbed", tmp_path / "run")
    newest = checkpoints(tmp_path / "run")[-1]
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    arguments = [*run.arguments, "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "last"]
    with lock_output_dir(tmp_path / "run"):  # by this process; a script's own is another
        assert "--output_dir" in one_sentence(run, script, arguments, tmp_path)
    sentence = one_sentence(run, script, arguments, tmp_path)
    assert str(newest) in sentence and "model.safetensors" in sentence and "checkpoint-12" in sentence
    arguments[-1] = str(checkpoints(runs("train_vit_gpt2").folder / "undisturbed")[-1])
    assert f"--resume_from_checkpoint {arguments[-1]}" in one_sentence(run, script, arguments, tmp_path)


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


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint_and_one_sentence(runs, small_disk, tmp_path):
    script = "train_lstm"
    run = runs(script)
    checkpoint = run.folder / "undisturbed" / "checkpoint-15"
    model = [run.folder / "undisturbed" / path.name for path in checkpoint.iterdir()]
    one, best = disk_usage(checkpoint), sum(disk_usage(path) for path in model if path.exists())
    room = best + one * 5 // 2  # no third checkpoint has room while two are there
    subprocess.run(["mount", "-o", f"remount,size={room}k", small_disk], check=True)
    arguments = [*run.arguments, "--output_dir", str(small_disk / "run")]
    assert str(small_disk / "run") in one_sentence(run, script, arguments, tmp_path)
    left = checkpoints(small_disk / "run")
    assert left and all(checkpoint_problem(checkpoint) is None for checkpoint in left)
    assert [path.name for path in (small_disk / "run").iterdir() if path.name.startswith(".")] == [".lock"]
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    assert run_script(run.context, script, [*arguments, "--resume_from_checkpoint", "last"], tmp_path / "cache") == 0
    assert not differences(what_is_left(small_disk / "run"), run.expected)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_is_absent(runs, tmp_path):
    """The same with a limit on the size of a file, for which no rights are needed: here it forbids the optimizer's state."""
    script = "train_vit_gpt2"
    run = runs(script)
    checkpoint = run.folder / "undisturbed" / "checkpoint-15"
    arguments = [*run.arguments, "--output_dir", str(tmp_path / "run"), "--report_to", "none"]
    room = (checkpoint / "optimizer.pt").stat().st_size - 4096
    sentence = one_sentence(run, script, arguments, tmp_path, max_file_bytes=room)
    assert "checkpoint-3" in sentence and "--resume_from_checkpoint" not in sentence  # there is none before it
    assert not [path.name for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name]


@pytest.mark.slow
def test_a_read_only_folder_is_refused_before_any_work(runs, small_disk, tmp_path):
    script = "train_scst"
    run = runs(script)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    sentence = one_sentence(run, script, [*run.arguments, "--output_dir", str(small_disk / "run")], tmp_path)
    assert str(small_disk) in sentence
