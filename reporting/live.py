"""What people watch while a model trains: a bar, and what each evaluation found."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec

from accelerate.utils import LoggerType
from datasets import Dataset
from tqdm.auto import tqdm

from reporting.results import METRIC_TITLES
from system.errors import UserError

logger = logging.getLogger(__name__)


class EpochProgressBar(tqdm):
    """One epoch on one line, with the loss so far and the time until the training ends, evaluations not counted in.

    Args:
        epoch: Of `num_epochs`, from 1 on.
        num_images: Of an epoch; an image counts once for each of its captions.
        seen: So many of them had been trained on before a run was resumed.
        disable: Whether to show nothing.
    """

    def __init__(
        self, epoch: int, num_epochs: int, num_images: int, seen: int = 0, disable: bool = False, unit: str = "captions"
    ):
        title = f"epoch {epoch}/{num_epochs}"
        super().__init__(total=num_images, initial=seen, desc=title, unit=f" {unit}", disable=disable)
        self.later = (num_epochs - epoch) * num_images

    def set_loss(self, value: float, name: str = "loss") -> None:
        """Show the epoch's mean loss, or what else is learned by, and how long all that is left takes at the epoch's pace."""
        if self.disable:
            return
        seconds = self.format_dict["elapsed"] / (self.n - self.initial) * (max(self.total - self.n, 0) + self.later)
        self.set_postfix_str(f"{name} {value:.3f}, training ends in {self.format_interval(seconds)}")


def score_and_show(captions: Sequence[str], rows: Dataset, scorer) -> dict[str, float]:
    """Score the captions of some rows, tell the scores with the shuffled ones beside, and show three images' captions.

    Args:
        rows: `image_id` and `captions` of each image.
        scorer: A `metrics.CaptionScorer` of the rows' captions.

    Returns:
        The scores, those of the captions dealt to other images as "shuffled_" and the score's name, and "unique_words".
    """
    scores, shuffled = scorer.score(captions), scorer.score(scorer.shuffle(captions))
    lines = [" " * 12 + "".join(f"{title:>9}" for title in METRIC_TITLES.values())]
    for name, row in (("this model", scores), ("shuffled", shuffled)):
        lines.append(f"{name:12}" + "".join(f"{row[metric]:9.3f}" for metric in METRIC_TITLES))
    for place in sorted({0, len(rows) // 2, len(rows) - 1}):  # always the same, so that one sees them change
        lines += [f"{rows[place]['image_id']}: {captions[place]}", f"    reference: {rows[place]['captions'][0]}"]
    logger.info("\n".join(lines))
    shuffled = {f"shuffled_{metric}": score for metric, score in shuffled.items()}
    return {**scores, **shuffled, "unique_words": scorer.unique_words(captions)}


def print_losses(row: dict) -> None:
    """One line of the log: which epoch and step, and the losses there are, in nats a token, or the reward of samples."""
    names = {"epoch": "epoch", "step": "step", "train_loss": "training loss", "reward": "reward"}
    names["eval_loss"] = "validation loss"
    logger.info(", ".join(f"{title} {row[name]:.4g}" for name, title in names.items() if name in row))


def check_trackers(names: Sequence[str]) -> None:
    """Raise ValueError where a tracker is not installed: Accelerate would leave it out without a word."""
    for name in names:
        if name in LoggerType.list() and name != "all" and find_spec(name) is None:
            raise UserError(
                f"--report_to {name}: {name} is not installed; pip install {name.replace('_', '-')}, or --report_to none"
            )
