"""FSDP2: weights, gradients and optimizer state of one model, sharded over the processes.

A process then has its part of each weight; the whole one exists while a forward or backward pass that all processes have entered
reads it. Evaluation, which each process does on batches of its own, needs a whole model.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel


class FullModel:
    """The model to evaluate and to save: the trained one itself, or, where it is sharded, a copy with all its weights.

    Created before Accelerate prepares the model, which cannot be copied once FSDP2 has sharded it. The copy waits in main memory.
    """

    def __init__(self, accelerator: Accelerator, model: PreTrainedModel):
        self.accelerator = accelerator
        self.copy = copy.deepcopy(model).cpu() if accelerator.is_fsdp2 else None

    @contextmanager
    def gathered(self, model: torch.nn.Module) -> Iterator[PreTrainedModel]:
        """Give the whole of the prepared `model`. All processes must call this together."""
        if self.copy is None:
            yield self.accelerator.unwrap_model(model)
            return
        self.copy.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
        self.copy.to(self.accelerator.device)
        for buffer in self.copy.buffers():  # BatchNorm's statistics: each process has counted its own batches
            buffer.copy_(broadcast(buffer))
        yield self.copy
        self.copy.cpu()
