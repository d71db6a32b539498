"""Runs of the training scripts in processes of their own, killed where a test wants it.

python tests/kill_points.py --runs 20     kills each script at 20 moments, resumes it, and compares with the undisturbed run
python tests/kill_points.py --shards 64   the same of training on so many webdataset tars
python tests/kill_points.py --encode 64   four processes encode so many tars; one is killed twice, and they are started again
"""

import argparse
import faulthandler
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

SCRIPTS = {
    "train_lstm": [
        *("--encoder", "test_efficientnet", "--pretrained_encoder", "false", "--image_size", "64"),
        *("--image_embed_dim", "32", "--hidden_size", "32", "--num_hidden_layers", "1", "--vocab_size", "120"),
    ],
    "train_vit_gpt2": [
        *("--pretrained_encoder", "false", "--pretrained_decoder", "false", "--image_size", "32"),
        *("--hidden_size", "32", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--prompt", "an image:"),
        *("--vocab_size", "120"),
    ],
    "train_scst": ["--num_samples", "2", "--max_length", "12"],  # and --model_name_or_path, see `start_options`
}
HANGS_AFTER = 200  # seconds; ten before them a process writes into its log where it stands
# 120 captions in steps of 24, or 24 images in steps of 5: five steps an epoch, three epochs, a checkpoint inside each epoch and one at
# its end: all that a run has to remember.
OPTIONS = [
    *("--num_train_epochs", "3", "--learning_rate", "1e-2", "--dropout", "0.3", "--num_augmentations", "2"),
    *("--lr_scheduler_type", "cosine", "--warmup_steps", "3", "--save_steps", "3", "--save_total_limit", "2"),
    *("--early_stopping_patience", "5", "--report_to", "tensorboard"),
]
# The same of shards, whose epochs have no end that is known.
SHARD_OPTIONS = [
    *("--streaming", "true", "--max_steps", "30", "--eval_steps", "9", "--save_steps", "4", "--learning_rate", "1e-2"),
    *("--dropout", "0.3", "--num_augmentations", "2", "--save_total_limit", "2", "--lr_scheduler_type", "cosine"),
    *("--per_device_train_batch_size", "24", "--ema_decay", "0.9", "--report_to", "tensorboard"),
]
# What the weights that are evaluated are made of, where they are not those that are trained; and a part of the encoder that learns.
OWN_OPTIONS = {
    "train_lstm": [
        *("--per_device_train_batch_size", "24", "--ema_decay", "0.9", "--eval_steps", "4", "--logging_steps", "2"),
        *(
            "--freeze_encoder",
            "false",
            "--encoder_learning_rate",
            "1e-3",
        ),  # its BatchNorm statistics follow the batches
    ],
    "train_vit_gpt2": ["--per_device_train_batch_size", "24", "--ema_decay", "0.9"],
    "train_scst": ["--per_device_train_batch_size", "5", "--init_weight_share", "0.3", "--xe_weight", "0.2"],
}
# Modules that the scripts, or the libraries they use, import when they need them.
IMPORTED_LATE = [
    *("accelerate.commands.launch", "torch.distributed.run", "modeling.encoders"),
    "torch.nn.modules.linear_cross_entropy",
    *("torch.utils.tensorboard", "matplotlib.backends.backend_agg", "torch._dynamo", "training.run", "training.lora"),
    *("training.self_critical", "training.tokenizers", "training.encoder_training", "modeling.inception_lstm"),
    *(f"transformers.models.{kind}.modeling_{kind}" for kind in ("vit", "gpt2", "vision_encoder_decoder")),
]
# What is counted, and how often it happens in such a run at least.
MOMENTS = {"step": 15, "stepped": 15, "evaluation": 3, "torch.save": 16, "sync": 100, "rename": 100, "encoder": 4}


def start_options(script: str, dataset: str, folder: Path) -> list[str]:
    """The captioner that `train_scst.py` starts from, made when it is asked for; nothing for the others."""
    if script != "train_scst":
        return []
    if not folder.exists():
        import torch

        from data_scripts import load_captions
        from data_scripts.train_tokenizer import train_tokenizer
        from modeling.inception_lstm import build_inception_lstm

        captions = [text for texts in load_captions(dataset)["train"]["captions"] for text in texts]
        torch.manual_seed(0)
        sizes = {"image_embed_dim": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
        captioner = build_inception_lstm(
            "test_efficientnet", train_tokenizer(captions, 120), pretrained_encoder=False, image_size=64, **sizes
        )
        captioner.save(folder)
    return ["--model_name_or_path", str(folder)]


def write_shards(splits, folder: Path, images_per_shard: int) -> None:
    """Write a table's images and captions as webdataset tars: so many in each of training, all of another split in one."""
    import io
    import tarfile

    import datasets

    for split, rows in splits.items():
        rows = rows.cast_column("image", datasets.Image(decode=False))
        size = images_per_shard if split == "train" else len(rows)
        for shard, start in enumerate(range(0, len(rows), size)):
            with tarfile.open(folder / f"{split}-{shard:05}.tar", "w") as tar:
                for number, row in enumerate(rows.select(range(start, min(start + size, len(rows)))), start):
                    members = {"png": row["image"]["bytes"], "txt": repr(row["captions"]).encode()}
                    for ending, content in members.items():
                        member = tarfile.TarInfo(f"{number:05}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))


def start_server() -> multiprocessing.context.BaseContext:
    """Processes that begin with everything imported, by a fork of one that has run nothing: the one server of all tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*SCRIPTS, *IMPORTED_LATE, "caption"])
    return context


def run_script(context, script: str, arguments: list[str], cache: Path, moment=None, **conditions) -> int:
    """Run a script to its end, or to the moment at which it gets a signal. Returns the exit code, -9 where it was killed."""
    (code,) = run_together(context, script, arguments, cache, [moment], **conditions)
    return code


def run_together(
    context,
    script: str,
    arguments: list[str],
    cache: Path,
    moments: list[tuple[str, float] | None],
    environment: dict[str, str] | None = None,
    **conditions,
) -> list[int]:
    """Run a script in as many processes as there are moments, as `accelerate launch` would start them. Returns their codes.

    Args:
        cache: Folder for the features of the encoder. What the processes say goes to files beside it.
        moments: When each process gets a signal, as `arm` has it; None for never.
        environment: Variables of the launcher's.
        conditions: `by`, the signal, `max_file_bytes`, the longest file that can be written, and `sharded`, whether FSDP2 is to
            be used if the environment wants it.

    Raises:
        TimeoutError: One of them did not come to an end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank, moment in enumerate(moments):
        # No card is to be seen: torch's barrier would take the process's number for that of one.
        variables = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
        if len(moments) > 1:
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
            variables |= {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(moments))}
        log = log_of(script, cache, rank)
        run = {"script": script, "arguments": arguments, "cache": str(cache), "moment": moment, "log": str(log)}
        processes.append(context.Process(target=_run, kwargs={**run, "environment": variables, **conditions}))
        processes[-1].start()
    ends = time.monotonic() + HANGS_AFTER
    for process in processes:
        process.join(max(ends - time.monotonic(), 0))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hanging:
        processes[rank].kill()
    if hanging:
        where = "\n".join(log_of(script, cache, rank).read_text() for rank in hanging)
        raise TimeoutError(f"{script}: processes {hanging} of {len(processes)} ran for {HANGS_AFTER} seconds\n{where}")
    return [process.exitcode for process in processes]


def log_of(script: str, cache: Path, rank: int = 0) -> Path:
    return cache.parent / f"{script}-{rank}.log"


def _run(
    script: str,
    arguments: list[str],
    cache: str,
    moment: tuple[str, float] | None,
    log: str,
    environment: dict[str, str],
    by: int = signal.SIGKILL,
    max_file_bytes: int | None = None,
    sharded: bool = False,
) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(HANGS_AFTER - 10, file=2)
    os.environ.update(environment)
    import datasets
    import torch

    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    # They are drawn from history.json alone, and would take half the time.
    sys.modules["training.run"].draw_curves = lambda *_: None
    if max_file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
    if sharded:
        shard_on_cpus()
    if moment:
        arm(*moment, by)
    sys.modules[script].main(arguments)


def shard_on_cpus() -> None:
    """Have Accelerate take this process's CPU for a GPU where it decides on FSDP, which it leaves out on CPUs without a word."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    plain = PartialState.__init__

    def init(self, *args, **kwargs) -> None:
        plain(self, *args, **kwargs)
        if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def arm(kind: str, count: float, by: int) -> None:
    """Have this process send itself a signal when something happens for the count-th time, or after so many seconds."""
    import shutil

    import torch
    import transformers

    import modeling.modeling_inception_lstm
    import training.run

    if kind == "seconds":
        timer = threading.Timer(count, os.kill, (os.getpid(), by))
        timer.daemon = True
        timer.start()
        return
    places = {
        "step": [(torch.optim.AdamW, "step")],
        "stepped": [(torch.optim.AdamW, "step")],
        "evaluation": [(training.run.TrainingRun, "_evaluate")],
        "torch.save": [(torch, "save")],
        "sync": [(os, "fsync")],
        "rename": [(os, "replace"), (shutil, "rmtree")],
        "encoder": [
            (modeling.modeling_inception_lstm.TimmEncoder, "forward"),
            (transformers.ViTModel, "forward"),
        ],
    }
    seen = 0

    def counted(plain: Callable) -> Callable:
        def call(*args, **kwargs) -> Any:
            nonlocal seen
            seen += 1
            result = plain(*args, **kwargs) if kind == "stepped" else None
            if seen == count:
                os.kill(os.getpid(), by)
            return result if kind == "stepped" else plain(*args, **kwargs)

        return call

    for owner, name in places[kind]:
        setattr(owner, name, counted(getattr(owner, name)))


def what_is_left(folder: Path) -> dict:
    """All that two runs have to agree on, times of the clock excepted."""
    import torch
    from safetensors.torch import load_file
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    left: dict[str, Any] = {"files": sorted(path.name for path in folder.iterdir())}
    left["weights"] = load_file(folder / "model.safetensors")
    for checkpoint in sorted(folder.glob("checkpoint-*")):
        for path in sorted(checkpoint.iterdir()):
            name = f"{checkpoint.name}/{path.name}"
            if path.suffix == ".safetensors":
                left[name] = load_file(path)
            elif path.suffix == ".pt":
                left[name] = torch.load(path, weights_only=True)
            elif path.suffix == ".json" and path.name != "checksums.json":
                left[name] = json.loads(path.read_text())
    left["history"] = json.loads((folder / "history.json").read_text())
    left["results"] = json.loads((folder / "results.json").read_text())
    left["captions"] = (folder / "captions.jsonl").read_text()
    events = EventAccumulator(str(folder / "logs")).Reload()
    left["curve"] = {
        tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    return _without_times(left)


TIMES = ("seconds", "per_second")


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if not str(key).endswith(TIMES)}
    if isinstance(value, list | tuple):
        return [_without_times(item) for item in value]
    return value


def differences(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """Where two nests of values differ, by a bit."""
    import numpy as np
    import torch

    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = [f"{place}/{key} is in one only" for key in sorted(map(str, ours.keys() ^ theirs.keys()))]
        return names + [
            line
            for key in ours.keys() & theirs.keys()
            for line in differences(ours[key], theirs[key], f"{place}/{key}")
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [line for number, pair in pairs for line in differences(*pair, f"{place}/{number}")]
    if isinstance(ours, torch.Tensor):
        same = torch.equal(ours, theirs)
    elif isinstance(ours, np.ndarray):
        same = np.array_equal(ours, theirs)
    else:
        same = ours == theirs
    return [] if same else [f"{place}: {str(ours)[:200]} and {str(theirs)[:200]}"]


def choose_moments(runs: int, seconds: float, seed: int) -> list[tuple[str, float]]:
    """Moments of death: of each kind in turn, and by the clock, at counts and times that only the seed decides."""
    chance = random.Random(seed)
    kinds = [*MOMENTS, "seconds"]
    chosen: list[tuple[str, float]] = []
    while len(chosen) < runs:
        kind = kinds[len(chosen) % len(kinds)]
        count = round(chance.uniform(0.05, 0.9) * seconds, 3)
        if kind != "seconds":
            count = chance.choice([count for count in range(1, MOMENTS[kind] + 1) if (kind, count) not in chosen])
        chosen.append((kind, count))
    return chosen


class Comparison:
    """An undisturbed run of a script, and killed ones beside it."""

    def __init__(self, context, script: str, options: list[str], dataset: str, folder: Path):
        self.context, self.script, self.folder = context, script, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.arguments = [*SCRIPTS[script], *options, "--dataset_name", dataset]
        self.arguments += start_options(script, dataset, folder / "start")
        first = context.Process(target=time.sleep, args=(0,))  # the server imports everything before it
        first.start()
        first.join()
        started = time.perf_counter()
        code = self._run("undisturbed", "undisturbed")
        if code:
            raise RuntimeError(f"{script} ended with {code}")
        self.seconds = time.perf_counter() - started
        self.expected = what_is_left(folder / "undisturbed")

    def _run(self, name: str, cache: str, moment: tuple[str, float] | None = None) -> int:
        # The folder's name is on the card, so it is the same for all; each run has a cache of features of its own.
        arguments = [*self.arguments, "--output_dir", str(self.folder / name)]
        if name != "undisturbed":
            arguments += ["--resume_from_checkpoint", "last"]
        return run_script(self.context, self.script, arguments, self.folder / f"cache-{cache}", moment)

    def kill_and_resume(self, moment: tuple[str, float]) -> tuple[int, list[str]]:
        """Exit code of the run that was to be killed, and in what the resumed run has ended otherwise."""
        name = "-".join(map(str, moment))
        killed = self._run(name, name, moment)
        resumed = self._run(name, name)
        if resumed:
            return killed, [f"the resumed run ended with {resumed}"]
        return killed, differences(what_is_left(self.folder / name), self.expected)


def encode_with_kills(tars: Path, model: str, folder: Path) -> bool:
    """Whether four processes, of which one is killed after an eighth of the shards and after half, encode each shard once, those in
    flight excepted, to what one process makes of them."""
    import pyarrow.parquet as pq

    number = len(list(tars.glob("train-*.tar")))
    finished: list[str] = []
    for kill_at in (number // 8, number // 2, None):
        log = folder / f"encode-{kill_at}.log"
        launch = encode_command(4, tars, model, folder / "four")
        with open(log, "w") as file:
            launcher = subprocess.Popen(
                launch, stdout=file, stderr=file, env={**os.environ, "ACCELERATE_USE_CPU": "true"}
            )
        while kill_at and launcher.poll() is None:
            if len(list((folder / "four").glob("*.parquet"))) >= kill_at:
                children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
                os.kill(int(children[-1]), signal.SIGKILL)
                break
            time.sleep(0.001)
        code = launcher.wait()
        finished += re.findall(r"(train-\d+)\.tar: \d+ images", log.read_text())
        there = len(list((folder / "four").glob("*.parquet")))
        print(f"killed at {kill_at}: the launcher ended with {code}, {there} of {number} shards are there", flush=True)
    subprocess.run(encode_command(1, tars, model, folder / "one"), check=True, capture_output=True)
    kept, again = ({path.name: pq.read_table(path) for path in (folder / name).glob("*")} for name in ("four", "one"))
    same = kept.keys() == again.keys() and all(kept[name].equals(again[name]) for name in again)
    print(
        f"{len(finished)} shards said to be finished, {len(set(finished))} of them different; equal to one process's: {same}"
    )
    return same and len(finished) == len(set(finished)) == number


def encode_command(num_processes: int, tars: Path, model: str, folder: Path) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(num_processes)]
    launch += ["--multi_gpu"] if num_processes > 1 else ["--cpu"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    options = ["--model_name_or_path", model, "--output_dir", str(folder)]
    return [*launch, "-m", "training.encode", f"{tars}/train-*.tar", *options]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="kills of each script")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--shards", type=int, default=0, help="number of tars to train on; a table where 0")
    parser.add_argument("--encode", type=int, default=0, help="number of tars to encode, in place of training")
    arguments = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    from data_scripts import load_captions
    from data_scripts.caption_table import write_caption_table
    from data_scripts.scenes import scene_rows

    context = start_server()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "scenes"
        num_scenes = {"train": 2 * (arguments.shards or arguments.encode) or 24, "validation": 10, "test": 9}
        write_caption_table(scene_rows(num_scenes, num_captions=dict.fromkeys(num_scenes, 5)), dataset)
        if arguments.shards or arguments.encode:
            tars = Path(folder) / "tars"
            tars.mkdir()
            write_shards(load_captions(str(dataset)), tars, images_per_shard=2)
            dataset = tars
        if arguments.encode:
            (_, model) = start_options("train_scst", str(Path(folder) / "scenes"), Path(folder) / "start")
            raise SystemExit(not encode_with_kills(tars, model, Path(folder)))
        scripts = [
            script for script in SCRIPTS if not arguments.shards or script != "train_scst"
        ]  # which takes no shards
        for script in scripts:
            options = SHARD_OPTIONS if arguments.shards else [*OPTIONS, *OWN_OPTIONS[script]]
            comparison = Comparison(context, script, options, str(dataset), Path(folder) / script)
            for moment in choose_moments(arguments.runs, comparison.seconds, arguments.seed):
                killed, found = comparison.kill_and_resume(moment)
                bad += bool(found)
                print(
                    script, *moment, "killed" if killed == -9 else f"ended with {killed}", found or "same", flush=True
                )
    print(f"{bad} of {arguments.runs * len(scripts)} resumed runs ended otherwise than the undisturbed one")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
