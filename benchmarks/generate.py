"""Time greedy decoding at batch 64 against reading every prefix from its beginning, full-size models with random weights.

    python -m benchmarks.generate --json generate.json

Both sides start from the encoder's states and write the same words. Told beside: the share of our time that is spent outside
the model.
"""

import time

import torch
from transformers.modeling_outputs import BaseModelOutput

from benchmarks import reference_way
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
from modeling.captioner import start_token_ids

MAX_LENGTH = {"lstm": 80, "vit_gpt2": 24}  # tokens; random weights rarely end a caption before


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, runs=2)
    parser.add_argument("--system", choices=["lstm", "vit_gpt2"], nargs="+", default=["lstm", "vit_gpt2"])
    parser.add_argument("--batch_size", type=int, default=64, help="images at once")
    args = parser.parse_args(argv)
    result = {"machine": describe_machine(args.device)}
    captions = [texts[0] for texts in paragraphs(None, 1000)["captions"]]
    for system in args.system:
        result[system] = compare(system, captions, args)
    write_result(result, args.json)


@torch.inference_mode()
def compare(system: str, captions: list[str], args) -> dict:
    """Seconds of both sides, in turns, and whether their words are the same."""
    model, _ = build_captioner(system, captions)
    model.to(args.device).eval()
    states = random_states(system, args.batch_size, args.device)
    config, length, written = model.generation_config, MAX_LENGTH[system], {}
    outside = []

    def report() -> float:
        start = time.perf_counter()
        ids = reference_way.generate(
            model, states, start_token_ids(model)[0], config.eos_token_id, config.pad_token_id, length
        )
        synchronize(args.device)
        written["report"] = ids.tolist()
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
        written["ours"] = ids.tolist()
        inside = sum(moments[1::2]) - sum(moments[::2])
        outside.append(1 - inside / seconds)
        return seconds

    measured = in_turns({"report": report, "ours": ours}, args.runs)
    return {
        "batch_size": args.batch_size,
        "tokens": length,
        "seconds": measured,
        "medians": medians(measured),
        "times_faster": ratio_of_medians(measured, "report", "ours"),
        "same_words": sum(a == b for a, b in zip(written["report"], written["ours"], strict=True)),
        "share_outside_the_model": outside,
    }


if __name__ == "__main__":
    main()
