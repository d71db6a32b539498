"""Baselines without the image: the same captions assigned to other images, and the best single caption for all images."""

import numpy as np

from .ngrams import LOW, MAX_ORDER, NgramIndex, count_words
from .overlap import CIDER_SIGMA, ReferenceTable

NUM_FINALISTS = 5


def derangement(num_images: int) -> np.ndarray:
    """Draw the random permutation without fixed points that the shuffled baseline uses, int64 (num_images,).

    All images lie on one random cycle, and each gets the caption of the image before it, so that none keeps its own. The
    permutation depends on the number of images alone. A single image has no other caption to get and keeps its own: the
    caller handles that case.
    """
    cycle = np.random.default_rng(num_images).permutation(num_images)
    source = np.empty(num_images, dtype=np.int64)
    source[cycle] = np.roll(cycle, 1)
    return source


def best_constant(candidates: list[str], index: NgramIndex, table: ReferenceTable) -> str:
    """Choose, among tokenized captions, the one with the highest mean CIDEr-D when every image gets it.

    All candidates are ranked by their similarity to the mean of the references, which is CIDEr-D without its clipping; the
    first five are then scored in full.
    """
    candidates = list(dict.fromkeys(candidates))
    counts = index.count(candidates)
    lengths = count_words(counts, len(candidates))
    similarity = np.zeros(len(candidates))
    for order in range(MAX_ORDER):
        key, start, _, reference, reference_weight, reference_norm = table.orders[order]
        # the mean reference: an image's references share one vote
        norm = reference_norm * table.num_references[table.image]
        share = np.divide(reference_weight, norm[reference], out=np.zeros(len(reference)), where=norm[reference] != 0)
        ngram = np.repeat(key & LOW, np.diff(start))
        size = 1 + max(counts[order].ngram.max(initial=0), ngram.max(initial=0))
        mean_reference = np.bincount(ngram, share, minlength=size)
        weight = table.frequencies.weigh(counts[order], order)
        norm = np.sqrt(np.bincount(counts[order].caption, weight**2, minlength=len(candidates)))
        dot = np.bincount(
            counts[order].caption, weight * mean_reference[counts[order].ngram], minlength=len(candidates)
        )
        similarity += np.divide(dot, norm, out=np.zeros(len(norm)), where=norm != 0)
    reference_lengths, how_many = np.unique(table.length, return_counts=True)
    gaussian = np.exp(-((lengths[:, None] - reference_lengths) ** 2) / (2 * CIDER_SIGMA**2))
    finalists = np.argsort(-similarity * (gaussian @ how_many), kind="stable")[:NUM_FINALISTS]

    num_images = len(table.num_references)
    mean_cider = []
    for finalist in finalists:
        _, cider = table.match(index.count([candidates[finalist]] * num_images))
        mean_cider.append(cider.mean())
    return candidates[finalists[np.argmax(mean_cider)]]
