"""Averages of weights: over the last steps, which is what a model of a high learning rate would come to at a low one; and of what was
learned with what it was learned from.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from safetensors.torch import load_file, save_file
from torch import nn

from system.errors import UserError

AVERAGE = "average.safetensors"  # in a checkpoint


def check_average(decay: float, frozen_encoder: bool) -> None:
    """Raise ValueError where weights cannot be averaged."""
    if decay and not frozen_encoder:
        raise UserError(
            "--ema_decay wants --freeze_encoder true: an encoder's normalization statistics are not averaged with its weights"
        )
    if decay and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise UserError("--ema_decay is not done under FSDP: launch with recipes/accelerate/several_gpus.yaml")


class WeightAverage:
    """Exponential moving average of all weights that learn (Polyak and Juditsky, 1992, https://doi.org/10.1137/0330046).

    Args:
        model: As it is trained, not wrapped.
        decay: Share of the average that a step leaves; 0 averages nothing. It is lower at first, so that the random weights of
            the beginning are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.learning = {name: value for name, value in model.named_parameters() if value.requires_grad and decay}
        self.values = [value.detach().clone() for value in self.learning.values()]

    def register(self, accelerator) -> None:
        """Go with the checkpoints that the accelerator saves and loads."""

        def save(models, weights, folder) -> None:
            if self.learning and accelerator.is_main_process:
                save_file(dict(zip(self.learning, self.values, strict=True)), Path(folder) / AVERAGE)

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(lambda models, folder: self.load(Path(folder)))

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: It has none, though weights are averaged, or the other way round; or one of other weights.
        """
        saved = load_file(folder / AVERAGE) if (folder / AVERAGE).exists() else {}
        if bool(saved) != bool(self.learning):
            raise UserError("it was trained with another --ema_decay, zero or more than that")
        if saved.keys() != self.learning.keys():
            raise UserError("other weights of it learn")
        for name, value in zip(self.learning, self.values, strict=True):
            value.copy_(saved[name])

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after a step in, the first of which is 1."""
        if self.learning:
            decay = min(self.decay, step / (step + 9))
            torch._foreach_lerp_(self.values, list(self.learning.values()), 1 - decay)

    def in_place(self) -> AbstractContextManager[None]:
        """The model with the average for its weights."""
        return with_values(list(self.learning.values()), self.values)


def mixed_with(model: nn.Module, start: nn.Module | None, share: float) -> AbstractContextManager[None]:
    """The model with weights of which so much are those that it started from (Wortsman et al., 2022, https://arxiv.org/abs/2109.01903).

    Args:
        start: As the model was; not looked at where the share is 0.
    """
    learning = {name: value for name, value in model.named_parameters() if value.requires_grad and share}
    mixed = [value.detach().lerp(start.get_parameter(name).detach(), share) for name, value in learning.items()]
    return with_values(list(learning.values()), mixed)


@contextmanager
def with_values(weights: list[torch.Tensor], values: list[torch.Tensor]) -> Iterator[None]:
    """The weights with other values, and with their own again when it is left."""
    own = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, own, strict=True):
                weight.copy_(value)
