"""BLEU, ROUGE-L and CIDEr-D of captions against references, as pycocoevalcap computes them, many images at once."""

from collections.abc import Iterator

import numpy as np

from .ngrams import CAPTIONS_AT_ONCE, MAX_ORDER, SHIFT, Captions, NgramIndex, ranges
from .occurrences import (
    NO_WORD,
    common_subsequences,
    occurrences,
    own_counts,
    place_columns,
    similar_sizes,
    word_masks,
)

CIDER_SIGMA = 6.0
ROUGE_BETA = 1.2


def caption_norms(index: NgramIndex, captions: Captions, numbers: list[np.ndarray], counts: np.ndarray) -> np.ndarray:
    """The length of each caption's vector of weighted n-grams, per order: float64 (4, captions).

    Args:
        index: Has the weights of n-grams.
        captions: The captions.
        numbers: Those of their n-grams, as `NgramIndex.number` gives them.
        counts: What `own_counts` gives.
    """
    squares = np.zeros((MAX_ORDER, len(captions.lengths)))
    for first in range(0, len(captions.lengths), CAPTIONS_AT_ONCE):
        block = slice(first, first + CAPTIONS_AT_ONCE)
        lengths, words = captions.lengths[block], slice(captions.starts[first], captions.ends[block][-1])
        caption = np.repeat(np.arange(len(lengths)), lengths)
        for order in range(MAX_ORDER):
            square = index.squares[order].take(numbers[order][words])
            square *= counts[order, words]  # an n-gram that occurs n times is met n times, and has n * n squares
            squares[order, block] = np.bincount(caption, square, minlength=len(lengths))
    return np.sqrt(squares)


class ReferenceTable:
    """The references of a set of images.

    Args:
        index: Has the weights of n-grams.
        tokens: All references, image by image, as they were tokenized.
        captions: The same, with words split at no-break spaces, as BLEU and CIDEr-D count them.
        num_references: For each image.
        numbers: Those of their n-grams, as `NgramIndex.number` gives them.
    """

    def __init__(
        self,
        index: NgramIndex,
        tokens: Captions,
        captions: Captions,
        num_references: np.ndarray,
        numbers: list[np.ndarray],
    ) -> None:
        self.index, self.tokens, self.captions = index, tokens, captions
        self.num_references = num_references
        self.first_reference = np.cumsum(num_references) - num_references
        self.image = np.repeat(np.arange(len(num_references)), num_references)
        self.norms = caption_norms(index, captions, numbers, own_counts(captions))

    def match(self, captions: Captions, pairs: "Pairs") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compare captions with the references of their images.

        Args:
            captions: The captions, split at no-break spaces.
            pairs: Each caption with each reference of its image.

        Returns:
            clipped n-gram matches for BLEU, float (captions, 4); CIDEr-D, float (captions,); and the length of each pair's
            longest common subsequence, int (pairs,).
        """
        numbers, counts = self.index.number(captions), own_counts(captions)
        norms = caption_norms(self.index, captions, numbers, counts)
        squares = [of_order.take(number) for of_order, number in zip(self.index.squares, numbers, strict=True)]
        clipped = np.zeros((MAX_ORDER, len(captions.words)))
        similarity, common = np.zeros(len(pairs.caption)), np.zeros(len(pairs.caption), dtype=np.int64)
        for chosen, masks, place in pairs.masks(captions, self.captions):
            common[chosen] = common_subsequences(masks)
            caption, reference = pairs.caption[chosen], pairs.reference[chosen]
            for order, (column, at, count) in enumerate(occurrences(masks, place)):
                # an n-gram is met at each of its places in the caption: each has a share of what it counts
                own = counts[order].take(at)
                share = np.minimum(own, count) / own
                dot = np.bincount(column, share * count * squares[order].take(at), minlength=len(chosen))
                norm = norms[order].take(caption) * self.norms[order].take(reference)
                similarity[chosen] += np.divide(dot, norm, out=np.zeros(len(norm)), where=norm != 0)
                # BLEU clips a count at the largest one any reference of the image has
                np.maximum.at(clipped[order], at, share)
        caption = np.repeat(np.arange(len(captions.lengths)), captions.lengths)
        matches = [np.bincount(caption, of_order, minlength=len(captions.lengths)) for of_order in clipped]
        # the "length" CIDEr-D compares is the number of bigrams
        difference = np.maximum(pairs.num_words - 1, 0)[pairs.caption] - np.maximum(pairs.reference_words - 1, 0)
        similarity *= np.exp(-(difference**2.0) / (2 * CIDER_SIGMA**2))
        total = np.bincount(pairs.caption, similarity, minlength=len(captions.lengths))
        return np.rint(np.column_stack(matches)), 10.0 * total / MAX_ORDER / self.num_references[pairs.image], common

    def rouge_l(self, tokens: Captions, pairs: "Pairs", common: np.ndarray) -> np.ndarray:
        """ROUGE-L of captions, float (captions,): the best recall and the best precision, each over all references.

        Precision and recall may come from two references; beta is coco-caption's (Lin 2004).

        Args:
            tokens: The captions, not split at no-break spaces.
            pairs: Each caption with each reference of its image.
            common: What `match` gives, which holds unless words have a no-break space.
        """
        if tokens.parts:
            for chosen, masks, _ in pairs.masks(tokens, self.tokens):
                common[chosen] = common_subsequences(masks)
        reference_words, words = self.tokens.lengths[pairs.reference].astype(np.int64), tokens.lengths.astype(np.int64)
        # as coco-caption splits: an empty caption is one empty word, and equals another empty caption
        common[(reference_words == 0) & (words == 0)[pairs.caption]] = 1
        precision = np.maximum.reduceat(common, pairs.first) / np.maximum(words, 1)
        recall = np.maximum.reduceat(common / np.maximum(reference_words, 1), pairs.first)
        divisor = recall + ROUGE_BETA**2 * precision
        score = (1 + ROUGE_BETA**2) * precision * recall
        return np.divide(score, divisor, out=np.zeros(len(score)), where=divisor != 0)


class Pairs:
    """Captions with the references of their images: one pair per caption and reference.

    Attributes:
        image, num_words: Of each caption.
        num_references: Of each caption's image.
        first: The first pair of each caption.
        caption, reference, reference_words: Of each pair.
    """

    def __init__(self, table: ReferenceTable, image: np.ndarray, lengths: np.ndarray) -> None:
        self.image, self.num_words = image, lengths.astype(np.int64)
        self.num_references = table.num_references[image]
        self.first = np.cumsum(self.num_references) - self.num_references
        self.caption = np.repeat(np.arange(len(image)), self.num_references)
        self.reference = ranges(table.first_reference[image], self.num_references)
        self.reference_words = table.captions.lengths[self.reference].astype(np.int64)

    def masks(self, captions: Captions, references: Captions) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Where the words of captions occur in their references, captions of similar length at once.

        Yields:
            pairs, those of a caption side by side; a column for each as of `word_masks`; and the places of the caption's words.
        """
        longest = np.maximum(np.maximum.reduceat(references.lengths[self.reference], self.first), captions.lengths)
        for block in similar_sizes(longest, self.num_references):
            chosen = ranges(self.first[block], self.num_references[block])
            words, place = place_columns(captions, self.caption[chosen])
            others, _ = place_columns(references, self.reference[chosen], NO_WORD)
            yield chosen, word_masks(words, others), place

    def closest_length(self) -> np.ndarray:
        """Words in the reference nearest in length to each caption; of two as near, in the shorter one."""
        distance = np.abs(self.reference_words - self.num_words[self.caption])
        # distance decides, then length: two numbers in one, both small
        return np.minimum.reduceat((distance << SHIFT) | self.reference_words, self.first) & ((1 << SHIFT) - 1)


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
