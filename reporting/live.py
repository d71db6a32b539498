"""What a training run logs while it trains: a progress bar, its losses, and the scores of each evaluation."""

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

from datasets import Dataset
from tqdm.auto import tqdm

from reporting.results import METRIC_TITLES

logger = logging.getLogger(__name__)

LOSS_TITLES = {
    "epoch": "epoch",
    "step": "step",
    "train_loss": "training loss",
    "reward": "reward",
    "eval_loss": "validation loss",
}


class EpochProgressBar(tqdm):
    """Progress of one epoch, with its mean loss so far and the time left until training ends, evaluations excluded.

    Args:
        epoch: Number of this epoch, 1 for the first.
        num_epochs: Number of epochs of the run.
        num_items: Items in an epoch.
        num_done: Items of this epoch that were trained on before the run was resumed.
        unit: What an item is: a caption, or an image where captions are sampled (self-critical training).
        disable: Show nothing.
    """

    def __init__(
        self,
        epoch: int,
        num_epochs: int,
        num_items: int,
        num_done: int = 0,
        unit: Literal["captions", "images"] = "captions",
        disable: bool = False,
    ):
        title = f"epoch {epoch}/{num_epochs}"
        super().__init__(total=num_items, initial=num_done, desc=title, unit=f" {unit}", disable=disable)
        self.num_later = (num_epochs - epoch) * num_items

    def set_loss(self, value: float, name: str = "loss") -> None:
        """Show the epoch's mean loss (or reward), and the time left at this epoch's pace."""
        if self.disable or self.n == self.initial:
            return
        num_left = max(self.total - self.n, 0) + self.num_later
        seconds = self.format_dict["elapsed"] / (self.n - self.initial) * num_left
        self.set_postfix_str(f"{name} {value:.3f}, training ends in {self.format_interval(seconds)}")


def log_losses(row: Mapping[str, float]) -> None:
    """Log a row of the history on one line: epoch, step, and the losses in nats per token or the mean reward."""
    logger.info(", ".join(f"{title} {row[name]:.4g}" for name, title in LOSS_TITLES.items() if name in row))


def log_scores(
    scores: Mapping[str, float], shuffled: Mapping[str, float], captions: Sequence[str], rows: Dataset
) -> None:
    """Log the scores of an evaluation above those of the shuffled baseline, and the captions of three images.

    Args:
        scores, shuffled: The metrics of `METRIC_TITLES`, of the captions and of the shuffled baseline.
        captions: One caption for each row.
        rows: Rows with `image_id` and `captions`. The first, middle and last are shown in every evaluation, so that
            their captions can be followed over the run.
    """
    lines = [" " * 12 + "".join(f"{title:>9}" for title in METRIC_TITLES.values())]
    for name, values in (("this model", scores), ("shuffled", shuffled)):
        lines.append(f"{name:12}" + "".join(f"{values[metric]:9.3f}" for metric in METRIC_TITLES))
    for index in sorted({0, len(rows) // 2, len(rows) - 1}):
        lines += [f"{rows[index]['image_id']}: {captions[index]}", f"    reference: {rows[index]['captions'][0]}"]
    logger.info("\n".join(lines))
