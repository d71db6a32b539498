"""What a checkpoint holds beside the model: optimizer, learning rate schedule, random number generators, where the run stands.

Weights are safetensors, optimizer and random states are read by `torch.load(weights_only=True)`, the rest is JSON: nothing of a
checkpoint is executed. Optimizer states are named by parameter, whole ones also under FSDP2, so that a run can be resumed on any
number of processes, sharded or not.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from modeling.captioner import Captioner
from system.errors import UserError
from training.checkpoints import TRAINER_STATE, random_states, read_trainer_state, save_tensors, set_random_states

if TYPE_CHECKING:
    from training.run import TrainingRun

OPTIMIZER = "optimizer.pt"
# Where the model of a checkpoint is an average, merged or mixed: the weights that are trained, as they are trained.
TRAINED_WEIGHTS = "trained_weights.safetensors"


def save_training_state(run: "TrainingRun", folder: Path, state: dict) -> None:
    """Write the run's model and state into a folder. All processes must call this together."""
    accelerator, model = run.accelerator, run.accelerator.unwrap_model(run.model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    optimizer = get_optimizer_state_dict(model, run.optimizer.optimizer, options=options)
    with run.exported() as captioner:
        if accelerator.is_main_process:
            captioner.save(folder)
    save_tensors(random_states(), folder / f"rng_state_{accelerator.process_index}.pt")
    if accelerator.is_main_process:
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
        save_tensors({"optimizer": optimizer, "scaler": scaler}, folder / OPTIMIZER)
        if run.exports_other_weights:
            save_file(_trained_weights(model), folder / TRAINED_WEIGHTS)
        state = state | {"lr_scheduler": run.scheduler.state_dict()}
        (folder / TRAINER_STATE).write_text(json.dumps(state, indent=1))


def load_training_state(run: "TrainingRun", folder: Path) -> dict:
    """Put model, optimizer, schedule and random states back as they were, and give the fields of the `TrainerState`.

    Raises:
        UserError: The checkpoint is another version's, of another model or training, or its steps have another size.
    """
    state, new = read_trainer_state(folder), vars(run.state)
    scheduler = state.pop("lr_scheduler", None)
    if differing := state.keys() ^ new.keys():
        raise UserError(
            f"{folder / TRAINER_STATE} was written by another version of this script (they differ in "
            f"{', '.join(sorted(differing))}): finish that run with the version that began it, or start anew without "
            "--resume_from_checkpoint"
        )
    then, now = state["step_size"], run.step_size
    if then != now:
        raise UserError(
            f"{folder} was trained with {then} {run.unit} a step, this run has {now}: per_device_train_batch_size x processes x "
            f"gradient_accumulation_steps must be {then} again"
        )
    if state["start_digest"] != new["start_digest"]:
        raise UserError(
            f"{folder} was trained from other weights than --model_name_or_path, --encoder or --decoder has: give what its run "
            "started from"
        )
    if (folder / TRAINED_WEIGHTS).is_file() != run.exports_other_weights:
        raise UserError(
            f"{folder} was trained with other options (--ema_decay, --lora_rank or --init_weight_share): give the same"
        )
    try:
        _load_weights(run, folder)
        # Read by all processes: each takes its part.
        saved = torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu")
        model, options = run.accelerator.unwrap_model(run.model), StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(model, run.optimizer.optimizer, saved["optimizer"], options=options)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{folder} is of another model, or of a training of other parts of it ({reason})") from error
    if run.accelerator.scaler and saved["scaler"]:
        run.accelerator.scaler.load_state_dict(saved["scaler"])
    run.scheduler.load_state_dict(scheduler)
    own = folder / f"rng_state_{run.accelerator.process_index}.pt"
    if own.is_file():  # none where the run had fewer processes
        set_random_states(torch.load(own, weights_only=True))
    return state


def _load_weights(run: "TrainingRun", folder: Path) -> None:
    model = run.accelerator.unwrap_model(run.model)
    exported = Captioner.load(folder).model.state_dict()
    if not run.exports_other_weights:
        exported = {name: exported[name] for name in run.captioner_keys}
        set_model_state_dict(model, exported, options=StateDictOptions(full_state_dict=True))
        return
    if run.ema:
        averaged = run.ema.module.state_dict()
        run.ema.module.load_state_dict({name: exported[name] for name in averaged})
        run.ema.n_averaged.fill_(read_trainer_state(folder)["step"])
    trained, saved = _trained_weights(model), load_file(folder / TRAINED_WEIGHTS)
    if differing := {(name, value.shape) for name, value in trained.items()} ^ {(k, v.shape) for k, v in saved.items()}:
        raise ValueError(f"they differ in {min(differing)[0]}")
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(saved[name])


def _trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """What of a model a training changes: parameters with a gradient, and buffers."""
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return trained | dict(model.named_buffers())
