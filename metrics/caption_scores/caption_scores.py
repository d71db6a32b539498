"""BLEU-1..4, ROUGE-L and CIDEr-D as coco-caption computes them: `evaluate.load("metrics/caption_scores")`."""

# ruff: noqa: F401
# evaluate copies the modules imported here, without looking into them: all of them must be named, with no comment behind.

import datasets
import evaluate

from .baselines import derangement
from .ngrams import NgramIndex
from .occurrences import occurrences
from .overlap import ReferenceTable
from .ptb_characters import LETTERS
from .ptb_tokenizer import tokenize
from .scorer import CaptionScorer
from .tokenizers import TOKENIZERS

_DESCRIPTION = """\
BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D of captions, equal to what coco-caption (pycocoevalcap) gives, without Java.
Captions go through a Python version of the PTB tokenizer that coco-caption runs.
"""

_KWARGS_DESCRIPTION = """\
Args:
    predictions: One caption (string) per image.
    references: For each image a list of at least one caption.
Returns:
    bleu_1, bleu_2, bleu_3, bleu_4, rouge_l: between 0 and 1.
    cider: CIDEr-D as coco-caption prints it, between 0 and 10; papers print it times 100.
Examples:
    >>> metric = evaluate.load("metrics/caption_scores")
    >>> scores = metric.compute(predictions=["a dog runs"], references=[["A dog runs.", "A dog is running."]])
    >>> round(scores["rouge_l"], 3)
    1.0
"""

_CITATION = """\
@article{chen2015microsoft,
    title = {Microsoft {COCO} Captions: Data Collection and Evaluation Server},
    author = {Chen, Xinlei and Fang, Hao and Lin, Tsung-Yi and Vedantam, Ramakrishna and Gupta, Saurabh and
              Doll{\\'a}r, Piotr and Zitnick, C. Lawrence},
    journal = {arXiv:1504.00325},
    year = {2015}
}
"""


class CaptionScores(evaluate.Metric):
    """The scores of `CaptionScorer` behind the interface of `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
            reference_urls=["https://github.com/tylin/coco-caption"],
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        return CaptionScorer(references).score(predictions)
