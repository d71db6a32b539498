"""System A: train Inception-ResNet-v2 + LSTM to caption pictures, in an Accelerate loop.

    accelerate launch train_lstm.py recipes/lstm_report.yaml --dataset data/paragraphs --output_dir outputs/lstm

A recipe sets the options, the command line overrides it, `--help` lists them.
"""

import dataclasses
import json
import logging
import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
import transformers
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.tracking import TrackioTracker
from accelerate.utils import broadcast_object_list, set_seed
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, get_scheduler

from data_scripts import load_captions
from data_scripts.caption_batches import CaptionCollator, CaptionPairs, CaptionSampler, Pictures, spread_evenly
from data_scripts.command_line import one_line_errors
from data_scripts.features import encode_splits
from data_scripts.train_tokenizer import check_special_tokens, train_tokenizer
from metrics import CaptionScorer
from modeling import InceptionLSTMConfig, InceptionLSTMForConditionalGeneration
from modeling.captioner import caption_pictures, save_captioner, set_decoding
from modeling.modeling_inception_lstm import timm_source
from modeling.processing import build_processor, timm_image_processor
from recipes import DataArguments, check_lengths, parse_recipe
from reporting.curves import draw_curves
from reporting.live import EpochBar, check_trackers, score_and_show, tell_losses
from reporting.model_card import write_model_card
from reporting.page import NUM_PICTURES
from reporting.push import CheckpointPush, download_checkpoint, push_to_hub
from reporting.report import command_line, report_captions
from reporting.results import write_history
from training.checkpoints import (
    check_finite,
    check_launch,
    check_sharding,
    check_step_size,
    checkpoint_to_resume,
    drop_old,
    new_checkpoint,
    own_output_dir,
    refuse_deepspeed,
)
from training.sharding import WholeModel, gather_head
from training.stopping import StopSignal, follow_launcher

logger = logging.getLogger(__name__)


@dataclass
class LSTMArguments:
    """The model; the defaults are the report's."""

    encoder: str = field(
        default="inception_resnet_v2.tf_in1k", metadata={"help": "timm name, Hub id or local folder of the encoder."}
    )
    pretrained_encoder: bool = field(default=True, metadata={"help": "Load the encoder's trained weights."})
    freeze_encoder: bool = field(default=True, metadata={"help": "Train nothing below the projection of its output."})
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the pictures given to the encoder, in pixels; its own if not given."}
    )
    center_crop: bool = field(
        default=True,
        metadata={"help": "Show the encoder a picture's middle, as in its training; else all of it, squeezed."},
    )
    image_embed_dim: int = field(
        default=1024, metadata={"help": "Length of the picture's and of each token's embedding."}
    )
    hidden_size: int = field(default=1024, metadata={"help": "Width of each LSTM layer."})
    num_hidden_layers: int = field(default=3, metadata={"help": "LSTM layers."})
    dropout: float = field(default=0.0, metadata={"help": "Share of the LSTM's inputs and outputs zeroed in training."})
    attention: bool = field(
        default=False,
        metadata={"help": "Look at the places of the encoder's grid at each word, not at its summary alone."},
    )
    num_attention_heads: int = field(default=1, metadata={"help": "Ways in which it looks at them at once."})
    vocab_size: int = field(
        default=8000, metadata={"help": "Tokens of the tokenizer that is trained if none is given."}
    )


@dataclass
class LoopArguments:
    """The training loop; names as in transformers.TrainingArguments."""

    output_dir: str = field(default="outputs/lstm", metadata={"help": "Where model, results and checkpoints go."})
    num_train_epochs: int = field(default=300, metadata={"help": "Times each caption is seen."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Captions a step on each device."})
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "Captions or pictures at once in evaluation."}
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches whose gradients make one step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Of AdamW, at its highest."})
    encoder_learning_rate: float | None = field(
        default=None, metadata={"help": "Of an encoder that is not frozen; the common one if not given."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Of AdamW."})
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "constant, constant_with_warmup, cosine, linear."}
    )
    warmup_steps: float = field(default=0, metadata={"help": "Steps of warm-up; below 1, their share of all steps."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are cut to this length; 0 cuts none."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16; as `accelerate` is set up if not given."}
    )
    seed: int = field(default=42, metadata={"help": "Of weights, order and dropout."})
    eval_epochs: int = field(default=1, metadata={"help": "Epochs between two evaluations."})
    save_epochs: int = field(default=1, metadata={"help": "Epochs between two checkpoints."})
    save_steps: int | None = field(
        default=None, metadata={"help": "Steps between two checkpoints inside an epoch; none there if not given."}
    )
    save_total_limit: int | None = field(
        default=None, metadata={"help": "Checkpoints kept, the newest, and the best beside them; all if not given."}
    )
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Leave the model of the best validation CIDEr in output_dir, else the last."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better validation CIDEr."}
    )
    generation_max_length: int | None = field(
        default=None,
        metadata={"help": "Longest caption generated, in tokens; the training captions' 99th percentile if not given."},
    )
    generation_min_length: int = field(
        default=0, metadata={"help": "Shortest caption generated, in tokens; the end of one comes no earlier."}
    )
    generation_num_beams: int = field(default=1, metadata={"help": "Beams; 1 is greedy."})
    length_penalty: float = field(
        default=1.0, metadata={"help": "Of beams: the power of its length that a caption's score is divided by."}
    )
    no_repeat_ngram_size: int = field(
        default=0, metadata={"help": "No run of so many tokens is generated twice; 0 allows all."}
    )
    report_to: str = field(
        default="tensorboard", metadata={"help": "Trackers of Accelerate, with commas between; or none."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint folder, `last`, or OWNER/NAME[@REVISION] on the Hub."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Upload output_dir at the end."})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository to push to; output_dir's name if not given."}
    )
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Make the repository a private one."})
    hub_revision: str | None = field(default=None, metadata={"help": "Branch to push to; main if not given."})
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = field(
        default="end",
        metadata={
            "help": "When to push: at the end only, or the model, the last or all checkpoints when one is saved."
        },
    )

    def __post_init__(self):
        check_lengths(self)


@dataclass
class Progress:
    """Where a run stands; saved with each checkpoint."""

    step_size: int  # captions
    epoch: int = 0  # whole ones
    step: int = 0
    epoch_steps: int = 0  # of the epoch that has begun, and what its loss is made of
    epoch_nats: float = 0.0
    epoch_tokens: float = 0.0
    train_seconds: float = 0.0
    best_cider: float = -1.0
    best_epoch: int = 0
    best_step: int = 0
    evaluations_since_best: int = 0
    history: list[dict] = field(default_factory=list)


def main(argv: list[str] | None = None) -> None:
    # ---- Arguments --------------------------------------------------------------------------------------------------
    data_args, model_args, args = parse_recipe((DataArguments, LSTMArguments, LoopArguments), argv, __doc__)

    # ---- Accelerator and seed ---------------------------------------------------------------------------------------
    follow_launcher()
    trackers = [name for name in args.report_to.split(",") if name != "none"]
    with one_line_errors():
        check_trackers(trackers)
        if "trackio" in trackers:  # by its name alone, its project would bear that of TensorBoard's folder
            trackers[trackers.index("trackio")] = TrackioTracker("showtell", name=args.output_dir)
        refuse_deepspeed()
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision, log_with=trackers or None, project_dir=args.output_dir
        )
        check_launch()
    logging.basicConfig(
        level=logging.INFO if accelerator.is_local_main_process else logging.WARNING, format="%(message)s"
    )
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    transformers.logging.disable_progress_bar()  # loading and saving take a second
    set_seed(args.seed)
    with one_line_errors(OSError), own_output_dir(args.output_dir):
        run(data_args, model_args, args, accelerator)


def run(data_args: DataArguments, model_args: LSTMArguments, args: LoopArguments, accelerator: Accelerator) -> None:
    """What one run does in the output directory that it has for itself."""
    options = {**vars(data_args), **vars(model_args), **vars(args)}

    # ---- Data -------------------------------------------------------------------------------------------------------
    with one_line_errors():
        resume_from = checkpoint_to_resume(
            args.resume_from_checkpoint, args.output_dir, "progress.json", download_checkpoint
        )
        pushing = CheckpointPush(args, active=args.push_to_hub and accelerator.is_main_process)
        dataset = load_captions(data_args.dataset, splits=("train", "validation"))
        if data_args.max_train_pictures:
            dataset["train"] = dataset["train"].select(range(min(data_args.max_train_pictures, len(dataset["train"]))))
        training_captions = [text for texts in dataset["train"]["captions"] for text in texts]
        tokenizer = load_tokenizer(data_args.tokenizer, training_captions, model_args.vocab_size, accelerator)

        # ---- Model --------------------------------------------------------------------------------------------------
        model, processor = build_model(model_args, tokenizer)
    model.to(accelerator.device)
    num_views = data_args.augmentation_views
    features = {split: [None] * (num_views if split == "train" else 1) for split in dataset}
    if data_args.cache_features and model_args.freeze_encoder:
        features = encode_splits(dataset, model.encoder, processor.image_processor, data_args, num_views)
    pairs = {
        split: CaptionPairs(dataset[split], tokenizer, data_args.max_caption_length, features[split])
        for split in ("train", "validation")
    }
    longest = args.generation_max_length or math.ceil(np.percentile(pairs["train"].lengths, 99))
    set_decoding(
        model,
        max(longest, args.generation_min_length),
        args.generation_min_length or None,
        num_beams=args.generation_num_beams,
        length_penalty=args.length_penalty,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
    )

    # ---- Optimiser --------------------------------------------------------------------------------------------------
    optimizer = torch.optim.AdamW(parameter_groups(model, args), lr=args.learning_rate, weight_decay=args.weight_decay)
    step_size = args.per_device_train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    num_steps = math.ceil(len(pairs["train"]) / step_size) * args.num_train_epochs
    warmup_steps = args.warmup_steps if args.warmup_steps >= 1 else args.warmup_steps * num_steps
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, round(warmup_steps), num_steps)

    collator = CaptionCollator(processor, share_pictures="index")
    loading = {"collate_fn": collator, "num_workers": data_args.dataloader_num_workers}
    sampler = CaptionSampler(
        pairs["train"].lengths,
        step_size,
        data_args.group_by_length,
        args.seed,
        pairs["train"].row_of_pair,
        data_args.group_by_picture,
        num_views,
    )
    train_loader = DataLoader(pairs["train"], args.per_device_train_batch_size, sampler=sampler, **loading)
    whole = WholeModel(accelerator, model)
    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    gather_head(model)

    def eval_loader(items) -> DataLoader:
        loader = DataLoader(items, args.per_device_eval_batch_size, **loading)
        return prepare_data_loader(loader, accelerator.device, put_on_device=True, even_batches=False)

    # ---- Training ---------------------------------------------------------------------------------------------------
    progress = Progress(step_size)
    if resume_from:
        with one_line_errors(ValueError):
            progress = load_checkpoint(accelerator, scheduler, resume_from, step_size)
    start_trackers(accelerator, options, progress)
    val_rows, val_features = spread_evenly(
        data_args.max_eval_pictures, dataset["validation"], features["validation"][0]
    )
    scorer = CaptionScorer(val_rows["captions"], training_captions)
    with StopSignal() as stopping:
        while progress.epoch < args.num_train_epochs and not stops_early(progress, args):
            row = train_epoch(accelerator, model, train_loader, optimizer, scheduler, progress, args, stopping)
            last = progress.epoch == args.num_train_epochs
            if progress.epoch % args.eval_epochs == 0 or last:
                with whole.of(model) as captioner:
                    row["eval_loss"] = validation_loss(accelerator, captioner, eval_loader(pairs["validation"]))
                    pictures = eval_loader(Pictures(val_rows, val_features))
                    row |= score_captions(accelerator, captioner, processor, pictures, val_rows, scorer)
                    keep_best(accelerator, captioner, processor, row, progress, args)
            record(accelerator, row, progress, args)
            asked = stopping.ask(accelerator)
            due = progress.epoch % args.save_epochs == 0 or (args.save_steps and progress.step % args.save_steps == 0)
            if due or last or asked or stops_early(progress, args):
                save_checkpoint(accelerator, model, scheduler, progress, args)
                pushing.send(progress.step)
            if asked:
                stopping.leave(accelerator, progress.step)
    if stops_early(progress, args):
        logger.info(f"No better validation CIDEr since epoch {progress.best_epoch}: stopped.")

    # ---- Evaluation -------------------------------------------------------------------------------------------------
    split = "test" if "test" in dataset else "validation"
    if not args.load_best_model_at_end:
        with whole.of(model) as captioner:
            if accelerator.is_main_process:
                save_captioner(captioner, processor, args.output_dir)
        accelerator.wait_for_everyone()
    captioner = InceptionLSTMForConditionalGeneration.from_pretrained(args.output_dir).to(accelerator.device)
    pictures = eval_loader(Pictures(dataset[split], features[split][0]))
    captions = caption_pictures(captioner.eval(), processor, pictures, accelerator, NUM_PICTURES)

    # ---- Saving -----------------------------------------------------------------------------------------------------
    if accelerator.is_main_process:
        results = report_captions(
            args.output_dir,
            rows=dataset[split],
            dataset=Path(data_args.dataset).name,
            split=split,
            captions=captions,
            scorer=CaptionScorer(dataset[split]["captions"], training_captions),
            decoding=captioner.generation_config,
            train=training_cost(progress, len(pairs["train"])),
            show_pictures=data_args.show_pictures,
        )
        write_model_card(
            args.output_dir,
            kind="inception-lstm",
            model_name=args.hub_model_id or args.output_dir,
            results=results,
            command=command_line(),
            options=options,
            base_models=hub_names(model_args),
            training_data={"pictures": len(dataset["train"]), "captions": len(training_captions)},
        )
        if args.push_to_hub:
            pushing.finish()
            push_to_hub(args.output_dir, args.hub_model_id, args.hub_private_repo, args.hub_revision)
    accelerator.end_training()


def load_tokenizer(name: str | None, training_captions: list[str], vocab_size: int, accelerator: Accelerator):
    """The tokenizer that is named, or one trained on the training captions, by one process for all."""
    if name:
        return AutoTokenizer.from_pretrained(name)
    trained = [train_tokenizer(training_captions, vocab_size) if accelerator.is_main_process else None]
    return broadcast_object_list(trained)[0]


def build_model(args: LSTMArguments, tokenizer) -> tuple:
    """Model and processor, the encoder's trained weights loaded where they are wanted."""
    check_special_tokens(tokenizer)
    if args.hidden_size % args.num_attention_heads:
        raise ValueError(
            f"--num_attention_heads {args.num_attention_heads} does not divide --hidden_size {args.hidden_size}"
        )
    try:
        backbone = timm.create_model(timm_source(args.encoder), pretrained=False, num_classes=0)
    except RuntimeError as error:
        raise ValueError(f"--encoder {args.encoder}: {error}; give a timm name, a Hub id or a local folder") from error
    config = InceptionLSTMConfig(
        encoder_name=backbone.pretrained_cfg["architecture"],
        freeze_encoder=args.freeze_encoder,
        vocab_size=len(tokenizer),
        image_embed_dim=args.image_embed_dim,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        dropout=args.dropout,
        attention=args.attention,
        num_attention_heads=args.num_attention_heads,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = InceptionLSTMForConditionalGeneration(config)
    if args.pretrained_encoder:
        try:
            model.load_pretrained_encoder(args.encoder)
        except Exception as error:  # timm, the Hub's client and torch each have their own
            raise ValueError(
                f"--encoder {args.encoder}: its weights cannot be loaded ({str(error).strip().splitlines()[0]}); give a "
                "folder that holds them, or --pretrained_encoder false"
            ) from error
    return model, build_processor(timm_image_processor(backbone, args.image_size, args.center_crop), tokenizer)


def hub_names(args: LSTMArguments) -> list[str]:
    """Hub id of the pretrained encoder, for the card; none for random weights or a folder of one machine."""
    if not args.pretrained_encoder or os.path.isdir(args.encoder):
        return []
    return [args.encoder if "/" in args.encoder else f"timm/{args.encoder}"]


def parameter_groups(model, args: LoopArguments) -> list[dict]:
    """What is trained: everything above the encoder, and the encoder at its own learning rate if it is not frozen."""
    encoder = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    others = [parameter for name, parameter in model.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": others}]
    if encoder:
        groups.append({"params": encoder, "lr": args.encoder_learning_rate or args.learning_rate})
    return groups


def train_epoch(
    accelerator, model, loader, optimizer, scheduler, progress: Progress, args: LoopArguments, stopping: StopSignal
) -> dict:
    """Every caption once, or those of a resumed epoch that are left. Returns the epoch's row of the history."""
    started = time.perf_counter()
    model.train()
    num_steps = math.ceil(len(loader) / args.gradient_accumulation_steps)
    loader.set_epoch(progress.epoch)
    size = args.per_device_train_batch_size * accelerator.num_processes
    nats = torch.tensor(progress.epoch_nats / accelerator.num_processes, device=accelerator.device)
    tokens = torch.tensor(progress.epoch_tokens, device=accelerator.device)
    seen = progress.epoch_steps * args.gradient_accumulation_steps * size
    silent = not accelerator.is_local_main_process
    with EpochBar(progress.epoch + 1, args.num_train_epochs, len(loader) * size, seen, silent) as bar:
        for batches in accumulation_windows(accelerator, loader, args.gradient_accumulation_steps, progress):
            step_nats, step_tokens = train_step(accelerator, model, batches, optimizer, args.max_grad_norm)
            scheduler.step()
            nats, tokens = nats + step_nats, tokens + step_tokens
            progress.step += 1
            progress.epoch_steps += 1
            bar.update(size * len(batches))
            if progress.step % 10 == 0:
                loss = (nats * accelerator.num_processes / tokens).item()
                bar.tell(loss)
                if not math.isfinite(loss):
                    break
            # The last step of an epoch is saved, where it is to be, after the epoch's evaluation.
            asked = stopping.ask(accelerator)
            due = args.save_steps and progress.step % args.save_steps == 0
            if progress.epoch_steps < num_steps and (due or asked):
                progress.epoch_nats, progress.epoch_tokens = accelerator.reduce(nats).item(), tokens.item()
                progress.train_seconds += time.perf_counter() - started
                save_checkpoint(accelerator, model, scheduler, progress, args)
                started = time.perf_counter()
                if asked:
                    stopping.leave(accelerator, progress.step)
    loss = (accelerator.reduce(nats) / tokens).item()
    check_finite(loss, model, progress.step, args.learning_rate, args.output_dir)
    progress.epoch += 1
    progress.epoch_steps, progress.epoch_nats, progress.epoch_tokens = 0, 0.0, 0.0
    progress.train_seconds += time.perf_counter() - started
    return {"epoch": progress.epoch, "step": progress.step, "train_loss": loss}


def train_step(accelerator, model, batches: list[dict], optimizer, max_grad_norm: float) -> tuple:
    """One step on all `batches` of all processes. Returns the sum of this process's losses, in nats, and all tokens."""
    # The sum of all tokens' losses over all processes and batches, divided once: as one big batch would.
    num_tokens = accelerator.reduce(sum((batch["labels"] != -100).sum() for batch in batches))
    nats = 0.0
    for position, batch in enumerate(batches, start=1):
        batch.pop("index")
        with nullcontext() if position == len(batches) else accelerator.no_sync(model):
            # Several processes average their gradients, where the sum is wanted.
            loss = model(**batch, num_items_in_batch=num_tokens).loss * accelerator.num_processes
            accelerator.backward(loss)
        nats = nats + loss.detach() * num_tokens / accelerator.num_processes
    if max_grad_norm:
        accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return nats, num_tokens


def accumulation_windows(accelerator, loader, num_batches: int, progress: Progress):
    """The batches of an epoch in lists of `num_batches`, the last list shorter where they do not divide.

    What `progress` has of the epoch is left out.
    """
    if progress.epoch_steps:
        loader = accelerator.skip_first_batches(loader, progress.epoch_steps * num_batches)
    # A loader that starts draws a number; a run resumed inside the epoch would draw it a second time.
    with torch.random.fork_rng(devices=[]):
        batches = iter(loader)
        window = list(islice(batches, num_batches))
    while window:
        yield window
        window = list(islice(batches, num_batches))


@torch.inference_mode()
def validation_loss(accelerator, model, loader) -> float:
    """Mean loss over all tokens of the validation captions, in nats."""
    model.eval()
    totals = torch.zeros(2, device=accelerator.device)
    for batch in loader:
        batch.pop("index")
        num_tokens = (batch["labels"] != -100).sum()
        totals += torch.stack([model(**batch, num_items_in_batch=1).loss, num_tokens])
    nats, tokens = accelerator.reduce(totals)
    return (nats / tokens).item()


def score_captions(accelerator, model, processor, loader, rows, scorer: CaptionScorer) -> dict:
    """Caption the validation pictures and score them, and the captions dealt to other pictures beside."""
    started = time.perf_counter()
    captions = [made["caption"] for made in caption_pictures(model.eval(), processor, loader, accelerator)]
    generated = time.perf_counter()
    return {
        **score_and_show(captions, rows, scorer),
        "generation_seconds": round(generated - started, 2),
        "scoring_seconds": round(time.perf_counter() - generated, 2),
    }


def keep_best(accelerator, model, processor, row: dict, progress: Progress, args: LoopArguments) -> None:
    """Leave the model in output_dir if no evaluation before had a better CIDEr."""
    progress.evaluations_since_best += 1
    if row["cider"] > progress.best_cider:
        progress.best_cider, progress.evaluations_since_best = row["cider"], 0
        progress.best_epoch, progress.best_step = progress.epoch, progress.step
        if args.load_best_model_at_end and accelerator.is_main_process:
            save_captioner(model, processor, args.output_dir)
    accelerator.wait_for_everyone()


def training_cost(progress: Progress, num_captions: int) -> dict:
    """What results.json tells of the training; evaluation and the encoding of pictures are not counted in."""
    return {
        "epochs": progress.epoch,
        "seconds": round(progress.train_seconds, 1),
        "images_per_second": round(progress.epoch * num_captions / progress.train_seconds, 1),
    }


def stops_early(progress: Progress, args: LoopArguments) -> bool:
    """Whether there were too many evaluations without a better one; true of a run that is resumed after that, too."""
    return bool(args.early_stopping_patience) and progress.evaluations_since_best >= args.early_stopping_patience


def start_trackers(accelerator, options: dict, progress: Progress) -> None:
    """Start the trackers; those of a resumed run begin with all it knows of the epochs before.

    What the killed run told them may reach further than its checkpoint, or, held back in a buffer, not so far: TensorBoard
    forgets what else is in the folder.
    """
    known = {name: value for name, value in options.items() if value is not None}
    accelerator.init_trackers("logs", known, init_kwargs={"tensorboard": {"purge_step": 0}})
    for row in progress.history:
        track(accelerator, row)


def track(accelerator, row: dict) -> None:
    scalars = {name: value for name, value in row.items() if name not in ("epoch", "step")}
    accelerator.log(scalars, step=row["step"])


def record(accelerator, row: dict, progress: Progress, args: LoopArguments) -> None:
    """Tell what an epoch gave: in the log, in history.json, in the curves and to the trackers."""
    progress.history.append(row)
    track(accelerator, row)
    tell_losses(row)
    if accelerator.is_main_process:
        write_history(args.output_dir, progress.history)
        draw_curves(args.output_dir, progress.history)


def save_checkpoint(accelerator, model, scheduler, progress: Progress, args: LoopArguments) -> None:
    """Write `checkpoint-STEP`, whole or not at all, and drop old ones beyond save_total_limit."""
    loss = progress.epoch_nats / max(progress.epoch_tokens, 1)
    check_finite(loss, model, progress.step, args.learning_rate, args.output_dir)
    with new_checkpoint(args.output_dir, progress.step) as folder:
        accelerator.save_state(str(folder))
        if accelerator.is_main_process:
            # As JSON: what Accelerate saves of a registered scheduler, it unpickles.
            (folder / "scheduler.json").write_text(json.dumps(scheduler.state_dict()))
            (folder / "progress.json").write_text(json.dumps(dataclasses.asdict(progress)))
    if accelerator.is_main_process:
        drop_old(args.output_dir, args.save_total_limit, keep_steps={progress.best_step})
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator, scheduler, folder: Path, step_size: int) -> Progress:
    """Put model, optimiser, schedule and random states back as they were, and say where the run stood.

    Raises:
        ValueError: The checkpoint is another model's, or its steps have other sizes.
    """
    progress = Progress(**json.loads((folder / "progress.json").read_text()))
    check_sharding(folder, accelerator.is_fsdp2)
    check_step_size(folder, progress.step_size, step_size)
    try:
        accelerator.load_state(str(folder))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{folder} is of another model ({str(error).splitlines()[-1].strip()})") from error
    scheduler.load_state_dict(json.loads((folder / "scheduler.json").read_text()))
    return progress


if __name__ == "__main__":
    main()
