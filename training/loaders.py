"""The batches of a run, step by step, from a table or from shards; see `StepLoader`."""

import logging
import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch.utils.data import DataLoader

from data_scripts.shards import Skipped
from system.errors import UserError
from training.shards import StreamSampler

logger = logging.getLogger(__name__)


class StepLoader:
    """What a run trains on, `TableLoader` or `ShardLoader`.

    `steps(epoch, done)` gives the batches of each optimizer step of an epoch, without those of its first `done` steps.
    """

    num_items: int | None = None  # of an epoch, over all processes; None where it is not known before the epoch ends
    steps_per_epoch: int | None = None
    ends = False  # whether the step that was given last is the epoch's last

    def positions(self, epoch_steps: int) -> list[list[dict]]:
        """What a checkpoint after so many steps of the epoch has to hold of each process beside their number; for JSON."""
        return []

    def resume(self, positions: list[list[dict]], step: int) -> None:
        """Begin where a checkpoint was taken, after so many steps of the run."""


class TableLoader(StepLoader):
    """The batches of a table: every process knows them all, and skips those that are done.

    Args:
        accelerator: The run's.
        loader: Of all processes' batches.
        num_batches: Batches in one optimizer step.
    """

    def __init__(self, accelerator: Accelerator, loader: DataLoader, num_batches: int):
        self.accelerator, self.num_batches = accelerator, num_batches
        self.num_items = len(loader.dataset)
        self.loader = accelerator.prepare(loader)
        self.steps_per_epoch = math.ceil(len(self.loader) / num_batches)

    def steps(self, epoch: int, done: int) -> Iterator[list[dict]]:
        loader = self.loader
        loader.set_epoch(epoch)
        if done:
            loader = self.accelerator.skip_first_batches(loader, done * self.num_batches)
            loader.set_epoch(epoch)  # accelerate 1.12 and older forget it, and deal the first epoch's batches again
        # A loader that starts draws a random number; a run resumed inside the epoch would draw it a second time.
        with torch.random.fork_rng(devices=[]):
            batches = iter(loader)
            group = list(islice(batches, self.num_batches))
        while group:  # the last one may be shorter
            done += 1
            self.ends = done == self.steps_per_epoch
            yield group
            group = list(islice(batches, self.num_batches))


class ShardLoader(StepLoader):
    """The batches of an epoch's steps, as many steps in every process: one that has read its shards repeats its last batch without labels.

    Args:
        accelerator: The run's.
        sampler: Of the training captions.
        num_batches: Batches in one optimizer step.
        collator, batch_size, num_workers: As of a `DataLoader`; workers decode what their process reads.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        sampler: StreamSampler,
        num_batches: int,
        collator: Callable[[list], dict],
        batch_size: int,
        num_workers: int,
    ):
        self.accelerator, self.sampler, self.num_batches, self.collator = accelerator, sampler, num_batches, collator
        self.loader = DataLoader(
            sampler.stream, batch_size, sampler=sampler, collate_fn=collator, num_workers=num_workers
        )
        self.step_captions = batch_size * num_batches
        self.steps_before = 0  # of the epoch, when the run was resumed

    def steps(self, epoch: int, done: int) -> Iterator[list[dict]]:
        self.sampler.set_epoch(epoch)
        self.steps_before = done
        with torch.random.fork_rng(devices=[]):  # a loader that starts draws a random number
            batches = (send_to_device(batch, self.accelerator.device) for batch in self.loader)
            group = list(islice(batches, self.num_batches))
        filler = group[-1] if group else self._any_batch()
        remaining = self._anywhere(group)
        while remaining:
            following = list(islice(batches, self.num_batches))
            remaining = self._anywhere(following)
            self.ends = not remaining
            filler = group[-1] if group else filler
            yield group or [filler | {"labels": torch.full_like(filler["labels"], -100)}]
            group = following
        self._log_skipped()

    def positions(self, epoch_steps: int) -> list[list[dict]]:
        if not epoch_steps:
            return []
        return gather_object([self.sampler.position((epoch_steps - self.steps_before) * self.step_captions)])

    def resume(self, positions: list[list[dict]], step: int) -> None:
        if positions:
            self.sampler.resume(positions, step)

    def _anywhere(self, group: list[dict]) -> bool:
        here = torch.tensor(float(bool(group)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(here).item() > 0)

    def _any_batch(self) -> dict:
        """A batch for a process that has no shard."""
        caption = self.sampler.first_caption()
        if caption is None:
            raise UserError("none of the shards has a sample that can be used")
        return send_to_device(self.collator([self.sampler.stream[caption]]), self.accelerator.device)

    def _log_skipped(self) -> None:
        """Name the shards, and count the samples, that no process could use in this epoch."""
        for line in sum(gather_object([self.sampler.skipped]), Skipped()).lines():
            logger.warning(line)
