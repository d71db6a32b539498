"""Which of an encoder's parameters are trained, and how their activations are kept."""

from itertools import pairwise

import timm
import torch
from PIL import Image
from timm.models import group_parameters
from torch import nn
from transformers import TimmBackboneConfig

from modeling.captioner import Captioner
from system.errors import UserError


def unfreeze_last_blocks(captioner: Captioner, num_blocks: int) -> None:
    """Train the last blocks of a frozen encoder, and what is behind them; its normalization statistics stay fixed.

    A head that its last hidden state does not depend on, such as SigLIP's, is no block.

    Raises:
        UserError: It has fewer blocks, or is not frozen.
    """
    if not num_blocks:
        return
    encoder = captioner.encoder
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        raise UserError(
            "--num_trainable_encoder_blocks wants --freeze_encoder true; without it, all blocks are trained"
        )
    if any(hasattr(module, "attention_bias_cache") for module in encoder.modules()):  # timm's LeViT and TinyViT
        raise UserError(
            "--num_trainable_encoder_blocks: this encoder caches its attention biases, and can only be trained as a whole"
        )
    encoder.requires_grad_(True)
    freeze_unused(captioner)
    every = _timm_blocks(encoder) or _transformers_blocks(encoder)
    blocks = [block for block in every if any(parameter.requires_grad for parameter in block)]
    encoder.requires_grad_(False)
    if num_blocks > len(blocks):
        raise UserError(f"--num_trainable_encoder_blocks {num_blocks}: give {len(blocks)} at most")
    for block in blocks[-num_blocks:]:
        for parameter in block:
            parameter.requires_grad_(True)


def _timm_blocks(encoder: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each layer that timm groups, a CNN's stages; the last with all that is behind timm's model. Empty without timm."""
    config = getattr(getattr(encoder, "config", None), "backbone_config", None)
    behind = []
    if isinstance(config, TimmBackboneConfig):  # a CNN's grid, whose modules timm has given other names
        with torch.device("meta"):
            model = timm.create_model(config.backbone)
        names = {name.replace(".", "_"): name for name, _ in model.named_parameters()}
        backbone = encoder.embeddings.backbone
        flat = {name.removeprefix("_backbone."): parameter for name, parameter in backbone.named_parameters()}
        parameters = {names[name.replace(".", "_")]: parameter for name, parameter in flat.items()}
        inside = {id(parameter) for parameter in parameters.values()}
        behind = [parameter for parameter in encoder.parameters() if id(parameter) not in inside]
    else:
        model = getattr(encoder, "backbone", getattr(encoder, "timm_model", None))
        if model is None:
            return []
        parameters = dict(model.named_parameters())
    groups = group_parameters(model, model.group_matcher(coarse=True))  # names by layer
    blocks: list[list[nn.Parameter]] = []
    for layer in sorted(groups):
        block = [parameters[name] for name in groups[layer] if name in parameters]
        if blocks and all(parameter.ndim == 1 for parameter in block):  # a last normalization is no block
            blocks[-1] += block
        elif block:
            blocks.append(block)
    blocks[-1] += behind
    return blocks


def _transformers_blocks(encoder: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each layer of an encoder of transformers, each with what is behind it; of stages, the layers in them."""
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    layers = [
        layer for one in lists for layer in one if not any(isinstance(part, nn.ModuleList) for part in layer.modules())
    ]
    every = list(encoder.parameters())
    places = {id(parameter): place for place, parameter in enumerate(every)}
    starts = [places[id(next(layer.parameters()))] for layer in layers if next(layer.parameters(), None) is not None]
    return [every[start:end] for start, end in pairwise([*starts, len(every)])]


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
