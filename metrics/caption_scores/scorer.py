"""Score captions against the references of their images: CaptionScorer to evaluate, CiderD to reward in training."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from .baselines import best_constant, derangement
from .ngrams import MAX_ORDER, NgramIndex, count_words
from .overlap import DocumentFrequencies, ReferenceTable, bleu, rouge_l
from .ptb_tokenizer import tokenize

END = " END"  # a word that no caption has: the tokenizer gives small letters
METRIC_NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")


def tokenize_predictions(predictions: Sequence[str], num_images: int) -> list[str]:
    """Check that there is one string per image, and give the captions with a blank between tokens."""
    if isinstance(predictions, str) or len(predictions) != num_images:
        raise ValueError(
            f"{'one string' if isinstance(predictions, str) else len(predictions)} as predictions for {num_images} "
            "images with references: give a list with one caption per image, in the same order"
        )
    for position, caption in enumerate(predictions):
        if not isinstance(caption, str):
            raise ValueError(
                f"predictions[{position}] is {caption!r}, not a string: give the empty string where there is no caption"
            )
    return [" ".join(tokenize(caption)) for caption in predictions]


def tokenize_references(references: Sequence[Sequence[str]]) -> list[list[str]]:
    """Check that every image has a list of strings, and give the references with a blank between tokens."""
    if isinstance(references, str) or not len(references):
        raise ValueError("references must be a list with, for each image, a list of at least one caption")
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
    return [[" ".join(tokenize(caption)) for caption in captions] for captions in references]


class CaptionScorer:
    """BLEU-1..4, ROUGE-L and CIDEr-D against fixed references, as pycocoevalcap gives them.

    References are tokenized, and their n-grams and document frequencies counted, once, here.

    Args:
        references: For each image a list of at least one caption.
        training_captions: What the model was trained on, all in one list: decides which captions are novel, and holds the
            candidates for the best constant caption.

    Raises:
        ValueError: References that are missing, empty or not strings, in one sentence that names the row.
    """

    def __init__(self, references: Sequence[Sequence[str]], training_captions: Sequence[str] | None = None) -> None:
        self.references = tokenize_references(references)
        self.training_captions = training_captions
        self.index = NgramIndex()
        counts = self.index.learn([caption for captions in self.references for caption in captions])
        image = np.repeat(np.arange(len(self.references)), [len(captions) for captions in self.references])
        frequencies = DocumentFrequencies(counts, image, len(self.references))
        self.table = ReferenceTable(self.references, counts, frequencies)

    def score(self, predictions: Sequence[str]) -> dict[str, float]:
        """Score one caption per image.

        Returns:
            "bleu_1" to "bleu_4", "rouge_l" and "cider", as coco-caption prints them (a CIDEr of 0.9 where papers print 90).

        Raises:
            ValueError: Another number of predictions than of images, or one that is no string.
        """
        return self._mean(self._measure(tokenize_predictions(predictions, len(self.references))))

    def unique_words(self, predictions: Sequence[str]) -> int:
        """Number of unique words in all captions together."""
        captions = tokenize_predictions(predictions, len(self.references))
        return len({word for caption in captions for word in caption.split()})

    def per_image_cider(self, predictions: Sequence[str]) -> list[float]:
        """CIDEr-D of each caption, in the order of the images."""
        return self._measure(tokenize_predictions(predictions, len(self.references)))[:, -1].tolist()

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
            "diagnostics": rates as fractions, lengths in tokens, None for what cannot be known; "beats_shuffled"; "warning":
            a sentence or None; "per_image": {"cider", "shuffled_caption"} of each image. All plain enough for JSON.

        Raises:
            ValueError: As `score`, or another number of `ended` than of images.
        """
        num_images = len(self.references)
        if ended is not None and len(ended) != num_images:
            raise ValueError(f"{len(ended)} values of `ended` for {num_images} images: give one per caption, or None")
        captions = tokenize_predictions(predictions, num_images)
        measured, shuffled = self._measure(captions), self._measure(self.shuffle(captions))
        intervals, gain = self._bootstrap(measured, measured[:, -1] - shuffled[:, -1], num_resamples, seed)
        metrics, shuffled_metrics = self._mean(measured), self._mean(shuffled)
        return {
            "metrics": metrics,
            "intervals": intervals,
            "shuffled": shuffled_metrics,
            "constant": dict(self._constant),
            "diagnostics": self._diagnose(captions, ended),
            "beats_shuffled": gain[0] > 0,
            "warning": self._warn(metrics["cider"], shuffled_metrics["cider"], gain),
            "per_image": [
                {"cider": cider, "shuffled_caption": caption}
                for cider, caption in zip(measured[:, -1].tolist(), self.shuffle(predictions), strict=True)
            ],
        }

    def _warn(self, cider: float, shuffled_cider: float, gain: list[float]) -> str | None:
        if len(self.references) == 1:
            return "One image has no shuffled baseline: score more images to learn whether the captions depend on the image."
        if gain[0] > 0:
            return None
        return (
            f"The captions do not beat the shuffled baseline (CIDEr {cider:.3f}, assigned to other images {shuffled_cider:.3f}, 95 % "
            f"interval of the difference {gain[0]:.3f} to {gain[1]:.3f}): {len(self.references)} images give no evidence that the model "
            "uses the image."
        )

    @staticmethod
    def shuffle(predictions: Sequence[str]) -> list[str]:
        """Assign to each image another image's caption, always the same one; a single image gets the empty caption."""
        return [predictions[source] for source in derangement(len(predictions))] if len(predictions) > 1 else [""]

    @cached_property
    def _constant(self) -> dict:
        """The best constant caption among the training captions or, without them, the references, and its scores."""
        candidates = self._tokenized_training_captions or [
            caption for captions in self.references for caption in captions
        ]
        caption = best_constant(candidates, self.index, self.table)
        return {**self._mean(self._measure([caption] * len(self.references))), "caption": caption}

    @cached_property
    def _tokenized_training_captions(self) -> list[str]:
        return [" ".join(tokenize(caption)) for caption in self.training_captions or ()]

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

    def _diagnose(self, captions: list[str], ended: Sequence[bool] | None) -> dict[str, float | int | None]:
        words = [caption.split() for caption in captions]
        trigrams = [list(zip(caption, caption[1:], caption[2:], strict=False)) for caption in words]
        known = set(self._tokenized_training_captions)
        return {
            "ended": None if ended is None else float(np.mean([bool(end) for end in ended])),
            "repeated_trigram": float(np.mean([len(set(of_caption)) < len(of_caption) for of_caption in trigrams])),
            "mean_length": float(np.mean([len(caption) for caption in words])),
            "mean_reference_length": float(self.table.length.mean()),
            "unique_words": len({word for caption in words for word in caption}),
            "novel": float(np.mean([caption not in known for caption in captions])) if known else None,
        }

    def _measure(self, captions: list[str]) -> np.ndarray:
        """What scores are sums of, (images, 12): BLEU's four matches, four guesses and two lengths, ROUGE-L, CIDEr-D."""
        counts = self.index.count(captions)
        lengths = count_words(counts, len(captions))
        matches, cider = self.table.match(counts)
        guesses = np.maximum(lengths[:, None] - np.arange(MAX_ORDER), 0)
        rouge = [rouge_l(caption, references) for caption, references in zip(captions, self.references, strict=True)]
        return np.column_stack([matches, guesses, lengths, self.table.closest_length(lengths), rouge, cider])

    def _mean(self, measured: np.ndarray) -> dict[str, float]:
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
    """

    def __init__(self, references: Sequence[Sequence[str]], count_end: bool = False) -> None:
        self.end = END if count_end else ""
        self.references = [[caption + self.end for caption in captions] for captions in tokenize_references(references)]
        image = np.repeat(np.arange(len(self.references)), [len(captions) for captions in self.references])
        self.index = NgramIndex()
        counts = self.index.learn([caption for captions in self.references for caption in captions])
        self.frequencies = DocumentFrequencies(counts, image, len(self.references))

    def score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """Score a batch of captions that ended, each against the references of its own image, float64 (len(predictions),)."""
        tokenized = [[caption + self.end for caption in captions] for captions in tokenize_references(references)]
        captions = [caption + self.end for caption in tokenize_predictions(predictions, len(tokenized))]
        return self._match(captions, tokenized)[0]

    def reward(
        self, predictions: Sequence[str], ended: Sequence[bool], images: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """CIDEr-D, BLEU-4 and ROUGE-L of each caption alone, each float64 (len(predictions),).

        Args:
            predictions: Captions; an image may have several.
            ended: Whether generation ended each with EOS. With `count_end`, the end counts for these alone.
            images: For each caption, the position of its image in the reference set.
        """
        captions = [
            caption + self.end * end
            for caption, end in zip(tokenize_predictions(predictions, len(images)), ended, strict=True)
        ]
        references = [self.references[image] for image in images]
        cider, matches, counts, table = self._match(captions, references)
        lengths = count_words(counts, len(captions))
        guesses = np.maximum(lengths[:, None] - np.arange(MAX_ORDER), 0)
        bleu_4 = bleu(matches, guesses, lengths, table.closest_length(lengths))[:, -1]
        return cider, bleu_4, np.array([rouge_l(*pair) for pair in zip(captions, references, strict=True)])

    def _match(self, captions: list[str], references: list[list[str]]) -> tuple:
        """CIDEr-D and BLEU's matches of the captions, their n-gram counts, and the table of their references."""
        num_predictions = len(captions)
        captions = captions + [caption for of_image in references for caption in of_image]
        # counted together, so that a new n-gram has the same number in a prediction and in its references
        counts = self.index.count(captions)
        table = ReferenceTable(
            references, [order.rows(num_predictions, len(captions)) for order in counts], self.frequencies
        )
        counts = [order.rows(0, num_predictions) for order in counts]
        matches, cider = table.match(counts)
        return cider, matches, counts, table
