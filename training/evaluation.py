"""Validation of a captioner: loss of the references, and scores of the captions that it generates."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from metrics import CaptionScorer
from modeling.captioner import Captioner
from reporting.live import log_scores
from training.batches import CaptionPairs, ImageDataset, subsample_evenly
from training.features import Features

if TYPE_CHECKING:
    from training.run import TrainingRun

logger = logging.getLogger(__name__)

FEW_IMAGES = 10  # below it, a validation split says little


class Evaluator:
    """What a `TrainingRun` calls when an evaluation is due.

    Args:
        run: The `TrainingRun`.
        pairs: The validation pairs, all of which have a loss.
        rows: `image`, `image_id` and `captions` of the validation images.
        features: Their features, see `encode_splits`.
        max_images: Number of images that are captioned, see `subsample_evenly`.
        training_captions: All of them, for the scorer's best constant caption.
        loss_of: Model and batch to the summed loss of its labels, in nats.
    """

    def __init__(
        self,
        run: "TrainingRun",
        pairs: CaptionPairs,
        rows: Dataset,
        features: Sequence[Features | None],
        max_images: int | None,
        training_captions: Iterable[str],
        loss_of: Callable[[nn.Module, dict], torch.Tensor],
    ):
        self.accelerator, self.loss_of = run.accelerator, loss_of
        self.rows, features = subsample_evenly(max_images, rows, *features)
        self.captions = run.eval_loader(pairs.by_length())
        self.images = run.eval_loader(ImageDataset(self.rows, features))
        self.scorer = CaptionScorer(self.rows["captions"], training_captions)
        if len(self.rows) < FEW_IMAGES:
            logger.warning(
                f"{len(self.rows):,} validation images are too few to tell a better model from a luckier one: "
                "give more, as by --validation_share of `python -m data_scripts`."
            )

    def __call__(self, captioner: Captioner) -> dict:
        """The row of the history: "eval_loss" (nats a token), scores of the captions and of their shuffled baseline, seconds."""
        row = {"eval_loss": self.validation_loss(captioner.model)}
        started = time.perf_counter()
        captions = [made["caption"] for made in caption_images(captioner, self.images, self.accelerator)]
        generated = time.perf_counter()
        row |= score_and_show(captions, self.rows, self.scorer)
        scored = time.perf_counter()
        return row | {
            "generation_seconds": round(generated - started, 2),
            "scoring_seconds": round(scored - generated, 2),
        }

    @torch.inference_mode()
    def validation_loss(self, model: nn.Module) -> float:
        """Mean loss over all tokens of the validation captions, in nats."""
        totals = torch.zeros(2, device=self.accelerator.device)
        for batch in self.captions:
            totals += torch.stack([self.loss_of(model, batch), count_labels([batch])])
        nats, tokens = self.accelerator.reduce(totals)
        return (nats / tokens).item()


def count_labels(batches: Sequence[dict]) -> torch.Tensor:
    """The number of tokens that have a loss."""
    return sum((batch["labels"] != -100).sum() for batch in batches)


def caption_images(
    captioner: Captioner, loader: DataLoader, accelerator: Accelerator, num_inspected: int = 0
) -> list[dict]:
    """Caption every image of a prepared loader, under any number of processes.

    Args:
        captioner: In eval, its model not wrapped.
        loader: Batches with `index` and what `Captioner.generate` takes.
        accelerator: The run's; gathers what each process has generated.
        num_inspected: Number of images, from the first on and rounded up to whole batches, that get what `Captioner.inspect` gives.

    Returns:
        On every process the same list, in the order of `index`, each image once.
    """
    captions = {}
    for batch in tqdm(loader, desc="captioning", leave=False, disable=not accelerator.is_local_main_process):
        inputs = {name: value for name, value in batch.items() if name != "index"}
        made = captioner.generate(inputs, inspect=min(batch["index"]) < num_inspected)
        captions.update(zip(batch["index"].tolist(), made, strict=True))
    captions = dict(gather_object(list(captions.items())))  # an image dealt to two processes counts once
    return [captions[index] for index in sorted(captions)]


def score_and_show(captions: Sequence[str], rows: Dataset, scorer: CaptionScorer) -> dict[str, float]:
    """Score one caption per row, log the scores beside those of the shuffled baseline, and log three images' captions.

    Args:
        rows: Rows with `image_id` and `captions`.
        scorer: The scorer of the rows' captions.

    Returns:
        The scores, those of the shuffled baseline under "shuffled_" and the metric's name, and "unique_words".
    """
    scores, shuffled = scorer.score(captions), scorer.score(scorer.shuffle(captions))
    log_scores(scores, shuffled, captions, rows)
    shuffled = {f"shuffled_{metric}": score for metric, score in shuffled.items()}
    return {**scores, **shuffled, "unique_words": scorer.unique_words(captions)}
