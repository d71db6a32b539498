"""LoRA (Hu et al. 2021): a decoder's weights stay as they are, two small matrices beside each of them learn what to add.

A model saved for use has the sums, and is as plain as one trained without; a checkpoint has the matrices, too.
"""

import copy
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from system.errors import UserError

TRAINED = "lora.safetensors"  # in a checkpoint: all that is trained, as it is trained


def check_lora(rank: int | None, pretrained: bool) -> None:
    """See to it, before anything is loaded, that adapters are possible.

    Raises:
        ValueError: They are not.
    """
    if rank is None:
        return
    if rank < 1:
        raise UserError(f"--lora_rank {rank}: give 1 or more, or leave it out")
    if not pretrained:
        raise UserError(
            "--lora_rank keeps a decoder's weights, random ones too: leave it out with --pretrained_decoder false"
        )
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise UserError("--lora_rank is not done under FSDP: launch with recipes/accelerate/several_gpus.yaml")
    if find_spec("peft") is None:
        raise UserError("--lora_rank needs peft: pip install 'peft>=0.18'")


def add_lora(decoder: PreTrainedModel, rank: int, fresh_cross_attention: bool) -> None:
    """Put adapters beside all linear layers but the head, and freeze the rest; fresh cross attention learns as a whole."""
    from peft import LoraConfig, inject_adapter_in_model

    cross_attention = [name for name, _ in decoder.named_modules() if "cross" in name] if fresh_cross_attention else []
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=cross_attention or None
    )
    inject_adapter_in_model(config, decoder)
    for name in cross_attention:
        decoder.get_submodule(name).requires_grad_(True)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the captioner with the adapters' products added to the weights, of the classes it had before."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = copy.deepcopy(model)
    for name, module in list(plain.decoder.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            plain.decoder.set_submodule(name, module.get_base_layer())
    return plain


def save_trained(model: PreTrainedModel, folder: Path) -> None:
    save_file({name: value.detach().contiguous() for name, value in _trained(model).items()}, folder / TRAINED)


def load_trained(model: PreTrainedModel, folder: Path) -> None:
    """Take back what `save_trained` has saved; KeyError or RuntimeError where it is of another model."""
    saved = load_file(folder / TRAINED)
    with torch.no_grad():
        for name, value in _trained(model).items():
            value.copy_(saved[name])


def _trained(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}
