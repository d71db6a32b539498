"""BLEU, ROUGE-L and CIDEr-D of captions against references, as pycocoevalcap computes them, many images at once."""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .ngrams import MAX_ORDER, SHIFT, Captions, NgramCounts, Ngrams, first_of_runs, ranges

CIDER_SIGMA = 6.0
ROUGE_BETA = 1.2
MASK_BITS = 64  # the words of a reference as bits of one number
LOOKUPS_AT_ONCE = 1 << 14  # what is looked at again and again stays in the processor's cache
ENTRIES_AT_ONCE = 1 << 19
IMAGES_AT_ONCE = 2048
BITS_OF_BYTE = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


class DocumentFrequencies:
    """The weight of an n-gram: log of the number of images over the number of those whose references hold it."""

    def __init__(self, images_with: Iterable[np.ndarray], num_images: int) -> None:
        weights = np.log(float(num_images)) - np.log(np.maximum(np.arange(num_images + 1.0), 1))
        # behind the known n-grams of an order stand all others: they count as n-grams of one image
        self.weights = [weights[np.append(images, 1)] for images in images_with]

    def weigh(self, ngram: np.ndarray, order: int) -> np.ndarray:
        return self.weights[order][np.minimum(ngram, len(self.weights[order]) - 1)]


class Entries(NamedTuple):
    """The n-grams of one order in the references, sorted by image, n-gram and reference.

    Attributes:
        first: Where the entries of each image begin, and, behind the last image, their number.
        ngram: The n-gram's number.
        reference: The reference that holds it.
        count: How often the reference does.
        num_references: For the first entry of each image and n-gram, how many references hold it; 0 for the others.
        positions: Where the reference holds it, as bits; for single words alone.
    """

    first: np.ndarray
    ngram: np.ndarray
    reference: np.ndarray
    count: np.ndarray
    num_references: np.ndarray
    positions: np.ndarray

    def find(self, image: np.ndarray, ngram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Look up n-grams in the references of images, by bisection.

        Returns:
            the places, in what was asked for, of what is there; and the first entry of each of those.
        """
        found, entries = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
        for start in range(0, len(ngram) if len(self.ngram) else 0, LOOKUPS_AT_ONCE):
            block = slice(start, start + LOOKUPS_AT_ONCE)
            wanted, low, end = ngram[block], self.first[image[block]], self.first[image[block] + 1]
            size = end - low
            for _ in range(int(size.max()).bit_length()):
                half = size >> 1
                low += half * (self.ngram[low + half - 1] < wanted)
                size -= half
            last = len(self.ngram) - 1
            low += self.ngram[np.minimum(low, last)] < wanted
            there = np.flatnonzero((low < end) & (self.ngram[np.minimum(low, last)] == wanted))
            found.append(there + start)
            entries.append(low[there])
        return np.concatenate(found), np.concatenate(entries)


class ReferenceTable:
    """The references of a set of images, laid out so that an n-gram of a caption finds those of its image.

    Args:
        tokens: All references, image by image, as they were tokenized.
        captions: The same, with words split at no-break spaces, as BLEU and CIDEr-D count them.
        num_references: For each image.
        orders: Their n-grams as `NgramIndex.number` gives them.
        frequencies: Weights of another reference set; without them, n-grams are weighted by this set.
    """

    def __init__(
        self,
        tokens: Captions,
        captions: Captions,
        num_references: np.ndarray,
        orders: Iterable[Ngrams],
        frequencies: DocumentFrequencies | None = None,
    ) -> None:
        self.tokens, self.captions = tokens, captions
        # ROUGE-L goes a slower way where the words of a reference do not fit in one number
        self.irregular = (tokens.lengths > MASK_BITS) | (tokens.lengths != captions.lengths)
        self.num_references = num_references
        self.first_reference = np.cumsum(num_references) - num_references
        self.image = np.repeat(np.arange(len(num_references)), num_references)
        # of counts, which are at most the words of a reference or the references of an image
        self.count_type = np.min_scalar_type(int(max(captions.lengths.max(), num_references.max())))
        self.orders = [self._sort(ngrams) for ngrams in orders]
        self.last_ngram = [int(entries.ngram.max(initial=-1)) for entries in self.orders]
        if frequencies is None:
            images_with = (np.bincount(entries.ngram[entries.num_references > 0]) for entries in self.orders)
            frequencies = DocumentFrequencies(images_with, len(num_references))
        self.frequencies = frequencies
        self.norms = [self._norms(entries, order) for order, entries in enumerate(self.orders)]

    def _sort(self, ngrams: Ngrams) -> Entries:
        """Sort the n-grams of one order, some images at a time: their keys fit in one number, and in the processor's cache."""
        stops = np.append(self.first_reference[IMAGES_AT_ONCE::IMAGES_AT_ONCE], len(self.image))
        ends = np.searchsorted(ngrams.caption, stops).tolist()
        parts = [self._sort_block(ngrams, start, end) for start, end in pairwise([0, *ends]) if start < end]
        if not parts:
            parts = [(0, *(np.empty(0, dtype=np.int64) for _ in Entries._fields))]
        first_images, sizes, *columns = zip(*parts, strict=True)
        num_entries = np.zeros(len(self.num_references), dtype=np.int64)
        for first_image, size in zip(first_images, sizes, strict=True):
            num_entries[first_image : first_image + len(size)] += size
        return Entries(np.concatenate(([0], np.cumsum(num_entries))), *map(np.concatenate, columns))

    def _sort_block(self, ngrams: Ngrams, start: int, end: int) -> tuple[np.ndarray, ...]:
        """Sort some n-grams by image, n-gram and reference: the first image, how many of each from it on, then as `Entries`."""
        ngrams = ngrams.cut(start, end)
        # all in one number, in as many bits as they need here; of words, the position, too
        first_reference, last_reference = ngrams.caption[[0, -1]].tolist()
        reference_bits, ngram_bits = (
            (last_reference - first_reference).bit_length(),
            int(ngrams.ngram.max()).bit_length(),
        )
        first_image = self.image[first_reference]
        key = self.image[ngrams.caption]
        key -= first_image
        key <<= ngram_bits
        key |= ngrams.ngram
        key <<= reference_bits
        key += ngrams.caption
        key -= first_reference
        positions = np.empty(0, dtype=np.uint64)
        if ngrams.position is not None:
            position_bits = int(ngrams.position.max()).bit_length()
            key <<= position_bits
            key |= ngrams.position
            key.sort()
            bits = np.uint64(1) << (key & ((1 << position_bits) - 1) & (MASK_BITS - 1)).view(np.uint64)
            key >>= position_bits
            entry = first_of_runs(key)
            positions = np.bitwise_or.reduceat(bits, entry)
        else:
            key.sort()
            entry = first_of_runs(key)
        count = np.ones(len(entry), dtype=self.count_type)
        if len(entry) < len(key):
            count[:] = np.diff(entry, append=len(key))
            key = key[entry]
        reference = (key & ((1 << reference_bits) - 1)).astype(np.int32)
        reference += first_reference
        key >>= reference_bits
        group = first_of_runs(key)
        num_references = np.zeros(len(key), dtype=self.count_type)
        num_references[group] = np.diff(group, append=len(key))
        ngram = (key & ((1 << ngram_bits) - 1)).astype(np.int32)
        key >>= ngram_bits
        return first_image, np.bincount(key), ngram, reference, count, num_references, positions

    def _norms(self, entries: Entries, order: int) -> np.ndarray:
        """The length of each reference's vector of weights."""
        squares = np.zeros(len(self.image))
        for start in range(0, len(entries.ngram), ENTRIES_AT_ONCE):
            block = slice(start, start + ENTRIES_AT_ONCE)
            weight = self.frequencies.weigh(entries.ngram[block], order)
            weight *= entries.count[block]
            weight *= weight
            squares += np.bincount(entries.reference[block], weight, minlength=len(squares))
        return np.sqrt(squares)

    def match(self, counts: list[NgramCounts], pairs: "Pairs") -> tuple[np.ndarray, np.ndarray]:
        """Compare captions with the references of their images.

        Args:
            counts: N-grams of the captions, per order.
            pairs: Each caption with each reference of its image.

        Returns:
            clipped n-gram matches for BLEU, int (captions, 4), and CIDEr-D, float (captions,).
        """
        matches = np.zeros((len(pairs.image), MAX_ORDER), dtype=np.int64)
        similarity = np.zeros(len(pairs.caption))
        for order, of_order in enumerate(counts):
            matches[:, order], cosine = self._match_order(of_order, order, pairs)
            similarity += cosine
        # the "length" CIDEr-D compares is the number of bigrams
        difference = np.maximum(pairs.num_words - 1, 0)[pairs.caption] - np.maximum(pairs.reference_words - 1, 0)
        similarity *= np.exp(-(difference**2.0) / (2 * CIDER_SIGMA**2))
        total = np.bincount(pairs.caption, similarity, minlength=len(matches))
        return matches, 10.0 * total / MAX_ORDER / self.num_references[pairs.image]

    def _match_order(self, counts: NgramCounts, order: int, pairs: "Pairs") -> tuple[np.ndarray, np.ndarray]:
        entries = self.orders[order]
        idf = self.frequencies.weigh(counts.ngram, order)
        weight = counts.count * idf
        norm = np.sqrt(np.bincount(counts.caption, weight**2, minlength=len(pairs.image)))
        known = np.flatnonzero(counts.ngram <= self.last_ngram[order])
        found, first = entries.find(pairs.image[counts.caption[known]], counts.ngram[known])
        found = known[found]
        caption, size = counts.caption[found], entries.num_references[first].astype(np.int64)
        met = ranges(first, size)
        met_count = entries.count[met]
        # BLEU clips a count at the largest one any reference of the image has
        clipped = np.maximum.reduceat(met_count, np.cumsum(size) - size) if len(met) else met_count
        clipped = np.minimum(counts.count[found], clipped)
        matches = np.bincount(caption, clipped, minlength=len(pairs.image)).astype(np.int64)

        met_weight = met_count * np.repeat(idf[found], size)
        product = np.minimum(np.repeat(weight[found], size), met_weight) * met_weight
        pair = entries.reference[met] + np.repeat(pairs.offset[caption], size)
        dot = np.bincount(pair, product, minlength=len(pairs.caption))
        norms = norm[pairs.caption] * self.norms[order][pairs.reference]
        return matches, np.divide(dot, norms, out=np.zeros(len(norms)), where=norms != 0)

    def rouge_l(self, tokens: Captions, pairs: "Pairs") -> np.ndarray:
        """ROUGE-L of captions, float (captions,): the best recall and the best precision, each over all references.

        Precision and recall may come from two references; beta is coco-caption's (Lin 2004). The longest common
        subsequences come from one walk over the words of all captions, bit-parallel (Hyyro 2004): the words of a reference
        are the bits of one number, and those not matched yet are ones.

        Args:
            tokens: The captions, not split at no-break spaces.
            pairs: Each caption with each reference of its image.
        """
        entries = self.orders[0]
        caption = np.repeat(np.arange(len(tokens.lengths)), tokens.lengths)
        found, first = entries.find(pairs.image[caption], tokens.words)
        size = entries.num_references[first].astype(np.int64)
        met = ranges(first, size)
        pair = entries.reference[met] + np.repeat(pairs.offset[caption[found]], size)
        position = np.repeat(tokens.positions()[found], size)
        by_position = np.argsort(position.astype(np.min_scalar_type(int(position.max(initial=0)))), kind="stable")
        pair, mask = pair[by_position], entries.positions[met][by_position]
        unmatched = np.full(len(pairs.caption), ~np.uint64(0))
        num_met = np.bincount(position)
        for start, end in zip(np.cumsum(num_met) - num_met, np.cumsum(num_met), strict=True):
            before, bits = unmatched[pair[start:end]], mask[start:end]
            unmatched[pair[start:end]] = (before + (before & bits)) | (before & ~bits)

        reference_words, words = self.tokens.lengths[pairs.reference].astype(np.int64), tokens.lengths.astype(np.int64)
        beyond = np.maximum(MASK_BITS - reference_words, 0).astype(np.uint64)  # bits that stand for no word
        within = np.where(reference_words > 0, ~np.uint64(0) >> np.minimum(beyond, MASK_BITS - 1), np.uint64(0))
        common = BITS_OF_BYTE[(~unmatched & within).view(np.uint8)].reshape(-1, 8).sum(axis=1, dtype=np.int64)
        irregular = self.irregular[pairs.reference] | (words != pairs.num_words)[pairs.caption]
        for odd in np.flatnonzero(irregular).tolist():
            both = tokens.of(pairs.caption[odd]), self.tokens.of(pairs.reference[odd])
            common[odd] = longest_common_subsequence(*(side.tolist() for side in both))
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
        first: The first pair of each caption.
        offset: Of each caption, what makes its pair of a reference's number.
        caption, reference, reference_words: Of each pair.
    """

    def __init__(self, table: ReferenceTable, image: np.ndarray, lengths: np.ndarray) -> None:
        num_references = table.num_references[image]
        self.image, self.num_words = image, lengths.astype(np.int64)
        self.first = np.cumsum(num_references) - num_references
        self.offset = self.first - table.first_reference[image]
        self.caption = np.repeat(np.arange(len(image)), num_references)
        self.reference = ranges(table.first_reference[image], num_references)
        self.reference_words = table.captions.lengths[self.reference].astype(np.int64)

    def closest_length(self) -> np.ndarray:
        """Words in the reference nearest in length to each caption; of two as near, in the shorter one."""
        distance = np.abs(self.reference_words - self.num_words[self.caption])
        # distance decides, then length: two numbers in one, both small
        return np.minimum.reduceat((distance << SHIFT) | self.reference_words, self.first) & ((1 << SHIFT) - 1)


def longest_common_subsequence(first: list[int], second: list[int]) -> int:
    """The length of the longest common subsequence, for references of any length."""
    masks: dict[int, int] = {}
    for position, word in enumerate(second):
        masks[word] = masks.get(word, 0) | 1 << position
    everything = unmatched = (1 << len(second)) - 1
    for word in first:
        hit = unmatched & masks.get(word, 0)
        unmatched = (unmatched + hit | unmatched & ~masks.get(word, 0)) & everything
    return len(second) - unmatched.bit_count()


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
