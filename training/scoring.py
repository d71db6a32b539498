"""Scores of an evaluation during training."""

from collections.abc import Sequence

from datasets import Dataset

from metrics import CaptionScorer
from reporting.live import log_scores


def score_and_show(captions: Sequence[str], rows: Dataset, scorer: CaptionScorer) -> dict[str, float]:
    """Score one caption per row, log the scores beside those of the shuffled baseline, and log three images' captions.

    Args:
        rows: Rows with `image_id` and `captions`.
        scorer: The scorer of the rows' captions.

    Returns:
        The scores, those of the shuffled baseline under "shuffled_" and the metric's name, and "unique_words".
    """
    scores, shuffled = scorer.score(captions), scorer.score(scorer.shuffle(captions))
    log_scores(scores, shuffled, captions, rows)
    shuffled = {f"shuffled_{metric}": score for metric, score in shuffled.items()}
    return {**scores, **shuffled, "unique_words": scorer.unique_words(captions)}
