"""AdamW, with a learning rate of its own for what is trained of the encoder."""

import torch
from torch import nn

from system.errors import UserError


def build_adamw(model: nn.Module, args, decay_vectors: bool = True) -> torch.optim.AdamW:
    """AdamW over all that is trained.

    Args:
        args: `learning_rate`, `weight_decay`, `adam_beta1`, `adam_beta2`, `adam_epsilon`, and `encoder_learning_rate` where the
            encoder may be trained.
        decay_vectors: Whether biases and normalization weights decay, too; transformers are trained without.

    Raises:
        UserError: There is a rate of the encoder's own, and nothing of it is trained.
    """
    encoder_rate = getattr(args, "encoder_learning_rate", None)
    groups, has_own_rate = {}, False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own_rate = name.startswith("encoder.") and encoder_rate is not None
            has_own_rate |= own_rate
            rate = encoder_rate if own_rate else args.learning_rate
            decay = args.weight_decay if decay_vectors or parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    if encoder_rate is not None and not has_own_rate:
        raise UserError(
            f"--encoder_learning_rate {encoder_rate} has no effect: the encoder is frozen; see --num_trainable_encoder_blocks"
        )
    return torch.optim.AdamW(
        [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in groups.items()],
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )
