"""A frozen encoder may learn in its last blocks, which say most about what the images show."""

from timm.models import group_parameters
from torch import nn

from system.errors import UserError


def unfreeze_last_blocks(encoder: nn.Module, num_blocks: int) -> None:
    """Let the last blocks of a frozen encoder learn, with whatever is behind them; its normalization statistics stay fixed.

    Args:
        encoder: The LSTM captioner's, of timm, whose blocks are the layers that timm itself groups; or one of transformers, of the ViT kind.

    Raises:
        ValueError: It has fewer blocks, or is not frozen.
    """
    if not num_blocks:
        return
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        raise UserError(
            "--num_trainable_encoder_blocks wants --freeze_encoder true; without it, all of the encoder learns"
        )
    if any(hasattr(module, "attention_bias_cache") for module in encoder.modules()):  # timm's LeViT and TinyViT
        raise UserError(
            "--num_trainable_encoder_blocks: this encoder keeps what it computes in its attention, and learns as a whole or not at all"
        )
    backbone = getattr(encoder, "backbone", None)
    if backbone is not None:
        groups = group_parameters(backbone, backbone.group_matcher(coarse=True))  # names by layer
        blocks = []
        for layer in sorted(groups):
            parameters = [backbone.get_parameter(name) for name in groups[layer]]
            if blocks and all(parameter.ndim == 1 for parameter in parameters):  # a last normalization is no block
                blocks[-1] += parameters
            else:
                blocks.append(parameters)
    else:
        layers = max((module for module in encoder.modules() if isinstance(module, nn.ModuleList)), key=len)
        blocks = [list(layer.parameters()) for layer in layers]
        every = list(encoder.parameters())
        blocks[-1] = every[[*map(id, every)].index(id(blocks[-1][0])) :]  # with what is behind the blocks
    if num_blocks > len(blocks):
        raise UserError(f"--num_trainable_encoder_blocks {num_blocks}: give {len(blocks)} at most")
    for block in blocks[-num_blocks:]:
        for parameter in block:
            parameter.requires_grad_(True)


def checkpoint_blocks(encoder: nn.Module) -> None:
    """Let the LSTM captioner's encoder compute the activations of its blocks again in the backward pass, in place of keeping them.

    BatchNorm of an encoder that learns as a whole sees each batch twice then, so that its statistics follow faster.

    Raises:
        ValueError: Nothing of it learns, or timm cannot do it for this one.
    """
    if not any(parameter.requires_grad for parameter in encoder.parameters()):
        raise UserError(
            "--activation_checkpointing true wants an encoder that learns: see --num_trainable_encoder_blocks"
        )
    try:
        encoder.backbone.set_grad_checkpointing()
    except (AttributeError, AssertionError) as error:
        raise UserError(f"--activation_checkpointing true: timm has it not for this encoder ({error})") from error
