"""Train ViT-GPT2: a Vision Transformer, frozen, and GPT-2 with cross attention, transformers' own VisionEncoderDecoderModel.

    accelerate launch train_vit_gpt2.py recipes/vit_gpt2_reference.yaml --dataset_name data/mine --output_dir outputs/vit_gpt2

A recipe sets the options, the command line overrides it, `--help` lists them.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from system.errors import UserError, one_line_errors
from training.arguments import (
    CaptionDataArguments,
    CaptionTrainingArguments,
    NewDecodingArguments,
    option,
    parse_recipe,
)

# What takes seconds to import is imported where it is used, so that `--help` and a wrong option answer at once.


@dataclass
class ModelArguments:
    """The model; the defaults are those of the course report that this project reimplements."""

    model_name_or_path: str | None = option(None, "Folder or Hub id of a whole ViT-GPT2 captioner to fine-tune.")
    encoder: str = option(
        "google/vit-base-patch16-224-in21k", "Hub id or local folder of the encoder; also a timm name, ViT or CNN."
    )
    decoder: str = option(
        "gpt2", "Hub id or local folder of the decoder, or of a ViT-GPT2 captioner whose decoder is taken."
    )
    pretrained_encoder: bool = option(
        True, "Load `encoder`; otherwise create a ViT of the sizes below with random weights."
    )
    pretrained_decoder: bool = option(
        True, "Load `decoder`; otherwise create a GPT-2 of the sizes below with random weights."
    )
    freeze_encoder: bool = option(True, "Freeze the encoder.")
    num_trainable_encoder_blocks: int = option(0, "Last N encoder blocks to train although the rest is frozen.", min=0)
    prompt: str = option("Image Caption:", "Text every caption starts with; '' for none.")
    loss_on_prompt: bool = option(False, "Include the prompt's tokens in the loss.")
    dropout: float | None = option(None, "Dropout of the decoder; its own if not given.", min=0, below=1)
    lora_rank: int | None = option(None, "Train LoRA adapters of this rank instead of the decoder; needs peft.", min=1)
    trim_vocabulary: bool = option(
        False, "Trim the vocabulary to the tokens of the training captions and single bytes."
    )
    image_size: int | None = option(
        None, "Side of the encoder's input in pixels; its own, or 224 of a new ViT, if not given.", min=1
    )
    patch_size: int = option(16, "Side of a new ViT's patches in pixels.", min=1, needs={"pretrained_encoder": [False]})
    convolutional_stem: bool = option(
        False,
        "Make a new ViT's patches with a small ResNet instead of one linear layer (hybrid ViT).",
        needs={"pretrained_encoder": [False]},
    )
    hidden_size: int = option(768, "Hidden size of a new ViT and a new GPT-2.", min=1)
    num_hidden_layers: int = option(12, "Number of layers of each new part.", min=1)
    num_encoder_layers: int | None = option(
        None,
        "Number of layers of a new ViT, where it differs from that of a new GPT-2.",
        min=1,
        needs={"pretrained_encoder": [False]},
    )
    num_attention_heads: int = option(12, "Attention heads of each new part.", min=1)
    vocab_size: int = option(
        8000,
        "Vocabulary size of the tokenizer that is trained for a new GPT-2.",
        min=8,  # four special tokens and four others
        needs={"tokenizer_name": [None], "pretrained_decoder": [False]},
    )

    def __post_init__(self):
        if not self.pretrained_encoder:
            self.image_size = self.image_size or 224
        if not self.pretrained_encoder and self.patch_size > self.image_size:
            raise UserError(f"--patch_size {self.patch_size} is more than --image_size {self.image_size}")
        if self.loss_on_prompt and not self.prompt:
            raise UserError("--loss_on_prompt true has no effect without a --prompt")
        new = not (self.pretrained_encoder and self.pretrained_decoder)
        if new and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"--num_attention_heads {self.num_attention_heads} does not divide --hidden_size {self.hidden_size}"
            )
        for name, size in self.sizes.items():
            if not new and size != getattr(ModelArguments, name):
                raise UserError(
                    f"--{name} {size} has no effect without --pretrained_encoder false or --pretrained_decoder false"
                )

    @property
    def sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}

    @property
    def pretrained_parts(self) -> dict[str, str]:
        """Names of the parts that are not new ones."""
        return {part: getattr(self, part) for part in ("encoder", "decoder") if getattr(self, f"pretrained_{part}")}


@dataclass
class TrainingArguments(CaptionTrainingArguments):
    """The training loop."""

    output_dir: str = option("outputs/vit_gpt2", "Folder for model, results and checkpoints.")
    num_train_epochs: int = option(30, "Number of epochs.", min=1)
    per_device_train_batch_size: int = option(8, "Captions per batch and device.", min=1)
    learning_rate: float = option(3e-4, "Peak learning rate of AdamW.", min=0)


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    kinds = (CaptionDataArguments, ModelArguments, NewDecodingArguments, TrainingArguments)
    data_args, model_args, decoding_args, args = parse_recipe(kinds, argv, __doc__)
    options = {**vars(data_args), **vars(model_args), **vars(decoding_args), **vars(args)}

    from data_scripts import load_for_training
    from modeling.caption_loss import teacher_forcing_loss
    from modeling.encoders import hub_name
    from modeling.fingerprint import weights_digest
    from modeling.vit_gpt2 import check_parts
    from training.batches import CaptionCollator
    from training.evaluation import Evaluator, count_labels
    from training.features import encode_splits
    from training.fine_tuning import check_vit_gpt2_start
    from training.lora import check_lora, merged
    from training.optimizer import build_adamw
    from training.pairs import pairs_of_split, sampler_of
    from training.run import TrainingRun

    # ---- Accelerator and seed ---------------------------------------------------------------------------------------
    if model_args.model_name_or_path:
        check_vit_gpt2_start(model_args, args.output_dir, data_args.tokenizer_name)
    else:
        check_parts(**model_args.pretrained_parts)
    check_lora(model_args.lora_rank, model_args.pretrained_decoder, args.ema_decay)
    with TrainingRun(args, options, script="train_vit_gpt2") as run:
        # ---- Data ---------------------------------------------------------------------------------------------------
        dataset, training_captions = load_for_training(
            data_args.dataset_name, data_args.max_train_samples, data_args.streaming, data_args.strict
        )

        # ---- Model --------------------------------------------------------------------------------------------------
        captioner = build_captioner(model_args, data_args, training_captions, run.accelerator)
        model, processor = captioner.model.to(run.accelerator.device), captioner.processor
        if args.activation_checkpointing:
            model.gradient_checkpointing_enable()
        optimizer = build_adamw(
            model, args, decay_vectors=False
        )  # a rate that has no effect is refused before images are encoded
        num_augmentations = data_args.num_augmentations
        features = encode_splits(dataset, model.encoder, processor.image_processor, data_args, num_augmentations)
        start_digest = weights_digest(model) if model_args.lora_rank else ""
        max_length, loss_on_prompt = data_args.max_caption_length, model_args.loss_on_prompt
        train_pairs, val_pairs = (
            pairs_of_split(dataset[split], captioner, max_length, features[split], loss_on_prompt)
            for split in ("train", "validation")
        )
        captioner.set_decoding(**decoding_args.within(train_pairs.lengths, captioner.max_caption_tokens))

        # ---- Optimizer ----------------------------------------------------------------------------------------------
        sampler = sampler_of(train_pairs, run, data_args)
        wrapped = run.prepare(
            captioner,
            optimizer,
            train_pairs,
            sampler,
            CaptionCollator(processor, share_images="pack"),
            data_args.dataloader_num_workers,
            start_digest=start_digest,
            export=merged if model_args.lora_rank else nullcontext,
        )

        # ---- Training -----------------------------------------------------------------------------------------------
        summed_loss = partial(teacher_forcing_loss, num_items_in_batch=1)
        val_rows, max_images = dataset["validation"], data_args.max_eval_samples
        evaluate = Evaluator(
            run,
            val_pairs,
            val_rows,
            features["validation"],
            max_images,
            training_captions,
            loss_of=lambda model, batch: summed_loss(model, model, batch),
        )
        for batches in run.steps(evaluate, summarize=lambda sums: {"train_loss": sums["loss"] / sums["tokens"]}):
            num_tokens = run.total(count_labels(batches))
            for batch in run.micro_batches(batches):
                loss = summed_loss(wrapped, model, batch, label_smoothing=args.label_smoothing_factor)
                run.backward(loss / num_tokens, loss=loss.detach(), tokens=count_labels([batch]))
            run.optimizer_step()

        # ---- Evaluation and saving ----------------------------------------------------------------------------------
        start = model_args.model_name_or_path
        started_from = [start] if start else [*map(hub_name, model_args.pretrained_parts.values())]
        run.finish(dataset, features, training_captions, data_args=data_args, started_from=started_from)


def build_captioner(model_args: ModelArguments, data_args, training_captions: Iterable[str], accelerator):
    """The captioner to train: of pretrained parts, or of new ones.

    Raises:
        UserError: An option does not go with the parts, or one cannot be loaded.
    """
    from modeling.captioner import Captioner
    from modeling.processing import build_processor
    from modeling.vit_gpt2 import brings_cross_attention, build_vit_gpt2, decoder_config, encoder_config, load_encoder
    from training.fine_tuning import load_for_fine_tuning
    from training.tokenizers import load_or_train_tokenizer, trimmed_to_captions

    if start := model_args.model_name_or_path:
        captioner = load_for_fine_tuning(start, model_args)
        set_trainable(captioner, model_args, fresh_cross_attention=False)
        return captioner
    encoder, decoder, prompt = model_args.encoder, model_args.decoder, model_args.prompt
    tokenizer_name = data_args.tokenizer_name or (decoder if model_args.pretrained_decoder else None)
    tokenizer = load_or_train_tokenizer(tokenizer_name, training_captions, model_args.vocab_size, accelerator)
    token_ids = None
    if model_args.trim_vocabulary:
        tokenizer, token_ids = trimmed_to_captions(tokenizer, training_captions, prompt, data_args.num_augmentations)
    if not model_args.pretrained_encoder:
        layers = model_args.num_encoder_layers or model_args.num_hidden_layers
        encoder = encoder_config(
            model_args.image_size,
            model_args.patch_size,
            **model_args.sizes | {"num_hidden_layers": layers},
            convolutional_stem=model_args.convolutional_stem,
        )
    if not model_args.pretrained_decoder:
        decoder, token_ids = decoder_config(len(tokenizer), **model_args.sizes), None  # nothing to trim in a new one
    try:
        encoder, image_processor = load_encoder(encoder, model_args.image_size)
        model = build_vit_gpt2(
            encoder, decoder, tokenizer, prompt, model_args.freeze_encoder, model_args.dropout, token_ids
        )
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--encoder {model_args.encoder}, --decoder {model_args.decoder}: {reason}; give Hub ids that can be reached, or folders"
        ) from error
    captioner = Captioner(model, build_processor(image_processor, tokenizer))
    positions, num_start_ids = model.config.decoder.max_position_embeddings, len(captioner.start_token_ids)
    if num_start_ids >= positions:
        raise UserError(f"--prompt has {num_start_ids - 1:,} tokens, and the decoder {positions:,} positions")
    fresh_cross_attention = bool(model_args.lora_rank) and not brings_cross_attention(model_args.decoder)
    set_trainable(captioner, model_args, fresh_cross_attention)
    return captioner


def set_trainable(captioner, model_args: ModelArguments, fresh_cross_attention: bool) -> None:
    """Choose what is trained of a captioner: LoRA's adapters in place of the decoder, and the encoder's last blocks."""
    from training.encoder_training import freeze_unused, unfreeze_last_blocks
    from training.lora import add_lora

    if model_args.lora_rank:
        add_lora(captioner.model.decoder, model_args.lora_rank, fresh_cross_attention=fresh_cross_attention)
    unfreeze_last_blocks(captioner, model_args.num_trainable_encoder_blocks)
    freeze_unused(captioner)


if __name__ == "__main__":
    main()
