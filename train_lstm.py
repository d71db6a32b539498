"""The LSTM captioner: train Inception-ResNet-v2 + LSTM to caption images, in an Accelerate loop.

    accelerate launch train_lstm.py recipes/lstm_reference.yaml --dataset_name data/paragraphs --output_dir outputs/lstm

A recipe sets the options, the command line overrides it, `--help` lists them.
"""

import logging
import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from data_scripts import load_for_training
from data_scripts.train_tokenizer import check_special_tokens, train_tokenizer
from metrics import CaptionScorer
from modeling import InceptionLSTMConfig, InceptionLSTMForConditionalGeneration
from modeling.captioner import caption_images, load_captioner, save_captioner, set_decoding
from modeling.modeling_inception_lstm import timm_source
from modeling.processing import build_processor, timm_image_processor
from reporting.live import EpochProgressBar
from reporting.page import NUM_IMAGES
from reporting.push import CheckpointPush, download_checkpoint
from reporting.training_report import report_training
from system.errors import UserError, one_line_errors
from training import arguments
from training.arguments import DataArguments, parse_recipe
from training.averaging import WeightAverage, check_average
from training.batches import CaptionCollator, CaptionPairs, CaptionSampler, ImageDataset, subsample_evenly
from training.checkpoints import (
    check_finite,
    check_not_overwriting_start,
    checkpoint_to_resume,
    copy_best_model,
    lock_output_dir,
)
from training.evaluation import score_captions
from training.features import encode_splits
from training.loop import (
    Progress,
    accumulation_windows,
    build_scheduler,
    is_due,
    keep_best,
    load_checkpoint,
    record,
    save_checkpoint,
    start_accelerator,
    start_trackers,
    stops_early,
)
from training.sharding import FullModel, gather_head
from training.stopping import StopSignal
from training.unfreezing import checkpoint_blocks, unfreeze_last_blocks

logger = logging.getLogger(__name__)


@dataclass
class LSTMArguments:
    """The model; the defaults are the report's."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Captioner of this system to go on from, a folder or a Hub id. Its encoder, sizes and tokenizer stay; of the "
            "options here freeze_encoder, num_trainable_encoder_blocks, dropout and attention_dropout count."
        },
    )
    encoder: str = field(
        default="inception_resnet_v2.tf_in1k", metadata={"help": "timm name, Hub id or local folder of the encoder."}
    )
    pretrained_encoder: bool = field(default=True, metadata={"help": "Load the encoder's trained weights."})
    freeze_encoder: bool = field(default=True, metadata={"help": "Train nothing below the projection of its output."})
    num_trainable_encoder_blocks: int = field(
        default=0,
        metadata={"help": "Last blocks of a frozen encoder that learn all the same, see encoder_learning_rate."},
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images given to the encoder, in pixels; its own if not given."}
    )
    center_crop: bool = field(
        default=True,
        metadata={"help": "Show the encoder an image's middle, as in its training; else all of it, squeezed."},
    )
    image_embed_dim: int = field(
        default=1024, metadata={"help": "Length of the image's and of each token's embedding."}
    )
    hidden_size: int = field(default=1024, metadata={"help": "Width of each LSTM layer."})
    num_hidden_layers: int = field(default=3, metadata={"help": "LSTM layers."})
    dropout: float = field(default=0.0, metadata={"help": "Share of the LSTM's inputs and outputs zeroed in training."})
    attention: bool = field(
        default=False,
        metadata={"help": "Look at the places of the encoder's grid at each word, not at its summary alone."},
    )
    num_attention_heads: int = field(default=1, metadata={"help": "Ways in which it looks at them at once."})
    attention_dropout: float = field(
        default=0.0, metadata={"help": "Share of what it can see at the places zeroed in training."}
    )
    vocab_size: int = field(
        default=8000, metadata={"help": "Tokens of the tokenizer that is trained if none is given."}
    )


@dataclass
class LoopArguments(arguments.LoopArguments):
    """The training loop."""

    output_dir: str = field(default="outputs/lstm", metadata={"help": "Where model, results and checkpoints go."})
    encoder_learning_rate: float | None = field(
        default=None, metadata={"help": "Of what learns of the encoder; the common one if not given."}
    )
    activation_checkpointing: bool = field(
        default=False,
        metadata={"help": "Compute activations of an encoder that learns again in the backward pass: less memory."},
    )
    label_smoothing_factor: float = field(
        default=0.0, metadata={"help": "Share of each word's weight in the loss that is spread over all words."}
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "What is evaluated and kept is an average of the weights, of which each step leaves so much; 0: none."
        },
    )


def main(argv: list[str] | None = None) -> None:
    # ---- Arguments --------------------------------------------------------------------------------------------------
    data_args, model_args, args = parse_recipe((DataArguments, LSTMArguments, LoopArguments), argv, __doc__)

    # ---- Accelerator and seed ---------------------------------------------------------------------------------------
    with one_line_errors():
        check_average(args.ema_decay, model_args.freeze_encoder)
        if model_args.model_name_or_path:
            check_not_overwriting_start(model_args.model_name_or_path, args.output_dir)
        accelerator = start_accelerator(args)
    with one_line_errors(), lock_output_dir(args.output_dir):
        run(data_args, model_args, args, accelerator)


def run(data_args: DataArguments, model_args: LSTMArguments, args: LoopArguments, accelerator: Accelerator) -> None:
    """What one run does in the output directory that it has for itself."""
    options = {**vars(data_args), **vars(model_args), **vars(args)}

    # ---- Data -------------------------------------------------------------------------------------------------------
    with one_line_errors():
        resume_from = checkpoint_to_resume(
            args.resume_from_checkpoint,
            args.output_dir,
            "progress.json",
            download_checkpoint,
            args.overwrite_output_dir,
        )
        pushing = CheckpointPush(args, active=args.push_to_hub and accelerator.is_main_process)
        dataset, training_captions = load_for_training(data_args.dataset_name, data_args.max_train_samples)

        # ---- Model --------------------------------------------------------------------------------------------------
        if model_args.model_name_or_path:
            model, processor = load_start(model_args, data_args.tokenizer_name)
        else:
            tokenizer = load_tokenizer(data_args.tokenizer_name, training_captions, model_args.vocab_size, accelerator)
            model, processor = build_model(model_args, tokenizer)
        unfreeze_last_blocks(model.encoder, model_args.num_trainable_encoder_blocks)
        if args.activation_checkpointing:
            checkpoint_blocks(model.encoder)
    model.to(accelerator.device)
    num_augmentations = data_args.num_augmentations
    features = encode_splits(dataset, model.encoder, processor.image_processor, data_args, num_augmentations)
    pairs = {
        split: CaptionPairs(dataset[split], processor.tokenizer, data_args.max_caption_length, features[split])
        for split in ("train", "validation")
    }
    longest = args.max_length or math.ceil(np.percentile(pairs["train"].lengths, 99))
    set_decoding(
        model,
        max(longest, args.min_length),
        args.min_length or None,
        num_beams=args.num_beams,
        length_penalty=args.length_penalty,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
    )

    # ---- Optimizer --------------------------------------------------------------------------------------------------
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    step_size = args.per_device_train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    scheduler = build_scheduler(args, optimizer, math.ceil(len(pairs["train"]) / step_size))

    collator = CaptionCollator(processor, share_images="index")
    loading = {"collate_fn": collator, "num_workers": data_args.dataloader_num_workers}
    sampler = CaptionSampler(
        pairs["train"].lengths,
        step_size,
        data_args.train_sampling_strategy == "group_by_length",
        args.seed,
        pairs["train"].row_of_pair,
        data_args.group_by_image,
        num_augmentations,
    )
    train_loader = DataLoader(pairs["train"], args.per_device_train_batch_size, sampler=sampler, **loading)
    full, average = FullModel(accelerator, model), WeightAverage(model, args.ema_decay)
    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)
    gather_head(model)
    average.register(accelerator)

    def eval_loader(items) -> DataLoader:
        loader = DataLoader(items, args.per_device_eval_batch_size, **loading)
        return prepare_data_loader(loader, accelerator.device, put_on_device=True, even_batches=False)

    # ---- Training ---------------------------------------------------------------------------------------------------
    progress = Progress(step_size)
    if resume_from:
        with one_line_errors():
            progress = load_checkpoint(accelerator, scheduler, resume_from, progress)
        copy_best_model(resume_from, args.output_dir)
    start_trackers(accelerator, options, progress)
    val_rows, val_features = subsample_evenly(
        data_args.max_eval_samples, dataset["validation"], *features["validation"]
    )
    scorer = CaptionScorer(val_rows["captions"], training_captions)
    with StopSignal() as stopping:
        while progress.epoch < args.num_train_epochs and not stops_early(progress, args):
            row = train_epoch(
                accelerator, model, train_loader, optimizer, scheduler, average, progress, args, stopping, pushing
            )
            last = progress.epoch == args.num_train_epochs
            if progress.epoch % args.eval_epochs == 0 or last:
                with average.in_place(), full.gathered(model) as captioner:
                    row["eval_loss"] = validation_loss(
                        accelerator, captioner, eval_loader(pairs["validation"].by_length())
                    )
                    images = eval_loader(ImageDataset(val_rows, val_features))
                    row |= score_captions(accelerator, captioner, processor, images, val_rows, scorer)
                    keep_best(accelerator, captioner, processor, row, progress, args)
            record(accelerator, row, progress, args)
            asked = stopping.ask(accelerator)
            due = progress.epoch % args.save_epochs == 0 or is_due(progress, args.save_steps)
            if due or last or asked or stops_early(progress, args):
                save_checkpoint(accelerator, model, scheduler, progress, args, pushing)
            if asked:
                stopping.leave(accelerator, progress.step)
    if stops_early(progress, args):
        logger.info(f"No better validation CIDEr since epoch {progress.best_epoch}: stopped.")

    # ---- Evaluation -------------------------------------------------------------------------------------------------
    split = "test" if "test" in dataset else "validation"
    if not args.load_best_model_at_end:
        with average.in_place(), full.gathered(model) as captioner:
            if accelerator.is_main_process:
                save_captioner(captioner, processor, args.output_dir)
        accelerator.wait_for_everyone()
    captioner = load_captioner(args.output_dir)[0].to(accelerator.device)
    images = eval_loader(ImageDataset(dataset[split], *features[split]))
    captions = caption_images(captioner, processor, images, accelerator, NUM_IMAGES)

    # ---- Saving -----------------------------------------------------------------------------------------------------
    if accelerator.is_main_process:
        report_training(
            args,
            data_args,
            dataset=dataset,
            split=split,
            captions=captions,
            scorer=CaptionScorer(dataset[split]["captions"], training_captions),
            decoding=captioner.generation_config,
            train=training_cost(progress, len(pairs["train"])),
            kind="inception-lstm",
            options=options,
            started_from=start_names(model_args),
            pushing=pushing if args.push_to_hub else None,
        )
    accelerator.end_training()


def load_tokenizer(name: str | None, training_captions: list[str], vocab_size: int, accelerator: Accelerator):
    """The tokenizer that is named, or one trained on the training captions, by one process for all."""
    if name:
        return AutoTokenizer.from_pretrained(name)
    trained = [train_tokenizer(training_captions, vocab_size) if accelerator.is_main_process else None]
    return broadcast_object_list(trained)[0]


def load_start(args: LSTMArguments, tokenizer_name: str | None) -> tuple:
    """Model and processor of a captioner that has learned already, to be trained as the options have it.

    Raises:
        ValueError: It cannot be loaded, is not of this system, or an option does not go with it.
    """
    if tokenizer_name:
        raise UserError(
            f"--tokenizer_name {tokenizer_name} does not go with --model_name_or_path {args.model_name_or_path}, which has its own"
        )
    model, processor = load_captioner(args.model_name_or_path)
    if not isinstance(model, InceptionLSTMForConditionalGeneration):
        raise UserError(
            f"--model_name_or_path {args.model_name_or_path} is a {type(model).__name__}: give a captioner that train_lstm.py has made"
        )
    config = model.config
    if args.attention_dropout and not config.attention:
        raise UserError(
            f"--attention_dropout {args.attention_dropout}: --model_name_or_path {args.model_name_or_path} has no attention"
        )
    config.update({name: getattr(args, name) for name in ("freeze_encoder", "dropout", "attention_dropout")})
    # A new one with its weights: what learns, what drops out and how it writes are this run's to say.
    fresh = InceptionLSTMForConditionalGeneration(config)
    fresh.load_state_dict(model.state_dict())
    return fresh, processor


def build_model(args: LSTMArguments, tokenizer) -> tuple:
    """Model and processor, the encoder's trained weights loaded where they are wanted."""
    check_special_tokens(tokenizer)
    for name, default in (("num_attention_heads", 1), ("attention_dropout", 0)):
        if getattr(args, name) != default and not args.attention:
            raise UserError(f"--{name} {getattr(args, name)} wants --attention true")
    if args.hidden_size % args.num_attention_heads:
        raise UserError(
            f"--num_attention_heads {args.num_attention_heads} does not divide --hidden_size {args.hidden_size}"
        )
    try:
        backbone = timm.create_model(timm_source(args.encoder), pretrained=False, num_classes=0)
    except RuntimeError as error:
        raise UserError(f"--encoder {args.encoder}: {error}; give a timm name, a Hub id or a local folder") from error
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
        attention_dropout=args.attention_dropout,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    try:
        model = InceptionLSTMForConditionalGeneration(config)
    except AssertionError as error:  # timm's, of models that cannot go without their summary
        if not args.attention:
            raise
        raise UserError(f"--attention true: timm's {args.encoder} gives no grid to look at") from error
    if args.pretrained_encoder:
        try:
            model.load_pretrained_encoder(args.encoder)
        except Exception as error:  # timm, the Hub's client and torch each have their own
            raise UserError(
                f"--encoder {args.encoder}: its weights cannot be loaded ({str(error).strip().splitlines()[0]}); give a "
                "folder that holds them, or --pretrained_encoder false"
            ) from error
    image_processor = timm_image_processor(backbone, args.image_size, args.center_crop)
    if args.image_size or args.attention:
        side = image_processor.crop_size["height"]
        try:
            with torch.no_grad():
                states = model.eval().encoder(torch.zeros(1, 3, side, side)).last_hidden_state
        except (AssertionError, RuntimeError) as error:
            raise UserError(f"--image_size {side}: {args.encoder} cannot see it ({error})") from error
        if args.attention and states.shape[1] == 1:
            logger.warning(
                f"--attention true: {args.encoder} gives one place for {side} pixels; there is nothing to choose from."
            )
    return model, build_processor(image_processor, tokenizer)


def start_names(args: LSTMArguments) -> list[str]:
    """Folder or Hub id of the trained weights it starts from, for the card; none for random weights."""
    if args.model_name_or_path:
        return [args.model_name_or_path]
    if not args.pretrained_encoder:
        return []
    return [args.encoder if "/" in args.encoder or os.path.isdir(args.encoder) else f"timm/{args.encoder}"]


def parameter_groups(model, args: LoopArguments) -> list[dict]:
    """What is trained: everything above the encoder, and the encoder at its own learning rate if it is not frozen."""
    encoder = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    others = [parameter for name, parameter in model.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": others}]
    if encoder:
        rate = args.learning_rate if args.encoder_learning_rate is None else args.encoder_learning_rate
        groups.append({"params": encoder, "lr": rate})
    return groups


def train_epoch(
    accelerator,
    model,
    loader,
    optimizer,
    scheduler,
    average: WeightAverage,
    progress: Progress,
    args: LoopArguments,
    stopping: StopSignal,
    pushing: CheckpointPush,
) -> dict:
    """Every caption once, or those of a resumed epoch that are left. Returns the epoch's row of the history."""
    started = time.perf_counter()
    model.train()
    num_steps = math.ceil(len(loader) / args.gradient_accumulation_steps)
    loader.set_epoch(progress.epoch)
    size = args.per_device_train_batch_size * accelerator.num_processes
    nats = torch.tensor(progress.sums.get("nats", 0.0) / accelerator.num_processes, device=accelerator.device)
    tokens = torch.tensor(progress.sums.get("tokens", 0.0), device=accelerator.device)
    seen = progress.epoch_steps * args.gradient_accumulation_steps * size
    silent = not accelerator.is_local_main_process
    with EpochProgressBar(progress.epoch + 1, args.num_train_epochs, len(loader) * size, seen, disable=silent) as bar:
        for batches in accumulation_windows(accelerator, loader, args.gradient_accumulation_steps, progress):
            step_nats, step_tokens = train_step(
                accelerator, model, batches, optimizer, args.max_grad_norm, args.label_smoothing_factor
            )
            scheduler.step()
            nats, tokens = nats + step_nats, tokens + step_tokens
            progress.step += 1
            average.update(progress.step)
            progress.epoch_steps += 1
            bar.update(size * len(batches))
            if progress.step % 10 == 0:
                loss = (accelerator.reduce(nats) / tokens).item()  # so that all processes stop where one has no number
                bar.set_loss(loss)
                if not math.isfinite(loss):
                    break
            # The last step of an epoch is saved, where it is to be, after the epoch's evaluation.
            asked = stopping.ask(accelerator)
            if progress.epoch_steps < num_steps and (is_due(progress, args.save_steps) or asked):
                progress.sums = {"nats": accelerator.reduce(nats).item(), "tokens": tokens.item()}
                progress.train_seconds += time.perf_counter() - started
                save_checkpoint(accelerator, model, scheduler, progress, args, pushing)
                started = time.perf_counter()
                if asked:
                    stopping.leave(accelerator, progress.step)
    loss = (accelerator.reduce(nats) / tokens).item()
    check_finite(loss, model, progress.step, args.learning_rate, args.output_dir)
    progress.epoch += 1
    progress.epoch_steps, progress.sums = 0, {}
    progress.train_seconds += time.perf_counter() - started
    return {"epoch": progress.epoch, "step": progress.step, "train_loss": loss}


def train_step(
    accelerator, model, batches: list[dict], optimizer, max_grad_norm: float, label_smoothing: float = 0.0
) -> tuple:
    """One step on all `batches` of all processes. Returns the sum of this process's losses, in nats, and all tokens."""
    # The sum of all tokens' losses over all processes and batches, divided once: as one big batch would.
    num_tokens = accelerator.reduce(sum((batch["labels"] != -100).sum() for batch in batches))
    nats = 0.0
    for position, batch in enumerate(batches, start=1):
        batch.pop("index")
        with nullcontext() if position == len(batches) else accelerator.no_sync(model):
            # Several processes average their gradients, where the sum is wanted.
            loss = model(**batch, num_items_in_batch=num_tokens, label_smoothing=label_smoothing).loss
            loss = loss * accelerator.num_processes
            accelerator.backward(loss)
        nats = nats + loss.detach() * num_tokens / accelerator.num_processes
    if max_grad_norm:
        accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return nats, num_tokens


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


def training_cost(progress: Progress, num_captions: int) -> dict:
    """What results.json tells of the training; evaluation and the encoding of images are not counted in."""
    return {
        "epochs": progress.epoch,
        "seconds": round(progress.train_seconds, 1),
        "captions_per_second": round(progress.epoch * num_captions / progress.train_seconds, 1),
    }


if __name__ == "__main__":
    main()
