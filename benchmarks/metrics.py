"""Time our caption scores against pycocoevalcap with its Java tokenizer: the same captions, whole processes, in turns.

    python -m benchmarks.metrics --json metrics_benchmark.json
    python -m benchmarks.metrics --earlier ../showtell-before   # and a checkout of an earlier commit beside

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
SCORES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")

# Each program reads the captions from the file it is given and prints, as the last line, its scores; ours also the seconds
# without starting Python and reading the file, and its peak memory before scoring and after.
OURS = """
import json, sys, time
from metrics import CaptionScorer
def peak():  # not resource's ru_maxrss: that of a child begins at its parent's
    return next((int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")), 0)
captions = json.load(open(sys.argv[1], encoding="utf-8"))
before, start = peak(), time.perf_counter()
scores = CaptionScorer(captions["references"]).score(captions["predictions"])
seconds, after = time.perf_counter() - start, peak()
print(json.dumps(scores | {"scoring_seconds": seconds, "kib_before": before, "kib_after": after}))
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


def time_program(program: str, captions_file: Path, folder: Path = REPOSITORY) -> dict[str, float]:
    """Run a program in a process of its own, with compiled modules beside the captions once it has been run there.

    Returns:
        what it printed, and its "seconds" and "cpu_seconds" from start to end, its children's included.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    # as installed packages are: not compiled again in each run, whatever the environment says
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": str(captions_file.parent / "compiled")}
    process = subprocess.run(
        [sys.executable, "-c", program, str(captions_file)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise RuntimeError(f"a side of the comparison failed: {process.stderr.strip().splitlines()[-1]}")
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(process.stdout.splitlines()[-1]) | {"seconds": seconds, "cpu_seconds": cpu_seconds}


def compare(sides: dict[str, tuple[str, Path]], num_images: int, num_runs: int) -> dict:
    """Time programs in turns on the same file of captions; the first is what the others are compared with."""
    predictions, references = make_captions(num_images)
    measured: dict[str, list[dict]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        captions_file = Path(folder) / "captions.json"
        captions_file.write_text(json.dumps({"predictions": predictions, "references": references}), encoding="utf-8")
        del predictions, references
        few = Path(folder) / "few.json"
        few.write_text('{"predictions": ["a dog"], "references": [["a dog"]]}')
        for program, checkout in sides.values():  # compiles the modules
            time_program(program, few, checkout)
        for run in range(num_runs):
            for name, side in sides.items():
                measured[name].append(time_program(side[0], captions_file, side[1]))
            print(
                f"{num_images} images, run {run + 1}: "
                + ", ".join(f"{name} {runs[-1]['seconds']:.2f} s" for name, runs in measured.items()),
                flush=True,
            )
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in measured.items()
    }
    ours, *others = medians
    return {
        "num_images": num_images,
        "references_per_image": NUM_REFERENCES,
        "load_average": os.getloadavg(),
        "runs": measured,
        "medians": medians,
        "ratios": {
            other: {
                key: medians[other][key] / medians[ours][key]
                for key in ("seconds", "cpu_seconds", "scoring_seconds", "kib_after")
                if key in medians[other]
            }
            for other in others
        },
        "largest_difference": {
            other: max(abs(medians[ours][name] - medians[other][name]) for name in SCORES) for other in others
        },
    }


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, runs=3)
    parser.add_argument("--num_images", type=int, default=8000, help="images of the comparison")
    parser.add_argument("--earlier", type=Path, help="checkout of an earlier commit to compare with as well")
    arguments = parser.parse_args(argv)
    try:
        version("pycocoevalcap")
    except PackageNotFoundError:
        parser.error("pycocoevalcap is not installed, and is what we compare with: pip install pycocoevalcap")
    if shutil.which("java") is None:
        parser.error("no `java` on the PATH, and pycocoevalcap's tokenizer is a Java program: install a Java runtime")

    java = subprocess.run(["java", "-version"], capture_output=True, text=True).stderr.splitlines()
    machine = describe_machine() | {"java": java[0], "pycocoevalcap": version("pycocoevalcap")}
    ours = {"showtell": (OURS, REPOSITORY)}
    earlier = {"earlier": (OURS, arguments.earlier.resolve())} if arguments.earlier else {}
    theirs = {"pycocoevalcap": (THEIRS, REPOSITORY)}
    result = {"machine": machine, "comparison": compare(ours | earlier | theirs, arguments.num_images, arguments.runs)}
    result["growth"] = [compare(ours | earlier, size, 1) for size in (12_500, 25_000, 50_000, 100_000)]
    write_result(result, arguments.json)
    for compared in [result["comparison"], *result["growth"]]:
        medians = compared["medians"]["showtell"]
        print(
            f"{compared['num_images']} images: {1e6 * medians['scoring_seconds'] / compared['num_images']:.0f} us an image, "
            f"{medians['kib_after'] / 1024**2:.2f} GiB, of which {medians['kib_before'] / 1024**2:.2f} the captions'; load "
            f"{compared['load_average'][0]:.1f}"
        )
        for other, ratios in compared["ratios"].items():
            said = ", ".join(f"{ratio:.2f} x {key}" for key, ratio in ratios.items())
            print(f"  {other}: {said}; scores differ by {compared['largest_difference'][other]:.1e}")


if __name__ == "__main__":
    main()
