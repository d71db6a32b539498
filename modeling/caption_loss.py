"""The loss both captioners are trained on, without ever holding the scores of a whole batch over the vocabulary."""

import math

import torch
from torch import nn

FLOAT16_TOKENS = 1024  # of up to 64 nats each
MAX_LOGITS_PER_CHUNK = 2**24  # 64 MiB in float32; with fewer tokens at a time the matrix products get slow


def tokens_at_once(num_tokens: int, vocab_size: int) -> int:
    """Tokens whose scores are held together: all chunks are of one size, since a small one costs as much as a large one."""
    num_chunks = math.ceil(num_tokens * vocab_size / MAX_LOGITS_PER_CHUNK)
    return max(1, math.ceil(num_tokens / max(1, num_chunks)))


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for it, so that it is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def caption_loss(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross entropy of the next token, in nats a token.

    The vocabulary is scored for a few tokens at a time, only where something is to be learned, and what remains of the scores
    is their gradient (torch's `linear_cross_entropy`); loss and gradients are those of the plain way.

    Args:
        hidden: float (batch, length, hidden size), what the last linear layer reads.
        labels: int64 (batch, length), -100 where nothing is to be learned.
        weight, bias: Of the last linear layer, (vocabulary, hidden size) and (vocabulary,).
        num_items_in_batch: Divisor of the summed loss: the labels of a whole step, so that accumulated batches weigh as
            many tokens as they have; the batch's own count where None.
        label_smoothing: Share of each label spread over the vocabulary (Szegedy et al., 2016,
            https://arxiv.org/abs/1512.00567, section 7).
    """
    learned = labels != -100
    if num_items_in_batch is None:
        num_items_in_batch = learned.sum()
    hidden, labels = hidden[learned], labels[learned]  # (tokens, hidden size), (tokens,)
    if torch.is_autocast_enabled(hidden.device.type):  # torch's op does not look
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    # On a processor torch's op computes all its products in float32, unless told that this one is fast in bfloat16.
    fast = hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16 and computes_in_bfloat16(hidden.device)
    options = nn.LinearCrossEntropyOptions(
        batch_chunk_size=tokens_at_once(len(hidden), len(weight)),
        chunking_method=None,
        acc_policy="compact" if fast else "auto",
    )
    # The sum has the operands' numbers, and float16 ends at 65,504 nats.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    size = FLOAT16_TOKENS if hidden.dtype == torch.float16 else max(1, len(hidden))
    nats = sum(
        nn.functional.linear_cross_entropy(
            *(part, weight, said), linear_bias=bias, reduction="sum", options=options
        ).to(wide)
        for part, said in zip(hidden.split(size), labels.split(size), strict=True)
    )
    if label_smoothing:
        # (1 - s) (logsumexp - score of the label) + s (logsumexp - mean score), the vocabulary's mean score being linear too.
        label_score = (hidden * weight[labels]).sum(dtype=wide)
        mean_score = hidden.sum(0, dtype=wide) @ weight.mean(0, dtype=wide)
        if bias is not None:
            label_score = label_score + bias[labels].sum(dtype=wide)
            mean_score = mean_score + len(hidden) * bias.mean(dtype=wide)
        nats = nats + label_smoothing * (label_score - mean_score)
    return nats / num_items_in_batch
