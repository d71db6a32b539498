"""Baselines without the image: the same captions assigned to other images, and the best single caption for all images."""

import numpy as np

from .ngrams import MAX_ORDER, Captions, NgramIndex, Ngrams
from .overlap import CIDER_SIGMA, Pairs, ReferenceTable

NUM_FINALISTS = 5
BLOCK = 8192


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


def best_constant(candidates: Captions, index: NgramIndex, table: ReferenceTable) -> int:
    """Choose the caption with the highest mean CIDEr-D when every image gets it; give its place among the candidates.

    All candidates are ranked by their similarity to the mean of the references, which is CIDEr-D without its clipping; the
    first five are then scored in full.
    """
    places: dict[bytes, int] = {}
    for place, key in enumerate(candidates.keys()):
        places.setdefault(key, place)
    distinct = np.fromiter(places.values(), dtype=np.int64, count=len(places))
    means = [_mean_reference(table, order) for order in range(MAX_ORDER)]
    captions = candidates.take(distinct).split_words()
    similarity = np.concatenate(
        [_similarity(index.number(block), len(block.lengths), means, table) for _, block in captions.blocks(BLOCK)]
    )
    reference_lengths, how_many = np.unique(table.captions.lengths, return_counts=True)
    gaussian = np.exp(-((captions.lengths[:, None] - reference_lengths) ** 2.0) / (2 * CIDER_SIGMA**2))
    # rounded, so that of captions as good the first is chosen
    rank = np.argsort(-np.round(similarity * (gaussian @ how_many), 9), kind="stable")
    finalists = np.sort(distinct[rank[:NUM_FINALISTS]])

    images = np.arange(len(table.num_references))
    mean_cider = []
    for finalist in finalists:
        everywhere = candidates.take(np.full(len(images), finalist)).split_words()
        counts = [ngrams.count() for ngrams in index.number(everywhere)]
        mean_cider.append(table.match(counts, Pairs(table, images, everywhere.lengths))[1].mean())
    return int(finalists[np.argmax(np.round(mean_cider, 12))])


def _mean_reference(table: ReferenceTable, order: int) -> np.ndarray:
    """The mean weight of every known n-gram in the references scaled to length one; an image's references share one vote."""
    entries = table.orders[order]
    norm = table.norms[order] * table.num_references[table.image]
    weight = entries.count * table.frequencies.weigh(entries.ngram, order)
    share = np.divide(weight, norm[entries.reference], out=np.zeros(len(weight)), where=norm[entries.reference] != 0)
    # behind the known n-grams stand all others, which no reference has
    return np.bincount(entries.ngram, share, minlength=len(table.frequencies.weights[order]))


def _similarity(ngrams: list[Ngrams], num_captions: int, means: list[np.ndarray], table: ReferenceTable) -> np.ndarray:
    similarity = np.zeros(num_captions)
    for order, of_order in enumerate(ngrams):
        counts = of_order.count()
        weight = counts.count * table.frequencies.weigh(counts.ngram, order)
        norm = np.sqrt(np.bincount(counts.caption, weight**2, minlength=num_captions))
        mean = means[order][np.minimum(counts.ngram, len(means[order]) - 1)]
        dot = np.bincount(counts.caption, weight * mean, minlength=num_captions)
        similarity += np.divide(dot, norm, out=np.zeros(len(norm)), where=norm != 0)
    return similarity
