"""The processes of a run: started, checked, logging; and what is refused before any work."""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import LoggerType, parse_flag_from_env, set_seed

from modeling.caption_loss import computes_in_bfloat16
from system.errors import UserError
from training.arguments import TrainingArguments

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
# Kept until the process ends: where a model that is done with drops the last reference to a gloo group, torch 2.6 and 2.7 wait for
# the group's threads while they hold the interpreter's lock, for which one of those threads may be waiting.
PROCESS_GROUPS: list[torch.distributed.ProcessGroup] = []
# What Accelerate assumes where the launcher says nothing, and what is needed: FSDP1 is another thing; sharded checkpoints are read
# with pickle; and every process needs the weights, to encode images and for its copy.
FSDP_SETTINGS = {
    "FSDP_VERSION": ("1", "2"),
    "FSDP_STATE_DICT_TYPE": ("SHARDED_STATE_DICT", "FULL_STATE_DICT"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": ("false", "FALSE"),
}


def start_accelerator(args: TrainingArguments) -> Accelerator:
    """Start the processes, the log and the seed of a run.

    Raises:
        UserError: A tracker that is not installed, a precision that the device has not, or a launch that is not supported.
    """
    follow_launcher()
    refuse_deepspeed()
    refuse_missing_gpus()
    check_sharding()
    trackers = [name for name in args.report_to.split(",") if name != "none"]
    check_trackers(trackers)
    run_name = args.run_name or args.output_dir
    if "trackio" in trackers:  # by its name alone, its project would bear that of TensorBoard's folder
        from accelerate.tracking import TrackioTracker  # of accelerate 1.10 and newer

        trackers[trackers.index("trackio")] = TrackioTracker(args.project, name=run_name)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else os.environ.get("ACCELERATE_MIXED_PRECISION")
    in_float32 = precision == "bf16" and not has_bfloat16()
    if precision == "fp16" and on_cpu():
        raise UserError("fp16 needs a GPU: train in --bf16 true, or with neither")
    accelerator = Accelerator(
        mixed_precision="no" if in_float32 else precision,
        log_with=trackers or None,
        project_dir=args.output_dir,
        dynamo_backend="no",  # what the launcher has for it is `compile_blocks`'s
    )
    if torch.distributed.is_initialized():
        PROCESS_GROUPS.append(torch.distributed.group.WORLD)
    level = logging.INFO if accelerator.is_local_main_process else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    if in_float32:
        logger.info("bf16: this device has no instructions for bfloat16; training in float32.")
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    for name in ("datasets", "huggingface_hub"):  # they have handlers of their own, and would say all twice
        logging.getLogger(name).propagate = False
    transformers.logging.disable_progress_bar()  # loading and saving take a second
    set_seed(args.seed)
    return accelerator


def follow_launcher() -> None:
    """Have Linux send this process SIGTERM when `accelerate launch` has ended, however it has.

    With one process the launcher passes no signal on, and a run would go on behind the back of whoever has stopped it; with
    several it does, but not where it is killed itself.
    """
    # The launcher alone sets this. A run started without it shall outlive the shell it was started from.
    if sys.platform == "linux" and "ACCELERATE_DYNAMO_BACKEND" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def refuse_deepspeed() -> None:
    """Refuse DeepSpeed before Accelerate, which needs it installed, is asked for it.

    Raises:
        UserError: The launcher asks for DeepSpeed.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "DeepSpeed is not supported: launch with recipes/accelerate/fsdp2.yaml, which shards one model over the processes, "
            "or with several_gpus.yaml, which gives each process a whole model"
        )


def refuse_fsdp(feature: str) -> None:
    """Refuse FSDP for what needs a whole model in each process.

    Raises:
        UserError: The launcher asks for FSDP.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise UserError(f"{feature} is not supported under FSDP: launch with recipes/accelerate/several_gpus.yaml")


def refuse_missing_gpus() -> None:
    """Refuse several processes for GPUs where there are none, before Accelerate starts each alone or waits for the others.

    Raises:
        UserError: There are none.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and on_cpu() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise UserError(
            f"{started} processes were launched for GPUs, of which there are none: launch one process, or set "
            "ACCELERATE_USE_CPU=true"
        )


def check_sharding() -> None:
    """Check that a model is sharded in a supported way.

    Raises:
        UserError: The launcher asks for FSDP with other settings.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        for name, (default, needed) in FSDP_SETTINGS.items():
            given = os.environ.get(name, default)
            if given.upper() != needed:
                raise UserError(f"{name} is {given}, and must be {needed}: launch with recipes/accelerate/fsdp2.yaml")


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers are installed: Accelerate would leave a missing one out in silence.

    Raises:
        UserError: One is unknown or not installed.
    """
    for name in names:
        if name not in LoggerType.list():
            raise UserError(f"--report_to {name}: give one of {', '.join(LoggerType.list())}, or none")
        if name != "all" and find_spec(name) is None:
            raise UserError(
                f"--report_to {name}: {name} is not installed; pip install {name.replace('_', '-')}, or --report_to none"
            )


def on_cpu() -> bool:
    """Whether a run is on the CPU: there is nothing else, or the launcher says so."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def has_bfloat16() -> bool:
    """Whether the device to train on, a CPU or a CUDA card, has instructions for bfloat16.

    Elsewhere torch has no LSTM in bfloat16, or its matrix products take up to a hundred times as long as in float32.
    """
    device = torch.device("cpu") if on_cpu() else torch.accelerator.current_accelerator()
    return computes_in_bfloat16(device)
