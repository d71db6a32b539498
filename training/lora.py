"""LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685) for the decoder of ViT-GPT2, by peft.

The decoder's weights stay as they are; two small matrices beside each of them are trained. A saved model has the products added to
its weights, and is as plain as one trained without.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel

from system.errors import UserError
from training.launch import refuse_fsdp


def check_lora(rank: int | None, pretrained: bool, ema_decay: float = 0.0) -> None:
    """Check that adapters are possible before anything is loaded.

    Raises:
        UserError: They are not.
    """
    if rank is None:
        return
    if not pretrained:
        raise UserError("--lora_rank keeps the decoder's weights, and with --pretrained_decoder false they are random")
    if ema_decay:
        raise UserError("--ema_decay is not supported with --lora_rank: leave one of them out")
    refuse_fsdp("--lora_rank")
    if find_spec("peft") is None:
        raise UserError("--lora_rank needs peft: pip install 'peft>=0.18'")


def add_lora(decoder: PreTrainedModel, rank: int, fresh_cross_attention: bool) -> None:
    """Put adapters beside all linear layers but the output layer, and freeze the rest; fresh cross attention is trained whole."""
    from peft import LoraConfig, inject_adapter_in_model

    cross_attention = [name for name, _ in decoder.named_modules() if "cross" in name] if fresh_cross_attention else []
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=cross_attention or None
    )
    inject_adapter_in_model(config, decoder)
    for name in cross_attention:
        decoder.get_submodule(name).requires_grad_(True)


@contextmanager
def merged(model: PreTrainedModel) -> Iterator[None]:
    """The captioner with the adapters merged into the weights and out of the module tree, as one without adapters.

    Both are back when the context is left, bit for bit: peft's own `unmerge` subtracts what `merge` has added, which rounds, so
    that a run evaluated more often would train on from other weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    decoder = model.decoder
    adapted = {name: layer for name, layer in decoder.named_modules() if isinstance(layer, BaseTunerLayer)}
    weights = {name: layer.get_base_layer().weight.detach().clone() for name, layer in adapted.items()}
    for name, layer in adapted.items():
        layer.merge()
        decoder.set_submodule(name, layer.get_base_layer())
    try:
        yield
    finally:
        for name, layer in adapted.items():
            layer.unmerge()
            decoder.set_submodule(name, layer)
            with torch.no_grad():
                layer.get_base_layer().weight.copy_(weights[name])
