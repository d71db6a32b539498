"""Several processes end where one ends, and none waits for one that is dead."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from kill_points import SCRIPTS, log_of, run_script, run_together, start_server
from safetensors.torch import load_file

from system.errors import UserError
from training.launch import check_sharding

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
# 120 captions in steps of 24. Ten images for validation and nine for the test, neither of which two processes share evenly.
OPTIONS = ["--learning_rate", "1e-3", "--dropout", "0", "--report_to", "none", "--num_train_epochs", "2"]
CAPTION_SCRIPTS = ["train_lstm", "train_vit_gpt2"]  # tests/test_scst.py has two processes of the third


@pytest.fixture(scope="module")
def context():
    return start_server()


@pytest.fixture(scope="module")
def alone(context, small_scenes, tmp_path_factory):
    """A run of each script in one process, made when it is asked for; and what it takes to run it in more."""
    made = {}

    def run(script: str) -> tuple[list[str], Path]:
        arguments = [*SCRIPTS[script], *OPTIONS, "--dataset_name", small_scenes]
        if script not in made:
            made[script] = tmp_path_factory.mktemp(script)
            options = ["--per_device_train_batch_size", "24", "--output_dir", str(made[script] / "one")]
            assert run_script(context, script, [*arguments, *options], made[script] / "cache") == 0
        return arguments, made[script]

    return run


def assert_same(ours: Path, theirs: Path) -> None:
    """Weights within 1e-4 (AdamW makes a full step of a gradient of rounding errors), the same captions and scores."""
    weights, expected = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert max((weights[name] - expected[name]).abs().max().item() for name in weights) < 1e-4
    assert (ours / "captions.jsonl").read_text() == (theirs / "captions.jsonl").read_text()
    assert len((ours / "captions.jsonl").read_text().splitlines()) == 9
    histories = [json.loads((folder / "history.json").read_text()) for folder in (ours, theirs)]
    for row, expected_row in zip(*histories, strict=True):
        for name in ("step", "train_loss", "eval_loss", "cider", "bleu_1"):
            assert row[name] == pytest.approx(expected_row[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("script", CAPTION_SCRIPTS)
def test_two_processes_end_where_one_ends(context, alone, script, tmp_path):
    arguments, folder = alone(script)
    arguments = [*arguments, "--per_device_train_batch_size", "12", "--output_dir", str(tmp_path / "two")]
    assert run_together(context, script, arguments, tmp_path / "cache", [None, None]) == [0, 0]
    assert_same(tmp_path / "two", folder / "one")
    assert len(list((tmp_path / "two" / "checkpoint-10").glob("rng_state_[01].pt"))) == 2


@pytest.mark.slow
def test_a_dead_process_ends_the_run_and_one_process_resumes_it(context, alone, tmp_path):
    """The second of two dies in the eighth step, two steps after a checkpoint inside the second epoch."""
    script = "train_vit_gpt2"
    arguments, folder = alone(script)
    arguments = [*arguments, "--save_steps", "1", "--output_dir", str(tmp_path / "run")]
    two = [*arguments, "--per_device_train_batch_size", "12"]
    first, second = run_together(context, script, two, tmp_path / "cache", [None, ("step", 8)])
    assert second == -signal.SIGKILL and first not in (0, -signal.SIGKILL)
    steps = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert steps[-1] == 7
    sizes = [*arguments, "--per_device_train_batch_size", "12", "--resume_from_checkpoint", "last"]
    assert run_script(context, script, sizes, tmp_path / "cache") == 2  # steps of another size
    assert "per_device_train_batch_size" in log_of(script, tmp_path / "cache").read_text()
    one = [*arguments, "--per_device_train_batch_size", "24", "--resume_from_checkpoint", "last"]
    assert run_script(context, script, one, tmp_path / "cache") == 0
    assert_same(tmp_path / "run", folder / "one")


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_and_three_resume(context, alone, tmp_path):
    script = "train_lstm"
    arguments, folder = alone(script)
    arguments = [*arguments, "--output_dir", str(tmp_path / "run")]
    two = [*arguments, "--per_device_train_batch_size", "12"]
    stopped = run_together(context, script, two, tmp_path / "cache", [None, ("step", 7)], by=signal.SIGTERM)
    assert stopped == [128 + signal.SIGTERM] * 2
    assert "checkpoint-7" in log_of(script, tmp_path / "cache").read_text()
    three = [*arguments, "--per_device_train_batch_size", "8", "--resume_from_checkpoint", "last"]
    assert run_together(context, script, three, tmp_path / "cache", [None] * 3) == [0] * 3
    assert_same(tmp_path / "run", folder / "one")


def fsdp2_environment() -> dict[str, str]:
    """What `accelerate launch` tells the processes of the checked-in config; the mixed precision excepted."""
    config = str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml")
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", config, "x.py"]))
    environment = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in environment.items() if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}


@pytest.mark.slow
@pytest.mark.parametrize("script", CAPTION_SCRIPTS)
def test_a_model_sharded_over_two_processes_ends_where_a_whole_one_does(context, alone, script, tmp_path):
    """FSDP2 as its config has it, two batches a step: stopped and resumed without it, and the other way round."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"FSDP2 of torch {torch.__version__} shards on GPUs alone; of 2.7 on CPUs, too")
    arguments, folder = alone(script)
    two = [*arguments, "--per_device_train_batch_size", "6", "--gradient_accumulation_steps", "2"]
    sharded = {"environment": fsdp2_environment(), "sharded": True}

    begun = ["--output_dir", str(tmp_path / "begun")]
    moments = [None, ("step", 7)]
    stopped = run_together(context, script, two + begun, tmp_path / "cache", moments, by=signal.SIGTERM, **sharded)
    assert stopped == [128 + signal.SIGTERM] * 2
    one = [*arguments, "--per_device_train_batch_size", "24", *begun, "--resume_from_checkpoint", "last"]
    assert run_script(context, script, one, tmp_path / "cache") == 0
    assert_same(tmp_path / "begun", folder / "one")

    ended = ["--output_dir", str(tmp_path / "ended"), "--resume_from_checkpoint", str(folder / "one" / "checkpoint-5")]
    assert run_together(context, script, two + ended, tmp_path / "cache", [None] * 2, **sharded) == [0, 0]
    assert_same(tmp_path / "ended", folder / "one")


def launch(options: list[str], log: Path) -> None:
    """Be `accelerate launch`, in a process that has its modules imported, which takes seconds."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update({"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""})
    os.chdir(ROOT)
    launch_command(launch_command_parser().parse_args(options))


@contextmanager
def launched(context, script: str, options: list[str], dataset: str, folder: Path) -> Iterator[tuple]:
    """A long run as a user starts it, once it has a checkpoint: the launcher, and its processes. `folder` gets the run and a log."""
    command = [*options, "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [f"{script}.py", *SCRIPTS[script], "--dataset_name", dataset, "--output_dir", str(folder / "run")]
    command += ["--num_train_epochs", "9999", "--eval_epochs", "9999", "--save_epochs", "9999", "--save_steps", "3"]
    command += ["--report_to", "none"]
    launcher = context.Process(target=launch, args=(command, folder / "log"))
    launcher.start()
    ends, processes = time.monotonic() + 150, []
    try:
        while not list((folder / "run").glob("checkpoint-*")):
            assert time.monotonic() < ends and launcher.is_alive(), (folder / "log").read_text()[-3000:]
            time.sleep(0.01)
        processes = children(launcher)
        yield launcher, processes
    finally:
        launcher.kill()
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def children(launcher: BaseProcess) -> list[int]:
    found = subprocess.run(["ps", "--ppid", str(launcher.pid), "-o", "pid="], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.slow
def test_the_launcher_ends_when_one_process_dies(context, small_scenes, tmp_path):
    """In the middle of a long run, from outside."""
    options = ["--multi_gpu", "--num_processes", "2"]
    with launched(context, "train_lstm", options, small_scenes, tmp_path) as (launcher, processes):
        assert len(processes) == 2
        os.kill(processes[1], signal.SIGKILL)
        launcher.join(90)
        assert launcher.exitcode not in (0, None)
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


LAUNCHERS = {"train_lstm": ["--multi_gpu", "--num_processes", "2"], "train_vit_gpt2": ["--num_processes", "1"]}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the launcher of one process leaves it alone")
@pytest.mark.parametrize("script", LAUNCHERS)
def test_sigterm_to_the_launcher_saves_too(context, small_scenes, tmp_path, script):
    with launched(context, script, LAUNCHERS[script], small_scenes, tmp_path) as (launcher, processes):
        launcher.terminate()
        launcher.join(90)
        assert launcher.exitcode not in (0, None)
        ends = time.monotonic() + 60
        while any(Path(f"/proc/{pid}").exists() for pid in processes):
            assert time.monotonic() < ends, "the run has outlived its launcher"
            time.sleep(0.01)
    newest = max(int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    (sentence,) = re.findall("stopped by SIGTERM.*", (tmp_path / "log").read_text())
    assert f"checkpoint-{newest} " in sentence and "--resume_from_checkpoint last" in sentence


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("script", CAPTION_SCRIPTS)
def test_two_gpus_share_a_model(small_scenes, tmp_path, script):
    """The checked-in config as it is, bfloat16 and NCCL included."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/fsdp2.yaml"]
    command += ["--num_processes", "2", "--main_process_port", "0", f"{script}.py", *SCRIPTS[script], *OPTIONS]
    command += ["--dataset_name", small_scenes, "--output_dir", str(tmp_path / "run")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "false"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len((tmp_path / "run" / "captions.jsonl").read_text().splitlines()) == 9
    assert all(value.isfinite().all() for value in load_file(tmp_path / "run" / "model.safetensors").values())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_accepts_the_config(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1 and str(config.mixed_precision) == "bf16"
    (script, recipe) = re.findall(r"(train_\w+\.py) (recipes/\w+\.yaml)", path.read_text())[0]
    assert (ROOT / script).is_file() and (ROOT / recipe).is_file()
    assert f"--config_file recipes/accelerate/{path.name}" in path.read_text()


SHARDINGS = {
    "FSDP_VERSION": "1",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


@pytest.mark.parametrize("name", SHARDINGS)
def test_a_model_is_shared_as_the_config_has_it_or_not_at_all(monkeypatch, name):
    for setting, value in fsdp2_environment().items():
        monkeypatch.setenv(setting, value)
    check_sharding()
    monkeypatch.setenv(name, SHARDINGS[name])
    with pytest.raises(UserError, match=rf"{name}.*fsdp2\.yaml"):
        check_sharding()


LAUNCHES = {
    "DeepSpeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, "fsdp2.yaml"),
    "no GPUs": ({"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "false"}, "ACCELERATE_USE_CPU"),
    "an average of shards": ({"ACCELERATE_USE_FSDP": "true"}, "--ema_decay"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_launch_that_cannot_go_well_is_refused(context, small_scenes, tmp_path, launch):
    environment, named = LAUNCHES[launch]
    arguments = [
        *SCRIPTS["train_lstm"],
        *OPTIONS,
        "--dataset_name",
        small_scenes,
        "--output_dir",
        str(tmp_path / "run"),
    ]
    arguments += ["--ema_decay", "0.9"]
    assert run_script(context, "train_lstm", arguments, tmp_path / "cache", environment=environment) == 2
    (sentence,) = re.findall("^error: (.*)$", log_of("train_lstm", tmp_path / "cache").read_text(), flags=re.MULTILINE)
    assert named in sentence and not (tmp_path / "run").exists()
