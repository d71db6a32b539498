"""Laws of the loss: computed in chunks, it is the plain cross entropy, gradients included."""

import pytest
import torch
from torch import nn

from modeling import caption_loss as module
from modeling.caption_loss import caption_loss


def plain_loss(hidden, labels, head, num_items_in_batch, label_smoothing):
    """All logits at once, as torch's own cross entropy takes them."""
    logits = nn.functional.linear(hidden, head.weight, head.bias).flatten(0, 1)
    options = {"reduction": "sum", "ignore_index": -100, "label_smoothing": label_smoothing}
    return nn.functional.cross_entropy(logits, labels.flatten(), **options) / num_items_in_batch


def head_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    head = nn.Linear(*weight.shape[::-1], bias=bias is not None)
    head.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return head


@pytest.fixture(autouse=True, params=[True, False], ids=["of_torch", "of_ours"])
def has_linear_cross_entropy(request, monkeypatch):
    """Each test runs with torch's op, where it has one, and with what stands in for it on older ones."""
    if request.param and not module.HAS_LINEAR_CROSS_ENTROPY:
        pytest.skip("torch has no linear_cross_entropy: 2.14 is the first that has")
    monkeypatch.setattr(module, "HAS_LINEAR_CROSS_ENTROPY", request.param)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    hidden, labels = torch.randn(3, 7, 16), torch.randint(0, 50, (3, 7))
    labels[0, :2] = labels[1, 4:] = labels[2, 6:] = -100
    return hidden.requires_grad_(), labels, head_of(torch.randn(50, 16), torch.randn(50))


def loss_and_gradients(loss_of, hidden, labels, head, *options) -> list[torch.Tensor]:
    loss = loss_of(hidden, labels, head, *options)
    return [loss.detach(), *torch.autograd.grad(2 * loss, [hidden, *head.parameters()])]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("divisor", [None, 37])
def test_loss_and_gradients_are_the_plain_ones(batch, monkeypatch, has_bias, label_smoothing, divisor):
    monkeypatch.setattr(module, "MAX_LOGITS_PER_CHUNK", 250)  # five tokens at a time
    hidden, labels, head = batch
    head = head if has_bias else head_of(head.weight)
    num_labels = divisor or (labels != -100).sum()
    results = [
        loss_and_gradients(caption_loss, hidden, labels, head, divisor, label_smoothing),
        loss_and_gradients(plain_loss, hidden, labels, head, num_labels, label_smoothing),
    ]
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_a_frozen_head_gets_no_gradient_and_evaluation_needs_none(batch):
    hidden, _, head = batch
    loss, expected, *_ = loss_and_gradients(caption_loss, *batch)
    head.requires_grad_(False)
    (gradient,) = torch.autograd.grad(2 * caption_loss(*batch), [hidden])
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-7)
    with torch.no_grad():
        assert caption_loss(*batch).item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.slow
def test_logits_of_a_batch_are_never_in_memory_at_once(monkeypatch):
    """No operation, also none inside torch's own, takes more memory than the hidden states; all logits are 25 times as many."""
    monkeypatch.setattr(module, "MAX_LOGITS_PER_CHUNK", 2000)
    hidden, labels = torch.randn(40, 30, 4, requires_grad=True), torch.randint(0, 100, (40, 30))
    head = nn.Linear(4, 100, bias=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        caption_loss(hidden, labels, head).backward()
    taken = [event.self_cpu_memory_usage for event in profile.events()]
    assert 0 < max(taken) <= 4 * hidden.numel()


def test_in_float16_many_tokens_are_no_more_than_it_can_hold():
    """Their sum is more than its largest number, 65,504."""
    hidden, labels = torch.full((1, 3000, 4), 10.0, requires_grad=True), torch.zeros(1, 3000, dtype=torch.int64)
    head = head_of(torch.tensor([[0.0] * 4, [1.0] * 4]))  # 40 nats for each
    with torch.autocast("cpu", dtype=torch.float16):
        losses = [caption_loss(hidden, labels, head, label_smoothing=smoothing) for smoothing in (0.0, 0.5)]
    losses[0].backward()
    assert losses[0].item() == pytest.approx(40, rel=1e-3) and losses[1].item() == pytest.approx(30, rel=1e-3)
    torch.testing.assert_close(hidden.grad, torch.full_like(hidden, 1 / 3000), rtol=2e-3, atol=0)


def test_in_bfloat16_it_stays_near(batch):
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            results.append(loss_and_gradients(caption_loss, *batch))
    for exact, rounded in zip(*results, strict=True):
        assert 0 < (rounded - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize(
    ("instructions", "dtype"), [({"avx512_bf16": True}, "c10::BFloat16"), ({}, "float")], ids=["bfloat16", "none"]
)
def test_in_bfloat16_products_have_the_dtype_that_the_cpu_is_fast_in(batch, monkeypatch, instructions, dtype):
    """torch's op, left to choose, computes them in float32: four times as slow on a processor that has bfloat16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=cpu, record_shapes=True) as profile,
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        caption_loss(*batch).backward()
    events = profile.profiler.kineto_results.events()
    products = [event.dtypes()[:3] for event in events if event.name() in ("aten::mm", "aten::addmm", "aten::addmm_")]
    assert len(products) == 3  # the logits, and the gradients of hidden states and weight
    assert {name for dtypes in products for name in dtypes} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_without_a_label_and_rows_of_padding_change_nothing(batch, dtype):
    """As on a card: no token is left out, hidden states without a label are zeros, and the vocabulary has a size of its liking."""
    hidden, labels, head = batch
    has_label = labels != -100
    operands = [value.detach().to(dtype) for value in (hidden, head.weight, head.bias)]
    expected = [value.clone().requires_grad_() for value in operands]
    nats = module.ChunkedCrossEntropy.apply(expected[0][has_label], *expected[1:], labels[has_label], 5)
    found = [value.clone().requires_grad_() for value in operands]
    inputs = found[0].masked_fill(~has_label.unsqueeze(-1), 0).flatten(0, 1)
    padded = module.pad_vocabulary(inputs, *found[1:])
    assert len(padded[1]) == len(padded[2]) == 64 and padded[1].dtype == dtype
    assert module.ChunkedCrossEntropy.apply(*padded, labels.flatten(), 4).item() == pytest.approx(nats.item(), rel=1e-6)
    (2 * nats).backward()
    (2 * module.ChunkedCrossEntropy.apply(*padded, labels.flatten(), 4)).backward()
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.grad - theirs.grad).norm() <= (1e-6 if dtype == torch.float32 else 2e-2) * theirs.grad.norm()


def test_a_vocabulary_without_bias_is_padded_with_tokens_of_no_probability(batch):
    hidden, _, head = batch
    states, weight, bias = module.pad_vocabulary(hidden[0], head.weight, None)
    logits = nn.functional.linear(states, weight, bias)
    torch.testing.assert_close(logits.softmax(-1)[:, :50], (hidden[0] @ head.weight.T).softmax(-1))
    assert logits.softmax(-1)[:, 50:].eq(0).all()


def test_compiled_it_is_the_same(batch, monkeypatch):
    monkeypatch.setattr(module, "HAS_LINEAR_CROSS_ENTROPY", False)
    monkeypatch.setattr(module, "chunk_gradients", module.chunk_gradients)  # as it was, afterwards
    expected = loss_and_gradients(caption_loss, *batch)
    module.compile_loss("aot_eager")
    for ours, theirs in zip(loss_and_gradients(caption_loss, *batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
