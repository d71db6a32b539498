"""Averages of weights: over the last steps (EMA), and of a fine-tuned model with the one it started from (WiSE-FT)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def ema_of(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model that follows it by an exponential moving average, BatchNorm statistics included.

    Args:
        decay: Fraction of the average that each step keeps. It is less in the first steps, so that the random weights of the
            beginning are soon forgotten.
    """

    def average(averaged: torch.Tensor, current: torch.Tensor, num_averaged: torch.Tensor) -> torch.Tensor:
        if not averaged.is_floating_point():  # BatchNorm's count of batches
            return current
        step = num_averaged.item() + 1
        return averaged.lerp(current, 1 - min(decay, step / (step + 9)))

    return AveragedModel(model, avg_fn=average, use_buffers=True)


@contextmanager
def mixed_with(model: nn.Module, start: nn.Module, weight: float) -> Iterator[None]:
    """The model with weights interpolated towards those it started from (Wortsman et al., 2022, https://arxiv.org/abs/2109.01903).

    Its own weights are back, bit for bit, when the context is left.

    Args:
        start: The starting model.
        weight: Fraction of the starting weights.
    """
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    own = {name: value.detach().clone() for name, value in trained.items()}
    with torch.no_grad():
        for name, value in trained.items():
            value.lerp_(start.get_parameter(name), weight)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(own[name])
