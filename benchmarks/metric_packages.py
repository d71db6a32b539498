"""Which package's number is the paper's number? The same captions through each of them, beside coco-caption's scores.

    pip install pycocoevalcap==1.2 aac-metrics==0.6.0 torchmetrics==1.9.0 nltk==3.10.4 rouge_score==0.1.2 sacrebleu==2.6.0
    pip install capevalkit==0.1.3 evaluate==0.4.6
    python -m benchmarks.metric_packages

Packages that are missing, or do not run, are named and left out. pycocoevalcap and capevalkit need Java. evaluate reads its metrics
from the Hub, or with --evaluate_metrics from the folder `metrics` of a clone of its repository.
Prints a table in Markdown; scores between 0 and 1, CIDEr-D between 0 and 10.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.metrics import make_captions
from metrics import score, tokenize
from metrics.caption_scores.java_metrics import JavaMetricError, meteor

NUM_IMAGES = 500

Captions = list[str]
References = list[list[str]]
Measure = Callable[[Captions, References], float]


def coco(module: str, name: str, *options: int) -> Measure:
    """The score, or scores, of one of pycocoevalcap's classes, after its own tokenizer."""

    def measure(predictions: Captions, references: References) -> float | list[float]:
        return compute_coco(module, name, options, predictions, references)[0]

    return measure


def compute_coco(module: str, name: str, options: tuple, predictions: Captions, references: References) -> tuple:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    gts = tokenizer.tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(references)})
    res = tokenizer.tokenize({i: [{"caption": text}] for i, text in enumerate(predictions)})
    return getattr(import_module(f"pycocoevalcap.{module}"), name)(*options).compute_score(gts, res)


def coco_bleu(predictions: Captions, references: References) -> float:
    return compute_coco("bleu.bleu", "Bleu", (4,), predictions, references)[0][3]


def coco_mean_of_meteors(predictions: Captions, references: References) -> float:
    of_images = compute_coco("meteor.meteor", "Meteor", (), predictions, references)[1]
    return sum(of_images) / len(of_images)


def tokenized(predictions: Captions, references: References) -> tuple[list[str], list[list[str]]]:
    """Captions as coco-caption's Java program splits them, joined by blanks."""
    split = lambda caption: " ".join(tokenize(caption))  # noqa: E731
    return [split(caption) for caption in predictions], [[split(text) for text in texts] for texts in references]


def aac(name: str) -> Measure:
    def measure(predictions: Captions, references: References) -> float:
        from aac_metrics import functional

        if name == "bleu_4":
            return float(functional.bleu(*tokenized(predictions, references), n=4)[0]["bleu_4"])
        metric = {"rouge_l": functional.rouge_l, "cider_d": functional.cider_d}[name]
        return float(metric(*tokenized(predictions, references))[0][name])

    return measure


def capevalkit(metric: str, name: str) -> Measure:
    def measure(predictions: Captions, references: References) -> float:
        from capevalkit.metrics.pycocoevalcap_metrics import compute_pycocoevalcap

        with TemporaryDirectory() as folder:
            files = Path(folder) / "predictions.jsonl", Path(folder) / "references.jsonl"
            for file, key, values in zip(files, ("caption", "references"), (predictions, references), strict=True):
                rows = (json.dumps({"id": f"{image:06}", key: value}) for image, value in enumerate(values))
                file.write_text("\n".join(rows), encoding="utf-8")
            return compute_pycocoevalcap(*map(str, files), [metric])[name]["score"]

    return measure


def hf_evaluate(metric: Path, name: str) -> Measure:
    def measure(predictions: Captions, references: References) -> float:
        import evaluate

        return float(evaluate.load(str(metric)).compute(predictions=predictions, references=references)[name])

    return measure


def nltk_corpus(predictions: Captions, references: References) -> float:
    from nltk.translate.bleu_score import corpus_bleu

    return corpus_bleu([list(map(tokenize, captions)) for captions in references], list(map(tokenize, predictions)))


def nltk_sentences(predictions: Captions, references: References) -> float:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smooth = SmoothingFunction().method1
    pairs = zip(references, predictions, strict=True)
    scores = [sentence_bleu(list(map(tokenize, c)), tokenize(p), smoothing_function=smooth) for c, p in pairs]
    return sum(scores) / len(scores)


def sacrebleu_padded(padding: str | None) -> Measure:
    def measure(predictions: Captions, references: References) -> float:
        from sacrebleu import corpus_bleu

        most = max(map(len, references))
        streams = [[(captions + [padding] * most)[i] for captions in references] for i in range(most)]
        return corpus_bleu(predictions, streams, lowercase=True, force=True).score / 100

    return measure


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


def list_rows(evaluate_metrics: Path) -> list[tuple[str, str, str, Measure, str]]:
    """For each row: score, package, how it is called, the measurement, why it differs where it does."""
    coco_formula, java = "coco-caption's formula, given PTB's tokens", "pycocoevalcap with its Java tokenizer"
    f1, punctuation = "F1 of one reference", "13a tokenizer: punctuation counts"
    of_evaluate = {"bleu": "13a tokenizer: case and punctuation count; brevity by the shortest reference"}
    of_evaluate["rouge"] = f"{f1}, as rouge_score; the median of resampled means, another one in each run"
    corpus = "the corpus's BLEU, without coco-caption's tiny smoothing"
    blanks = "split at blanks: case and punctuation count; depends on the references' order"
    capevalkit_call, mean = "compute_pycocoevalcap", "a mean over sentences, not the corpus's BLEU"
    return [
        ("bleu_4", "pycocoevalcap", "Bleu(4)", coco_bleu, "coco-caption itself"),
        ("bleu_4", "aac-metrics", "bleu", aac("bleu_4"), coco_formula),
        ("bleu_4", "capevalkit", capevalkit_call, capevalkit("bleu", "BLEU-4"), java),
        ("bleu_4", "evaluate", 'load("bleu")', hf_evaluate(evaluate_metrics / "bleu", "bleu"), of_evaluate["bleu"]),
        ("bleu_4", "nltk", "corpus_bleu, PTB's tokens", nltk_corpus, corpus),
        ("bleu_4", "nltk", "mean of sentence_bleu, smoothed", nltk_sentences, mean),
        (
            "bleu_4",
            "sacrebleu",
            "references padded with ''",
            sacrebleu_padded(""),
            f"{punctuation}; '' counts for nothing",
        ),
        ("bleu_4", "sacrebleu", "references padded with None", sacrebleu_padded(None), punctuation),
        ("bleu_4", "torchmetrics", "bleu_score", torchmetrics_bleu, blanks),
        ("rouge_l", "pycocoevalcap", "Rouge()", coco("rouge.rouge", "Rouge"), "coco-caption itself"),
        ("rouge_l", "aac-metrics", "rouge_l", aac("rouge_l"), coco_formula),
        ("rouge_l", "capevalkit", capevalkit_call, capevalkit("rouge", "ROUGE-L"), java),
        (
            "rouge_l",
            "evaluate",
            'load("rouge")',
            hf_evaluate(evaluate_metrics / "rouge", "rougeL"),
            of_evaluate["rouge"],
        ),
        (
            "rouge_l",
            "rouge_score",
            "score_multi",
            google_rouge,
            f"{f1}, not beta 1.2 over best precision and best recall",
        ),
        ("rouge_l", "torchmetrics", "rouge_score", torchmetrics_rouge, f"{f1}, as rouge_score"),
        ("cider", "pycocoevalcap", "Cider()", coco("cider.cider", "Cider"), "coco-caption itself: CIDEr-D"),
        ("cider", "aac-metrics", "cider_d", aac("cider_d"), coco_formula),
        ("cider", "capevalkit", capevalkit_call, capevalkit("cider", "CIDEr"), java),
        ("meteor", "pycocoevalcap", "Meteor()", coco("meteor.meteor", "Meteor"), "coco-caption itself"),
        (
            "meteor",
            "pycocoevalcap",
            "mean over images",
            coco_mean_of_meteors,
            "METEOR of a set is no mean over its images",
        ),
        ("meteor", "capevalkit", capevalkit_call, capevalkit("meteor", "METEOR"), java),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate_metrics", type=Path, default=Path(), help="folder of evaluate's metrics")
    rows = list_rows(parser.parse_args(argv).evaluate_metrics)
    predictions, references = make_captions(NUM_IMAGES)
    # as in Flickr8k's kind of data, but with images that have fewer references
    references = [captions[: 5 - image % 3] for image, captions in enumerate(references)]
    backwards = [captions[::-1] for captions in references]
    ours = score(predictions, references)
    try:
        ours["meteor"] = meteor(predictions, references)
    except JavaMetricError as error:
        print(f"METEOR: left out ({error})", file=sys.stderr)
    print(f"{NUM_IMAGES} images, 3 to 5 references\n")
    print("| score | package | called | value | less coco-caption's | references reversed | why |\n" + 7 * "|---" + "|")
    for name in [name for name in ("bleu_4", "rouge_l", "cider", "meteor") if name in ours]:
        print(f"| {name} | caption-scores | {'meteor' if name == 'meteor' else 'score'} | {ours[name]:.6f} | | | |")
        for _, package, call, measure, why in (row for row in rows if row[0] == name):
            try:
                said = f"{package} {version(package)}"
                with contextlib.redirect_stdout(sys.stderr):  # pycocoevalcap's own
                    value, turned = measure(predictions, references), measure(predictions, backwards)
            except (ImportError, OSError) as error:
                print(f"{package}: left out ({str(error).splitlines()[0]})", file=sys.stderr)
                continue
            less, order = value - ours[name], turned - value
            shown = ["equal" if abs(number) < 1e-6 else f"{number:+.6f}" for number in (less, order)]
            print(f"| {name} | {said} | {call} | {value:.6f} | {shown[0]} | {shown[1]} | {why} |", flush=True)


if __name__ == "__main__":
    main()
