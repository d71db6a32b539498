"""AdamW, with a learning rate of its own for what is trained of the encoder."""

import torch
from torch import nn


def build_adamw(model: nn.Module, args, decay_vectors: bool = True) -> torch.optim.AdamW:
    """AdamW over all that is trained.

    Args:
        args: `learning_rate`, `weight_decay`, `adam_beta1`, `adam_beta2`, `adam_epsilon`, and `encoder_learning_rate` where the
            encoder may be trained.
        decay_vectors: Whether biases and normalization weights decay, too; transformers are trained without.
    """
    encoder_rate = getattr(args, "encoder_learning_rate", None)
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own_rate = name.startswith("encoder.") and encoder_rate is not None
            rate = encoder_rate if own_rate else args.learning_rate
            decay = args.weight_decay if decay_vectors or parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()],
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )
