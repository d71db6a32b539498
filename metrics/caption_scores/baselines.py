"""Baselines without the image: the same captions assigned to other images, and the best single caption for all images."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from .ngrams import MAX_ORDER, Captions, NgramIndex
from .occurrences import own_counts
from .overlap import CIDER_SIGMA, Pairs, ReferenceTable, caption_norms

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
    # n-grams of one image count one by one here
    every = NgramIndex(index.words, least=1)
    numbers = every.learn(table.captions, table.image, len(table.num_references))
    means = [_mean_reference(table, order, numbers[order], every.squares[order]) for order in range(MAX_ORDER)]
    reference_lengths, how_many = np.unique(table.captions.lengths, return_counts=True)
    best: list[tuple[float, int, tuple[str, ...], str]] = []  # minus its rank value, its place, its words, the caption
    first = 0
    for texts in blocks(candidates):
        tokens = index.words.encode(texts, learn=False)
        captions = tokens.split_words()
        gaussian = np.exp(-((captions.lengths[:, None] - reference_lengths) ** 2.0) / (2 * CIDER_SIGMA**2))
        value = _similarity(every, captions, means) * (gaussian @ how_many)
        value = np.round(value, 9)  # so that of captions as good the first is chosen
        best = _with_block(best, texts, value, first, index)
        first += len(texts)

    images = np.arange(len(table.num_references))
    mean_cider = []
    finalists = [caption for _, _, _, caption in sorted(best, key=lambda candidate: candidate[1])]
    for finalist in finalists:
        everywhere = index.words.encode([finalist], learn=False).take(np.zeros(len(images), dtype=int)).split_words()
        mean_cider.append(table.match(everywhere, Pairs(table, images, everywhere.lengths))[1].mean())
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


def _mean_reference(table: ReferenceTable, order: int, number: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """What every n-gram of a caption adds to its product with the mean of the references, scaled to length one.

    An image's references share one vote.
    """
    norm = table.norms[order] * table.num_references[table.image]
    share = np.divide(1.0, norm, out=np.zeros(len(norm)), where=norm != 0)
    # numbers begin at -1, where no n-gram does
    shares = np.bincount(number + 1, np.repeat(share, table.captions.lengths), minlength=len(squares))
    return np.roll(shares, -1) * squares


def _similarity(index: NgramIndex, captions: Captions, means: list[np.ndarray]) -> np.ndarray:
    """Of each caption with the mean of the references."""
    numbers = index.number(captions)
    norms = caption_norms(index, captions, numbers, own_counts(captions))
    caption = np.repeat(np.arange(len(captions.lengths)), captions.lengths)
    similarity = np.zeros(len(captions.lengths))
    for number, mean, norm in zip(numbers, means, norms, strict=True):
        dot = np.bincount(caption, mean.take(number), minlength=len(similarity))
        similarity += np.divide(dot, norm, out=np.zeros(len(norm)), where=norm != 0)
    return similarity
