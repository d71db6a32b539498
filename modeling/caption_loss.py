"""Cross entropy of captions, in chunks: the logits of a whole batch over the vocabulary are never in memory at once."""

import math

import torch
from torch import nn

FLOAT16_TOKENS = 1024  # of up to 64 nats each
MAX_LOGITS_PER_CHUNK = 2**24  # 64 MiB in float32; smaller chunks make slow matrix products
GPU_CHUNKS = 16  # a GPU's chunks are larger by this: up to 1.5 GiB
GPU_ROWS = 64  # a GPU is slow at products whose sizes are no multiples of 8: GPT-2's vocabulary, 50,257, is odd
HAS_LINEAR_CROSS_ENTROPY = hasattr(nn, "LinearCrossEntropyOptions")  # torch 2.14 and newer


def chunk_size(num_tokens: int, vocab_size: int, device: torch.device) -> int:
    """Tokens whose logits are computed together; chunks have equal sizes, since a small one takes as long as a large one."""
    max_logits = MAX_LOGITS_PER_CHUNK * (GPU_CHUNKS if device.type == "cuda" else 1)
    num_chunks = math.ceil(num_tokens * vocab_size / max_logits)
    return max(1, math.ceil(num_tokens / max(1, num_chunks)))


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether a device has bfloat16 instructions, so that it is faster than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # An older torch cannot say, and float32 is right anywhere.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)
    return any(capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def hidden_states_before_head(forward: nn.Module, model: nn.Module, **inputs) -> tuple[torch.Tensor, nn.Module]:
    """Run a captioner up to its head, the last linear layer; no logits are computed.

    For what computes them itself, chunk by chunk. The last of a decoder's `hidden_states` would not do: decoders of the BERT
    kind have layers between it and the head.

    Args:
        forward: The model, or what Accelerate has wrapped it in.
        model: The model itself.
        inputs: Arguments of its forward, without labels.

    Returns:
        hidden: Inputs of the head, (batch, length, hidden size).
        head: The model's output embeddings.
    """
    head = model.get_output_embeddings()
    captured = []

    def capture_input(module: nn.Module, args: tuple) -> tuple:
        captured.append(args[0])
        return (args[0][:, :0],)  # no tokens, hence no logits

    hook = head.register_forward_pre_hook(capture_input)
    try:
        forward(**inputs, use_cache=False)  # with a cache, transformers lets packed captions attend to each other
    finally:
        hook.remove()
    return captured.pop(), head


def teacher_forcing_loss(
    forward: nn.Module,
    model: nn.Module,
    batch: dict,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross entropy of a batch of captions for either captioner, in nats per token.

    Args:
        forward, model: See `hidden_states_before_head`.
        batch: `labels`, int64 (batch, length), and the model's inputs.
        num_items_in_batch, label_smoothing: See `caption_loss`.
    """
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    hidden, head = hidden_states_before_head(forward, model, **inputs)
    return caption_loss(hidden, batch["labels"], head, num_items_in_batch, label_smoothing)


def can_read_weight(head: nn.Module) -> bool:
    """Whether a head is a linear layer and nothing more, so that a loss may use its weight without calling it.

    Not where it is wrapped (LoRA), quantized, offloaded or has hooks of others; FSDP2's hooks only gather the weight.
    """
    replaced = "forward" in vars(head)  # as accelerate does with an instance's
    if replaced or type(head).forward is not nn.Linear.forward:
        return False
    is_fsdp_module = hasattr(head, "unshard")
    if is_fsdp_module:
        return not hasattr(head.weight, "full_tensor")  # a DTensor while it is sharded
    return not head._forward_hooks and not head._forward_pre_hooks


def caption_loss(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: nn.Module,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross entropy of the next token, in nats per token.

    Logits are computed chunk by chunk and their gradient replaces them at once (torch's `linear_cross_entropy`, or
    `ChunkedCrossEntropy` where it has none, and on a GPU); loss and gradients equal those of the plain computation.

    Args:
        hidden: Inputs of the head, float (batch, length, hidden size).
        labels: int64 (batch, length), -100 where there is no target.
        head: Output embeddings: usually a linear layer of weight (vocabulary, hidden size). Any other module from hidden
            states to logits is called, see `can_read_weight`.
        num_items_in_batch: Divisor of the summed loss: the number of labels of the whole step, so that each token of
            accumulated batches has the same weight; the batch's own number where None.
        label_smoothing: Probability that is spread evenly over the vocabulary (Szegedy et al., 2016,
            https://arxiv.org/abs/1512.00567, section 7).
    """
    has_label = labels != -100
    if num_items_in_batch is None:
        num_items_in_batch = has_label.sum()
    if hidden.device.type == "cuda":  # which indexing by a mask would have to wait for
        hidden = hidden.masked_fill(~has_label.unsqueeze(-1), 0).flatten(0, 1)
        labels = labels.flatten()
    else:
        hidden, labels = hidden[has_label], labels[has_label]  # (tokens, hidden size), (tokens,)
    if can_read_weight(head):
        nats = _fused_cross_entropy(hidden, labels, head.weight, head.bias, label_smoothing)
    else:
        nats = _called_cross_entropy(hidden, labels, head, label_smoothing)
    return nats / num_items_in_batch


def _called_cross_entropy(
    hidden: torch.Tensor, labels: torch.Tensor, head: nn.Module, label_smoothing: float
) -> torch.Tensor:
    """Sum of the cross entropy, through the head's own forward."""
    logits = head(hidden)  # (tokens, vocabulary)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)


def _fused_cross_entropy(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    label_smoothing: float,
) -> torch.Tensor:
    """Sum of the cross entropy, from weight (vocabulary, hidden size) and bias (vocabulary,) of a linear head."""
    if torch.is_autocast_enabled(hidden.device.type):  # which torch's op ignores
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    # On a CPU bfloat16 is slow without instructions for it: the products are float32's then.
    fast = hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16 and computes_in_bfloat16(hidden.device)
    sum_dtype = torch.promote_types(hidden.dtype, torch.float32)  # float16 ends at 65,504 nats
    on_gpu = hidden.device.type == "cuda"
    size = chunk_size(len(hidden), len(weight), hidden.device)
    if HAS_LINEAR_CROSS_ENTROPY and not on_gpu:
        options = nn.LinearCrossEntropyOptions(
            batch_chunk_size=size, chunking_method=None, acc_policy="compact" if fast else "auto"
        )
        # The op's sum has the operands' dtype.
        part = FLOAT16_TOKENS if hidden.dtype == torch.float16 else max(1, len(hidden))
        nats = sum(
            nn.functional.linear_cross_entropy(
                *(hidden_part, weight, labels_part), linear_bias=bias, reduction="sum", options=options
            ).to(sum_dtype)
            for hidden_part, labels_part in zip(hidden.split(part), labels.split(part), strict=True)
        )
    else:
        operands = hidden, weight, bias
        if hidden.device.type == "cpu" and not fast:
            operands = [None if value is None else value.to(sum_dtype) for value in operands]
        operands = pad_vocabulary(*operands) if on_gpu else operands
        with torch.autocast(hidden.device.type, enabled=False):
            nats = ChunkedCrossEntropy.apply(*operands, labels, size)
    if label_smoothing:
        # (1 - s) (logsumexp - label's logit) + s (logsumexp - mean logit); the mean over the vocabulary is linear as well.
        has_label, labels = labels != -100, labels.clamp(min=0)  # hidden states without a label are zeros
        label_logits = (hidden * weight[labels]).sum(dtype=sum_dtype)
        mean_logits = hidden.sum(0, dtype=sum_dtype) @ weight.mean(0, dtype=sum_dtype)
        if bias is not None:
            label_logits = label_logits + (bias[labels] * has_label).sum(dtype=sum_dtype)
            mean_logits = mean_logits + has_label.sum() * bias.mean(dtype=sum_dtype)
        nats = nats + label_smoothing * (label_logits - mean_logits)
    return nats


def pad_vocabulary(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The operands with rows of weight, up to a multiple of 64, that stand for tokens of probability 0."""
    missing = -len(weight) % GPU_ROWS
    if not missing:
        return hidden, weight, bias
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    pad = nn.functional.pad
    return hidden, pad(weight, (0, 0, 0, missing)), pad(bias, (0, missing), value=-math.inf)


def chunk_gradients(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross entropy of a chunk, and its gradient in the logits, in float32 or more.

    Args:
        logits: (chunk, vocabulary).
        targets: (chunk, 1), -100 where there is no label, where the gradient is the softmax alone.
    """
    has_label, targets = targets != -100, targets.clamp(min=0)
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)  # (chunk, vocabulary)
    nats = -(log_probs.gather(1, targets) * has_label).sum()
    gradient = log_probs.exp_().scatter_add_(1, targets, -has_label.to(log_probs.dtype))  # one less at the label
    return nats, gradient


def compile_loss(backend: str) -> None:
    """Let torch.compile make few kernels of what is done with the logits on a GPU; in this process, from now on."""
    global chunk_gradients
    chunk_gradients = torch.compile(chunk_gradients, backend=backend, dynamic=True)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropy of a linear head, whose gradients are computed with it, chunk by chunk.

    For torch before 2.14, which has no `linear_cross_entropy` (to go with it), and for GPUs, whose products of a padded
    vocabulary it can use. The gradients are summed in float32, as torch's op sums them. `backward` may be called once, and has no
    gradient itself.

    Args, of `apply`: hidden states (tokens, hidden size), zeros where there is no label; weight (vocabulary, hidden size) and bias
        (vocabulary,) or None; labels (tokens,), -100 where there is none; and the number of tokens whose logits are in memory at
        once.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, size: int) -> torch.Tensor:
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        nats = hidden.new_zeros((), dtype=sum_dtype)
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=sum_dtype) if needs_weight else None
        bias_grad = torch.zeros_like(bias, dtype=sum_dtype) if needs_bias else None
        for start in range(0, len(hidden), size):
            part, targets = hidden[start : start + size], labels[start : start + size, None]
            nats_of_part, logits_grad = chunk_gradients(nn.functional.linear(part, weight, bias), targets)
            nats += nats_of_part
            if needs_bias:
                bias_grad += (logits_grad * (targets != -100)).sum(0)
            logits_grad = logits_grad.to(hidden.dtype)
            if needs_hidden:
                torch.mm(logits_grad, weight, out=hidden_grad[start : start + size])
            if needs_weight:
                weight_grad += logits_grad.T @ part
        ctx.gradients = hidden_grad, weight_grad, bias_grad
        ctx.dtypes = hidden.dtype, weight.dtype, hidden.dtype if bias is None else bias.dtype
        return nats

    @staticmethod
    def backward(ctx, gradient):
        scaled = [
            value if value is None else value.mul_(gradient).to(dtype)
            for value, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        del ctx.gradients
        return *scaled, None, None
