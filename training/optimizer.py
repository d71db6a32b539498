"""AdamW, with a learning rate of its own for what is trained of the encoder."""

import torch
from torch import nn


def build_adamw(model: nn.Module, args) -> torch.optim.AdamW:
    """AdamW over all that is trained.

    Args:
        args: `learning_rate`, `weight_decay`, `adam_beta1`, `adam_beta2`, `adam_epsilon`, and `encoder_learning_rate` where the
            encoder may be trained.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    encoder_rate = getattr(args, "encoder_learning_rate", None)
    groups = [
        {
            "params": [parameter for name, parameter in trained if not name.startswith("encoder.")],
            "lr": args.learning_rate,
        },
        {
            "params": [parameter for name, parameter in trained if name.startswith("encoder.")],
            "lr": args.learning_rate if encoder_rate is None else encoder_rate,
        },
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        fused=True,
    )
