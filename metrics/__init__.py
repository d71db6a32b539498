"""Captions against references, exactly as coco-caption scores them, without Java or network."""

from metrics.caption_scores.ptb_tokenizer import tokenize
from metrics.caption_scores.scorer import METRIC_NAMES, CaptionScorer, CiderD

__all__ = ["METRIC_NAMES", "CaptionScorer", "CiderD", "tokenize"]
