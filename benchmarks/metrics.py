"""Time our caption scores against pycocoevalcap with its Java tokenizer: the same captions, whole processes, in turns.

    python -m benchmarks.metrics --json metrics_benchmark.json

The captions are made here, always the same. Needs Java and `pip install pycocoevalcap`.
"""

import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.machine import benchmark_parser, describe_machine, write_result

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_REFERENCES = 5

# Each program reads the captions from the file it is given and prints its scores as the last line.
OURS = """
import json, sys
from metrics import CaptionScorer
captions = json.load(open(sys.argv[1], encoding="utf-8"))
print(json.dumps(CaptionScorer(captions["references"]).score(captions["predictions"])))
"""
THEIRS = """
import json, sys
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
captions = json.load(open(sys.argv[1], encoding="utf-8"))
as_rows = lambda texts: [{"caption": text} for text in texts]
tokenizer = PTBTokenizer()
references = tokenizer.tokenize({i: as_rows(texts) for i, texts in enumerate(captions["references"])})
predictions = tokenizer.tokenize({i: as_rows([text]) for i, text in enumerate(captions["predictions"])})
bleu, _ = Bleu(4).compute_score(references, predictions, verbose=0)
rouge, _ = Rouge().compute_score(references, predictions)
cider, _ = Cider().compute_score(references, predictions)
print(json.dumps({**{f"bleu_{n}": score for n, score in enumerate(bleu, 1)}, "rouge_l": rouge, "cider": cider}))
"""


def make_captions(num_images: int) -> tuple[list[str], list[list[str]]]:
    """Write a prediction and five references for each image, in made-up words as unevenly used as real ones.

    An image has a dozen words of its own, from which its captions draw, so that they overlap as real ones do.
    """
    generator = random.Random(0)
    syllables = [first + second for first in "bdfgklmnprst" for second in "aeiou"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(8000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    drawn = iter(generator.choices(words, weights, k=num_images * 12))
    predictions, references = [], []
    for _ in range(num_images):
        own = [next(drawn) for _ in range(12)]
        captions = []
        for _ in range(NUM_REFERENCES + 1):
            caption = generator.choices(own, k=generator.randint(7, 15))
            # commas, hyphens and genitives about as often as in Flickr8k
            caption[3] += generator.choices(["", ",", "'s", "-" + caption[4]], [90, 6, 1, 3])[0]
            captions.append(" ".join(caption).capitalize() + " .")
        predictions.append(captions[0])
        references.append(captions[1:])
    return predictions, references


def time_program(program: str, captions_file: Path) -> tuple[float, float, dict[str, float]]:
    """Run a program in a process of its own.

    Returns:
        its seconds from start to end, the processor seconds it and its children took, and the scores it printed.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", program, str(captions_file)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if process.returncode:
        raise RuntimeError(f"a side of the comparison failed: {process.stderr.strip().splitlines()[-1]}")
    return seconds, cpu_seconds, json.loads(process.stdout.splitlines()[-1])


def compare(num_images: int, num_runs: int) -> dict:
    """Time both sides in turns on the same file of captions."""
    predictions, references = make_captions(num_images)
    with tempfile.TemporaryDirectory() as folder:
        captions_file = Path(folder) / "captions.json"
        captions_file.write_text(json.dumps({"predictions": predictions, "references": references}), encoding="utf-8")
        ours, theirs = [], []
        for run in range(num_runs):
            ours.append(time_program(OURS, captions_file))
            theirs.append(time_program(THEIRS, captions_file))
            print(f"run {run + 1}: showtell {ours[-1][0]:.2f} s, pycocoevalcap {theirs[-1][0]:.2f} s", flush=True)
    our_seconds, our_cpu_seconds, (our_scores, *_) = zip(*ours, strict=True)
    their_seconds, their_cpu_seconds, (their_scores, *_) = zip(*theirs, strict=True)
    return {
        "num_images": num_images,
        "references_per_image": NUM_REFERENCES,
        "showtell_seconds": our_seconds,
        "pycocoevalcap_seconds": their_seconds,
        "showtell_cpu_seconds": our_cpu_seconds,
        "pycocoevalcap_cpu_seconds": their_cpu_seconds,
        "load_average": os.getloadavg(),
        "ratio_of_cpu_medians": statistics.median(their_cpu_seconds) / statistics.median(our_cpu_seconds),
        "ratio_of_medians": statistics.median(their_seconds) / statistics.median(our_seconds),
        "scores": our_scores,
        "largest_difference": max(abs(our_scores[name] - their_scores[name]) for name in our_scores),
    }


def measure_growth(sizes: list[int]) -> list[dict]:
    """Time tokenization and all scores of ever more images, five references each, in this process."""
    from metrics import CaptionScorer

    rows = []
    predictions, references = make_captions(max(sizes))
    CaptionScorer(references[:100]).score(predictions[:100])  # imports and first calls are not what grows
    for size in sizes:
        start = time.perf_counter()
        CaptionScorer(references[:size]).score(predictions[:size])
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2  # Linux counts KiB
        rows.append({"num_images": size, "seconds": seconds, "peak_memory_gib": memory})
        print(f"{size} images: {seconds:.2f} s, {1e6 * seconds / size:.0f} us an image, {memory:.2f} GiB", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, runs=3)
    parser.add_argument("--num_images", type=int, default=8000, help="images of the comparison")
    arguments = parser.parse_args(argv)
    try:
        version("pycocoevalcap")
    except PackageNotFoundError:
        parser.error("pycocoevalcap is not installed, and is what we compare with: pip install pycocoevalcap")
    if shutil.which("java") is None:
        parser.error("no `java` on the PATH, and pycocoevalcap's tokenizer is a Java program: install a Java runtime")

    java = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr.splitlines()
    machine = describe_machine() | {"java": java[0], "pycocoevalcap": version("pycocoevalcap")}
    result = {"machine": machine, "comparison": compare(arguments.num_images, arguments.runs)}
    result["growth"] = measure_growth([12_500, 25_000, 50_000, 100_000])
    write_result(result, arguments.json)
    comparison = result["comparison"]
    print(
        f"{comparison['ratio_of_medians']:.1f} times faster by the clock, {comparison['ratio_of_cpu_medians']:.1f} times less processor "
        f"time, at a load of {comparison['load_average'][0]:.1f}; scores differ by {comparison['largest_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
