"""Baselines without the image: the same captions assigned to other images, and the best single caption for all images."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from .ngrams import MAX_ORDER, NgramIndex, Ngrams
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


def blocks(captions: Iterable[str]) -> Iterator[list[str]]:
    """Lists of 8,192 captions, the last one shorter: the memory needed does not grow with their number."""
    captions = iter(captions)
    while block := list(islice(captions, BLOCK)):
        yield block


def best_constant(candidates: Iterable[str], index: NgramIndex, table: ReferenceTable) -> str:
    """Choose the caption with the highest mean CIDEr-D when every image gets it.

    All candidates are ranked by their similarity to the mean of the references, which is CIDEr-D without its clipping; the
    first five are then scored in full. Of captions with the same words, and of those that are as good, the first counts.
    """
    means = [_mean_reference(table, order) for order in range(MAX_ORDER)]
    reference_lengths, how_many = np.unique(table.captions.lengths, return_counts=True)
    best: list[tuple[float, int, tuple[str, ...], str]] = []  # minus its rank value, its place, its words, the caption
    first = 0
    for texts in blocks(candidates):
        tokens = index.words.encode(texts, learn=False)
        captions = tokens.split_words()
        gaussian = np.exp(-((captions.lengths[:, None] - reference_lengths) ** 2.0) / (2 * CIDER_SIGMA**2))
        value = _similarity(index.number(captions), len(texts), means, table) * (gaussian @ how_many)
        value = np.round(value, 9)  # so that of captions as good the first is chosen
        best = _with_block(best, texts, value, first, index)
        first += len(texts)

    images = np.arange(len(table.num_references))
    mean_cider = []
    finalists = [caption for _, _, _, caption in sorted(best, key=lambda candidate: candidate[1])]
    for finalist in finalists:
        everywhere = index.words.encode([finalist], learn=False).take(np.zeros(len(images), dtype=int)).split_words()
        counts = [ngrams.count() for ngrams in index.number(everywhere)]
        mean_cider.append(table.match(counts, Pairs(table, images, everywhere.lengths))[1].mean())
    return finalists[int(np.argmax(np.round(mean_cider, 12)))]


def _with_block(best: list[tuple], texts: list[str], value: np.ndarray, first: int, index: NgramIndex) -> list[tuple]:
    """The best five, and of a block of captions what is better."""
    found = {words: (negative, place, words, text) for negative, place, words, text in best}
    worst = -best[-1][0] if len(best) == NUM_FINALISTS else -np.inf
    for number in np.argsort(-value, kind="stable").tolist():
        if value[number] <= worst or len(found) >= len(best) + NUM_FINALISTS:
            break
        words = index.words.split_text(texts[number])
        found.setdefault(words, (-value[number], first + number, words, texts[number]))
    return sorted(found.values())[:NUM_FINALISTS]


def _mean_reference(table: ReferenceTable, order: int) -> np.ndarray:
    """The mean weight of every known n-gram in the references scaled to length one; an image's references share one vote."""
    entries = table.orders[order]
    norm = table.norms[order] * table.num_references[table.image]
    weight = entries.count * table.frequencies.weigh(entries.ngram, order)
    share = np.divide(weight, norm[entries.reference], out=np.zeros(len(weight)), where=norm[entries.reference] != 0)
    # behind the known n-grams stand all others, which no reference has
    return np.bincount(entries.ngram, share, minlength=len(table.frequencies.weights[order]))


def _similarity(
    ngrams: Iterable[Ngrams], num_captions: int, means: list[np.ndarray], table: ReferenceTable
) -> np.ndarray:
    similarity = np.zeros(num_captions)
    for order, of_order in enumerate(ngrams):
        counts = of_order.count()
        weight = counts.count * table.frequencies.weigh(counts.ngram, order)
        norm = np.sqrt(np.bincount(counts.caption, weight**2, minlength=num_captions))
        mean = means[order][np.minimum(counts.ngram, len(means[order]) - 1)]
        dot = np.bincount(counts.caption, weight * mean, minlength=num_captions)
        similarity += np.divide(dot, norm, out=np.zeros(len(norm)), where=norm != 0)
    return similarity
