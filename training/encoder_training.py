"""Which of an encoder's parameters are trained, and how their activations are kept."""

import torch
from PIL import Image
from timm.models import group_parameters
from torch import nn

from modeling.captioner import Captioner
from system.errors import UserError


def unfreeze_last_blocks(encoder: nn.Module, num_blocks: int) -> None:
    """Train the last blocks of a frozen encoder, and what is behind them; its normalization statistics stay fixed.

    Args:
        encoder: The LSTM captioner's, whose blocks are the layers that timm groups; or one of transformers, of the ViT kind.

    Raises:
        UserError: It has fewer blocks, or is not frozen.
    """
    if not num_blocks:
        return
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        raise UserError(
            "--num_trainable_encoder_blocks wants --freeze_encoder true; without it, all blocks are trained"
        )
    if any(hasattr(module, "attention_bias_cache") for module in encoder.modules()):  # timm's LeViT and TinyViT
        raise UserError(
            "--num_trainable_encoder_blocks: this encoder caches its attention biases, and can only be trained as a whole"
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


def freeze_unused(captioner: Captioner) -> list[str]:
    """Freeze those parameters of the encoder that its last hidden state does not depend on, such as CLIP's last normalization.

    Nothing would train them, and DistributedDataParallel fails where trainable parameters get no gradient. They are found by
    a backward pass of one image, before activation checkpointing is turned on.

    Returns:
        Their names.
    """
    encoder = captioner.encoder
    trainable = {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    if not trainable:
        return []
    image = Image.new("RGB", (64, 64))
    pixels = captioner.image_processor(images=image, return_tensors="pt")["pixel_values"]  # (1, 3, height, width)
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()  # no statistics are updated, no layers dropped
    with torch.enable_grad():
        states = encoder(pixel_values=pixels.to(next(encoder.parameters()))).last_hidden_state
        gradients = [None] * len(trainable)
        if states.requires_grad:
            gradients = torch.autograd.grad(states.sum(), [*trainable.values()], allow_unused=True)
    for module, mode in modes.items():
        module.training = mode
    unused = [name for name, gradient in zip(trainable, gradients, strict=True) if gradient is None]
    for name in unused:
        trainable[name].requires_grad_(False)
    return unused


def checkpoint_blocks(encoder: nn.Module) -> None:
    """Recompute the activations of the LSTM captioner's encoder blocks in the backward pass, in place of keeping them.

    BatchNorm of an encoder that is trained as a whole sees each batch twice then, so that its statistics follow faster.

    Raises:
        UserError: The encoder is frozen, or timm cannot do it for this one.
    """
    if not any(parameter.requires_grad for parameter in encoder.parameters()):
        raise UserError("--activation_checkpointing true wants a trainable encoder: see --num_trainable_encoder_blocks")
    try:
        encoder.backbone.set_grad_checkpointing()
    except (AttributeError, AssertionError) as error:
        raise UserError(f"--activation_checkpointing true: timm cannot do it for this encoder ({error})") from error
