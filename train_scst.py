"""Either system, continued on its own CIDEr-D reward: self-critical sequence training, in an Accelerate loop.

    accelerate launch train_scst.py recipes/scst_flickr8k.yaml --model_name_or_path outputs/lstm_flickr8k --output_dir outputs/scst

A recipe sets the options, the command line overrides it, `--help` lists them.
"""

import copy
import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import parse_flag_from_env
from torch.utils.data import DataLoader

from data_scripts import load_for_training
from metrics import CaptionScorer, CiderD
from modeling.caption_loss import caption_loss
from modeling.captioner import (
    caption_images,
    load_captioner,
    max_caption_tokens,
    save_captioner,
    set_decoding,
    start_token_ids,
)
from reporting.live import EpochProgressBar
from reporting.page import NUM_IMAGES
from reporting.push import CheckpointPush, download_checkpoint
from reporting.training_report import report_training
from system.errors import UserError, one_line_errors
from training import arguments
from training.arguments import ImageArguments, parse_recipe
from training.averaging import mixed_with
from training.batches import (
    AugmentedImages,
    CaptionCollator,
    CaptionPairs,
    CaptionSampler,
    ImageDataset,
    subsample_evenly,
)
from training.checkpoints import (
    check_finite,
    check_not_overwriting_start,
    checkpoint_to_resume,
    copy_best_model,
    lock_output_dir,
)
from training.evaluation import score_captions
from training.features import encode_splits, weights_digest
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
from training.self_critical import METRICS, SelfCritic, last_states, set_sampling_mode, shares_by
from training.stopping import StopSignal

logger = logging.getLogger(__name__)

STATE_FILE = "scst_progress.json"
RARE = 1 / 1000  # share of all tokens below which one is rare


@dataclass
class SCSTArguments:
    """The captioner to go on from, and its reward."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the captioner to continue, of either captioner."}
    )
    num_samples: int = field(default=5, metadata={"help": "Captions sampled of each image at each step."})
    baseline: Literal["leave_one_out", "greedy"] = field(
        default="leave_one_out",
        metadata={"help": "What a sample has to beat: the mean of the image's other samples, or its greedy caption."},
    )
    bleu_weight: float = field(
        default=0.0, metadata={"help": "What a sample's BLEU-4 (0 to 1) counts beside its CIDEr-D (0 to 10)."}
    )
    rouge_weight: float = field(
        default=0.0, metadata={"help": "What a sample's ROUGE-L (0 to 1) counts beside its CIDEr-D (0 to 10)."}
    )
    kl_coef: float = field(
        default=0.0, metadata={"help": "CIDEr-D that a nat of KL divergence from the starting model costs a caption."}
    )
    init_weight_share: float = field(
        default=0.0,
        metadata={"help": "Share of the starting weights in what is evaluated and kept; the rest are those learned."},
    )
    xe_weight: float = field(
        default=0.0, metadata={"help": "Share of the loss that is cross entropy of a training caption."}
    )
    dropout: float = field(
        default=0.0,
        metadata={"help": "Share of the model's values zeroed where it learns from its samples, drawn without."},
    )
    sample_no_repeat_ngram_size: int = field(
        default=0,
        metadata={
            "help": "No run of so many tokens is sampled twice, and the model learns as one that cannot; 0: none."
        },
    )
    sample_min_length: int = field(
        default=0,
        metadata={"help": "No caption of fewer tokens is sampled, and the model learns as one that cannot; 0: none."},
    )


@dataclass
class LoopArguments(arguments.LoopArguments):
    """The training loop."""

    output_dir: str = field(default="outputs/scst", metadata={"help": "Where model, results and checkpoints go."})
    num_train_epochs: int = field(default=5, metadata={"help": "Times each image is seen."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Images a step on each device."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Of AdamW, at its highest."})
    weight_decay: float = field(default=0.0, metadata={"help": "Of AdamW."})
    seed: int = field(default=42, metadata={"help": "Of order and samples."})
    eval_steps: int | None = field(
        default=None, metadata={"help": "Steps between two evaluations inside an epoch; none there if not given."}
    )
    early_stopping_patience: int | None = field(
        default=2, metadata={"help": "Stop after so many evaluations without a better validation CIDEr."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest caption sampled and generated, in tokens; the model's own if not given."},
    )
    min_length: int | None = field(
        default=None,
        metadata={
            "help": "Shortest caption generated in evaluation, in tokens, see sample_min_length for samples; the model's own if not given."
        },
    )
    num_beams: int | None = field(
        default=None, metadata={"help": "Beams in evaluation; 1 is greedy; the model's own if not given."}
    )
    length_penalty: float | None = field(
        default=None,
        metadata={
            "help": "Of beams in evaluation: the power of its length that a caption's score is divided by; likewise."
        },
    )
    no_repeat_ngram_size: int | None = field(
        default=None,
        metadata={"help": "In evaluation no run of so many tokens is generated twice; the model's own if not given."},
    )
    logit_adjustment_tau: float | None = field(
        default=None,
        metadata={
            "help": "In evaluation a token gains so many nats for each factor of e by which it is rarer in the training captions "
            "than one in 1,000; 0: none; the model's own if not given."
        },
    )


def main(argv: list[str] | None = None) -> None:
    # ---- Arguments --------------------------------------------------------------------------------------------------
    data_args, scst_args, args = parse_recipe((ImageArguments, SCSTArguments, LoopArguments), argv, __doc__)

    # ---- Accelerator and seed ---------------------------------------------------------------------------------------
    with one_line_errors():
        check_options(scst_args, args.output_dir)
        accelerator = start_accelerator(args)
    with one_line_errors(), lock_output_dir(args.output_dir):
        run(data_args, scst_args, args, accelerator)


def run(data_args: ImageArguments, scst_args: SCSTArguments, args: LoopArguments, accelerator: Accelerator) -> None:
    """What one run does in the output directory that it has for itself."""
    options = {**vars(data_args), **vars(scst_args), **vars(args)}

    # ---- Data -------------------------------------------------------------------------------------------------------
    with one_line_errors():
        resume_from = checkpoint_to_resume(
            args.resume_from_checkpoint, args.output_dir, STATE_FILE, download_checkpoint, args.overwrite_output_dir
        )
        pushing = CheckpointPush(args, active=args.push_to_hub and accelerator.is_main_process)
        dataset, training_captions = load_for_training(data_args.dataset_name, data_args.max_train_samples)

        # ---- Model --------------------------------------------------------------------------------------------------
        model, processor, kind = load_start(scst_args.model_name_or_path)
    start_digest = weights_digest(model)
    model.to(accelerator.device)
    num_augmentations = data_args.num_augmentations
    features = encode_splits(dataset, model.get_encoder(), processor.image_processor, data_args, num_augmentations)
    max_length, start_ids = longest_caption(data_args, model), start_token_ids(model)
    pairs = {
        split: CaptionPairs(dataset[split], processor.tokenizer, max_length, features[split], start_ids)
        for split in ("train", "validation")
    }
    with one_line_errors():
        use_decoding(model, processor.tokenizer, args, pairs["train"], scst_args.sample_min_length)
    start = copy.deepcopy(model) if scst_args.kl_coef or scst_args.init_weight_share else None
    critic = SelfCritic(
        model,
        processor,
        CiderD(dataset["train"]["captions"], count_end=True),
        scst_args,
        args.seed,
        start=start if scst_args.kl_coef else None,
        token_ids=captions_of_images(pairs["train"]),
        num_augmentations=num_augmentations,
    )

    # ---- Optimizer --------------------------------------------------------------------------------------------------
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    step_size = args.per_device_train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    scheduler = build_scheduler(args, optimizer, math.ceil(len(dataset["train"]) / step_size))

    def loader_of(items, batch_size: int, share: str | None = None, sampler=None) -> DataLoader:
        collator, workers = CaptionCollator(processor, share), data_args.dataloader_num_workers
        return DataLoader(items, batch_size, sampler=sampler, collate_fn=collator, num_workers=workers)

    def eval_loader(items, share: str | None = None) -> DataLoader:
        loader = loader_of(items, args.per_device_eval_batch_size, share)
        return prepare_data_loader(loader, accelerator.device, put_on_device=True, even_batches=False)

    train_images = AugmentedImages(dataset["train"], features["train"])
    sampler = CaptionSampler(
        np.ones(len(train_images)),
        step_size,
        group_by_length=False,
        seed=args.seed,
        images=np.arange(len(train_images)),
        num_augmentations=num_augmentations,
    )
    train_loader = loader_of(train_images, args.per_device_train_batch_size, sampler=sampler)
    model, optimizer, train_loader = accelerator.prepare(model, optimizer, train_loader)

    # ---- Training ---------------------------------------------------------------------------------------------------
    progress = Progress(step_size, start_digest)
    if resume_from:
        with one_line_errors():
            progress = load_checkpoint(accelerator, scheduler, resume_from, progress, STATE_FILE, unit="images")
        copy_best_model(resume_from, args.output_dir)
    start_trackers(accelerator, options, progress)
    val_rows, val_features = subsample_evenly(
        data_args.max_eval_samples, dataset["validation"], *features["validation"]
    )
    scorer = CaptionScorer(val_rows["captions"], training_captions)

    def evaluate(row: dict) -> None:
        captioner = accelerator.unwrap_model(model)
        share = shares_by(captioner)
        with mixed_with(captioner, start, scst_args.init_weight_share):
            captions = eval_loader(pairs["validation"].by_length(), share)
            row["eval_loss"] = validation_loss(accelerator, captioner, captions)
            images = eval_loader(ImageDataset(val_rows, val_features))
            row |= score_captions(accelerator, captioner, processor, images, val_rows, scorer)
            keep_best(accelerator, captioner, processor, row, progress, args)

    with StopSignal() as stopping:
        if not progress.history:  # what is to be beaten
            row = {"epoch": 0, "step": 0}
            evaluate(row)
            record(accelerator, row, progress, args)
        while progress.epoch < args.num_train_epochs and not stops_early(progress, args):
            row = train_until_due(
                accelerator, model, critic, train_loader, optimizer, scheduler, progress, args, stopping, pushing
            )
            epoch_ends, last = progress.epoch_steps == 0, progress.epoch == args.num_train_epochs
            if (epoch_ends and progress.epoch % args.eval_epochs == 0) or last or is_due(progress, args.eval_steps):
                evaluate(row)
            record(accelerator, row, progress, args)
            asked = stopping.ask(accelerator)
            due = (epoch_ends and progress.epoch % args.save_epochs == 0) or is_due(progress, args.save_steps)
            if due or last or asked or stops_early(progress, args):
                save_checkpoint(accelerator, model, scheduler, progress, args, pushing, STATE_FILE)
            if asked:
                stopping.leave(accelerator, progress.step)
    if stops_early(progress, args):
        logger.info(f"No better validation CIDEr since step {progress.best_step}: stopped.")

    # ---- Evaluation -------------------------------------------------------------------------------------------------
    split = "test" if "test" in dataset else "validation"
    if not args.load_best_model_at_end:
        if accelerator.is_main_process:
            captioner = accelerator.unwrap_model(model)
            with mixed_with(captioner, start, scst_args.init_weight_share):
                save_captioner(captioner, processor, args.output_dir)
        accelerator.wait_for_everyone()
    captioner = load_captioner(args.output_dir)[0].to(accelerator.device)
    images = eval_loader(ImageDataset(dataset[split], *features[split]))
    captions = caption_images(captioner.eval(), processor, images, accelerator, NUM_IMAGES)

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
            train=training_cost(progress, len(dataset["train"])),
            kind=kind,
            options=options,
            started_from=[scst_args.model_name_or_path],
            pushing=pushing if args.push_to_hub else None,
            self_critical=True,
        )
    accelerator.end_training()


def check_options(args: SCSTArguments, output_dir: str) -> None:
    """Raise ValueError where options do not go together, or not with the launcher's."""
    for name in ("DEEPSPEED", "FSDP"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise UserError(
                f"{name} is not supported by train_scst.py, which samples from the model as it is: run with "
                "recipes/accelerate/several_gpus.yaml, which gives each process a whole one"
            )
    if args.model_name_or_path is None:
        raise UserError("--model_name_or_path is missing: name the folder or the Hub id of the captioner to continue")
    check_not_overwriting_start(args.model_name_or_path, output_dir)
    if args.num_samples == 1 and args.baseline == "leave_one_out":
        raise UserError("--num_samples 1: there is no other sample to beat; give 2 or more, or --baseline greedy")
    if args.dropout and args.kl_coef:
        raise UserError("--dropout and --kl_coef do not go together: what dropout changes would count as divergence")


def load_start(name: str) -> tuple:
    """The captioner to continue, its processor, and which system it is, as the model card has it.

    Its encoder stays as it is.

    Raises:
        ValueError: It cannot be loaded, or is of neither system.
    """
    model, processor = load_captioner(name)
    kinds = {"inception_lstm": "inception-lstm", "vision-encoder-decoder": "vit-gpt2"}
    kind = kinds.get(model.config.model_type)
    if kind is None or (kind == "vit-gpt2" and model.config.decoder.model_type != "gpt2"):
        raise UserError(
            f"--model_name_or_path {name} is a {type(model).__name__} that neither train_lstm.py nor train_vit_gpt2.py makes: give one of theirs"
        )
    model.get_encoder().requires_grad_(False)
    return model, processor, kind


def longest_caption(args: ImageArguments, model) -> int | None:
    """Longest training caption kept, in tokens."""
    lengths = [length for length in (args.max_caption_length, max_caption_tokens(model)) if length is not None]
    return min(lengths, default=None)


def use_decoding(model, tokenizer, args: LoopArguments, captions: CaptionPairs, sample_min_length: int = 0) -> None:
    """Put the options into the generation config, where there are any; else it stays as it was saved.

    Raises:
        ValueError: The shortest caption, or sample, is longer than the longest.
    """
    longest = args.max_length
    if longest is None and model.generation_config.max_length is None:
        longest = math.ceil(np.percentile(captions.lengths, 99))
    if longest is not None:
        longest = min(longest, max_caption_tokens(model) or longest)
    set_decoding(
        model,
        longest,
        args.min_length,
        num_beams=args.num_beams,
        length_penalty=args.length_penalty,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
    )
    if args.logit_adjustment_tau is not None:
        boosts = logit_adjustments(captions.token_ids, args.logit_adjustment_tau, tokenizer.all_special_ids)
        model.generation_config.sequence_bias = boosts or None
    num_start = len(start_token_ids(model))
    longest = model.generation_config.max_length - num_start
    if sample_min_length > longest:
        raise UserError(
            f"the shortest sample is to have {sample_min_length} tokens and the longest {longest}: give a lower "
            "--sample_min_length or a higher --max_length"
        )


def logit_adjustments(captions: list[list[int]], nats: float, special_ids: Sequence[int]) -> list[list]:
    """What rare tokens gain where captions are generated: self-critical training takes from them, since they are seldom sampled
    (Honda et al., 2023, https://arxiv.org/abs/2212.03230).

    A token that is a share p of all gains `nats` times log(RARE / p): the adjustment of logits of Menon et al. (2021,
    https://arxiv.org/abs/2007.07314), for rare tokens alone.

    Args:
        captions: Token ids of the training captions, in which tokens are counted.
        special_ids: Tokens left as they are, the end among them.

    Returns:
        `sequence_bias` of a generation config: [[token], nats] of each that gains something.
    """
    counts = Counter(token for token_ids in captions for token in token_ids)
    rare = RARE * counts.total()
    return [
        [[token], round(nats * math.log(rare / count), 3)]
        for token, count in sorted(counts.items())
        if nats and count < rare and token not in special_ids
    ]


def captions_of_images(pairs: CaptionPairs) -> list[list[list[list[int]]]]:
    """The token ids of each image's captions, as they are and, where there are views, as its mirror image's."""
    ends = np.flatnonzero(np.diff(pairs.row_of_pair, append=-1)) + 1
    return [
        [token_ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        for token_ids in (pairs.token_ids, pairs.mirrored_ids)
        if token_ids
    ]


def train_until_due(
    accelerator,
    model,
    critic: SelfCritic,
    loader,
    optimizer,
    scheduler,
    progress: Progress,
    args: LoopArguments,
    stopping: StopSignal,
    pushing: CheckpointPush,
) -> dict:
    """Every image once, or those of the epoch that are left, but no further than to an evaluation inside it.

    Returns the row of the history that says how the samples did.
    """
    started = time.perf_counter()
    set_sampling_mode(accelerator.unwrap_model(model))
    num_steps = math.ceil(len(loader) / args.gradient_accumulation_steps)
    loader.set_epoch(progress.epoch)
    size = args.per_device_train_batch_size * accelerator.num_processes
    sums = torch.tensor([progress.sums.get(name, 0.0) for name in METRICS], dtype=torch.float64)
    sums = sums / accelerator.num_processes
    seen = progress.epoch_steps * args.gradient_accumulation_steps * size
    silent = not accelerator.is_local_main_process
    with EpochProgressBar(progress.epoch + 1, args.num_train_epochs, len(loader) * size, seen, "images", silent) as bar:
        for batches in accumulation_windows(accelerator, loader, args.gradient_accumulation_steps, progress):
            sums += train_step(accelerator, model, critic, batches, optimizer, progress.epoch, args.max_grad_norm)
            scheduler.step()
            progress.step += 1
            progress.epoch_steps += 1
            bar.update(size * len(batches))
            if progress.step % 10 == 0:
                figures = all_sums(accelerator, sums)  # so that all processes stop where one has no number
                bar.set_loss(figures["reward"] / figures["samples"], "reward")
                if not math.isfinite(figures["loss"]):
                    break
            # The last step before an evaluation is saved, where it is to be, after it.
            if progress.epoch_steps == num_steps or is_due(progress, args.eval_steps):
                break
            asked = stopping.ask(accelerator)
            if is_due(progress, args.save_steps) or asked:
                progress.sums = all_sums(accelerator, sums)
                progress.train_seconds += time.perf_counter() - started
                save_checkpoint(accelerator, model, scheduler, progress, args, pushing, STATE_FILE)
                started = time.perf_counter()
                if asked:
                    stopping.leave(accelerator, progress.step)
    told = all_sums(accelerator, sums)
    check_finite(told["loss"], model, progress.step, args.learning_rate, args.output_dir)
    row = {"epoch": round(progress.epoch + progress.epoch_steps / num_steps, 4), "step": progress.step}
    row |= {"reward": told["reward"] / told["samples"], "sample_length": told["tokens"] / told["samples"]}
    row["sample_ended"] = told["ended"] / told["samples"]
    if critic.start is not None:
        row["kl"] = told["kl"] / told["samples"]
    progress.sums = {}
    if progress.epoch_steps == num_steps:
        progress.epoch, progress.epoch_steps = progress.epoch + 1, 0
    progress.train_seconds += time.perf_counter() - started
    return row


def all_sums(accelerator, sums: torch.Tensor) -> dict[str, float]:
    """The sums of all processes, by name."""
    total = accelerator.reduce(sums.to(accelerator.device)) if accelerator.num_processes > 1 else sums
    return dict(zip(METRICS, total.tolist(), strict=True))


def train_step(
    accelerator, model, critic: SelfCritic, batches: list[dict], optimizer, epoch: int, max_grad_norm: float
) -> torch.Tensor:
    """One step on all `batches` of all processes. Returns the sums of this process's samples."""
    own = torch.tensor(sum(len(batch["index"]) for batch in batches), device=accelerator.device)
    num_images = accelerator.reduce(own).item()
    sums = 0.0
    for position, batch in enumerate(batches, start=1):
        with nullcontext() if position == len(batches) else accelerator.no_sync(model):
            with accelerator.autocast():
                # Several processes average their gradients, where the sum is wanted.
                loss, figures = critic.loss(model, batch, epoch, num_images / accelerator.num_processes)
            accelerator.backward(loss)
        sums = sums + figures
    if max_grad_norm:
        accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return sums


@torch.inference_mode()
def validation_loss(accelerator, model, loader) -> float:
    """Mean cross entropy over all tokens of the validation captions, in nats: how far the model has left their words."""
    model.eval()
    totals = torch.zeros(2, device=accelerator.device)
    for batch in loader:
        batch.pop("index")
        labels = batch.pop("labels")
        with accelerator.autocast():
            hidden, head = last_states(model, model, **batch)
            nats = caption_loss(hidden, labels, head.weight, head.bias, num_items_in_batch=1)
        totals += torch.stack([nats, (labels != -100).sum()])
    nats, tokens = accelerator.reduce(totals)
    return (nats / tokens).item()


def training_cost(progress: Progress, num_images: int) -> dict:
    """What results.json tells of the training; evaluation and the encoding of images are not counted in."""
    epochs = progress.history[-1]["epoch"]
    return {
        "epochs": epochs,
        "seconds": round(progress.train_seconds, 1),
        "images_per_second": round(epochs * num_images / progress.train_seconds, 1),
    }


if __name__ == "__main__":
    main()
