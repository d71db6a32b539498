"""What the loops under Accelerate have in common: start, progress, history, the best model, checkpoints."""

import dataclasses
import json
import logging
import os
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import TrackioTracker
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from modeling.captioner import save_captioner
from reporting.curves import draw_curves
from reporting.live import log_losses
from reporting.push import CheckpointPush
from reporting.results import write_history
from system.errors import UserError
from training.arguments import LoopArguments
from training.checkpoints import (
    IN_FLOAT32,
    check_finite,
    check_launch,
    check_sharding,
    check_step_size,
    drop_old,
    has_bfloat16,
    new_checkpoint,
    refuse_deepspeed,
)
from training.launch import check_trackers
from training.stopping import follow_launcher

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands; saved with each checkpoint."""

    step_size: int  # captions, or images, over all processes and accumulated batches
    start_digest: str = ""  # of the captioner's weights that it goes on from, where it does
    epoch: int = 0  # whole ones
    step: int = 0
    epoch_steps: int = 0  # of the epoch that has begun
    sums: dict[str, float] = field(
        default_factory=dict
    )  # what the next row of the history is made of, over all processes
    train_seconds: float = 0.0
    best_cider: float = -1.0
    best_epoch: int = 0
    best_step: int = 0
    evaluations_since_best: int = 0
    history: list[dict] = field(default_factory=list)


def start_accelerator(args: LoopArguments) -> Accelerator:
    """The processes, the log and the seed of a run.

    Raises:
        ValueError: A tracker or a launch that is not to be had.
    """
    follow_launcher()
    trackers = [name for name in args.report_to.split(",") if name != "none"]
    check_trackers(trackers)
    if "trackio" in trackers:  # by its name alone, its project would bear that of TensorBoard's folder
        trackers[trackers.index("trackio")] = TrackioTracker("showtell", name=args.output_dir)
    refuse_deepspeed()
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    in_float32 = precision == "bf16" and not has_bfloat16()
    if in_float32:
        args.mixed_precision = "no"
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, log_with=trackers or None, project_dir=args.output_dir
    )
    check_launch()
    logging.basicConfig(
        level=logging.INFO if accelerator.is_local_main_process else logging.WARNING, format="%(message)s"
    )
    if in_float32:
        logger.info(IN_FLOAT32)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    # It tells at each checkpoint that tied weights are saved once.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()  # loading and saving take a second
    set_seed(args.seed)
    return accelerator


def build_scheduler(args: LoopArguments, optimizer: torch.optim.Optimizer, epoch_steps: int) -> LRScheduler:
    """The schedule of the learning rate over all epochs, each of so many steps."""
    num_steps = epoch_steps * args.num_train_epochs
    warmup_steps = args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * num_steps
    return get_scheduler(args.lr_scheduler_type, optimizer, round(warmup_steps), num_steps)


def is_due(progress: Progress, num_steps: int | None) -> bool:
    """Whether so many steps have passed since it was due before; never where there is no such number."""
    return bool(num_steps) and progress.step % num_steps == 0


def accumulation_windows(accelerator, loader, num_batches: int, progress: Progress):
    """The batches of an epoch in lists of `num_batches`, the last list shorter where they do not divide.

    What `progress` has of the epoch is left out.
    """
    if progress.epoch_steps:
        loader = accelerator.skip_first_batches(loader, progress.epoch_steps * num_batches)
    # A loader that starts draws a number; a run resumed inside the epoch would draw it a second time.
    with torch.random.fork_rng(devices=[]):
        batches = iter(loader)
        window = list(islice(batches, num_batches))
    while window:
        yield window
        window = list(islice(batches, num_batches))


def keep_best(accelerator, model, processor, row: dict, progress: Progress, args: LoopArguments) -> None:
    """Leave the model in output_dir if no evaluation before had a better CIDEr."""
    progress.evaluations_since_best += 1
    if row["cider"] > progress.best_cider:
        progress.best_cider, progress.evaluations_since_best = row["cider"], 0
        progress.best_epoch, progress.best_step = progress.epoch, progress.step
        if args.load_best_model_at_end and accelerator.is_main_process:
            save_captioner(model, processor, args.output_dir)
    accelerator.wait_for_everyone()


def stops_early(progress: Progress, args: LoopArguments) -> bool:
    """Whether there were too many evaluations without a better one; true of a run that is resumed after that, too."""
    return bool(args.early_stopping_patience) and progress.evaluations_since_best >= args.early_stopping_patience


def start_trackers(accelerator, options: dict, progress: Progress) -> None:
    """Start the trackers; those of a resumed run begin with all it knows of the epochs before.

    What the killed run told them may reach further than its checkpoint, or, held back in a buffer, not so far: TensorBoard
    forgets what else is in the folder.
    """
    known = {name: value for name, value in options.items() if value is not None}
    accelerator.init_trackers("logs", known, init_kwargs={"tensorboard": {"purge_step": 0}})
    for row in progress.history:
        track(accelerator, row)


def track(accelerator, row: dict) -> None:
    scalars = {name: value for name, value in row.items() if name not in ("epoch", "step")}
    accelerator.log(scalars, step=row["step"])


def record(accelerator, row: dict, progress: Progress, args: LoopArguments) -> None:
    """Tell what an epoch gave: in the log, in history.json, in the curves and to the trackers."""
    progress.history.append(row)
    track(accelerator, row)
    log_losses(row)
    if accelerator.is_main_process:
        write_history(args.output_dir, progress.history)
        draw_curves(args.output_dir, progress.history)


def save_checkpoint(
    accelerator,
    model,
    scheduler,
    progress: Progress,
    args: LoopArguments,
    pushing: CheckpointPush,
    state_file: str = "progress.json",
) -> None:
    """Write `checkpoint-STEP`, whole or not at all, drop old ones beyond save_total_limit, and push it where it is to be.

    Args:
        state_file: Where it tells how far the run is; of another name in each script, so that none takes another's.
    """
    check_finite(sum(progress.sums.values()), model, progress.step, args.learning_rate, args.output_dir)
    with new_checkpoint(args.output_dir, progress.step) as folder:
        accelerator.save_state(str(folder))
        if accelerator.is_main_process:
            # As JSON: what Accelerate saves of a registered scheduler, it unpickles.
            (folder / "scheduler.json").write_text(json.dumps(scheduler.state_dict()))
            (folder / state_file).write_text(json.dumps(dataclasses.asdict(progress)))
    if accelerator.is_main_process:
        drop_old(args.output_dir, args.save_total_limit, progress.step, keep_steps={progress.best_step})
    accelerator.wait_for_everyone()
    pushing.send(progress.step)


def load_checkpoint(
    accelerator, scheduler, folder: Path, begun: Progress, state_file: str = "progress.json", unit: str = "captions"
) -> Progress:
    """Put model, optimizer, schedule and random states back as they were, and say where the run stood.

    Args:
        begun: This run's, before its first step.

    Raises:
        ValueError: The checkpoint is another version's or another model's, or its steps have other sizes.
    """
    saved = json.loads((folder / state_file).read_text())
    differing = saved.keys() ^ {field.name for field in dataclasses.fields(Progress)}
    if differing:
        raise UserError(
            f"{folder / state_file} was written by another version of this script (they differ in {', '.join(sorted(differing))}): "
            "end that run with the version that began it, or begin anew without --resume_from_checkpoint"
        )
    progress = Progress(**saved)
    check_sharding(folder, accelerator.is_fsdp2)
    check_step_size(folder, progress.step_size, begun.step_size, unit)
    if progress.start_digest != begun.start_digest:
        raise UserError(
            f"{folder} went on from another captioner than --model_name_or_path: give the one that its run began with"
        )
    try:
        accelerator.load_state(str(folder))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{folder} is of another model or training ({str(error).splitlines()[-1].strip()})") from error
    scheduler.load_state_dict(json.loads((folder / "scheduler.json").read_text()))
    return progress
