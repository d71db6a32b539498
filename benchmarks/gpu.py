"""Check and time everything that a CUDA card does, in at most 8 minutes, without network, with random weights.

    python -m benchmarks.gpu --json gpu.json     # or: make gpu-check

Runs the tests marked `gpu`, then measures, at full size: the training step of both captioners from cached features, decoding beside
the reference implementation, the image encoders alone, compiled, in either memory order and fed by a data loader, and what the CPU's
special paths do on the card: the chunked loss and the fused AdamW beside torch's plain ones. A part that would begin after
`--minutes` is left out, and the table says so. `--device cpu --tiny` runs all of it on small captioners, as a test does.
"""

import functools
import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_outputs import BaseModelOutput

from benchmarks import full_size, generate, reference
from benchmarks.machine import benchmark_parser, describe_machine, synchronize, write_result
from modeling import caption_loss as loss_module
from modeling.caption_loss import teacher_forcing_loss
from modeling.captioner import Captioner
from modeling.inception_lstm import build_inception_lstm
from modeling.modeling_inception_lstm import TimmEncoder
from modeling.processing import build_processor
from modeling.vit_gpt2 import build_vit_gpt2, decoder_config, encoder_config, vit_image_processor
from system.errors import UserError, one_line_errors
from training.compiling import compile_blocks
from training.features import PixelCollator
from training.optimizer import build_adamw

KINDS = ("lstm", "vit_gpt2")
BETWEEN = 2  # captions whose operations are counted; their number is proportional to that of captions
ADAMW = {"learning_rate": 1e-4, "weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
SIZES = {
    False: {
        **{"batch_size": 256, "tokens": 64, "images": 1024, "loaded": 8192, "product": 8192},
        **{"new_tokens": 48, "decoded": {"lstm": 16384, "vit_gpt2": 1024}, "steps": 10},
    },
    True: {
        **{"batch_size": 4, "tokens": 6, "images": 8, "loaded": 16, "product": 64},
        **{"new_tokens": 4, "decoded": {"lstm": 4, "vit_gpt2": 4}, "steps": 1},
    },
}
LARGE_BATCHES = {"lstm": [512, 1024], "vit_gpt2": [512]}


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, runs=1)
    parser.set_defaults(device="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="small captioners and few images, to try the command itself"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time after which no further part begins")
    args = parser.parse_args(argv)
    with one_line_errors():
        if args.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(
                "no CUDA card was found, and nothing was measured: run this where torch.cuda.is_available() is true, or try the "
                "command itself with --device cpu --tiny"
            )
    args.sizes = Namespace(**SIZES[args.tiny])
    result = {"machine": describe_machine(args.device)}
    deadline = time.monotonic() + 60 * args.minutes
    for name, part in parts(args, deadline).items():
        start = time.monotonic()
        print(f"{name} ...", file=sys.stderr, flush=True)
        if start > deadline:
            result[name] = {"left_out": f"{args.minutes:g} minutes were over"}
            continue
        try:
            result[name] = part(result)
        except Exception as error:  # the other parts are worth having
            result[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        result[name]["seconds_taken"] = round(time.monotonic() - start, 1)
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    write_result(result, args.json)
    print(table(result))
    if any("failed" in part for part in result.values()):
        raise SystemExit(1)


def parts(args, deadline: float) -> dict[str, Callable[[dict], dict]]:
    """What is measured, in this order, by name; each is given what was measured before it."""
    captions = [texts[0] for texts in full_size.paragraphs(None, args.sizes.images)["captions"]]

    @functools.cache
    def captioner(kind: str) -> Captioner:
        built = tiny_captioner(kind, captions) if args.tiny else full_size.build_captioner(kind, captions)
        built.model.to(args.device)
        return built

    found = {} if args.tiny else {"tests": lambda _: run_tests(deadline)}
    found["peak"] = lambda _: {"bf16_tflops": product_tflops(args)}
    for kind in KINDS:
        found |= {
            f"training step, {kind}": lambda result, kind=kind: training_step(
                kind, captioner(kind), args, result["peak"]
            ),
            f"encoder, {kind}": lambda result, kind=kind: encoding(captioner(kind), args, result["peak"]),
            f"loss, {kind}": lambda _, kind=kind: losses(captioner(kind), args),
            f"adamw, {kind}": lambda _, kind=kind: optimizers(captioner(kind), args),
            # Last: its weights are bfloat16's from then on.
            f"decoding, {kind}": lambda _, kind=kind: decoding(kind, captioner(kind), captions, args),
        }
    return found


def tiny_captioner(kind: str, captions: list[str]) -> Captioner:
    """A captioner of a few thousand weights."""
    tokenizer = full_size.train_tokenizer(captions, 120)
    if kind == "lstm":
        sizes = {"image_embed_dim": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        return build_inception_lstm("test_efficientnet", tokenizer, pretrained_encoder=False, image_size=32, **sizes)
    encoder = encoder_config(32, 16, 16, 1, 2)
    model = build_vit_gpt2(encoder, decoder_config(len(tokenizer), 16, 1, 2), tokenizer)
    return Captioner(model, build_processor(vit_image_processor(encoder), tokenizer))


def run_tests(deadline: float) -> dict:
    """Run the tests marked `gpu`; numbers of those that passed, failed and were skipped."""
    root = Path(__file__).parent.parent
    # The others may need packages that a cluster's image lacks.
    files = [str(path) for path in (root / "tests").glob("test_*.py") if "pytest.mark.gpu" in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "false"}
    timeout = max(60.0, (deadline - time.monotonic()) / 2)
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=timeout)
    lines = done.stdout.splitlines()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    if done.returncode:
        raise RuntimeError(f"tests: {lines[-1]}; {' '.join(line for line in lines if line.startswith('FAILED'))}")
    return {**counts, "skips": [line for line in lines if line.startswith("SKIPPED")]}


# ---- Measuring ------------------------------------------------------------------------------------------------------


def seconds_of(run: Callable[[], object], args) -> float:
    """Seconds of one call, the mean of `steps` after three that are not timed."""
    for _ in range(min(3, args.sizes.steps)):
        run()
    synchronize(args.device)
    start = time.perf_counter()
    for _ in range(args.sizes.steps):
        run()
    synchronize(args.device)
    return (time.perf_counter() - start) / args.sizes.steps


def peak_gib(run: Callable[[], object], args) -> float | None:
    """Most memory that the card held in one call; None on a CPU."""
    if not args.device.startswith("cuda"):
        run()
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def product_tflops(args) -> float:
    """The card's rate of products in bfloat16, 10^12 operations a second: measured, on random numbers."""
    size = args.sizes.product
    left, right = (torch.randn(size, size, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: left @ right, args) / 1e12


def in_bfloat16(args) -> torch.autocast:
    """As the training scripts train with `--bf16 true`; float32 in a tiny run, since many CPUs have no LSTM in bfloat16."""
    return torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=not args.tiny)


def rate(number: int, operations: float, seconds: float, peak: dict) -> dict:
    """Items a second, and the share of the card's peak that their operations are."""
    tflops = operations / seconds / 1e12
    return {"per_second": number / seconds, "tflops": tflops, "share_of_peak": tflops / peak["bf16_tflops"]}


def batch_of(captioner: Captioner, args, size: int) -> dict:
    """Random encoder states and labels of `size` captions."""
    pixels = example_pixels(captioner, 1, args)
    with torch.no_grad():
        states = captioner.encoder.eval()(pixels).last_hidden_state
    states = torch.randn(size, *states.shape[1:], device=args.device)
    labels = torch.randint(4, len(captioner.tokenizer), (size, args.sizes.tokens), device=args.device)
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=states), "labels": labels}


def example_pixels(captioner: Captioner, size: int, args) -> torch.Tensor:
    rows = full_size.paragraphs(None, 1)
    pixels = PixelCollator(captioner.image_processor)([rows[0]["image"]])
    return pixels.to(args.device).expand(size, -1, -1, -1).contiguous()


# ---- Parts ----------------------------------------------------------------------------------------------------------


def step_loss(captioner: Captioner, batch: dict) -> torch.Tensor:
    """As the training scripts compute it."""
    model = captioner.model
    if hasattr(model, "decoder"):
        inputs = {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}
        return teacher_forcing_loss(model, model, batch | inputs)
    return model(**batch).loss


def plain_operations(captioner: Captioner, args) -> float:
    """Floating point operations of forward and backward pass for one caption, counted by torch, of a plain loss.

    Without cuDNN and oneDNN, whose LSTMs torch's counter does not know.
    """
    model, batch = captioner.model, batch_of(captioner, args, BETWEEN)
    labels = batch.pop("labels")
    ids = model.prepare_decoder_input_ids_from_labels(labels)
    counter = FlopCounterMode(display=False)
    with counter, torch.backends.cudnn.flags(enabled=False), torch.backends.mkldnn.flags(enabled=False):
        logits = model(**batch, decoder_input_ids=ids, use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    model.zero_grad()
    return counter.get_total_flops() / BETWEEN


def training_step(kind: str, captioner: Captioner, args, peak: dict) -> dict:
    """Forward pass, loss, backward pass and AdamW from cached features, in bfloat16, as a frozen encoder is trained with.

    Of ViT-GPT2 also as `accelerate launch --dynamo_backend inductor` has it.
    """
    model = captioner.model.train()
    model.encoder.requires_grad_(False)
    operations = plain_operations(captioner, args)
    found = {"tokens": args.sizes.tokens, "gflop_per_caption": operations / 1e9}
    for size in (args.sizes.batch_size, *([] if args.tiny else LARGE_BATCHES[kind])):
        found[f"batch_{size}"] = step_of(captioner, args, size, operations, peak)
    if kind == "vit_gpt2":
        compile_blocks(model, "eager" if args.tiny else "inductor")
        found["compiled"] = step_of(captioner, args, args.sizes.batch_size, operations, peak)
    return found


def step_of(captioner: Captioner, args, size: int, operations: float, peak: dict) -> dict:
    batch = batch_of(captioner, args, size)
    optimizer = build_adamw(captioner.model, Namespace(**ADAMW))

    def step() -> None:
        with in_bfloat16(args):
            loss = step_loss(captioner, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return rate(size, size * operations, seconds_of(step, args), peak) | {"peak_gib": peak_gib(step, args)}


@torch.inference_mode()
def decoding(kind: str, captioner: Captioner, captions: list[str], args) -> dict:
    """Captions a second: in bfloat16, greedy and with 4 beams, and as the report decodes, in float32 without a cache."""
    number, tokens = args.sizes.decoded[kind], args.sizes.new_tokens
    few, many = min(64, number), min(1024, number)
    model, config = captioner.model.eval(), captioner.model.generation_config
    states = batch_of(captioner, args, number)["encoder_outputs"].last_hidden_state
    found = {"batch_size": number, "tokens": tokens}

    def report(size: int) -> Callable:
        ids = captioner.start_token_ids[0], -1, config.pad_token_id  # no caption ends
        return lambda: reference.generate(model, states[:size], *ids, tokens)

    def ours(size: int, beams: int = 1) -> Callable:
        outputs = BaseModelOutput(last_hidden_state=states[:size])
        options = {"num_beams": beams, "max_length": tokens, "min_length": tokens, "do_sample": False}
        return lambda: model.generate(encoder_outputs=outputs, **options)

    def per_second(size: int, run: Callable) -> float:
        run()
        synchronize(args.device)
        start = time.perf_counter()
        run()
        synchronize(args.device)
        return size / (time.perf_counter() - start)

    with torch.compiler.set_stance("force_eager"):
        # With more images at once it has no more captions a second, and needs more memory than most cards have.
        found["report_batch_size"], found["report_per_second"] = many, per_second(many, report(many))
        found[f"report_per_second_batch_{few}"] = per_second(few, report(few))
        found["float32_per_second"] = per_second(number, ours(number))
        found[f"float32_per_second_batch_{few}"] = per_second(few, ours(few))
        if not args.tiny:
            captioner.to(args.device, "bfloat16")
            states = states.bfloat16()
        found |= {
            "per_second": per_second(number, ours(number)),
            f"per_second_batch_{many}": per_second(many, ours(many)),
            f"per_second_batch_{few}": per_second(few, ours(few)),
            "per_second_4_beams": per_second(number // 4, ours(number // 4, beams=4)),
        }
        found["speedup"] = found["per_second"] / found["report_per_second"]
        if not args.tiny:
            compared = generate.compare(kind, captions, Namespace(device=args.device, batch_size=64, runs=1))
            found["same_captions_of_64"] = compared["same_captions"]
    return found


@torch.inference_mode()
def encoding(captioner: Captioner, args, peak: dict) -> dict:
    """Images a second of the encoder: from memory, compiled, in either order of the pixels, and behind a data loader."""
    size = min(64, args.sizes.images)
    encoder, pixels = captioner.encoder.eval(), example_pixels(captioner, size, args)
    counter = FlopCounterMode(display=False)
    with counter, in_bfloat16(args):
        encoder(pixels[:1])

    def seconds(forward: Callable) -> float:
        with in_bfloat16(args):
            return seconds_of(lambda: forward(pixels), args)

    found = {"batch_size": size} | rate(size, size * counter.get_total_flops(), seconds(encoder), peak)
    if isinstance(encoder, TimmEncoder):
        found |= memory_orders(encoder, pixels, seconds, size)
    if not args.tiny:
        try:
            found["compiled_per_second"] = size / seconds(torch.compile(encoder))
        except RuntimeError as error:  # most often for lack of a C++ compiler
            found["not_compiled"] = " ".join(str(error).split())[:300]
    found["float32_per_second"] = size / seconds_of(lambda: encoder(pixels), args)  # as features are cached
    return found | loading(captioner, args, size)


def memory_orders(encoder: TimmEncoder, pixels: torch.Tensor, seconds: Callable, size: int) -> dict:
    """Images a second with channels first, where showtell has them last, and the largest difference of the features in float32."""
    last = encoder(pixels).last_hidden_state
    encoder.memory_format = lambda device: torch.contiguous_format
    try:
        first = encoder(pixels).last_hidden_state
        return {
            "channels_first_per_second": size / seconds(encoder),
            "difference_of_memory_orders": ((last - first).abs().max() / first.abs().max()).item(),
        }
    finally:
        del encoder.memory_format


def loading(captioner: Captioner, args, size: int) -> dict:
    """Images a second that a loader decodes and resizes, with a worker for each core, alone and with the encoder in float32 behind
    it, as features are cached."""
    rows, size = full_size.paragraphs(None, args.sizes.images), min(size, args.sizes.loaded // 4)
    num_workers = 0 if args.tiny else os.cpu_count() or 1
    found = {"num_workers": num_workers}
    collator = PixelCollator(captioner.image_processor, args.device)
    for name, encodes in (("loaded_per_second", False), ("loaded_and_encoded_per_second", True)):
        loader = DataLoader(
            ImagesOf(rows, args.sizes.loaded),
            size,
            num_workers=num_workers,
            collate_fn=collator,
            pin_memory=args.device.startswith("cuda"),
        )
        start, number = None, 0
        for batch in loader:
            if start is None:  # the workers have started
                start = time.perf_counter()
                continue
            number += len(batch)
            if encodes:
                captioner.encoder(collator.finish(batch))
        synchronize(args.device)
        found[name] = number / (time.perf_counter() - start)
    return found


class ImagesOf(torch.utils.data.Dataset):
    """So many images of a table, as RGB; again from its start after its end."""

    def __init__(self, rows, number: int):
        self.rows, self.number = rows, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int):
        return self.rows[index % len(self.rows)]["image"].convert("RGB")


def losses(captioner: Captioner, args) -> dict:
    """Seconds, memory and value of the loss by torch's op, by `ChunkedCrossEntropy`, and plain, from the same hidden states."""
    head = captioner.model.get_output_embeddings()
    number = args.sizes.batch_size * args.sizes.tokens // 4
    hidden = torch.randn(1, number, head.in_features, device=args.device, requires_grad=True)
    labels = torch.randint(0, head.out_features, (1, number), device=args.device)
    has_op = loss_module.HAS_LINEAR_CROSS_ENTROPY
    found = {"positions": number, "vocabulary": head.out_features, "torch_has_the_op": has_op}

    def loss_of(name: str) -> torch.Tensor:
        if name == "plain":
            return nn.functional.cross_entropy(head(hidden[0]).float(), labels[0])
        if name == "of_ours":
            return loss_module.ChunkedCrossEntropy.apply(*operands(), labels[0], size) / number
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=size, chunking_method=None)
        inputs, weight, bias = operands(padded=False)
        return nn.functional.linear_cross_entropy(inputs, weight, labels[0], linear_bias=bias, options=options)

    def operands(padded: bool = True) -> tuple:
        dtype = torch.float32 if args.tiny else torch.bfloat16
        of_head = (None if value is None else value.to(dtype) for value in (head.weight, head.bias))
        inputs = hidden[0].to(dtype), *of_head
        return loss_module.pad_vocabulary(*inputs) if padded else inputs

    size = loss_module.chunk_size(number, head.out_features, hidden.device)
    for name in (*(["of_torch"] if has_op else []), "of_ours", "plain"):

        def run(name: str = name) -> torch.Tensor:
            with in_bfloat16(args) if name == "plain" else nullcontext():
                loss = loss_of(name)
            loss.backward()
            hidden.grad = None
            captioner.model.zero_grad()
            return loss

        found[name] = {"seconds": seconds_of(run, args), "peak_gib": peak_gib(run, args), "nats": run().item()}
    nats = found["plain"]["nats"]
    off = max(abs(found[name]["nats"] - nats) for name in ("of_torch", "of_ours") if name in found)
    if off > 0.02 * nats:
        raise RuntimeError(f"the chunked loss is {off:.3g} nats from the plain one, {nats:.3g}")
    return found


def optimizers(captioner: Captioner, args) -> dict:
    """Seconds of AdamW, fused as showtell has it and plain, and the largest relative difference of the weights after three steps."""
    model = captioner.model
    model.encoder.requires_grad_(False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    start = [weight.detach().clone() for weight in weights]
    found, ends = {}, {}
    for name in ("fused", "plain"):
        torch.manual_seed(0)
        with torch.no_grad():
            for weight, value in zip(weights, start, strict=True):
                weight.copy_(value)
                weight.grad = torch.randn_like(weight)
        optimizer = build_adamw(model, Namespace(**ADAMW))
        if name == "plain":
            optimizer = torch.optim.AdamW(weights, lr=ADAMW["learning_rate"], weight_decay=ADAMW["weight_decay"])
        for _ in range(3):
            optimizer.step()
        ends[name] = [weight.detach().clone() for weight in weights]
        found[f"{name}_seconds"] = seconds_of(optimizer.step, args)
    apart = zip(ends["fused"], ends["plain"], strict=True)
    found["difference"] = max(((one - other).abs().max() / (other.abs().max() + 1e-12)).item() for one, other in apart)
    if found["difference"] > 1e-4:
        raise RuntimeError(f"weights after fused and plain AdamW are {found['difference']:.3g} apart")
    return found


def table(result: dict) -> str:
    """The result as a Markdown table, one row a number."""
    lines = ["| part | what | value |", "|---|---|---:|"]
    for part, values in result.items():
        for name, value in values.items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            for detail, number in inner:
                shown = f"{number:.4g}" if isinstance(number, float) else json.dumps(number)
                lines.append(f"| {part} | {' '.join((name, detail)).strip().replace('_', ' ')} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
