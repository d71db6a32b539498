"""METEOR and SPICE, which are Java programs, through pycocoevalcap: optional, and never waited for without end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from .ptb_tokenizer import tokenize
from .scorer import check_predictions, check_references

# Runs in a process of its own, with the Java program as its child, so that both can be ended together.
PROGRAM = """
import json, sys
name, captions_file = sys.argv[1:]
if name == "meteor":
    from pycocoevalcap.meteor.meteor import Meteor as Metric
else:
    from pycocoevalcap.spice.spice import Spice as Metric
captions = json.load(open(captions_file, encoding="utf-8"))
references = dict(enumerate(captions["references"]))
predictions = {image: [caption] for image, caption in enumerate(captions["predictions"])}
score, of_images = Metric().compute_score(references, predictions)
if name == "spice":
    of_images = [image["All"]["f"] for image in of_images]
print(json.dumps([float(score), [float(image) for image in of_images]]))
"""


class JavaMetricError(RuntimeError):
    """METEOR or SPICE cannot be computed; the message is one sentence that says why and what to do."""


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]], time_limit: float = 600) -> float:
    """METEOR 1.5 of one caption per image, as coco-caption runs it (Denkowski and Lavie 2014).

    Args:
        predictions: One caption per image.
        references: For each image a list of at least one caption.
        time_limit: Seconds after which the Java program is ended.

    Raises:
        JavaMetricError: No Java, no pycocoevalcap, a failing program, or one slower than the limit.
        ValueError: As `CaptionScorer`.
    """
    return measure_java("meteor", predictions, references, time_limit)[0]


def spice(predictions: Sequence[str], references: Sequence[Sequence[str]], time_limit: float = 3600) -> float:
    """SPICE of one caption per image, as coco-caption runs it (Anderson et al. 2016); arguments and errors as `meteor`."""
    return measure_java("spice", predictions, references, time_limit)[0]


def measure_java(
    name: Literal["meteor", "spice"],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    time_limit: float = 3600,
) -> tuple[float, list[float]]:
    """METEOR or SPICE of all images, and of each. SPICE is their mean, METEOR is not; arguments and errors as `meteor`."""
    check_installation(name)
    check_references(references)
    check_predictions(predictions, len(references))
    return _run(name, predictions, references, time_limit)


def check_installation(name: str) -> None:
    """Raise a JavaMetricError where Java, pycocoevalcap or its models are missing."""
    if shutil.which("java") is None:
        raise JavaMetricError(
            f"{name.upper()} is a Java program and there is no `java` on the PATH: install a Java runtime"
        )
    package = find_spec("pycocoevalcap")
    if package is None:
        raise JavaMetricError(
            f"{name.upper()} runs through pycocoevalcap, which is not installed: pip install pycocoevalcap"
        )
    # without its models pycocoevalcap would start a large download in the middle of an evaluation
    jars = Path(package.submodule_search_locations[0]) / "spice" / "lib"
    if name == "spice" and not all((jars / f"stanford-corenlp-3.6.0{part}.jar").exists() for part in ("", "-models")):
        raise JavaMetricError(
            "SPICE needs models that pycocoevalcap has not fetched yet: run "
            "`python -m pycocoevalcap.spice.get_stanford_models` once, with a network"
        )


def _run(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]], time_limit: float
) -> tuple[float, list[float]]:
    captions = {
        "references": [[" ".join(tokenize(caption)) for caption in captions] for captions in references],
        "predictions": [" ".join(tokenize(caption)) for caption in predictions],
    }
    with tempfile.TemporaryDirectory() as folder:
        captions_file = Path(folder) / "captions.json"
        captions_file.write_text(json.dumps(captions), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, name, str(captions_file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=time_limit)
        except subprocess.TimeoutExpired:
            raise JavaMetricError(
                f"{name.upper()} was not done after {time_limit:g} s and was stopped: give it longer or fewer images"
            ) from None
        finally:
            if process.poll() is None:  # also when interrupted: leave no Java program behind
                if os.name == "nt":  # which has no groups of processes: the Java program ends by itself
                    process.kill()
                else:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode:
        lines = errors.strip().splitlines() or ["no message"]
        # Java's own word rather than that of the Python process around it
        reason = next((line for line in lines if line.startswith(("Exception in thread", "Error"))), lines[-1])
        raise JavaMetricError(f"{name.upper()} failed ({reason}): try pycocoevalcap's own example with this Java")
    score, of_images = json.loads(output.splitlines()[-1])
    return score, of_images
