"""Checkpoints that are whole or absent, and an output directory that one run has for itself.

A checkpoint is a model: config, generation config, weights, tokenizer and processor, as `from_pretrained` reads them. Beside them
lies the state of the training: optimizer, random number generators, `trainer_state.json`. All processes write into a folder beside
its place; it gets a file with the checksum of every other file, is flushed to disk, and is then renamed by the main process. The
folder has to be one that all processes see.
"""

import errno
import filecmp
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME

from system.errors import UserError
from system.files import sha256_of, write_file

CHECKSUMS = "checksums.json"
TRAINER_STATE = "trainer_state.json"


# ---- Output directory -----------------------------------------------------------------------------------------------


@contextmanager
def lock_output_dir(output_dir: str | os.PathLike) -> Iterator[None]:
    """Keep other runs out of `output_dir` while this one writes into it, and remove what a killed one left half done.

    Raises:
        UserError: Another run writes into it, or it cannot be written to.
    """
    state = PartialState()
    if not state.is_main_process:
        yield
        return
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        # Released by the system when the process ends, however it ends. The file stays: removing it would let a third run lock
        # a new file of that name while a second one still waits for this one.
        lock = FileLock(output_dir / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"another run writes into {output_dir}: wait for its end, or give another --output_dir"
        ) from error
    with lock:
        _remove_leftovers(output_dir)
        try:
            yield
        except SafetensorError as error:  # its own for a full disk
            raise UserError(f"{output_dir} cannot be written to: {error}") from error


def check_not_overwriting_start(model_name_or_path: str, output_dir: str | os.PathLike) -> None:
    """Raise UserError where a run would overwrite the captioner that it starts from."""
    if Path(model_name_or_path).resolve() == Path(output_dir).resolve():
        raise UserError(
            f"--output_dir {output_dir} is the folder of --model_name_or_path, which would be overwritten: give another"
        )


def _remove_leftovers(output_dir: Path) -> None:
    """Remove what a killed run was writing or removing; a checkpoint it was about to replace is put back."""
    for replaced in output_dir.glob(".checkpoint-*.replaced"):
        whole = output_dir / replaced.name[1:].removesuffix(".replaced")
        if not whole.exists():
            os.replace(replaced, whole)
    for pattern in (".checkpoint-*", ".saving-*", ".pushing-*", ".round-trip-*"):
        for folder in output_dir.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)
    for file in output_dir.glob(".*.*"):
        if file.name.rpartition(".")[2].isdigit():  # .history.json.4711, as `write_file` names it until it is whole
            file.unlink()


# ---- Writing --------------------------------------------------------------------------------------------------------


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


@contextmanager
def new_checkpoint(output_dir: str | os.PathLike, step: int) -> Iterator[Path]:
    """Give the folder into which all processes write; at the end of the block it becomes `checkpoint-STEP`.

    Raises:
        UserError: It cannot be written. Nothing of it is left, and the sentence names the newest one that is there.
    """
    state = PartialState()
    folder = Path(output_dir) / f"checkpoint-{step}"
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if state.is_main_process:
            partial.mkdir(exist_ok=True)
        state.wait_for_everyone()
        yield partial
        state.wait_for_everyone()
        if state.is_main_process:
            _write_checksums(partial)
            _put_in_place(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{folder} could not be written ({_reason(error, folder.parent)}); {newest_whole(output_dir)}"
        ) from error
    state.wait_for_everyone()


def _reason(error: Exception, folder: Path) -> str:
    if shutil.disk_usage(folder).free < 2**20:  # safetensors and torch do not report it
        return "no space is left on the disk"
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def save_tensors(values: dict, path: Path) -> None:
    """Write what `torch.load(weights_only=True)` reads.

    Raises:
        OSError: It cannot be written; torch's own for that is a RuntimeError, as bugs have them.
    """
    try:
        torch.save(values, path)
    except RuntimeError as error:
        raise OSError(errno.EIO, str(error).splitlines()[0], str(path)) from error


def newest_whole(output_dir: str | os.PathLike) -> str:
    """From where a run can be resumed, as a sentence."""
    found = checkpoints(output_dir)
    if not found:
        return "there is no checkpoint before it"
    return f"{found[-1]} is the last one before: resume with --resume_from_checkpoint last"


def _write_checksums(folder: Path) -> None:
    sums = {str(path.relative_to(folder)): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))


def _put_in_place(partial: Path, folder: Path) -> None:
    """Flush a folder to disk, then give it its name. One that bears the name already is removed only after that."""
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    replaced = folder.with_name(f".{folder.name}.replaced")
    if folder.exists():
        os.replace(folder, replaced)
    os.replace(partial, folder)
    _sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    is_windows = os.name == "nt"  # which opens no folders, and flushes no file that is open for reading alone
    if is_windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_old(output_dir: str | os.PathLike, limit: int | None, step: int, keep_steps: Collection[int] = ()) -> None:
    """Remove the oldest checkpoints beyond `limit`, never that of `step` and none of `keep_steps`; all stay where it is None.

    Called by the main process, after the newest, that of `step`, has its name. Later ones exist where the run was resumed from an
    earlier one.
    """
    found = [checkpoint for checkpoint in checkpoints(output_dir) if step_of(checkpoint) <= step]
    for old in found[:-limit] if limit else []:
        if step_of(old) not in keep_steps:
            _remove(old)


def _remove(checkpoint: Path) -> None:
    # Renamed first: a kill in the middle of the removal leaves no half checkpoint.
    leaving = checkpoint.with_name(f".{checkpoint.name}.partial")
    os.replace(checkpoint, leaving)
    shutil.rmtree(leaving)


# ---- Random number generators ---------------------------------------------------------------------------------------


def random_states() -> dict:
    """The states of all random number generators of this process, as tensors and plain values."""
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator().type
        states[device] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_states(states: dict) -> None:
    """Put the states of `random_states` back; a device that is not here now is left out."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator().type
        if device in states:
            torch.get_device_module(device).set_rng_state(states[device])


# ---- Resuming -------------------------------------------------------------------------------------------------------


def checkpoint_to_resume(
    option: str | None, output_dir: str, script: str, download: Callable[[str], Path], overwrite: bool = False
) -> Path | None:
    """The folder that `--resume_from_checkpoint` means; None where there is nothing to resume.

    Args:
        option: A checkpoint folder, `last`, or what `download` knows.
        script: The script that resumes it, as its `trainer_state.json` names it.
        download: Given an option that is no folder here, downloads the checkpoint and what lies beside it.
        overwrite: Whether another run's checkpoints in `output_dir` are removed.

    Raises:
        UserError: There is no checkpoint, it is another script's, or it is damaged; or `output_dir` is another run's.
    """
    found = checkpoints(output_dir)
    if option is None:
        _remove_others(found, output_dir, overwrite)
        return None
    if option == "last":
        if not found:
            if PartialState().is_main_process:
                print(f"{output_dir} has no checkpoint: starting from the beginning.")
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
            f"resume from the one before with --resume_from_checkpoint {before[-1]}"
            if before
            else "there is none before"
        )
        raise UserError(f"{folder} is damaged ({problem}): {offer}")
    if read_trainer_state(folder).get("script") != script:
        raise UserError(f"--resume_from_checkpoint {folder}: a checkpoint of another training script")
    if not _lies_in(folder, output_dir):
        _remove_others(found, output_dir, overwrite)
        names = [path.name for path in folder.parent.glob("*.safetensors")]
        same = names and not any(filecmp.cmpfiles(folder.parent, output_dir, names, shallow=False)[1:])
        if (Path(output_dir) / CONFIG_NAME).exists() and not same and not overwrite:
            raise UserError(
                f"{output_dir} has the model of another run than the checkpoint's: give another --output_dir, or "
                "--overwrite_output_dir true"
            )
    return folder


def read_trainer_state(folder: Path) -> dict:
    """The trainer_state.json of a checkpoint; empty where there is none."""
    path = folder / TRAINER_STATE
    return json.loads(path.read_text()) if path.is_file() else {}


def checkpoint_problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None if they are as they were written."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        for name, expected in sums.items():
            if sha256_of(folder / name) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"its files cannot be read: {error}"
    return None


def _remove_others(found: list[Path], output_dir: str, overwrite: bool) -> None:
    """Remove another run's checkpoints: by their steps they would be taken for this one's."""
    if found and not overwrite:
        raise UserError(
            f"{output_dir} has checkpoints of another run, the last {found[-1].name}: resume it with --resume_from_checkpoint "
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


def check_finite(loss: float, model: torch.nn.Module, step: int, learning_rate: float, output_dir: str) -> None:
    """End the run, before it saves anything, if its loss or a weight is no longer finite.

    Raises:
        UserError: One is not.
    """
    broken = next((name for name, value in model.named_parameters() if not value.isfinite().all()), None)
    if broken or not math.isfinite(loss):
        what = f"{broken} has non-finite values" if math.isfinite(loss) else f"the loss is {loss}"
        raise UserError(
            f"{what} at step {step}: lower --learning_rate (now {learning_rate}); {newest_whole(output_dir)}"
        )
