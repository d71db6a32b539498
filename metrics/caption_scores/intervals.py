"""95 % intervals over images, for scores that are a mean, or a ratio of two sums."""

import numpy as np


def bootstrap_interval(
    values: np.ndarray, weights: np.ndarray | None = None, num_resamples: int = 1000, seed: int = 0
) -> list[float]:
    """The percentiles 2.5 and 97.5 of a mean over bootstrap resamples of the images, as `CaptionScorer.report` draws them.

    Args:
        values: Of each image what the score's numerator is the sum of, (images,).
        weights: Of each image what its denominator is the sum of; ones if None. A resample without any scores 0.
    """
    generator, num_images = np.random.default_rng(seed), len(values)
    columns = np.column_stack([values, np.ones(num_images) if weights is None else weights]).astype(float)
    totals = np.empty((num_resamples, 2))
    for total in totals:
        total[:] = np.bincount(generator.integers(0, num_images, num_images), minlength=num_images) @ columns
    scores = np.divide(totals[:, 0], totals[:, 1], out=np.zeros(num_resamples), where=totals[:, 1] != 0)
    return np.percentile(scores, [2.5, 97.5]).tolist()


def interval_of_images(score: float, of_images: np.ndarray) -> list[float]:
    """The interval of images' scores around their score together, where that may be no mean, as METEOR is not."""
    of_images = np.asarray(of_images, dtype=float)
    moved = score - float(of_images.mean())
    return [end + moved for end in bootstrap_interval(of_images)]
