"""A frozen encoder may learn in its last blocks, which say most about what the pictures show."""

from timm.models import group_parameters
from torch import nn


def unfreeze_last_blocks(encoder: nn.Module, num_blocks: int) -> None:
    """Let the last blocks of a frozen encoder learn, with whatever is behind them; its normalisation statistics stay fixed.

    Args:
        encoder: System A's, of timm, whose blocks are the layers that timm itself groups; or one of transformers, of the ViT kind.

    Raises:
        ValueError: It has fewer blocks.
    """
    backbone = getattr(encoder, "backbone", None)
    if backbone is not None:
        groups = group_parameters(
            backbone, backbone.group_matcher(coarse=True)
        )  # names by layer, the stem's the lowest
        blocks = [[backbone.get_parameter(name) for name in groups[layer]] for layer in sorted(groups)]
    else:
        layers = max((module for module in encoder.modules() if isinstance(module, nn.ModuleList)), key=len)
        blocks = [list(layer.parameters()) for layer in layers]
        of_blocks = {parameter for block in blocks for parameter in block}
        after = list(encoder.parameters())
        while after and after[0] is not blocks[-1][-1]:
            after.pop(0)
        blocks[-1] += [parameter for parameter in after if parameter not in of_blocks]
    if num_blocks > len(blocks):
        raise ValueError(f"--unfrozen_encoder_blocks {num_blocks}: the encoder has {len(blocks)}")
    for block in blocks[-num_blocks:]:
        for parameter in block:
            parameter.requires_grad_(True)
