"""Captions against references: the package caption-scores (README.md), which the repository uses from its folder."""

from metrics.caption_scores import METRIC_NAMES, TOKENIZERS, CaptionScorer, CiderD, compute_score, score, tokenize

__all__ = ["METRIC_NAMES", "TOKENIZERS", "CaptionScorer", "CiderD", "compute_score", "score", "tokenize"]
