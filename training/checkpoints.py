"""Checkpoints that are whole or absent, and an output directory that one run has for itself.

A checkpoint is written beside its place by all processes, gets a file with the checksum of every other file, goes to the
disk, and is then renamed by the main process. The folder has to be one that all processes see.
"""

import filecmp
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from accelerate.utils.constants import FSDP_MODEL_NAME
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME

from modeling.caption_loss import computes_in_bfloat16
from system.errors import UserError
from system.files import write_file

CHECKSUMS = "checksums.json"
IN_FLOAT32 = "bf16: this device has no instructions for bfloat16, so training computes in float32."
# What Accelerate takes where the launcher says nothing, and what is needed: FSDP1 is another thing; parts saved by themselves
# are read with pickle; and every process has to have the weights, to encode images and for its copy.
FSDP_SETTINGS = {
    "FSDP_VERSION": ("1", "2"),
    "FSDP_STATE_DICT_TYPE": ("SHARDED_STATE_DICT", "FULL_STATE_DICT"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "FALSE"),
}


@contextmanager
def lock_output_dir(output_dir: str | os.PathLike) -> Iterator[None]:
    """Keep other runs out of `output_dir` as long as this one is in it, and clear away what a killed one left half done.

    Raises:
        OSError: Another run is in it, or nothing can be written there.
    """
    state = PartialState()
    if not state.is_main_process:
        yield
        return
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / ".lock"  # let go by the system when the process ends, however it ends
    try:
        lock = FileLock(path).acquire(timeout=0)
    except Timeout as error:
        raise OSError(
            f"another run writes into {output_dir}: wait for its end, or give another --output_dir"
        ) from error
    try:
        clear_leftovers(output_dir)
        yield
    except SafetensorError as error:  # its own for a full disk
        raise OSError(f"{output_dir} cannot be written to: {error}") from error
    finally:
        path.unlink(missing_ok=True)
        lock.lock.release()


def check_not_overwriting_start(model: str, output_dir: str | os.PathLike) -> None:
    """Raise ValueError where a run would write over the captioner that it goes on from."""
    if Path(model).resolve() == Path(output_dir).resolve():
        raise UserError(
            f"--output_dir {output_dir} is the --model_name_or_path's own folder, which would be lost: give another"
        )


def refuse_deepspeed() -> None:
    """To be asked before Accelerate and the Trainer are, which want DeepSpeed to be installed.

    Raises:
        ValueError: The launcher wants DeepSpeed.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "DEEPSPEED is not supported: run with recipes/accelerate/fsdp2.yaml, which shares one model among the processes, "
            "or with several_gpus.yaml, which gives each a whole one"
        )


def check_launch() -> None:
    """See to it that the processes know of one another, and that a model is shared out in no other way than works.

    Raises:
        ValueError: The launcher wants what is not there, or what is not done.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and PartialState().num_processes == 1:
        raise UserError(
            f"{started} processes were launched for GPUs, of which there are none: launch one process, or set ACCELERATE_USE_CPU=true"
        )
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        for name, (default, needed) in FSDP_SETTINGS.items():
            given = os.environ.get(name, default)
            if given.upper() != needed:
                raise UserError(f"{name} is {given}, and has to be {needed}: run with recipes/accelerate/fsdp2.yaml")


def has_bfloat16(use_cpu: bool = False) -> bool:
    """Whether the device that is going to be trained on is known to have instructions for bfloat16: a processor or a CUDA card.

    Elsewhere, where it is one of these, torch has no LSTM in it, and its products take up to a hundred times as long as in float32.
    """
    use_cpu = use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    device = torch.device("cpu") if use_cpu else torch.accelerator.current_accelerator()
    return computes_in_bfloat16(device)


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def clear_leftovers(output_dir: Path) -> None:
    """Remove what a killed run was writing or removing; a checkpoint it was about to replace is put back."""
    for replaced in output_dir.glob(".checkpoint-*.replaced"):
        whole = output_dir / replaced.name[1:].removesuffix(".replaced")
        if not whole.exists():
            os.replace(replaced, whole)
    for pattern in (".checkpoint-*", ".saving-*", ".pushing-*"):
        for folder in output_dir.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)
    for file in output_dir.glob(".*.*"):
        if file.name.rpartition(".")[2].isdigit():  # .history.json.4711, as `write_file` names it until it is whole
            file.unlink()


@contextmanager
def new_checkpoint(output_dir: str | os.PathLike, step: int) -> Iterator[Path]:
    """Give the folder into which all processes write; at the end of the block it becomes `checkpoint-STEP`.

    Raises:
        OSError: It cannot be written. Nothing of it is left, and the sentence names the newest one that is there.
    """
    state = PartialState()
    folder = Path(output_dir) / f"checkpoint-{step}"
    scratch = folder.with_name(f".{folder.name}.partial")
    beside = scratch / folder.name  # the Trainer gives its checkpoints their name itself
    try:
        if state.is_main_process:
            beside.mkdir(parents=True, exist_ok=True)
        state.wait_for_everyone()
        yield beside
        state.wait_for_everyone()
        if state.is_main_process:
            _write_checksums(beside)
            _put_in_place(beside, folder)
            scratch.rmdir()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        shutil.rmtree(scratch, ignore_errors=True)
        raise OSError(
            f"{folder} could not be written ({_reason(error, folder.parent)}); {newest_whole(output_dir)}"
        ) from error
    state.wait_for_everyone()


def _reason(error: Exception, folder: Path) -> str:
    if shutil.disk_usage(folder).free < 2**20:  # torch says something about positions in a file
        return "no space is left on the disk"
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def newest_whole(output_dir: str | os.PathLike) -> str:
    """Say from where a run can go on."""
    found = checkpoints(output_dir)
    if not found:
        return "there is no checkpoint before it"
    return f"{found[-1]} is the last one before: go on from it with --resume_from_checkpoint last"


def _write_checksums(folder: Path) -> None:
    sums = {str(path.relative_to(folder)): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _put_in_place(beside: Path, folder: Path) -> None:
    """Bring a folder to the disk, then give it its name. One that bears the name already goes only after that."""
    for path in [*beside.rglob("*"), beside]:
        _sync(path)
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(beside, folder)
    _sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def drop_old(output_dir: str | os.PathLike, limit: int | None, step: int, keep_steps: Collection[int] = ()) -> None:
    """Remove the oldest checkpoints beyond `limit`, never that of `step` and none of `keep_steps`; all stay where it is None.

    Called by the main process, after the newest, that of `step`, has its name. Later ones are there where the run went back.
    """
    found = [checkpoint for checkpoint in checkpoints(output_dir) if step_of(checkpoint) <= step]
    for old in found[:-limit] if limit else []:
        if step_of(old) not in keep_steps:
            _remove(old)


def _remove(checkpoint: Path) -> None:
    # Renamed first: a kill in the middle of the removing leaves no half checkpoint.
    leaving = checkpoint.with_name(f".{checkpoint.name}.partial")
    os.replace(checkpoint, leaving)
    shutil.rmtree(leaving)


def checkpoint_problem(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint's files, or None if they are as they were written."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        for name, expected in sums.items():
            if _sha256(folder / name) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"its files cannot be read: {error}"
    return None


def checkpoint_to_resume(
    option: str | None, output_dir: str, state_file: str, download: Callable[[str], Path], overwrite: bool = False
) -> Path | None:
    """The folder that `--resume_from_checkpoint` means; None where there is nothing to resume.

    Args:
        option: A checkpoint folder, `last`, or what `download` knows.
        state_file: The file in which this script's checkpoints tell where the run stood.
        download: Given an option that is no folder here, brings the checkpoint and what lies beside it.
        overwrite: Whether another run's checkpoints in `output_dir` are removed.

    Raises:
        ValueError: There is no checkpoint, it is another script's, or it is damaged; or `output_dir` is another run's.
    """
    found = checkpoints(output_dir)
    if option is None:
        _clear_of_others(found, output_dir, overwrite)
        return None
    if option == "last":
        if not found:
            if PartialState().is_main_process:
                print(f"{output_dir} holds no checkpoint: starting from the beginning.")
            return None
        folder = found[-1]
    else:
        folder = Path(option)
        if not folder.is_dir():
            folder = download(option)
    # One process reads the files, which may be many gigabytes, for all.
    problem = broadcast_object_list([checkpoint_problem(folder) if PartialState().is_main_process else None])[0]
    if problem:
        places = [place for place, other in enumerate(found) if other.samefile(folder)]
        before = found[: places[0]] if places else found
        offer = (
            f"go on from the one before with --resume_from_checkpoint {before[-1]}"
            if before
            else "there is none before"
        )
        raise UserError(f"{folder} is damaged ({problem}): {offer}")
    if not (folder / state_file).is_file():
        raise UserError(f"--resume_from_checkpoint {folder}: a checkpoint of another training script")
    if not _lies_in(folder, output_dir):
        _clear_of_others(found, output_dir, overwrite)
        names = [path.name for path in folder.parent.glob("*.safetensors")]
        same = names and not any(filecmp.cmpfiles(folder.parent, output_dir, names, shallow=False)[1:])
        if (Path(output_dir) / CONFIG_NAME).exists() and not same and not overwrite:
            raise UserError(
                f"{output_dir} holds the model of another run than the checkpoint's: give another --output_dir, or "
                "--overwrite_output_dir true"
            )
    return folder


def _clear_of_others(found: list[Path], output_dir: str, overwrite: bool) -> None:
    """See to it that no other run's checkpoints are in the way: by their steps they would be taken for this one's."""
    if found and not overwrite:
        raise UserError(
            f"{output_dir} holds checkpoints of another run, the last {found[-1].name}: go on from it with --resume_from_checkpoint "
            "last, give another --output_dir, or remove them with --overwrite_output_dir true"
        )
    if PartialState().is_main_process:
        for checkpoint in found:
            _remove(checkpoint)
    PartialState().wait_for_everyone()


def copy_best_model(checkpoint: Path, output_dir: str) -> None:
    """Copy what lies beside a checkpoint from elsewhere to `output_dir`, where the best model so far is among it.

    Called once the checkpoint is found to be of this model: the run's best may have been before it.
    """
    beside = checkpoint.parent
    if PartialState().is_main_process and not _lies_in(checkpoint, output_dir) and (beside / CONFIG_NAME).exists():
        files = [path for path in beside.iterdir() if path.is_file() and not path.name.startswith(".")]
        # The config last: what is half there after a kill is then copied again.
        for path in sorted(files, key=lambda path: path.name == CONFIG_NAME):
            write_file(Path(output_dir) / path.name, path.read_bytes())
    PartialState().wait_for_everyone()


def _lies_in(checkpoint: Path, output_dir: str) -> bool:
    return checkpoint.resolve().parent == Path(output_dir).resolve()


def check_step_size(folder: Path, then: int, now: int, unit: str = "captions") -> None:
    """See to it that a step has as many captions, or images, as before, whatever the number of processes.

    Epoch, place in it and learning rate are counted in steps.

    Raises:
        ValueError: It has not.
    """
    if then != now:
        raise UserError(
            f"{folder} was made with {then} {unit} a step, here are {now}: per_device_train_batch_size x processes x "
            f"gradient_accumulation_steps must be {then} again"
        )


def check_sharding(folder: Path, now: bool) -> None:
    """See to it that a checkpoint of a model that was shared out by FSDP2 goes on so, and one of another does not.

    Raises:
        ValueError: Accelerate would look for files that it has not written.
    """
    then = (folder / f"{FSDP_MODEL_NAME}.bin").is_file()
    if then != now:
        made, runs = ("with", "without") if then else ("without", "with")
        raise UserError(f"{folder} was made {made} FSDP2, and this run is {runs} it: launch it as that one was")


def check_finite(loss: float, model: torch.nn.Module, step: int, learning_rate: float, output_dir: str) -> None:
    """End the run, before it saves anything, if its loss or a weight is no longer a number."""
    broken = next((name for name, value in model.named_parameters() if not value.isfinite().all()), None)
    if broken or not math.isfinite(loss):
        what = f"{broken} holds what is no number" if math.isfinite(loss) else f"the loss is {loss}"
        raise SystemExit(
            f"error: {what} at step {step}; lower --learning_rate (now {learning_rate}); {newest_whole(output_dir)}"
        )
