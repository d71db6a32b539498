"""torch.compile in training, where `accelerate launch --dynamo_backend` asks for it."""

import logging
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from modeling.caption_loss import compile_loss
from training.launch import refuse_fsdp

logger = logging.getLogger(__name__)


def launcher_backend() -> str | None:
    """The backend of torch.compile that the launcher names; None where it names none."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    return None if backend == "no" else backend


def uncompiled() -> AbstractContextManager:
    """Context in which compiled blocks run as they are: for `generate()` they would be compiled anew for every length of its cache."""
    return torch.compiler.set_stance("force_eager") if launcher_backend() else nullcontext()


def compile_blocks(model: nn.Module, backend: str) -> None:
    """Compile the decoder's blocks in place, each by itself: they are alike, so that one compilation serves them all.

    And the loss with them. Accelerate would compile the whole model, of which transformers' masks and the loss's hook are compiled
    anew for many a batch. The LSTM captioner has no blocks: cuDNN's LSTM is one call.

    Raises:
        UserError: The launcher asks for FSDP.
    """
    refuse_fsdp(f"--dynamo_backend {backend}")
    blocks = [
        block
        for module in getattr(model, "decoder", nn.Module()).modules()
        if isinstance(module, nn.ModuleList)
        for block in module
    ]
    for block in blocks:
        block.compile(backend=backend)
    compile_loss(backend)
    logger.info(f"--dynamo_backend {backend}: {len(blocks)} blocks of the decoder and the loss are compiled.")
