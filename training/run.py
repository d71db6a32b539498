"""One training loop for every script.

A `TrainingRun` holds what always travels together and does what every training does: it starts, resumes, gives micro-batches,
evaluates, saves checkpoints, pushes and reports. The forward and backward pass of a step stand in the script:

    for batches in run.steps(evaluate, summarize):
        for batch in run.micro_batches(batches):
            run.backward(model(**batch).loss)
        run.optimizer_step()
"""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from operator import methodcaller
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import DatasetDict
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, get_scheduler

from data_scripts.caption_texts import CaptionTexts
from data_scripts.scene_truth import scene_truths
from metrics import CaptionScorer
from modeling.captioner import Captioner
from modeling.round_trip import check_round_trip
from reporting.curves import draw_curves
from reporting.live import EpochProgressBar, log_losses
from reporting.page import NUM_IMAGES
from reporting.push import CheckpointPush, download_checkpoint
from reporting.results import write_history
from reporting.training_report import report_training
from system.errors import UserError
from training.arguments import TrainingArguments
from training.averaging import ema_of
from training.batches import ImageDataset
from training.checkpoints import (
    check_finite,
    checkpoint_to_resume,
    copy_best_model,
    lock_output_dir,
    new_checkpoint,
    remove_old,
)
from training.compiling import compile_blocks, launcher_backend, uncompiled
from training.evaluation import caption_images
from training.fine_tuning import KINDS
from training.launch import refuse_fsdp, start_accelerator
from training.loaders import ShardLoader, TableLoader
from training.sharding import FullModel
from training.shards import StreamSampler
from training.stop_signal import StopSignal
from training.training_state import load_training_state, save_training_state

logger = logging.getLogger(__name__)

# curves.png takes longer to draw than a small model to evaluate; it is drawn at the end anyway.
SECONDS_BETWEEN_CURVES = 30


@dataclass
class TrainerState:
    """Where a run stands; saved with each checkpoint."""

    script: str  # training script; a checkpoint of another one is refused
    step_size: int  # captions, or images, in an optimizer step, over all processes and accumulated batches
    start_digest: str = ""  # digest of the weights it fine-tunes, where a checkpoint does not hold all of them
    epoch: int = 0  # finished epochs
    step: int = 0
    epoch_steps: int = 0  # steps done in the current epoch
    positions: list[list[dict]] = field(default_factory=list)  # of each process in the current epoch; see `StepLoader`
    running_sums: dict[str, float] = field(default_factory=dict)  # over all processes, since the history's last row
    train_seconds: float = 0.0
    best_cider: float = -1.0
    best_loss: float = math.inf  # validation loss at the best CIDEr
    best_step: int = 0
    evaluations_since_best: int = 0
    has_tied: bool = False  # whether two evaluations had the same CIDEr, which is logged once
    log_history: list[dict] = field(default_factory=list)


class TrainingRun:
    """What one run does in its output directory, which it has for itself inside its `with` block.

    Args:
        args: Options of the training loop.
        options: All options of the run, for trackers and model card.
        script: Name of the script, such as "train_lstm".
        unit: What a batch counts, "captions" or "images".

    Raises:
        UserError: The launch, a tracker, the output directory or the checkpoint to resume cannot be used.
    """

    def __init__(self, args: TrainingArguments, options: dict[str, Any], script: str, unit: str = "captions"):
        self.args, self.script, self.unit = args, script, unit
        self.options = {name: value for name, value in options.items() if name != "hub_token"}
        if getattr(args, "ema_decay", 0):
            refuse_fsdp("--ema_decay")
        self.stop_signal = StopSignal()
        self._curves_due = time.monotonic() + SECONDS_BETWEEN_CURVES
        self.accelerator = start_accelerator(args)
        self.step_size = (
            args.per_device_train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps
        )

    def __enter__(self) -> "TrainingRun":
        args = self.args
        if not gc.get_freeze_count():  # once a process, or what earlier runs have left would stay
            gc.freeze()  # going through all that is imported again, at exit if not before, takes a second
        with ExitStack() as stack:
            stack.enter_context(lock_output_dir(args.output_dir))
            self.resume_from = checkpoint_to_resume(
                args.resume_from_checkpoint,
                args.output_dir,
                self.script,
                download_checkpoint,
                args.overwrite_output_dir,
            )
            self.pushing = CheckpointPush(
                args, active=args.push_to_hub and self.accelerator.is_main_process, token=args.hub_token
            )
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._exit.__exit__(*error)

    # ---- Start ------------------------------------------------------------------------------------------------------

    def prepare(
        self,
        captioner: Captioner,
        optimizer: torch.optim.Optimizer,
        train_dataset: torch.utils.data.Dataset,
        sampler: Sampler,
        collator: Callable[[list], dict],
        num_workers: int = 0,
        *,
        start_digest: str = "",
        export: Callable[[PreTrainedModel], AbstractContextManager] = nullcontext,
        train_mode: Callable[[PreTrainedModel], Any] = methodcaller("train"),
    ) -> nn.Module:
        """Give the model as Accelerate has prepared it, its state and the run's put back where a checkpoint is resumed.

        Args:
            captioner: Model and processor.
            start_digest: See `TrainerState`.
            export: Context in which the model is as it is evaluated and saved; its own weights are back afterwards.
            train_mode: Puts the model into the mode in which it is trained.

        Raises:
            UserError: The checkpoint is of another model, or its steps have another size.
        """
        args, accelerator, model = self.args, self.accelerator, captioner.model
        self.captioner, self.export, self.train_mode = captioner, export, train_mode
        self.loading = {"collate_fn": collator, "num_workers": num_workers}
        if accelerator.is_main_process and not self.resume_from:
            with torch.random.fork_rng(devices=[]), export(model):
                check_round_trip(captioner, args.output_dir)
        self.captioner_keys = list(model.state_dict())
        self.full_model = FullModel(accelerator, model)
        self.ema = None
        if getattr(args, "ema_decay", 0):
            self.ema = ema_of(model, args.ema_decay)
        if backend := launcher_backend():
            compile_blocks(model, backend)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self._prepare_loader(train_dataset, sampler, collator)
        warmup = args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * self.num_steps
        self.scheduler = get_scheduler(args.lr_scheduler_type, optimizer, round(warmup), self.num_steps)
        self.state = TrainerState(self.script, self.step_size, start_digest)
        if self.resume_from:
            self._resume()
        # Saved over all processes, and added up over them again: each takes an equal part.
        self.sums = {
            name: torch.tensor(value / accelerator.num_processes, dtype=self._sum_dtype)
            for name, value in self.state.running_sums.items()
        }
        return self.model

    def _prepare_loader(self, train_dataset, sampler: Sampler, collator: Callable[[list], dict]) -> None:
        args, num_batches = self.args, self.args.gradient_accumulation_steps
        batch_size, num_workers = args.per_device_train_batch_size, self.loading["num_workers"]
        if isinstance(sampler, StreamSampler):
            if args.max_steps <= 0:
                raise UserError(
                    "--max_steps is missing: shards do not say how many captions an epoch has; give the number of steps"
                )
            self.loader = ShardLoader(self.accelerator, sampler, num_batches, collator, batch_size, num_workers)
        else:
            loader = DataLoader(train_dataset, batch_size, sampler=sampler, **self.loading)
            self.loader = TableLoader(self.accelerator, loader, num_batches)
        self.num_steps = args.max_steps if args.max_steps > 0 else self.loader.steps_per_epoch * args.num_train_epochs

    def _resume(self) -> None:
        saved = load_training_state(self, self.resume_from)
        self.state = TrainerState(**saved)
        self.loader.resume(self.state.positions, self.state.step)
        copy_best_model(self.resume_from, self.args.output_dir)
        logger.info(f"Resumed from {self.resume_from}: step {self.state.step:,} of {self.num_steps:,}.")

    def eval_loader(self, items: torch.utils.data.Dataset) -> DataLoader:
        """Batches of items in their order, split across the processes, each item once."""
        loader = DataLoader(items, self.args.per_device_eval_batch_size, **self.loading)
        return prepare_data_loader(loader, self.accelerator.device, put_on_device=True, even_batches=False)

    # ---- Steps ------------------------------------------------------------------------------------------------------

    def steps(
        self, evaluate: Callable[[Captioner], dict], summarize: Callable[[dict[str, float]], dict[str, float]]
    ) -> Iterator[list[dict]]:
        """Give the batches of each optimizer step; evaluate, log and save whenever it is due; exit on SIGTERM.

        Args:
            evaluate: Gives the validation scores of a captioner, "cider" among them, for a row of the history.
            summarize: Gives the same row's training figures from the sums passed to `backward`; the first is that of the progress bar.
        """
        args, state = self.args, self.state
        with self.stop_signal:
            self._start_trackers()
            if args.eval_on_start and not state.log_history:
                self._log({"epoch": 0, "step": 0} | self._evaluate(evaluate))
            while not self._is_finished():
                self.train_mode(self.model)
                started = time.perf_counter()
                with self._epoch_bar() as bar:
                    for batches in self.loader.steps(state.epoch, state.epoch_steps):
                        yield batches
                        state.train_seconds += time.perf_counter() - started
                        bar.update(min(self.step_size, bar.total - bar.n))  # the last batch may be short
                        self._end_step(evaluate, summarize, bar)
                        if self._is_finished():
                            break
                        started = time.perf_counter()
        if self._should_stop_early():
            logger.info(f"No better validation CIDEr since step {state.best_step}: stopped.")

    def micro_batches(self, batches: list[dict]) -> Iterator[dict]:
        """The batches of one step; only the last one's backward pass synchronizes gradients between processes."""
        for position, batch in enumerate(batches, start=1):
            last = position == len(batches)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                yield batch

    def total(self, count: torch.Tensor | int) -> torch.Tensor:
        """The sum of a count over all processes."""
        return self.accelerator.reduce(torch.as_tensor(count, device=self.accelerator.device))

    def backward(self, loss: torch.Tensor, /, **sums: torch.Tensor | float) -> None:
        """Backward pass of one batch.

        Args:
            loss: This batch's part of the step's loss, in which batches and processes are summed, not averaged.
            sums: Added up until the next row of the history, over batches, steps and processes; see `steps`.
        """
        # DDP and FSDP2 average the gradients of the processes; the loss is a sum over them.
        self.accelerator.backward(loss * self.accelerator.num_processes)
        for name, value in sums.items():
            value = torch.as_tensor(value, dtype=self._sum_dtype).detach()
            self.sums[name] = value + self.sums[name] if name in self.sums else value

    def optimizer_step(self) -> None:
        """Clip the gradients, update weights, learning rate and moving average."""
        if self.args.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.state.step += 1
        self.state.epoch_steps += 1
        if self.ema:
            self.ema.update_parameters(self.accelerator.unwrap_model(self.model))

    @property
    def exports_other_weights(self) -> bool:
        """Whether the weights that are evaluated and saved are others than those that are trained."""
        return self.ema is not None or self.export is not nullcontext

    @property
    def _sum_dtype(self) -> torch.dtype:
        # Thousands of batches are added up; MPS has no float64.
        return torch.float32 if self.accelerator.device.type == "mps" else torch.float64

    def _end_step(self, evaluate: Callable, summarize: Callable, bar: EpochProgressBar) -> None:
        args, state = self.args, self.state
        if state.step % 10 == 0:  # not each time: reading the sums waits for the device
            sums = self._total_sums()  # of all processes, so that all stop where one has a loss that is not finite
            name, value = next(iter(summarize(sums).items()))
            bar.set_loss(value, name.removeprefix("train_"))
            if not math.isfinite(sum(sums.values())):  # the weights are not read each time
                self._end_if_not_finite(sums)
        epoch_ends = self.loader.ends
        if epoch_ends:
            state.epoch, state.epoch_steps = state.epoch + 1, 0
        last = state.step >= self.num_steps
        should_evaluate = last or every_n_steps(state.step, args.eval_steps)
        should_evaluate |= epoch_ends and state.epoch % args.eval_epochs == 0
        if should_evaluate or epoch_ends or every_n_steps(state.step, args.logging_steps):
            sums = self._total_sums()
            self._end_if_not_finite(sums)
            row = {"epoch": self._epochs(), "step": state.step} if self.loader.steps_per_epoch else {"step": state.step}
            row |= summarize(sums)
            self.sums = {}
            self._log(row | (self._evaluate(evaluate) if should_evaluate else {}))
        should_stop = self.stop_signal.confirm(self.accelerator)
        should_save = last or should_stop or self._should_stop_early() or every_n_steps(state.step, args.save_steps)
        if should_save or (epoch_ends and state.epoch % args.save_epochs == 0):
            self._save_checkpoint()
        if should_stop:
            self.stop_signal.exit_after_checkpoint(self.accelerator, state.step)

    def _epochs(self) -> float:
        """Epochs trained, the one that has begun as a fraction; of shards the finished ones."""
        state = self.state
        if not self.loader.steps_per_epoch or not state.epoch_steps:
            return state.epoch
        return round(state.epoch + state.epoch_steps / self.loader.steps_per_epoch, 4)

    def _total_sums(self) -> dict[str, float]:
        if not self.sums:
            return {}
        device = self.accelerator.device
        sums = self.accelerator.reduce(torch.stack([value.to(device) for value in self.sums.values()]))
        return dict(zip(self.sums, sums.tolist(), strict=True))

    def _end_if_not_finite(self, sums: dict[str, float]) -> None:
        check_finite(sum(sums.values()), self.model, self.state.step, self.args.learning_rate, self.args.output_dir)

    def _epoch_bar(self) -> EpochProgressBar:
        args, state = self.args, self.state
        silent = args.disable_tqdm or not self.accelerator.is_local_main_process
        if not self.loader.steps_per_epoch:  # one bar for all steps
            total, done = self.num_steps * self.step_size, state.step * self.step_size
            return EpochProgressBar(1, 1, total, done, self.unit, silent)
        num_epochs = math.ceil(self.num_steps / self.loader.steps_per_epoch)
        done = min(state.epoch_steps * self.step_size, self.loader.num_items)
        return EpochProgressBar(state.epoch + 1, num_epochs, self.loader.num_items, done, self.unit, silent)

    def _is_finished(self) -> bool:
        return self.state.step >= self.num_steps or self._should_stop_early()

    def _should_stop_early(self) -> bool:
        """Whether there were too many evaluations without a better one; true of a run that is resumed after that, too."""
        patience = self.args.early_stopping_patience
        return bool(patience) and self.state.evaluations_since_best >= patience

    # ---- Evaluation and history -------------------------------------------------------------------------------------

    @contextmanager
    def exported(self) -> Iterator[Captioner]:
        """The captioner as it is evaluated and saved: averaged, gathered from its shards, or as `export` has it."""
        processor = self.captioner.processor
        with uncompiled():
            if self.ema:
                yield Captioner(self.ema.module.eval(), processor)
                return
            with self.full_model.gathered(self.model) as model, self.export(model):
                yield Captioner(model.eval(), processor)

    def _evaluate(self, evaluate: Callable) -> dict:
        """Scores of the captioner, which is saved if no evaluation before had a better CIDEr, or the same with a lower loss."""
        state = self.state
        with self.exported() as captioner:
            with self.accelerator.autocast():
                row = evaluate(captioner)
            state.evaluations_since_best += 1
            ties = row["cider"] == state.best_cider
            if ties and not state.has_tied:
                logger.info("Validation CIDEr equals the best so far: of equal ones the lower validation loss decides.")
            state.has_tied |= ties
            if row["cider"] > state.best_cider or (ties and row["eval_loss"] < state.best_loss):
                state.best_cider, state.best_loss = row["cider"], row["eval_loss"]
                state.best_step, state.evaluations_since_best = state.step, 0
                if self.args.load_best_model_at_end and self.accelerator.is_main_process:
                    captioner.save(self.args.output_dir)
        self.train_mode(self.model)
        self.accelerator.wait_for_everyone()
        return row

    def _start_trackers(self) -> None:
        """Start the trackers; those of a resumed run begin with all rows of the history.

        What a killed run logged may reach further than its checkpoint, or, held back in a buffer, not so far: TensorBoard drops
        what else is in the folder.
        """
        known = {name: value for name, value in self.options.items() if value is not None}
        self.accelerator.init_trackers("logs", known, init_kwargs={"tensorboard": {"purge_step": 0}})
        for row in self.state.log_history:
            self._track(row)

    def _track(self, row: dict) -> None:
        scalars = {name: value for name, value in row.items() if name not in ("epoch", "step")}
        self.accelerator.log(scalars, step=row["step"])

    def _log(self, row: dict) -> None:
        """Add a row to the history: in the log, in history.json, in the curves and in the trackers."""
        history = self.state.log_history
        history.append(row)
        self._track(row)
        log_losses(row)
        if self.accelerator.is_main_process:
            write_history(self.args.output_dir, history)
            if time.monotonic() > self._curves_due:
                draw_curves(self.args.output_dir, history)
                self._curves_due = time.monotonic() + SECONDS_BETWEEN_CURVES

    # ---- Checkpoints and end ----------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        """Write `checkpoint-STEP`, whole or not at all, remove old ones beyond save_total_limit, push it where it is to go."""
        args, state = self.args, self.state
        state.running_sums = self._total_sums()
        state.positions = self.loader.positions(state.epoch_steps)
        self._end_if_not_finite(state.running_sums)
        with new_checkpoint(args.output_dir, state.step) as folder:
            save_training_state(self, folder, asdict(state))
        self.train_mode(self.model)
        if self.accelerator.is_main_process:
            remove_old(args.output_dir, args.save_total_limit, state.step, keep_steps={state.best_step})
        self.accelerator.wait_for_everyone()
        self.pushing.send(state.step)

    def finish(
        self,
        dataset: DatasetDict,
        features: dict[str, list],
        training_captions: CaptionTexts | list[str],
        *,
        data_args,
        started_from: Sequence[str],
        self_critical: bool = False,
    ) -> None:
        """Caption the test split, or the validation split where there is none, with the saved model; report and push.

        Args:
            dataset, features: Splits, and their features as `encode_splits` gives them.
            training_captions: All of them, for the scorer's best constant caption.
            started_from, self_critical: See `write_model_card`.
        """
        args, accelerator = self.args, self.accelerator
        split = "test" if "test" in dataset else "validation"
        if not args.load_best_model_at_end:
            with self.exported() as captioner:
                if accelerator.is_main_process:
                    captioner.save(args.output_dir)
            accelerator.wait_for_everyone()
        captioner = Captioner.load(args.output_dir).to(accelerator.device)
        images = self.eval_loader(ImageDataset(dataset[split], *features[split]))
        with accelerator.autocast():
            captions = caption_images(captioner, images, accelerator, NUM_IMAGES)
        if accelerator.is_main_process:
            draw_curves(args.output_dir, self.state.log_history)
            report_training(
                args,
                data_args,
                dataset=dataset,
                split=split,
                num_training_captions=len(training_captions),
                captions=captions,
                scorer=CaptionScorer(dataset[split]["captions"], training_captions),
                decoding=captioner.model.generation_config,
                train=self._training_figures(),
                kind=KINDS[captioner.model.config.model_type],
                options=self.options,
                started_from=started_from,
                pushing=self.pushing if args.push_to_hub else None,
                self_critical=self_critical,
                truth=scene_truths([made["caption"] for made in captions], dataset[split]["captions"]),
            )
        accelerator.end_training()

    def _training_figures(self) -> dict[str, float]:
        """What the run took: epochs, seconds, and captions or images per second."""
        state = self.state
        num_trained = state.step * self.step_size
        if num_items := self.loader.num_items:  # an epoch's last batch may be short
            num_trained = state.epoch * num_items + min(state.epoch_steps * self.step_size, num_items)
        rate = round(num_trained / state.train_seconds, 1)
        return {"epochs": self._epochs(), "seconds": round(state.train_seconds, 3), f"{self.unit}_per_second": rate}


def every_n_steps(step: int, num_steps: int | None) -> bool:
    """Whether `step` is a multiple of `num_steps`; False where that is None."""
    return bool(num_steps) and step % num_steps == 0
