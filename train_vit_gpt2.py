"""ViT-GPT2: train ViT + GPT-2 to caption images, under Seq2SeqTrainer.

    accelerate launch train_vit_gpt2.py recipes/vit_gpt2_reference.yaml --dataset_name data/paragraphs --output_dir outputs/vit_gpt2

A recipe sets the options, the command line overrides it, `--help` lists them.
"""

import json
import logging
import math
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerState,
    VisionEncoderDecoderModel,
    set_seed,
)
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from data_scripts import load_for_training
from data_scripts.augmentations import augment_caption
from data_scripts.train_tokenizer import check_special_tokens, train_tokenizer
from data_scripts.trim_vocabulary import trim_tokenizer
from metrics import CaptionScorer
from modeling.caption_loss import caption_loss
from modeling.captioner import caption_images, max_caption_tokens, save_captioner, set_decoding, start_token_ids
from modeling.processing import build_processor
from modeling.vit_gpt2 import (
    brings_cross_attention,
    build_vit_gpt2,
    decoder_config,
    encoder_config,
    hidden_states_as_logits,
    vit_image_processor,
)
from reporting.curves import draw_curves
from reporting.live import EpochProgressBar, log_losses
from reporting.page import NUM_IMAGES
from reporting.push import CheckpointPush, download_checkpoint
from reporting.results import write_history
from reporting.training_report import report_training
from system.errors import UserError, one_line_errors
from training.arguments import DataArguments, check_lengths, parse_recipe
from training.batches import CaptionCollator, CaptionPairs, CaptionSampler, ImageDataset, subsample_evenly
from training.checkpoints import (
    IN_FLOAT32,
    check_finite,
    check_launch,
    check_sharding,
    check_step_size,
    checkpoint_to_resume,
    copy_best_model,
    drop_old,
    has_bfloat16,
    lock_output_dir,
    new_checkpoint,
    refuse_deepspeed,
)
from training.evaluation import score_captions
from training.features import encode_splits
from training.launch import check_trackers
from training.lora import TRAINED, add_lora, check_lora, load_trained, merged, save_trained
from training.sharding import FullModel
from training.stopping import StopSignal, follow_launcher
from training.unfreezing import unfreeze_last_blocks

logger = logging.getLogger(__name__)

HISTORY_NAMES = {"loss": "train_loss", "eval_loss": "eval_loss"}  # of the losses that the Trainer logs


@dataclass
class ViTGPT2Arguments:
    """The model; the defaults are the report's."""

    encoder: str = field(
        default="google/vit-base-patch16-224-in21k", metadata={"help": "Hub id or local folder of the encoder."}
    )
    decoder: str = field(
        default="gpt2",
        metadata={
            "help": "Hub id or local folder of the decoder, or of a captioner of this system, whose decoder is taken."
        },
    )
    pretrained_encoder: bool = field(
        default=True, metadata={"help": "Load `encoder`; else a ViT of the sizes below is made, with random weights."}
    )
    pretrained_decoder: bool = field(
        default=True, metadata={"help": "Load `decoder`; else a GPT-2 of the sizes below is made, with random weights."}
    )
    freeze_encoder: bool = field(default=True, metadata={"help": "Train nothing of the encoder."})
    num_trainable_encoder_blocks: int = field(
        default=0,
        metadata={"help": "Last blocks of a frozen encoder that learn all the same, see encoder_learning_rate."},
    )
    prompt: str = field(default="Image Caption:", metadata={"help": "Text every caption starts with; '' for none."})
    loss_on_prompt: bool = field(default=False, metadata={"help": "Learn the prompt as well."})
    dropout: float | None = field(
        default=None, metadata={"help": "Share of the decoder's values zeroed in training; its own if not given."}
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "Train adapters of this rank (LoRA) in the decoder's place; needs peft."}
    )
    trim_vocabulary: bool = field(
        default=False, metadata={"help": "Keep only the tokens, of tokenizer and decoder, that training captions use."}
    )
    image_size: int = field(default=224, metadata={"help": "Side of the images a made ViT sees, in pixels."})
    patch_size: int = field(default=16, metadata={"help": "Side of the patches it cuts them into, in pixels."})
    hidden_size: int = field(default=768, metadata={"help": "Width of a made ViT and of a made GPT-2."})
    num_hidden_layers: int = field(default=12, metadata={"help": "Layers of either."})
    num_attention_heads: int = field(default=12, metadata={"help": "Attention heads in a layer of either."})
    vocab_size: int = field(
        default=8000, metadata={"help": "Tokens of the tokenizer that is trained for a made GPT-2 if none is given."}
    )


@dataclass
class LoopArguments(Seq2SeqTrainingArguments):
    """The training loop: transformers' own options, with the LSTM captioner's where it has more."""

    output_dir: str = field(default="outputs/vit_gpt2", metadata={"help": "Where model, results and checkpoints go."})
    num_train_epochs: float = field(default=30, metadata={"help": "Times each caption is seen."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Captions a step on each device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Captions or images at once in evaluation."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Of AdamW, at its highest."})
    encoder_learning_rate: float | None = field(
        default=None, metadata={"help": "Of what learns of the encoder; the common one if not given."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Of AdamW."})
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "constant, constant_with_warmup, cosine, linear."}
    )
    eval_epochs: int = field(default=1, metadata={"help": "Epochs between two evaluations."})
    save_epochs: int = field(default=1, metadata={"help": "Epochs between two checkpoints."})
    save_steps: int | None = field(
        default=None, metadata={"help": "Steps between two checkpoints inside an epoch; none there if not given."}
    )
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "Leave the model of the best validation CIDEr in output_dir, else the last."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better validation CIDEr."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Max length of a generated caption, in tokens."})
    num_beams: int = field(default=1, metadata={"help": "Number of beams; 1 is greedy."})
    min_length: int = field(
        default=0, metadata={"help": "Shortest caption generated, in tokens; the end of one comes no earlier."}
    )
    length_penalty: float = field(
        default=1.0, metadata={"help": "Of beams: the power of its length that a caption's score is divided by."}
    )
    no_repeat_ngram_size: int = field(
        default=0, metadata={"help": "No run of so many tokens is generated twice; 0 allows all."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Remove the checkpoints that another run has left in output_dir."}
    )
    report_to: str = field(default="tensorboard", metadata={"help": "Trackers, with commas between; or none."})
    project: str = field(default="showtell", metadata={"help": "Project of the run, in trackers that have projects."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When the training loss is logged."})
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = field(
        default="end",
        metadata={
            "help": "When to push: at the end only, or the model, the last or all checkpoints when one is saved."
        },
    )

    # What the loop below relies on is no option: images are no argument of `forward`, epochs decide on evaluation and
    # checkpoints, a loss that is not a number must be seen, and it is the launcher that shares a model out.
    remove_unused_columns: bool = field(default=False, init=False)
    eval_strategy: str = field(default="no", init=False)
    save_strategy: str = field(default="no", init=False)
    metric_for_best_model: str = field(default="cider", init=False)
    greater_is_better: bool = field(default=True, init=False)
    logging_nan_inf_filter: bool = field(default=False, init=False)
    fsdp: str | None = field(default=None, init=False)
    deepspeed: str | None = field(default=None, init=False)
    # Stand among the data's options.
    dataloader_num_workers: int = field(default=0, init=False)
    train_sampling_strategy: str = field(default="random", init=False)

    def __post_init__(self):
        refuse_deepspeed()
        check_lengths(self)
        by_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16" and not self.fp16
        self.in_float32 = (self.bf16 or by_launcher) and not has_bfloat16(self.use_cpu)
        if self.in_float32:
            self.bf16, os.environ["ACCELERATE_MIXED_PRECISION"] = False, "no"
        # The Trainer wants to be told of a processor that computes in bfloat16.
        self.use_cpu |= self.bf16 and not torch.accelerator.is_available()
        self.report_to = [name for name in self.report_to.split(",") if name != "none"]
        self.run_name = self.run_name or self.output_dir
        super().__post_init__()
        check_trackers(self.report_to)
        get_reporting_integration_callbacks(self.report_to)  # raises ValueError where it knows none of that name
        self.dataloader_pin_memory &= torch.cuda.is_available()


def main(argv: list[str] | None = None) -> None:
    # ---- Arguments --------------------------------------------------------------------------------------------------
    data_args, model_args, args = parse_recipe((DataArguments, ViTGPT2Arguments, LoopArguments), argv, __doc__)
    args.dataloader_num_workers = data_args.dataloader_num_workers

    # ---- Accelerator and seed ---------------------------------------------------------------------------------------
    follow_launcher()
    logging.basicConfig(level=logging.INFO if args.local_process_index == 0 else logging.WARNING, format="%(message)s")
    if args.in_float32:
        logger.info(IN_FLOAT32)
    logging.getLogger("accelerate").setLevel(logging.WARNING)
    transformers.logging.disable_progress_bar()  # loading and saving take a second
    set_seed(args.seed)
    with one_line_errors():
        check_launch()
    with one_line_errors(), lock_output_dir(args.output_dir):
        run(data_args, model_args, args)


def run(data_args: DataArguments, model_args: ViTGPT2Arguments, args: LoopArguments) -> None:
    """What one run does in the output directory that it has for itself."""
    options = {**vars(data_args), **vars(model_args), **args.to_sanitized_dict()}
    push, args.push_to_hub = args.push_to_hub, False  # the Trainer's own push ends a training that it fails

    # ---- Data -------------------------------------------------------------------------------------------------------
    with one_line_errors():
        check_lora(model_args.lora_rank, model_args.pretrained_decoder)
        resume_from = checkpoint_to_resume(
            args.resume_from_checkpoint,
            args.output_dir,
            "trainer_state.json",
            download_checkpoint,
            args.overwrite_output_dir,
        )
        if resume_from:
            stay_stopped(args, resume_from)
        pushing = CheckpointPush(args, active=push and args.process_index == 0, token=args.hub_token)
        dataset, training_captions = load_for_training(data_args.dataset_name, data_args.max_train_samples)
        tokenizer_name = data_args.tokenizer_name or (model_args.decoder if model_args.pretrained_decoder else None)
        tokenizer, token_ids = load_tokenizer(tokenizer_name, training_captions, model_args.vocab_size), None
        if model_args.trim_vocabulary:
            num_tokens = len(tokenizer)
            views = range(min(data_args.num_augmentations, 2))
            blank = " " if model_args.prompt else ""  # as `CaptionPairs` puts it
            texts = [blank + augment_caption(caption, view) for view in views for caption in training_captions]
            texts.append(model_args.prompt)
            tokenizer, token_ids = trim_tokenizer(tokenizer, texts)
            logger.info(f"{len(tokenizer):,} of the vocabulary's {num_tokens:,} tokens are kept.")

        # ---- Model --------------------------------------------------------------------------------------------------
        model, processor = build_model(model_args, tokenizer, token_ids)
    model.to(args.device)
    num_augmentations = data_args.num_augmentations
    features = encode_splits(dataset, model.encoder, processor.image_processor, data_args, num_augmentations)
    start_ids = start_token_ids(model)
    room = max_caption_tokens(model)
    max_length = min(data_args.max_caption_length or room, room)
    pairs = {
        split: CaptionPairs(
            dataset[split], tokenizer, max_length, features[split], start_ids, model_args.loss_on_prompt
        )
        for split in ("train", "validation")
    }
    longest = args.max_length or math.ceil(np.percentile(pairs["train"].lengths, 99))
    shortest = min(args.min_length, room)
    set_decoding(
        model,
        min(max(longest, shortest), room),
        shortest or None,
        num_beams=args.num_beams or 1,
        length_penalty=args.length_penalty,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
    )

    # ---- Optimizer --------------------------------------------------------------------------------------------------
    step_size = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    val_rows, val_features = subsample_evenly(
        data_args.max_eval_samples, dataset["validation"], *features["validation"]
    )
    trainer = CaptionTrainer(
        model,
        args,
        processor=processor,
        lora=bool(model_args.lora_rank),
        sampler=CaptionSampler(
            pairs["train"].lengths,
            step_size,
            data_args.train_sampling_strategy == "group_by_length",
            args.seed,
            pairs["train"].row_of_pair,
            data_args.group_by_image,
            num_augmentations,
        ),
        train_dataset=pairs["train"],
        eval_dataset=pairs["validation"].by_length(),
        eval_images=ImageDataset(val_rows, val_features),
        eval_rows=val_rows,
        scorer=CaptionScorer(val_rows["captions"], training_captions),
        pushing=pushing,
    )

    # ---- Training ---------------------------------------------------------------------------------------------------
    with trainer.stopping:
        trainer.train(resume_from_checkpoint=resume_from and str(resume_from))

    # ---- Evaluation -------------------------------------------------------------------------------------------------
    split = "test" if "test" in dataset else "validation"
    if not args.load_best_model_at_end:
        with trainer.full.gathered(trainer.model) as captioner:
            if trainer.is_world_process_zero():
                captioner = merged(captioner) if trainer.lora else captioner
                save_captioner(captioner, processor, args.output_dir)
        trainer.accelerator.wait_for_everyone()
    captioner = VisionEncoderDecoderModel.from_pretrained(args.output_dir).to(args.device)
    images = trainer.eval_loader(ImageDataset(dataset[split], *features[split]))
    captions = caption_images(captioner.eval(), processor, images, trainer.accelerator, NUM_IMAGES)

    # ---- Saving -----------------------------------------------------------------------------------------------------
    if trainer.is_world_process_zero():
        report_training(
            args,
            data_args,
            dataset=dataset,
            split=split,
            captions=captions,
            scorer=CaptionScorer(dataset[split]["captions"], training_captions),
            decoding=captioner.generation_config,
            train=training_cost(history_rows(trainer.state.log_history), len(pairs["train"])),
            kind="vit-gpt2",
            options=options,
            started_from=start_names(model_args),
            pushing=pushing if push else None,
            token=args.hub_token,
        )


def load_tokenizer(name: str | None, training_captions: list[str], vocab_size: int):
    """The tokenizer that is named, or one trained on the training captions, by one process for all."""
    if name:
        tokenizer = AutoTokenizer.from_pretrained(name)
    else:
        trained = [train_tokenizer(training_captions, vocab_size) if PartialState().is_main_process else None]
        tokenizer = broadcast_object_list(trained)[0]
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as with GPT-2; labels are masked by position, so EOS stays a target
    return tokenizer


def build_model(args: ViTGPT2Arguments, tokenizer, token_ids: list[int] | None = None) -> tuple:
    """Model and processor: the trained parts named, `token_ids` of a decoder's tokens kept; or parts made of the sizes given."""
    sizes = {
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_hidden_layers,
        "num_attention_heads": args.num_attention_heads,
    }
    check_special_tokens(tokenizer)
    encoder = args.encoder
    if not args.pretrained_encoder:
        if args.patch_size > args.image_size:
            raise UserError(f"--patch_size {args.patch_size} is more than --image_size {args.image_size}")
        encoder = encoder_config(args.image_size, args.patch_size, **sizes)
    decoder = args.decoder
    if not args.pretrained_decoder:
        decoder, token_ids = decoder_config(len(tokenizer), **sizes), None
    try:
        model = build_vit_gpt2(encoder, decoder, tokenizer, args.prompt, args.freeze_encoder, args.dropout, token_ids)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--encoder {args.encoder}, --decoder {args.decoder}: {reason}; give Hub ids that can be reached, or folders"
        ) from error
    positions, num_start_ids = model.config.decoder.max_position_embeddings, len(start_token_ids(model))
    if num_start_ids >= positions:
        raise UserError(f"--prompt has {num_start_ids - 1:,} tokens, of which the decoder reads {positions:,} at most")
    if args.lora_rank:
        add_lora(model.decoder, args.lora_rank, fresh_cross_attention=not brings_cross_attention(args.decoder))
    unfreeze_last_blocks(model.encoder, args.num_trainable_encoder_blocks)
    return model, build_processor(vit_image_processor(encoder), tokenizer)


def start_names(args: ViTGPT2Arguments) -> list[str]:
    """Folders or Hub ids of the pretrained parts, for the card; none for random weights."""
    parts = ((args.encoder, args.pretrained_encoder), (args.decoder, args.pretrained_decoder))
    return [name for name, pretrained in parts if pretrained]


class CaptionTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer, with what it gets wrong for captions put right.

    Its own evaluation hands the gold captions to `generate()`, drops the prompt, and keeps every logit of the split: `evaluate`
    goes the way of `generate_captions` instead, as the LSTM captioner does. VisionEncoderDecoder's own loss does not divide by the tokens of
    all accumulated batches, and scores the whole vocabulary at once: `caption_loss` does neither.
    """

    def __init__(
        self,
        model,
        args: LoopArguments,
        *,
        processor,
        lora,
        sampler,
        eval_images,
        eval_rows,
        scorer,
        pushing: CheckpointPush,
        **kwargs,
    ):
        super().__init__(
            model,
            args,
            processing_class=processor,
            data_collator=CaptionCollator(processor, share_images="pack"),
            **kwargs,
        )
        self.processor = processor
        self.lora = lora
        self.sampler = sampler
        self.eval_images = eval_images
        self.eval_rows = eval_rows
        self.scorer = scorer
        self.stopping = StopSignal()
        self.full = FullModel(self.accelerator, model)
        self.add_callback(PushCheckpoints(pushing))  # before the next, which may leave once a checkpoint is saved
        self.epoch_ends = EpochEnds(self)
        self.add_callback(self.epoch_ends)
        for silent in (ProgressCallback, PrinterCallback):  # EpochEnds tells more, and no line of twenty numbers
            self.remove_callback(silent)
        if "tensorboard" in args.report_to:
            self.remove_callback(TensorBoardCallback)
            self.add_callback(WholeCurve)
        self.checkpoint_parent = args.output_dir

    def _get_train_sampler(self, train_dataset=None) -> CaptionSampler:
        return self.sampler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        with one_line_errors():
            check_sharding(folder, self.accelerator.is_fsdp2)
            check_step_size(folder, self._loop(folder)["step_size"], self.sampler.batch_size)
            if (folder / TRAINED).is_file() != self.lora:
                raise UserError(
                    f"{folder} was made {'without' if self.lora else 'with'} --lora_rank: give the same options"
                )
            try:
                if self.lora:
                    load_trained(self.model, folder)
                    return
                if self.accelerator.is_fsdp2:
                    super()._load_from_checkpoint(resume_from_checkpoint, model)
                    return
                # A ViT's weights are saved under older names than its modules have. `from_pretrained` knows them; the
                # Trainer's own way takes them for missing, and goes on with the encoder it happens to have.
                saved = VisionEncoderDecoderModel.from_pretrained(folder).state_dict()
                self.model.load_state_dict({name: saved[name] for name in self.model.state_dict()})
            except (KeyError, RuntimeError) as error:
                reason = str(error).splitlines()[-1].strip()
                raise UserError(f"{folder} is of another model ({reason})") from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with one_line_errors():
            try:
                super()._load_optimizer_and_scheduler(checkpoint)
            except ValueError as error:  # torch's where other parts of the model learned
                raise UserError(f"{checkpoint} was made with other parts learning: give the same options") from error
        if checkpoint:
            copy_best_model(Path(checkpoint), self.args.output_dir)

    def _load_rng_state(self, checkpoint: str) -> None:
        # The Trainer calls this where a resumed run is about to take its first step. Of an epoch that has begun it has by
        # itself neither the loss nor the time so far.
        super()._load_rng_state(checkpoint)
        loop = self._loop(checkpoint)
        self._tr_loss += loop["loss_since_logged"]
        self._globalstep_last_logged = loop["step_logged"]
        self.epoch_ends.started -= loop["epoch_seconds"]

    def _save(self, output_dir: str, state_dict=None) -> None:
        if not self.lora:
            super()._save(output_dir, state_dict)
            return
        save_captioner(merged(self.model), self.processor, output_dir)
        save_trained(self.model, Path(output_dir))

    def _loop(self, checkpoint: str | Path) -> dict:
        return json.loads((Path(checkpoint) / "loop.json").read_text())

    def _get_output_dir(self, trial) -> str:
        return self.checkpoint_parent

    def _save_checkpoint(self, model, trial) -> None:
        """As always, but whole or not at all, and with what an epoch that has begun has given so far."""
        step, args = self.state.global_step, self.args
        loss = self.accelerator.reduce(self._tr_loss, reduction="mean").item()
        check_finite(loss, self.model, step, args.learning_rate, args.output_dir)
        with new_checkpoint(args.output_dir, step) as folder:
            self.checkpoint_parent = str(folder.parent)
            super()._save_checkpoint(model, trial)
            self.checkpoint_parent = args.output_dir
            if self.is_world_process_zero():
                (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, the Hub token in it; nobody needs it
                loop = {
                    "step_size": self.sampler.batch_size,
                    "loss_since_logged": loss,
                    "step_logged": self._globalstep_last_logged,
                    "epoch_seconds": self.epoch_ends.seconds(),
                }
                (folder / "loop.json").write_text(json.dumps(loop))
        if self.is_world_process_zero():
            scored = [entry for entry in self.state.log_history if "eval_cider" in entry]
            best = max(scored, key=lambda entry: entry["eval_cider"], default={"step": 0})
            drop_old(args.output_dir, args.save_total_limit, step, keep_steps={best["step"]})
        self.accelerator.wait_for_everyone()

    def mean_loss(self) -> float:
        """Of the steps since it was last logged, in nats a token; on this process."""
        return self._tr_loss.item() / (self.state.global_step - self._globalstep_last_logged)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As always, but an encoder that is not frozen may have a learning rate of its own."""
        optimizer = super().create_optimizer(model)
        if self.args.encoder_learning_rate is not None:
            encoder = set(self.model.encoder.parameters())
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if parameter in encoder]
                group["params"] = [parameter for parameter in group["params"] if parameter not in encoder]
                optimizer.add_param_group({**group, "params": own, "lr": self.args.encoder_learning_rate})
        return optimizer

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """Nats a token of the whole step, so that accumulated batches weigh as many tokens as they have."""
        inputs = {name: value for name, value in inputs.items() if name != "index"}  # no argument of the model's
        labels = inputs.pop("labels")
        with hidden_states_as_logits(self.accelerator.unwrap_model(model).decoder) as head:
            outputs = model(**inputs, use_cache=False)  # with a cache transformers lets packed captions see each other
        smoothing = self.args.label_smoothing_factor if model.training else 0.0
        loss = caption_loss(outputs.logits, labels, head.weight, head.bias, num_items_in_batch, smoothing)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # which average their gradients, where the sum is wanted
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Validation loss, scores of generated captions, and what they cost; the model is kept if its CIDEr is the best."""
        with self.full.gathered(self.model) as model:
            model = (merged(model) if self.lora else model).eval()
            metrics = {"loss": self.validation_loss(model)} | self.score_captions(model)
            metrics = {f"eval_{name}": value for name, value in metrics.items()}
            self.log(metrics)
            since_best = evaluations_since_best(self.state.log_history)
            if since_best == 0 and self.args.load_best_model_at_end and self.is_world_process_zero():
                save_captioner(model, self.processor, self.args.output_dir)
        self.accelerator.wait_for_everyone()
        patience = self.args.early_stopping_patience
        if patience and since_best >= patience:
            logger.info(f"No better validation CIDEr for {since_best} evaluations: stopping.")
            self.control.should_training_stop = self.control.should_save = True
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.inference_mode()
    def validation_loss(self, model) -> float:
        """Mean loss over all tokens of the validation captions, in nats."""
        totals = torch.zeros(2, device=self.args.device)
        for batch in self.eval_loader(self.eval_dataset):
            num_tokens = (batch["labels"] != -100).sum()
            with self.compute_loss_context_manager():
                totals += torch.stack([self.compute_loss(model, batch) * num_tokens, num_tokens])
        nats, tokens = self.accelerator.reduce(totals)
        return (nats / tokens).item()

    def score_captions(self, model) -> dict:
        loader = self.eval_loader(self.eval_images)
        return score_captions(self.accelerator, model, self.processor, loader, self.eval_rows, self.scorer)

    def eval_loader(self, items) -> DataLoader:
        loader = DataLoader(
            items,
            self.args.eval_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
        )
        return prepare_data_loader(loader, self.args.device, put_on_device=True, even_batches=False)


class EpochEnds(TrainerCallback):
    """What happens between two epochs, evaluation and checkpoint when they are due, history and curves; and checkpoints within."""

    def __init__(self, trainer: CaptionTrainer):
        self.trainer = trainer

    def seconds(self) -> float:
        """Of the epoch so far; none after its end, when they have been logged."""
        return 0.0 if self.started is None else time.perf_counter() - self.started

    def on_epoch_begin(self, args: LoopArguments, state, control, **kwargs):
        # With several processes Accelerate does not tell the sampler of a resumed epoch which one it is.
        self.trainer.sampler.set_epoch(int(state.epoch))
        write_curves(args, state)
        self.started = time.perf_counter()
        epoch, num_images = int(state.epoch), len(self.trainer.train_dataset)
        seen = round((state.epoch - epoch) * num_images)
        silent = args.disable_tqdm or not state.is_local_process_zero
        self.bar = EpochProgressBar(epoch + 1, math.ceil(args.num_train_epochs), num_images, seen, disable=silent)

    def on_step_end(self, args: LoopArguments, state, control, **kwargs):
        self.bar.update(
            min(self.trainer.sampler.batch_size, self.bar.total - self.bar.n)
        )  # the last batch may be short
        if state.global_step % 10 == 0:
            self.bar.set_loss(self.trainer.mean_loss())
        asked = self.trainer.stopping.ask(self.trainer.accelerator)
        due = args.save_steps and state.global_step % args.save_steps == 0
        # The last step of an epoch is saved, where it is to be, after the epoch's evaluation.
        if not float(state.epoch).is_integer():
            control.should_save |= bool(asked or due)

    def on_epoch_end(self, args: LoopArguments, state, control, **kwargs):
        epoch = round(state.epoch)
        last = state.global_step >= state.max_steps
        due = args.save_steps and state.global_step % args.save_steps == 0
        control.should_evaluate = epoch % args.eval_epochs == 0 or last
        control.should_save = bool(epoch % args.save_epochs == 0 or last or due or self.trainer.stopping.heard)
        # Kept with the logs, a checkpoint remembers it.
        entry = {"epoch": state.epoch, "step": state.global_step, "train_seconds": round(self.seconds(), 2)}
        state.log_history.append(entry)
        self.started = None
        self.bar.close()

    def on_save(self, args: LoopArguments, state, control, **kwargs):
        if self.trainer.stopping.heard:
            self.trainer.stopping.leave(self.trainer.accelerator, state.global_step)

    def on_log(self, args: LoopArguments, state, control, logs=None, **kwargs):
        losses = {name: logs[key] for key, name in HISTORY_NAMES.items() if key in logs}
        if losses:
            log_losses({"epoch": state.epoch, "step": state.global_step, **losses})
        if not math.isfinite(logs.get("loss", 0.0)):
            check_finite(logs["loss"], self.trainer.model, state.global_step, args.learning_rate, args.output_dir)

    def on_train_end(self, args: LoopArguments, state, control, **kwargs):
        write_curves(args, state)


class PushCheckpoints(TrainerCallback):
    """Each checkpoint goes to the Hub when it is written, if it is to go."""

    def __init__(self, pushing: CheckpointPush):
        self.pushing = pushing

    def on_save(self, args: LoopArguments, state, control, **kwargs):
        self.pushing.send(state.global_step)


class WholeCurve(TensorBoardCallback):
    """TensorBoard, in one folder a run; a resumed run writes its curve anew.

    What the killed run told it may reach further than its checkpoint, or, held back in a buffer, not so far: what else is in
    the folder is forgotten.
    """

    def on_train_begin(self, args: LoopArguments, state, control, **kwargs):
        if state.is_world_process_zero:
            self.tb_writer = self._SummaryWriter(os.path.join(args.output_dir, "logs"), purge_step=0)
        super().on_train_begin(args, state, control, **kwargs)
        for entry in state.log_history:
            if "train_seconds" not in entry:  # is told to nobody
                logs = {name: value for name, value in entry.items() if name != "step"}
                self.on_log(args, replace(state, global_step=entry["step"]), control, logs)

    def on_log(self, args: LoopArguments, state, control, logs=None, **kwargs):
        if "train_runtime" not in logs:  # the Trainer's summary, of a resumed run's own steps alone
            super().on_log(args, state, control, logs=logs, **kwargs)


def evaluations_since_best(log_history: list[dict]) -> int:
    """How many evaluations there were after the first of the best."""
    ciders = [entry["eval_cider"] for entry in log_history if "eval_cider" in entry]
    return len(ciders) - 1 - int(np.argmax(ciders)) if ciders else 0


def stay_stopped(args: LoopArguments, checkpoint: Path) -> None:
    """See to it that a run that has stopped early, and is resumed, trains no more."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if args.early_stopping_patience and evaluations_since_best(state.log_history) >= args.early_stopping_patience:
        args.num_train_epochs = state.epoch


def write_curves(args: LoopArguments, state) -> None:
    """history.json and curves.png of what has been logged so far."""
    history = history_rows(state.log_history)
    if history and state.is_world_process_zero:
        write_history(args.output_dir, history)
        draw_curves(args.output_dir, history)


def history_rows(log_history: list[dict]) -> list[dict]:
    """What the Trainer has logged, as the LSTM captioner's history has it: one row for each step at which something was."""
    rows = {}
    for entry in log_history:
        if "train_runtime" in entry:  # the Trainer's summary at the end
            continue
        row = rows.setdefault(entry["step"], {"epoch": round(entry["epoch"], 4), "step": entry["step"]})
        logged = {name: value for name, value in entry.items() if name not in ("epoch", "step")}
        row |= {HISTORY_NAMES.get(name, name.removeprefix("eval_")): value for name, value in logged.items()}
    return list(rows.values())


def training_cost(history: list[dict], num_captions: int) -> dict:
    """What results.json tells of the training; evaluation and the encoding of images are not counted in."""
    epochs, seconds = history[-1]["epoch"], sum(row.get("train_seconds", 0.0) for row in history)
    return {
        "epochs": epochs,
        "seconds": round(seconds, 1),
        "captions_per_second": round(epochs * num_captions / seconds, 1),
    }


if __name__ == "__main__":
    main()
