"""Captions against references, exactly as coco-caption scores them, without Java or network.

The folder is also an `evaluate` metric that travels to the Hub alone: its modules import only one another.
"""

from .coco_caption import compute_score
from .ptb_tokenizer import tokenize
from .scorer import METRIC_NAMES, CaptionScorer, CiderD
from .tokenizers import TOKENIZERS

__all__ = ["METRIC_NAMES", "TOKENIZERS", "CaptionScorer", "CiderD", "compute_score", "score", "tokenize"]


def score(predictions: list[str], references: list[list[str]], tokenizer: str = "auto") -> dict[str, float]:
    """Score one caption per image against the image's references; see `CaptionScorer` for arguments and errors."""
    return CaptionScorer(references, tokenizer=tokenizer).score(predictions)
