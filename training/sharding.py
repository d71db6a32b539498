"""FSDP2: weights, gradients and optimizer state of one model, shared out among the processes.

A process then has its part of each weight; the whole one is there while a forward or backward that all processes have entered
reads it. What each process does by itself, on batches that are not dealt out evenly, takes a whole model.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


class FullModel:
    """The model to evaluate and to save: the trained one itself, or, where it is shared out, a copy with all its weights.

    To be made before Accelerate prepares the model, which FSDP2 lets nobody copy afterwards. The copy waits in main memory.
    """

    def __init__(self, accelerator: Accelerator, model: PreTrainedModel):
        self.accelerator = accelerator
        self.copy = copy.deepcopy(model).cpu() if accelerator.is_fsdp2 else None

    @contextmanager
    def gathered(self, model: torch.nn.Module) -> Iterator[PreTrainedModel]:
        """Give the whole of the prepared `model`. All processes have to ask for it together."""
        if self.copy is None:
            yield self.accelerator.unwrap_model(model)
            return
        parts = model.state_dict()
        for name, value in self.copy.state_dict().items():
            part = parts[name].detach()
            # Statistics of BatchNorm are whole everywhere, but each process has counted its own batches.
            value.copy_(part.full_tensor() if isinstance(part, DTensor) else broadcast(part))
        yield self.copy.to(self.accelerator.device)
        self.copy.cpu()


def gather_head(model: torch.nn.Module) -> None:
    """Have each forward of a prepared model gather the weights of its last linear layer as well.

    The loss reads them, and never calls the layer, which would gather them by itself.
    """
    head = model.get_output_embeddings() if isinstance(model, FSDPModule) else None
    if isinstance(head, FSDPModule):
        model.register_forward_pre_hook(lambda *_: head.unshard())
