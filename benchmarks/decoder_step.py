"""Time a training step of either decoder against plain matrix products of its shapes, and measure the memory of the loss.

    python -m benchmarks.decoder_step --json decoder_step.json

A step is forward pass, loss and backward pass from encoder features; the products are all those that it cannot do without, in
float32, each with its two gradients. The memory of the loss is the peak of a process that computes nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks.full_size import VOCABULARY, build_captioner, paragraphs, random_states
from benchmarks.machine import (
    benchmark_parser,
    describe_machine,
    in_turns,
    medians,
    ratio_of_medians,
    synchronize,
    write_result,
)
from modeling.caption_loss import caption_loss, hidden_states_before_head

SHAPE = {"lstm": (64, 70), "vit_gpt2": (8, 128)}  # captions in a batch, tokens in a caption
HIDDEN = 768  # of GPT-2 small


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, runs=3)
    parser.add_argument(
        "--captioners", choices=["lstm", "vit_gpt2"], nargs="+", default=["lstm", "vit_gpt2"], help="captioners to time"
    )
    parser.add_argument("--memory_of", choices=["nothing", *LOSSES], help=argparse.SUPPRESS)  # of this process
    args = parser.parse_args(argv)
    if args.memory_of:
        return measure_memory(args.memory_of)
    result = {"machine": describe_machine(args.device)}
    captions = [texts[0] for texts in paragraphs(None, 1000)["captions"]]
    for kind in args.captioners:
        result[kind] = compare_step(kind, captions, args)
    result["loss"] = compare_loss(args)
    write_result(result, args.json)


def compare_step(kind: str, captions: list[str], args) -> dict:
    """Billions of floating point operations per second of the step and of the bare products, in turns."""
    model = build_captioner(kind, captions).model.to(args.device).train()
    batch_size, length = SHAPE[kind]
    states = random_states(kind, batch_size, args.device)
    labels = torch.randint(4, 1000, (batch_size, length), device=args.device)
    products = list(lstm_products(model.config) if kind == "lstm" else gpt2_products(model.config.decoder))
    billions = sum(6 * count * batch * n * k * m for count, batch, n, k, m in products) / 1e9

    def step() -> float:
        start = time.perf_counter()
        step_loss(kind, model, states, labels).backward()
        synchronize(args.device)
        seconds = time.perf_counter() - start
        model.zero_grad()
        return billions / seconds

    def bare() -> float:
        seconds = 0.0
        for count, batch, n, k, m in products:
            left, right, out = (torch.randn(batch, *size, device=args.device) for size in ((n, k), (k, m), (n, m)))
            if batch == 1:
                left, right, out = left[0], right[0], out[0]
            synchronize(args.device)  # drawing the numbers is not timed
            start = time.perf_counter()
            for _ in range(count):
                left @ right, out @ right.mT, left.mT @ out
            synchronize(args.device)
            seconds += time.perf_counter() - start
        return billions / seconds

    step(), bare()  # warm-up
    measured = in_turns({"step": step, "products": bare}, args.runs)
    return {
        "captions": batch_size,
        "tokens": length,
        "gflop_per_second": measured,
        "medians": medians(measured),
        "step_to_products": ratio_of_medians(measured, "step", "products"),
    }


def step_loss(kind: str, model, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of a batch as the training scripts compute it."""
    if kind == "lstm":
        return model(encoder_outputs=(states,), labels=labels).loss
    ids = model.prepare_decoder_input_ids_from_labels(labels)
    decoder = model.decoder
    hidden, head = hidden_states_before_head(decoder, decoder, input_ids=ids, encoder_hidden_states=states)
    return caption_loss(hidden, labels, head)


def lstm_products(config) -> Iterator[tuple[int, int, int, int, int]]:
    """(times, batch, n, k, m) of each product n x k by k x m: a layer's inputs at once, its state token by token, the logits."""
    captions, length = SHAPE["lstm"]
    for layer in range(config.num_hidden_layers):
        size = config.image_embed_dim if layer == 0 else config.hidden_size
        yield 1, 1, captions * length, size, 4 * config.hidden_size
    yield config.num_hidden_layers * length, 1, captions, config.hidden_size, 4 * config.hidden_size
    yield 1, 1, captions * length, config.hidden_size, config.vocab_size


def gpt2_products(config) -> Iterator[tuple[int, int, int, int, int]]:
    """The same for GPT-2 with cross attention over 197 positions."""
    captions, length = SHAPE["vit_gpt2"]
    tokens, positions, size, layers = captions * length, 197, config.n_embd, config.n_layer
    heads = captions * config.n_head
    for rows, width, out in [
        (tokens, size, 3 * size),  # queries, keys and values of self-attention
        (tokens, size, size),
        (tokens, size, size),  # queries of cross attention
        (captions * positions, size, 2 * size),  # its keys and values
        (tokens, size, size),
        (tokens, size, 4 * size),
        (tokens, 4 * size, size),
    ]:
        yield layers, 1, rows, width, out
    for keys in (length, positions):
        yield layers, heads, length, size // config.n_head, keys
        yield layers, heads, length, keys, size // config.n_head
    yield 1, 1, tokens, size, config.vocab_size


def loss_inputs(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    """Hidden states, labels and head of ViT-GPT2's loss, 8 captions of 128 tokens."""
    torch.manual_seed(0)
    hidden = torch.randn(*SHAPE["vit_gpt2"], HIDDEN, device=device, requires_grad=True)
    head = nn.Linear(HIDDEN, VOCABULARY["vit_gpt2"], bias=False, device=device)
    nn.init.normal_(head.weight, std=0.02)
    return hidden, torch.randint(VOCABULARY["vit_gpt2"], SHAPE["vit_gpt2"], device=device), head


def plain_loss(hidden: torch.Tensor, labels: torch.Tensor, head: nn.Linear) -> torch.Tensor:
    """The logits of all tokens at once, as float32, then their cross entropy."""
    logits = head(hidden)
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


LOSSES = {"plain": plain_loss, "showtell": caption_loss}


def compare_loss(args) -> dict:
    """Seconds, memory and gradients of both losses."""
    gradients = {}

    def seconds(name: str) -> float:
        hidden, labels, head = loss_inputs(args.device)
        start = time.perf_counter()
        LOSSES[name](hidden, labels, head).backward()
        synchronize(args.device)
        gradients[name] = torch.cat([hidden.grad.flatten(), head.weight.grad.flatten()])
        return time.perf_counter() - start

    seconds("plain"), seconds("showtell")
    measured = in_turns({name: lambda name=name: seconds(name) for name in LOSSES}, args.runs)
    difference = (gradients["showtell"] - gradients["plain"]).norm() / gradients["plain"].norm()
    held = {name: peak_memory(name) for name in ("nothing", *LOSSES)}
    beyond = {name: held[name] - held["nothing"] for name in LOSSES}
    return {
        "seconds": measured,
        "medians": medians(measured),
        "ratio_of_seconds": ratio_of_medians(measured, "showtell", "plain"),
        "mebibytes_beyond_weights_and_gradients": beyond,
        "ratio_of_memory": beyond["showtell"] / beyond["plain"],
        "relative_difference_of_gradients": difference.item(),
    }


def peak_memory(what: str) -> float:
    """Peak memory of a process that computes nothing but this loss, in MiB; on Linux alone.

    Without the Makefile's settings for glibc, under which freed memory counts as held.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-m", "benchmarks.decoder_step", "--memory_of", what]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def measure_memory(what: str) -> None:
    """Compute one loss, and print the mebibytes that this process held at most."""
    hidden, labels, head = loss_inputs()
    if what == "nothing":  # what both losses hold at the end
        hidden.grad, head.weight.grad = torch.ones_like(hidden), torch.ones_like(head.weight)
    else:
        LOSSES[what](hidden, labels, head).backward()
    # In kB; getrusage would start from the peak of the parent process.
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1024)


if __name__ == "__main__":
    main()
