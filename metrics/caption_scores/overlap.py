"""BLEU, ROUGE-L and CIDEr-D of captions against references, as pycocoevalcap computes them, all images at once."""

import numpy as np

from .ngrams import LOW, MAX_ORDER, SHIFT, NgramCounts, count_words, first_of_runs

CIDER_SIGMA = 6.0
ROUGE_BETA = 1.2


class DocumentFrequencies:
    """The weight of an n-gram: log of the number of images over the number of those whose references hold it."""

    def __init__(self, counts: list[NgramCounts], image: np.ndarray, num_images: int) -> None:
        self.log_num_images = np.log(float(num_images))
        self.log_frequency = []
        for caption, ngram, _ in counts:
            in_image = np.sort((image[caption] << SHIFT) | ngram)
            in_image = in_image[first_of_runs(in_image)]
            self.log_frequency.append(np.log(np.bincount(in_image & LOW)))

    def weigh(self, counts: NgramCounts, order: int) -> np.ndarray:
        """Term frequency times inverse document frequency; an n-gram of no reference counts as one of one image."""
        log_frequency = np.zeros(len(counts.ngram))
        known = counts.ngram < len(self.log_frequency[order])
        log_frequency[known] = self.log_frequency[order][counts.ngram[known]]
        return counts.count * (self.log_num_images - log_frequency)


class ReferenceTable:
    """The references of a set of images, laid out so that an n-gram of a prediction finds those of its image.

    Args:
        references: Tokenized references, a list per image.
        counts: Their n-grams, one entry per order, captions numbered image by image.
        frequencies: What weighs an n-gram for CIDEr-D.
    """

    def __init__(
        self, references: list[list[str]], counts: list[NgramCounts], frequencies: DocumentFrequencies
    ) -> None:
        self.num_references = np.array([len(captions) for captions in references])
        self.first_reference = np.cumsum(self.num_references) - self.num_references
        self.image = np.repeat(np.arange(len(references)), self.num_references)
        self.length = count_words(counts, len(self.image))
        self.frequencies = frequencies
        self.orders = [self._lay_out(counts[order], order) for order in range(MAX_ORDER)]

    def _lay_out(self, counts: NgramCounts, order: int) -> tuple[np.ndarray, ...]:
        weight = self.frequencies.weigh(counts, order)
        norm = np.sqrt(np.bincount(counts.caption, weight**2, minlength=len(self.length)))
        key = (self.image[counts.caption] << SHIFT) | counts.ngram
        by_key = np.argsort(key)
        key = key[by_key]
        start = first_of_runs(key)
        # BLEU clips a count at the largest one any reference of the image has
        max_count = np.maximum.reduceat(counts.count[by_key], start) if len(start) else start
        return key[start], np.append(start, len(by_key)), max_count, counts.caption[by_key], weight[by_key], norm

    def match(self, counts: list[NgramCounts]) -> tuple[np.ndarray, np.ndarray]:
        """Match one prediction per image against its references.

        Args:
            counts: N-grams of the predictions, per order.

        Returns:
            clipped n-gram matches for BLEU, int (images, 4), and CIDEr-D per image, float (images,).
        """
        lengths = count_words(counts, len(self.num_references))
        matches = np.zeros((len(lengths), MAX_ORDER), dtype=np.int64)
        similarity = np.zeros(len(self.length))
        for order in range(MAX_ORDER):
            matches[:, order], cosine = self._match_order(counts[order], order, len(lengths))
            similarity += cosine
        # the "length" CIDEr-D compares is the number of bigrams
        bigrams = np.maximum(lengths - 1, 0)
        difference = bigrams[self.image] - np.maximum(self.length - 1, 0)
        similarity *= np.exp(-(difference**2.0) / (2 * CIDER_SIGMA**2))
        total = np.bincount(self.image, similarity, minlength=len(lengths))
        return matches, 10.0 * total / MAX_ORDER / self.num_references

    def _match_order(self, counts: NgramCounts, order: int, num_images: int) -> tuple[np.ndarray, np.ndarray]:
        key, start, max_count, reference, reference_weight, reference_norm = self.orders[order]
        weight = self.frequencies.weigh(counts, order)
        norm = np.sqrt(np.bincount(counts.caption, weight**2, minlength=num_images))
        if not len(key):
            return np.zeros(num_images, dtype=np.int64), np.zeros(len(self.length))

        wanted = (counts.caption << SHIFT) | counts.ngram
        place = np.minimum(np.searchsorted(key, wanted), len(key) - 1)
        found = key[place] == wanted
        place, image, weight = place[found], counts.caption[found], weight[found]
        clipped = np.minimum(counts.count[found], max_count[place])
        matches = np.bincount(image, clipped, minlength=num_images).astype(np.int64)

        # every found n-gram meets each reference of its image that holds it: ranges of the table, unrolled
        size = start[place + 1] - start[place]
        unrolled = np.repeat(start[place] + size - np.cumsum(size), size) + np.arange(size.sum())
        met = reference_weight[unrolled]
        product = np.minimum(np.repeat(weight, size), met) * met
        dot = np.bincount(reference[unrolled], product, minlength=len(self.length))
        norms = norm[self.image] * reference_norm
        return matches, np.divide(dot, norms, out=np.zeros(len(norms)), where=norms != 0)

    def closest_length(self, lengths: np.ndarray) -> np.ndarray:
        """Words in the reference nearest in length to each prediction; of two as near, in the shorter one."""
        distance = np.abs(self.length - lengths[self.image])
        # distance decides, then length: two numbers in one, both small
        return np.minimum.reduceat((distance << SHIFT) | self.length, self.first_reference) & LOW


def bleu(matches: np.ndarray, guesses: np.ndarray, length: np.ndarray, reference_length: np.ndarray) -> np.ndarray:
    """Corpus BLEU-1 to BLEU-4 from sums over images (Papineni et al. 2002, with coco-caption's smoothing).

    Args:
        matches: Clipped matches (..., 4).
        guesses: N-grams predicted (..., 4).
        length: Words predicted (...).
        reference_length: Words of the closest references (...).

    Returns:
        float (..., 4)
    """
    tiny, small = 1e-15, 1e-9
    precision = np.cumprod((matches + tiny) / (guesses + small), axis=-1)
    scores = precision ** (1.0 / np.arange(1, MAX_ORDER + 1))
    ratio = (length + tiny) / (reference_length + small)
    return scores * np.exp(np.minimum(0.0, 1 - 1 / ratio))[..., None]


def rouge_l(prediction: str, references: list[str]) -> float:
    """ROUGE-L of one tokenized caption: the best recall and the best precision, each over all references.

    Precision and recall may come from two references; beta is coco-caption's (Lin 2004). The longest common subsequences
    with all references come from one walk over the prediction, bit-parallel (Hyyro 2004): a reference is a run of bits in
    one integer, with a spare bit above it that keeps the carry of the addition away from the next reference.
    """
    # as coco-caption splits: an empty caption is one empty word, and equals another empty caption
    words = prediction.split(" ")
    masks = dict.fromkeys(words, 0)
    spans, bit = [], 1
    for reference in references:
        first_bit = bit
        reference_words = reference.split(" ")
        for word in reference_words:
            if word in masks:
                masks[word] |= bit
            bit <<= 1
        spans.append((bit - first_bit, len(reference_words)))
        bit <<= 1
    everything = sum(span for span, _ in spans)

    unmatched = everything
    for word in words:
        mask = masks[word]
        if mask:
            hit = unmatched & mask
            unmatched = (unmatched + hit | unmatched & ~mask) & everything
    matched = everything & ~unmatched
    common = [((matched & span).bit_count(), length) for span, length in spans]
    precision = max(lcs for lcs, _ in common) / len(words)
    recall = max(lcs / length for lcs, length in common)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)
