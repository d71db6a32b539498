"""Several processes end where one ends, and none waits for one that is dead."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from kill_points import SCRIPTS, log_of, run_script, run_together, start_server
from safetensors.torch import load_file

from training.checkpoints import check_launch

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
# 120 captions in steps of 24. Ten pictures for validation and nine for the test, neither of which two processes share evenly.
OPTIONS = ["--learning_rate", "1e-3", "--dropout", "0", "--report_to", "none", "--num_train_epochs", "2"]


@pytest.fixture(scope="module")
def context():
    return start_server()


@pytest.fixture(scope="module")
def alone(context, small_scenes, tmp_path_factory):
    """A run of each script in one process, made when it is asked for; and what it takes to run it in more."""
    made = {}

    def run(script: str) -> tuple[list[str], Path]:
        arguments = [*SCRIPTS[script], *OPTIONS, "--dataset", small_scenes]
        if script not in made:
            made[script] = tmp_path_factory.mktemp(script)
            options = ["--per_device_train_batch_size", "24", "--output_dir", str(made[script] / "one")]
            assert run_script(context, script, [*arguments, *options], made[script] / "cache") == 0
        return arguments, made[script]

    return run


def assert_same(ours: Path, theirs: Path) -> None:
    """Weights within 1e-5, and so the same captions, each picture once, and the same scores."""
    weights, expected = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert max((weights[name] - expected[name]).abs().max().item() for name in weights) < 1e-5
    assert (ours / "captions.jsonl").read_text() == (theirs / "captions.jsonl").read_text()
    assert len((ours / "captions.jsonl").read_text().splitlines()) == 9
    histories = [json.loads((folder / "history.json").read_text()) for folder in (ours, theirs)]
    for row, expected_row in zip(*histories, strict=True):
        for name in ("step", "train_loss", "eval_loss", "cider", "bleu_1"):
            assert row[name] == pytest.approx(expected_row[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_end_where_one_ends(context, alone, script, tmp_path):
    arguments, folder = alone(script)
    arguments = [*arguments, "--per_device_train_batch_size", "12", "--output_dir", str(tmp_path / "two")]
    assert run_together(context, script, arguments, tmp_path / "cache", [None, None]) == [0, 0]
    assert_same(tmp_path / "two", folder / "one")
    assert len(list((tmp_path / "two" / "checkpoint-10").glob("r*_*_[01].p*"))) == 2  # random states of both


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dead_process_ends_the_run_and_one_process_goes_on(context, alone, script, tmp_path):
    """The second of two dies in the seventh step, two steps after a checkpoint inside the second epoch."""
    arguments, folder = alone(script)
    arguments = [*arguments, "--save_steps", "1", "--output_dir", str(tmp_path / "run")]
    two = [*arguments, "--per_device_train_batch_size", "12"]
    first, second = run_together(context, script, two, tmp_path / "cache", [None, ("step", 8)])
    assert second == -signal.SIGKILL and first not in (0, -signal.SIGKILL)
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert steps[-1] == 7
    sizes = [*arguments, "--per_device_train_batch_size", "12", "--resume_from_checkpoint", "last"]
    assert run_script(context, script, sizes, tmp_path / "cache") == 2
    assert "was made with 24 captions a step, here are 12" in log_of(script, tmp_path / "cache").read_text()
    one = [*arguments, "--per_device_train_batch_size", "24", "--resume_from_checkpoint", "last"]
    assert run_script(context, script, one, tmp_path / "cache") == 0
    assert_same(tmp_path / "run", folder / "one")


@pytest.mark.parametrize("script", SCRIPTS)
def test_sigterm_to_one_process_stops_all_and_three_go_on(context, alone, script, tmp_path):
    arguments, folder = alone(script)
    arguments = [*arguments, "--output_dir", str(tmp_path / "run")]
    two = [*arguments, "--per_device_train_batch_size", "12"]
    stopped = run_together(context, script, two, tmp_path / "cache", [None, ("step", 7)], by=signal.SIGTERM)
    assert stopped == [128 + signal.SIGTERM] * 2
    assert "stopped by SIGTERM; checkpoint-7 is saved" in log_of(script, tmp_path / "cache").read_text()
    three = [*arguments, "--per_device_train_batch_size", "8", "--resume_from_checkpoint", "last"]
    assert run_together(context, script, three, tmp_path / "cache", [None] * 3) == [0] * 3
    assert_same(tmp_path / "run", folder / "one")


def test_the_launcher_ends_when_one_process_dies(small_scenes, tmp_path):
    """As a user starts it, from outside, in the middle of a long run."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [
        "train_lstm.py",
        *SCRIPTS["train_lstm"],
        "--dataset",
        small_scenes,
        "--output_dir",
        str(tmp_path / "run"),
    ]
    command += ["--num_train_epochs", "9999", "--eval_epochs", "9999", "--save_epochs", "9999", "--save_steps", "3"]
    command += ["--report_to", "none"]
    with open(tmp_path / "log", "w") as log:
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    ends = time.monotonic() + 150
    while not list((tmp_path / "run").glob("checkpoint-*")):
        assert time.monotonic() < ends and launcher.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.2)
    children = subprocess.run(["ps", "--ppid", str(launcher.pid), "-o", "pid="], capture_output=True, text=True)
    processes = [int(pid) for pid in children.stdout.split()]
    assert len(processes) == 2
    os.kill(processes[1], signal.SIGKILL)
    assert launcher.wait(timeout=90) != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_accepts_the_config(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1 and str(config.mixed_precision) == "bf16"
    (script, recipe) = re.findall(r"(train_\w+\.py) (recipes/\w+\.yaml)", path.read_text())[0]
    assert (ROOT / script).is_file() and (ROOT / recipe).is_file()
    assert f"--config_file recipes/accelerate/{path.name}" in path.read_text()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_sharded_model_is_refused(monkeypatch, kind):
    """FSDP2 was tried: the steps go well, and the evaluation of an uneven split waits forever."""
    check_launch()
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(ValueError, match=r"several_gpus\.yaml"):
        check_launch()


LAUNCHES = {
    "FSDP shares one model": {"ACCELERATE_USE_FSDP": "true"},
    "2 processes were launched for GPUs, of which there are none": {"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "false"},
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
@pytest.mark.parametrize("sentence", LAUNCHES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_launch_that_cannot_go_well_is_refused(context, small_scenes, tmp_path, script, sentence):
    arguments = [*SCRIPTS[script], *OPTIONS, "--dataset", small_scenes, "--output_dir", str(tmp_path / "run")]
    arguments += ["--use_cpu", "false"] if script == "train_vit_gpt2" else []
    code = run_script(context, script, arguments, tmp_path / "cache", environment=LAUNCHES[sentence])
    assert code == 2 and f"error: {sentence}" in log_of(script, tmp_path / "cache").read_text()
    assert not (tmp_path / "run").exists()
