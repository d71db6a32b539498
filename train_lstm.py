"""Train the LSTM captioner: a timm encoder, frozen below a projection of its output, and an LSTM.

    accelerate launch train_lstm.py recipes/lstm_reference.yaml --dataset_name data/mine --output_dir outputs/lstm

A recipe sets the options, the command line overrides it, `--help` lists them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from system.errors import UserError, one_line_errors
from training.arguments import (
    CaptionDataArguments,
    CaptionTrainingArguments,
    NewDecodingArguments,
    option,
    parse_recipe,
    refuse_what_it_brings,
)

# What takes seconds to import is imported where it is used, so that `--help` and a wrong option answer at once.

BROUGHT_BY_A_CAPTIONER = (
    *("encoder", "pretrained_encoder", "image_size", "center_crop", "output_stride", "image_embed_dim", "hidden_size"),
    *("num_hidden_layers", "attention", "num_attention_heads", "vocab_size"),
)


@dataclass
class ModelArguments:
    """The model; the defaults are those of the course report that this project reimplements."""

    model_name_or_path: str | None = option(
        None,
        "Folder or Hub id of an LSTM captioner to fine-tune. Its encoder, sizes and tokenizer stay; of the options here "
        "freeze_encoder, num_trainable_encoder_blocks, dropout and attention_dropout count.",
    )
    encoder: str = option("inception_resnet_v2.tf_in1k", "timm name, Hub id or local folder of the encoder.")
    pretrained_encoder: bool = option(True, "Load the pretrained weights of the encoder.")
    freeze_encoder: bool = option(True, "Freeze the encoder.")
    num_trainable_encoder_blocks: int = option(0, "Last N encoder blocks to train although the rest is frozen.", min=0)
    image_size: int | None = option(None, "Side of the encoder's input in pixels; its own if not given.", min=1)
    center_crop: bool = option(True, "Center-crop; otherwise resize the whole image, ignoring its aspect ratio.")
    output_stride: int | None = option(
        None,
        "Stride of the encoder's feature grid in pixels; 16 or 8 give a convolutional encoder a finer grid; its own, "
        "mostly 32, if not given.",
        min=1,
        needs={"attention": [True]},
    )
    image_embed_dim: int = option(1024, "Size of the image's and of each token's embedding.", min=1)
    hidden_size: int = option(1024, "Hidden size of each LSTM layer.", min=1)
    num_hidden_layers: int = option(3, "Number of LSTM layers.", min=1)
    dropout: float = option(0.0, "Dropout of the LSTM's inputs and outputs.", min=0, below=1)
    attention: bool = option(False, "Attend to the encoder's feature grid at each token, not to its pooled features.")
    num_attention_heads: int = option(1, "Number of attention heads.", min=1, needs={"attention": [True]})
    attention_dropout: float = option(0.0, "Dropout of attention keys and values.", min=0, below=1)
    vocab_size: int = option(  # four special tokens and four others at least
        8000, "Vocabulary size of the tokenizer that is trained.", min=8, needs={"tokenizer_name": [None]}
    )

    def __post_init__(self):
        if self.model_name_or_path:
            refuse_what_it_brings(self, self.model_name_or_path, BROUGHT_BY_A_CAPTIONER)
        if self.attention_dropout and not self.attention and not self.model_name_or_path:
            raise UserError(f"--attention_dropout {self.attention_dropout} has no effect without --attention true")


@dataclass
class TrainingArguments(CaptionTrainingArguments):
    """The training loop."""

    output_dir: str = option("outputs/lstm", "Folder for model, results and checkpoints.")


@one_line_errors()
def main(argv: list[str] | None = None) -> None:
    kinds = (CaptionDataArguments, ModelArguments, NewDecodingArguments, TrainingArguments)
    data_args, model_args, decoding_args, args = parse_recipe(kinds, argv, __doc__)
    options = {**vars(data_args), **vars(model_args), **vars(decoding_args), **vars(args)}

    from data_scripts import load_for_training
    from modeling.encoders import hub_name
    from training.batches import CaptionCollator
    from training.evaluation import Evaluator, count_labels
    from training.features import encode_splits
    from training.fine_tuning import check_lstm_start
    from training.optimizer import build_adamw
    from training.pairs import pairs_of_split, sampler_of
    from training.run import TrainingRun

    # ---- Accelerator and seed ---------------------------------------------------------------------------------------
    if model_args.model_name_or_path:
        check_lstm_start(model_args, args.output_dir, data_args.tokenizer_name)
    with TrainingRun(args, options, script="train_lstm") as run:
        # ---- Data ---------------------------------------------------------------------------------------------------
        dataset, training_captions = load_for_training(
            data_args.dataset_name, data_args.max_train_samples, data_args.streaming, data_args.strict
        )

        # ---- Model --------------------------------------------------------------------------------------------------
        captioner = build_captioner(model_args, args, data_args.tokenizer_name, training_captions, run.accelerator)
        model, processor = captioner.model.to(run.accelerator.device), captioner.processor
        num_augmentations = data_args.num_augmentations
        optimizer = build_adamw(model, args)  # a rate that has no effect is refused before images are encoded
        features = encode_splits(dataset, model.encoder, processor.image_processor, data_args, num_augmentations)
        train_pairs, val_pairs = (
            pairs_of_split(dataset[split], captioner, data_args.max_caption_length, features[split])
            for split in ("train", "validation")
        )
        captioner.set_decoding(**decoding_args.within(train_pairs.lengths))

        # ---- Optimizer ----------------------------------------------------------------------------------------------
        sampler = sampler_of(train_pairs, run, data_args)
        collator = CaptionCollator(processor, share_images="index")
        model = run.prepare(captioner, optimizer, train_pairs, sampler, collator, data_args.dataloader_num_workers)

        # ---- Training -----------------------------------------------------------------------------------------------
        val_rows, max_images = dataset["validation"], data_args.max_eval_samples
        evaluate = Evaluator(
            run, val_pairs, val_rows, features["validation"], max_images, training_captions, loss_of=summed_loss
        )
        for batches in run.steps(evaluate, summarize=lambda sums: {"train_loss": sums["loss"] / sums["tokens"]}):
            num_tokens = run.total(count_labels(batches))
            for batch in run.micro_batches(batches):
                loss = summed_loss(model, batch, args.label_smoothing_factor)
                run.backward(loss / num_tokens, loss=loss.detach(), tokens=count_labels([batch]))
            run.optimizer_step()

        # ---- Evaluation and saving ----------------------------------------------------------------------------------
        started_from = [hub_name(model_args.encoder)] if model_args.pretrained_encoder else []
        if model_args.model_name_or_path:
            started_from = [model_args.model_name_or_path]
        run.finish(dataset, features, training_captions, data_args=data_args, started_from=started_from)


def summed_loss(model, batch: dict, label_smoothing: float = 0.0):
    """Cross entropy of a batch of captions, in nats, summed over its tokens."""
    return model(**batch, num_items_in_batch=1, label_smoothing=label_smoothing, skip_logits=True).loss


def build_captioner(
    model_args: ModelArguments, args, tokenizer_name: str | None, training_captions: Iterable[str], accelerator
):
    """The captioner to train: a new one, or one to fine-tune.

    Raises:
        UserError: An option does not go with it, or something cannot be loaded.
    """
    from modeling.inception_lstm import build_inception_lstm, load_for_fine_tuning
    from training.encoder_training import checkpoint_blocks, freeze_unused, unfreeze_last_blocks
    from training.tokenizers import load_or_train_tokenizer

    if start := model_args.model_name_or_path:
        captioner = load_for_fine_tuning(
            start, model_args.freeze_encoder, model_args.dropout, model_args.attention_dropout
        )
    else:
        tokenizer = load_or_train_tokenizer(tokenizer_name, training_captions, model_args.vocab_size, accelerator)
        used_here = ("model_name_or_path", "num_trainable_encoder_blocks", "vocab_size")
        captioner = build_inception_lstm(
            tokenizer=tokenizer, **{name: value for name, value in vars(model_args).items() if name not in used_here}
        )
    unfreeze_last_blocks(captioner, model_args.num_trainable_encoder_blocks)
    freeze_unused(captioner)
    if args.activation_checkpointing:
        checkpoint_blocks(captioner.encoder)
    return captioner


if __name__ == "__main__":
    main()
