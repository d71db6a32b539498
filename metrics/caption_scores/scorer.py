"""Score captions against the references of their images: CaptionScorer to evaluate, CiderD to reward in training."""

import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain

import numpy as np

from .baselines import best_constant, blocks, derangement
from .ngrams import MAX_ORDER, Captions, NgramIndex, WordIndex
from .occurrences import own_counts
from .overlap import Pairs, ReferenceTable, bleu
from .tokenizers import choose_tokenizer, describe_misfit, get_split

END = " END"  # a word that no caption has: no tokenizer gives a blank
KEPT_BYTES = 1 << 23
METRIC_NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")


def check_predictions(predictions: Sequence[str], num_images: int) -> None:
    """Raise a ValueError unless there is one string per image."""
    if isinstance(predictions, str) or len(predictions) != num_images:
        raise ValueError(
            f"{'one string' if isinstance(predictions, str) else len(predictions)} as predictions for {num_images} "
            "images with references: give a list with one caption per image, in the same order"
        )
    if set(map(type, predictions)) <= {str}:
        return
    for position, caption in enumerate(predictions):
        if not isinstance(caption, str):
            raise ValueError(
                f"predictions[{position}] is {caption!r}, not a string: give the empty string where there is no caption"
            )


def check_references(references: Sequence[Sequence[str]]) -> None:
    """Raise a ValueError unless every image has a list of at least one string."""
    if isinstance(references, str) or not len(references):
        raise ValueError("references must be a list with, for each image, a list of at least one caption")
    plain = set(map(type, references)) <= {list, tuple} and all(references)
    if plain and set(map(type, chain.from_iterable(references))) == {str}:
        return
    for position, captions in enumerate(references):
        if isinstance(captions, str) or not isinstance(captions, Sequence):
            raise ValueError(
                f"references[{position}] is {captions!r}, not a list of strings: put each image's captions in a list"
            )
        if not captions:
            raise ValueError(f"references[{position}] is empty: every image needs at least one reference caption")
        for caption in captions:
            if not isinstance(caption, str):
                raise ValueError(
                    f"references[{position}] holds {caption!r}, not a string: drop it or write the caption"
                )


class CaptionScorer:
    """BLEU-1..4, ROUGE-L and CIDEr-D against fixed references, as pycocoevalcap gives them.

    References are tokenized, and their n-grams and document frequencies counted, once, here.

    Args:
        references: For each image a list of at least one caption.
        training_captions: What the model was trained on, one caption after the other: decides which captions are novel, and holds the
            candidates for the best constant caption. It is read a few thousand captions at a time, twice in a report, and never kept:
            give something that can be iterated over again, and not an iterator.
        tokenizer: A name of `TOKENIZERS`, or "auto" to choose by what the references are written in ("ptb", coco-caption's, for
            English). The attribute `tokenizer` has the name chosen. A tokenizer that cannot split the references is warned of.

    Raises:
        ValueError: References that are missing, empty or not strings, in one sentence that names the row; a tokenizer that
            does not exist or is not installed.
    """

    def __init__(
        self,
        references: Sequence[Sequence[str]],
        training_captions: Iterable[str] | None = None,
        tokenizer: str = "auto",
    ) -> None:
        check_references(references)
        self.references, self.training_captions = references, training_captions
        self.num_images = len(references)
        self.index, self.table, self.tokenizer = learn_references(references, tokenizer)

    def score(self, predictions: Sequence[str]) -> dict[str, float]:
        """Score one caption per image.

        Returns:
            "bleu_1" to "bleu_4", "rouge_l" and "cider", as coco-caption prints them (a CIDEr of 0.9 where papers print 90).

        Raises:
            ValueError: Another number of predictions than of images, or one that is no string.
        """
        return self.mean(self.measure(predictions))

    def measure(self, predictions: Sequence[str]) -> np.ndarray:
        """What the scores are sums of, float64 (images, 12): columns as of the function `measure`."""
        return self._measure(self._encode(predictions))

    def unique_words(self, predictions: Sequence[str]) -> int:
        """Number of unique words in all captions together."""
        return len(np.unique(self._encode(predictions).split_words().words))

    def per_image_cider(self, predictions: Sequence[str]) -> list[float]:
        """CIDEr-D of each caption, in the order of the images."""
        return self.measure(predictions)[:, -1].tolist()

    def report(
        self,
        predictions: Sequence[str],
        ended: Sequence[bool] | None = None,
        num_resamples: int = 1000,
        seed: int = 0,
    ) -> dict:
        """Score captions with 95 % intervals, the shuffled and the constant baseline, and diagnostics.

        The intervals are percentiles over bootstrap resamples of the images, with unchanged document frequencies. Captions
        beat the shuffled baseline (the same captions assigned to other images) if the interval of the mean gain lies above
        zero: an image's CIDEr-D minus that of the caption assigned to it, both from the same resample. A single image gets
        the empty caption in the shuffled baseline.

        Args:
            predictions: One caption per image.
            ended: For each caption, whether generation ended it with EOS.
            num_resamples: Number of bootstrap resamples.
            seed: Seed of the resampling.

        Returns:
            "metrics", "shuffled" and "constant" (with its "caption"): the six scores; "intervals": [low, high] of each score;
            "diagnostics": rates as fractions, lengths in tokens, None for what cannot be known; "tokenizer"; "beats_shuffled";
            "warning": a sentence or None; "per_image": {"cider", "shuffled_caption"} of each image. All plain enough for JSON.

        Raises:
            ValueError: As `score`, or another number of `ended` than of images.
        """
        num_images = self.num_images
        if ended is not None and len(ended) != num_images:
            raise ValueError(f"{len(ended)} values of `ended` for {num_images} images: give one per caption, or None")
        captions = self._encode(predictions)
        shuffled_captions = captions.take(derangement(num_images)) if num_images > 1 else self._encode([""])
        measured, shuffled = self._measure(captions), self._measure(shuffled_captions)
        intervals, gain = self._bootstrap(measured, measured[:, -1] - shuffled[:, -1], num_resamples, seed)
        metrics, shuffled_metrics = self.mean(measured), self.mean(shuffled)
        return {
            "metrics": metrics,
            "intervals": intervals,
            "shuffled": shuffled_metrics,
            "constant": dict(self._constant),
            "diagnostics": self._diagnose(predictions, captions, ended),
            "tokenizer": self.tokenizer,
            "beats_shuffled": gain[0] > 0,
            "warning": self._warn(metrics["cider"], shuffled_metrics["cider"], gain),
            "per_image": [
                {"cider": cider, "shuffled_caption": caption}
                for cider, caption in zip(measured[:, -1].tolist(), self.shuffle(predictions), strict=True)
            ],
        }

    def _warn(self, cider: float, shuffled_cider: float, gain: list[float]) -> str | None:
        if self.num_images == 1:
            return "One image has no shuffled baseline: score more images to learn whether the captions depend on the image."
        if gain[0] > 0:
            return None
        return (
            f"The captions do not beat the shuffled baseline (CIDEr {cider:.3f}, assigned to other images {shuffled_cider:.3f}, 95 % "
            f"interval of the difference {gain[0]:.3f} to {gain[1]:.3f}): {self.num_images} images give no evidence that the model "
            "uses the image."
        )

    @staticmethod
    def shuffle(predictions: Sequence[str]) -> list[str]:
        """Assign to each image another image's caption, always the same one; a single image gets the empty caption."""
        return [predictions[source] for source in derangement(len(predictions))] if len(predictions) > 1 else [""]

    @cached_property
    def _constant(self) -> dict:
        """The best constant caption among the training captions or, without them, the references, and its scores."""
        candidates = self.training_captions or chain.from_iterable(self.references)
        caption = best_constant(candidates, self.index, self.table)
        encoded = self.index.words.encode([caption], learn=False)
        scores = self.mean(self._measure(encoded.take(np.zeros(self.num_images, dtype=np.int64))))
        return {**scores, "caption": " ".join(self.index.words.split_text(caption))}

    def _novel(self, predictions: Sequence[str]) -> float | None:
        """Fraction of the captions whose words no training caption has; None without training captions."""
        if not self.training_captions:
            return None
        # Their words are learned, so that they have the same numbers in every block of training captions.
        keys = list(self.index.words.encode(predictions, learn=True).keys())
        novel = set(keys)
        for block in blocks(self.training_captions):
            novel.difference_update(self.index.words.encode(block, learn=False).keys())
        return float(np.mean([key in novel for key in keys]))

    def _encode(self, predictions: Sequence[str]) -> Captions:
        check_predictions(predictions, self.num_images)
        return self.index.words.encode(predictions, learn=False)

    def _bootstrap(
        self, measured: np.ndarray, gain: np.ndarray, num_resamples: int, seed: int
    ) -> tuple[dict[str, list[float]], list[float]]:
        """95 % intervals of every score and of the mean gain, from the same resamples of the images."""
        generator = np.random.default_rng(seed)
        num_images = len(measured)
        columns = np.column_stack([measured, gain])
        totals = np.empty((num_resamples, columns.shape[1]))
        for total in totals:
            times_drawn = np.bincount(generator.integers(0, num_images, num_images), minlength=num_images)
            total[:] = times_drawn @ columns
        bleus = bleu(totals[:, :4], totals[:, 4:8], totals[:, 8], totals[:, 9])
        scores = np.column_stack([bleus, totals[:, 10:] / num_images])
        low_high = np.percentile(scores, [2.5, 97.5], axis=0).T.tolist()
        return dict(zip(METRIC_NAMES, low_high[:-1], strict=True)), low_high[-1]

    def _diagnose(
        self, predictions: Sequence[str], captions: Captions, ended: Sequence[bool] | None
    ) -> dict[str, float | int | None]:
        words = captions.split_words()
        repeated = np.searchsorted(words.ends, np.flatnonzero(own_counts(words)[2] > 1), side="right")
        return {
            "ended": None if ended is None else float(np.mean([bool(end) for end in ended])),
            "repeated_trigram": len(np.unique(repeated)) / self.num_images,
            "mean_length": float(words.lengths.mean()),
            "mean_reference_length": float(self.table.captions.lengths.mean()),
            "unique_words": len(np.unique(words.words)),
            "novel": self._novel(predictions),
        }

    def _measure(self, captions: Captions) -> np.ndarray:
        """What scores are sums of, (images, 12): BLEU's four matches, four guesses and two lengths, ROUGE-L, CIDEr-D."""
        return measure(self.table, captions, np.arange(self.num_images))

    @staticmethod
    def mean(measured: np.ndarray) -> dict[str, float]:
        """The six scores of what `measure` gives."""
        total = measured.sum(axis=0)
        bleus = bleu(total[:4], total[4:8], total[8], total[9])
        scores = [*bleus, *(total[10:] / len(measured))]
        return dict(zip(METRIC_NAMES, map(float, scores), strict=True))


class CiderD:
    """CIDEr-D with document frequencies fitted once, to reward captions in training.

    Vedantam et al. 2015 (the score), Rennie et al. 2017 (the use as a reward).

    Args:
        references: For each image of the reference set, usually the training split, a list of captions.
        count_end: Whether the end of a caption counts as a word of its n-grams, as in the rewards of Rennie et al. Without
            it, a caption that stops at "a dog on a" loses nothing.
        tokenizer: As of `CaptionScorer`.
    """

    def __init__(self, references: Sequence[Sequence[str]], count_end: bool = False, tokenizer: str = "auto") -> None:
        check_references(references)
        self.count_end = count_end
        self.index, self.table, self.tokenizer = learn_references(references, tokenizer, END if count_end else None)

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """Score a batch of captions that ended, each against the references of its own image, float64 (len(predictions),)."""
        check_references(references)
        check_predictions(predictions, len(references))
        # split together, so that a new word has the same number in a prediction and in its references
        num_references = np.array([len(captions) for captions in references])
        together = [*predictions, *chain.from_iterable(references)]
        tokens = self._encode(together, np.ones(len(together), dtype=bool))
        of_predictions, of_references = np.arange(len(predictions)), np.arange(len(predictions), len(together))
        captions, texts = tokens.take(of_predictions).split_words(), tokens.take(of_references)
        words = texts.split_words()
        table = ReferenceTable(self.index, texts, words, num_references, self.index.number(words))
        return table.match(captions, Pairs(table, of_predictions, captions.lengths))[1]

    def reward(
        self, predictions: Sequence[str], ended: Sequence[bool], images: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """CIDEr-D, BLEU-4 and ROUGE-L of each caption alone, each float64 (len(predictions),).

        Args:
            predictions: Captions; an image may have several.
            ended: Whether generation ended each with EOS. With `count_end`, the end counts for these alone.
            images: For each caption, the position of its image in the reference set.
        """
        check_predictions(predictions, len(images))
        captions = self._encode(predictions, np.asarray(ended, dtype=bool))
        rows = measure(self.table, captions, np.asarray(images, dtype=np.int64))
        return rows[:, -1], bleu(rows[:, :4], rows[:, 4:8], rows[:, 8], rows[:, 9])[:, -1], rows[:, -2]

    def _encode(self, captions: Sequence[str], ended: np.ndarray) -> Captions:
        encoded = self.index.words.encode(captions, learn=False)
        return encoded.append_word(self.index.words.words[END], ended) if self.count_end else encoded


def learn_references(
    references: Sequence[Sequence[str]], tokenizer: str, end: str | None = None
) -> tuple[NgramIndex, ReferenceTable, str]:
    """Number the words and n-grams of all references, and lay them out.

    Args:
        references: For each image a list of captions.
        tokenizer: A name of `TOKENIZERS`, or "auto".
        end: A word to append to every caption.

    Returns:
        the index of the numbers, the table of the references, and the tokenizer's name.
    """
    # what is freed is kept up to twice the largest array that was (glibc, mallopt(3)): pages are not fetched again for each block
    np.empty(KEPT_BYTES, dtype=np.uint8)
    captions = list(chain.from_iterable(references))
    tokenizer = choose_tokenizer(captions) if tokenizer == "auto" else tokenizer
    if misfit := describe_misfit(tokenizer, captions):
        warnings.warn(misfit, stacklevel=3)
    index = NgramIndex(WordIndex(get_split(tokenizer)))
    tokens = index.words.encode(captions, learn=True)
    if end:
        tokens = tokens.append_word(index.words.number(end), np.ones(len(captions), dtype=bool))
    words = tokens.split_words()
    num_references = np.array([len(of_image) for of_image in references])
    images = np.repeat(np.arange(len(references)), num_references)
    numbers = index.learn(words, images, len(references))
    return index, ReferenceTable(index, tokens, words, num_references, numbers), tokenizer


def measure(table: ReferenceTable, tokens: Captions, images: np.ndarray) -> np.ndarray:
    """What the scores of captions are computed from, float64 (captions, 12).

    Args:
        table: The references.
        tokens: The captions, tokenized.
        images: The image of each caption.

    Returns:
        BLEU's four matches, four guesses, and the words of caption and closest reference; ROUGE-L; CIDEr-D
    """
    captions = tokens.split_words()
    pairs = Pairs(table, images, captions.lengths)
    matches, cider, common = table.match(captions, pairs)
    guesses = np.maximum(pairs.num_words[:, None] - np.arange(MAX_ORDER), 0)
    rouge = table.rouge_l(tokens, pairs, common)
    return np.column_stack([matches, guesses, pairs.num_words, pairs.closest_length(), rouge, cider])
