"""Which package's number is the paper's number? The same captions through each of them, beside coco-caption's scores.

    pip install pycocoevalcap==1.2 aac-metrics==0.6.0 torchmetrics==1.9.0 nltk==3.10.4 rouge_score==0.1.2 sacrebleu==2.6.0
    pip install capevalkit==0.1.3 evaluate==0.4.6
    python -m benchmarks.metric_packages

Packages that are missing, or do not run, are named and left out. capevalkit needs Java; evaluate reads its metrics from the Hub.
Prints a table in Markdown; scores between 0 and 1, CIDEr-D between 0 and 10.
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.metrics import make_captions
from metrics import score, tokenize

NUM_IMAGES = 500

Captions = list[str]
References = list[list[str]]


def coco_bleu(predictions: Captions, references: References) -> float:
    from pycocoevalcap.bleu.bleu import Bleu

    return Bleu(4).compute_score(*by_image(predictions, references), verbose=0)[0][3]


def coco_rouge(predictions: Captions, references: References) -> float:
    from pycocoevalcap.rouge.rouge import Rouge

    return Rouge().compute_score(*by_image(predictions, references))[0]


def coco_cider(predictions: Captions, references: References) -> float:
    from pycocoevalcap.cider.cider import Cider

    return Cider().compute_score(*by_image(predictions, references))[0]


def by_image(predictions: Captions, references: References) -> tuple[dict, dict]:
    """What pycocoevalcap's scorers take, with the tokens of `tokenize`, which are those of its Java program."""
    join = lambda caption: " ".join(tokenize(caption))  # noqa: E731
    gts = {image: [join(caption) for caption in captions] for image, captions in enumerate(references)}
    return gts, {image: [join(caption)] for image, caption in enumerate(predictions)}


def aac(name: str) -> Callable[[Captions, References], float]:
    def measure(predictions: Captions, references: References) -> float:
        from aac_metrics import functional

        gts, res = by_image(predictions, references)
        tokenized = [captions[0] for captions in res.values()], list(gts.values())
        if name == "bleu":
            return float(functional.bleu(*tokenized, n=4)[0]["bleu_4"])
        metric = {"rouge_l": functional.rouge_l, "cider_d": functional.cider_d}[name]
        return float(metric(*tokenized)[0][name])

    return measure


def capevalkit(metric: str, name: str) -> Callable[[Captions, References], float]:
    def measure(predictions: Captions, references: References) -> float:
        from capevalkit.metrics.pycocoevalcap_metrics import compute_pycocoevalcap

        with TemporaryDirectory() as folder:
            files = Path(folder) / "predictions.jsonl", Path(folder) / "references.jsonl"
            for file, key, values in zip(files, ("caption", "references"), (predictions, references), strict=True):
                rows = (json.dumps({"id": f"{image:06}", key: value}) for image, value in enumerate(values))
                file.write_text("\n".join(rows), encoding="utf-8")
            return compute_pycocoevalcap(*map(str, files), [metric])[name]["score"]

    return measure


def evaluate_bleu(predictions: Captions, references: References) -> float:
    import evaluate

    return evaluate.load("bleu").compute(predictions=predictions, references=references)["bleu"]


def evaluate_rouge(predictions: Captions, references: References) -> float:
    import evaluate

    return evaluate.load("rouge").compute(predictions=predictions, references=references)["rougeL"]


def nltk_corpus(predictions: Captions, references: References) -> float:
    from nltk.translate.bleu_score import corpus_bleu

    return corpus_bleu([list(map(tokenize, captions)) for captions in references], list(map(tokenize, predictions)))


def nltk_sentences(predictions: Captions, references: References) -> float:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smooth = SmoothingFunction().method1
    pairs = zip(references, predictions, strict=True)
    scores = [sentence_bleu(list(map(tokenize, c)), tokenize(p), smoothing_function=smooth) for c, p in pairs]
    return sum(scores) / len(scores)


def sacrebleu_padded(predictions: Captions, references: References) -> float:
    from sacrebleu import corpus_bleu

    most = max(map(len, references))
    streams = [[(captions + [""] * most)[i] for captions in references] for i in range(most)]
    return corpus_bleu(predictions, streams, lowercase=True, force=True).score / 100


def sacrebleu_missing(predictions: Captions, references: References) -> float:
    from sacrebleu import corpus_bleu

    most = max(map(len, references))
    streams = [[(captions + [None] * most)[i] for captions in references] for i in range(most)]
    return corpus_bleu(predictions, streams, lowercase=True, force=True).score / 100


def torchmetrics_bleu(predictions: Captions, references: References) -> float:
    from torchmetrics.functional.text import bleu_score

    return float(bleu_score(predictions, references))


def torchmetrics_rouge(predictions: Captions, references: References) -> float:
    from torchmetrics.functional.text.rouge import rouge_score

    return float(rouge_score(predictions, references, rouge_keys="rougeL")["rougeL_fmeasure"])


def google_rouge(predictions: Captions, references: References) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    pairs = zip(references, predictions, strict=True)
    scores = [scorer.score_multi(captions, prediction)["rougeL"].fmeasure for captions, prediction in pairs]
    return sum(scores) / len(scores)


# score, package, how it is called, the measurement, why it differs where it does
ROWS = [
    ("bleu_4", "pycocoevalcap", "Bleu(4)", coco_bleu, "coco-caption itself"),
    ("bleu_4", "aac-metrics", "bleu", aac("bleu"), "coco-caption's formula, given PTB's tokens"),
    (
        "bleu_4",
        "capevalkit",
        "compute_pycocoevalcap",
        capevalkit("bleu", "BLEU-4"),
        "pycocoevalcap with its Java tokenizer",
    ),
    ("bleu_4", "evaluate", 'load("bleu")', evaluate_bleu, "13a tokenizer, case counts"),
    (
        "bleu_4",
        "nltk",
        "corpus_bleu, PTB's tokens",
        nltk_corpus,
        "the corpus's BLEU, without coco-caption's tiny smoothing",
    ),
    (
        "bleu_4",
        "nltk",
        "mean of sentence_bleu, smoothed",
        nltk_sentences,
        "a mean over sentences, not the corpus's BLEU",
    ),
    (
        "bleu_4",
        "sacrebleu",
        "references padded with ''",
        sacrebleu_padded,
        "13a tokenizer: punctuation counts; '' changes nothing here",
    ),
    ("bleu_4", "sacrebleu", "references padded with None", sacrebleu_missing, "13a tokenizer: punctuation counts"),
    (
        "bleu_4",
        "torchmetrics",
        "bleu_score",
        torchmetrics_bleu,
        "split at blanks: case and punctuation count; depends on the references' order",
    ),
    ("rouge_l", "pycocoevalcap", "Rouge()", coco_rouge, "coco-caption itself"),
    ("rouge_l", "aac-metrics", "rouge_l", aac("rouge_l"), "coco-caption's formula, given PTB's tokens"),
    (
        "rouge_l",
        "capevalkit",
        "compute_pycocoevalcap",
        capevalkit("rouge", "ROUGE-L"),
        "pycocoevalcap with its Java tokenizer",
    ),
    ("rouge_l", "evaluate", 'load("rouge")', evaluate_rouge, "F1 of one reference, as rouge_score"),
    (
        "rouge_l",
        "rouge_score",
        "score_multi",
        google_rouge,
        "F1 of one reference, not beta 1.2 over best precision and best recall",
    ),
    ("rouge_l", "torchmetrics", "rouge_score", torchmetrics_rouge, "F1 of one reference, as rouge_score"),
    ("cider", "pycocoevalcap", "Cider()", coco_cider, "coco-caption itself: CIDEr-D"),
    (
        "cider",
        "capevalkit",
        "compute_pycocoevalcap",
        capevalkit("cider", "CIDEr"),
        "pycocoevalcap with its Java tokenizer",
    ),
    ("cider", "aac-metrics", "cider_d", aac("cider_d"), "coco-caption's formula, given PTB's tokens"),
]


def main() -> None:
    predictions, references = make_captions(NUM_IMAGES)
    # as in Flickr8k's kind of data, but with images that have fewer references
    references = [captions[: 5 - image % 3] for image, captions in enumerate(references)]
    backwards = [captions[::-1] for captions in references]
    ours = score(predictions, references)
    print(f"{NUM_IMAGES} images, 3 to 5 references\n")
    print(
        "| score | package | called | value | less coco-caption's | references reversed | why |\n|---|---|---|---|---|---|---|"
    )
    for name in ("bleu_4", "rouge_l", "cider"):
        print(f"| {name} | caption-scores | score | {ours[name]:.6f} | | | |")
        for _, package, call, measure, why in (row for row in ROWS if row[0] == name):
            try:
                said = f"{package} {version(package)}"
                value, turned = measure(predictions, references), measure(predictions, backwards)
            except (ImportError, OSError) as error:
                print(f"{package}: left out ({str(error).splitlines()[0]})", file=sys.stderr)
                continue
            less, order = value - ours[name], turned - value
            shown = ["equal" if abs(less) < 1e-6 else f"{less:+.6f}", "equal" if abs(order) < 1e-6 else f"{order:+.6f}"]
            print(f"| {name} | {said} | {call} | {value:.6f} | {shown[0]} | {shown[1]} | {why} |")


if __name__ == "__main__":
    main()
