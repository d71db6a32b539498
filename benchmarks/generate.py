"""Time greedy decoding at batch 64 against decoding without a cache, full-size models with random weights.

    python -m benchmarks.generate --json generate.json

Both sides start from encoder features and generate the same captions. Also measured: the fraction of showtell's time that is
spent outside the model's forward pass.
"""

import time

import torch
from transformers.modeling_outputs import BaseModelOutput

from benchmarks import reference
from benchmarks.full_size import build_captioner, paragraphs, random_states
from benchmarks.machine import (
    benchmark_parser,
    describe_machine,
    in_turns,
    medians,
    ratio_of_medians,
    synchronize,
    write_result,
)

MAX_LENGTH = {"lstm": 80, "vit_gpt2": 24}  # tokens; random weights rarely end a caption before


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, runs=2)
    parser.add_argument(
        "--captioners", choices=["lstm", "vit_gpt2"], nargs="+", default=["lstm", "vit_gpt2"], help="captioners to time"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch")
    args = parser.parse_args(argv)
    result = {"machine": describe_machine(args.device)}
    captions = [texts[0] for texts in paragraphs(None, 1000)["captions"]]
    for kind in args.captioners:
        result[kind] = compare(kind, captions, args)
    write_result(result, args.json)


@torch.inference_mode()
def compare(kind: str, captions: list[str], args) -> dict:
    """Seconds per batch of both sides, in turns, and how many captions are the same."""
    captioner = build_captioner(kind, captions)
    model = captioner.model.to(args.device).eval()
    states = random_states(kind, args.batch_size, args.device)
    config, length, generated = model.generation_config, MAX_LENGTH[kind], {}
    outside = []

    def plain() -> float:
        start = time.perf_counter()
        ids = reference.generate(
            model, states, captioner.start_token_ids[0], config.eos_token_id, config.pad_token_id, length
        )
        synchronize(args.device)
        generated["reference"] = ids.tolist()
        return time.perf_counter() - start

    def ours() -> float:
        moments = []

        def now(*_) -> None:
            synchronize(args.device)
            moments.append(time.perf_counter())

        hooks = [model.register_forward_pre_hook(now), model.register_forward_hook(now)]
        start = time.perf_counter()
        outputs = BaseModelOutput(last_hidden_state=states)
        ids = model.generate(encoder_outputs=outputs, max_length=length, do_sample=False)
        synchronize(args.device)
        seconds = time.perf_counter() - start
        for hook in hooks:
            hook.remove()
        generated["showtell"] = ids.tolist()
        inside = sum(moments[1::2]) - sum(moments[::2])
        outside.append(1 - inside / seconds)
        return seconds

    measured = in_turns({"reference": plain, "showtell": ours}, args.runs)
    return {
        "batch_size": args.batch_size,
        "tokens": length,
        "seconds": measured,
        "medians": medians(measured),
        "speedup": ratio_of_medians(measured, "reference", "showtell"),
        "same_captions": sum(a == b for a, b in zip(generated["reference"], generated["showtell"], strict=True)),
        "fraction_outside_the_model": outside,
    }


if __name__ == "__main__":
    main()
