"""Train a captioner on its own CIDEr-D reward: self-critical sequence training of either captioner.

    accelerate launch train_scst.py recipes/scst_flickr8k.yaml --model_name_or_path outputs/lstm_flickr8k --output_dir outputs/scst

A recipe sets the options, the command line overrides it, `--help` lists them.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from system.errors import UserError, one_line_errors
from training import arguments
from training.arguments import DataArguments, option, parse_recipe

if TYPE_CHECKING:
    from training.self_critical import SelfCriticalLoss

# What takes seconds to import is imported where it is used, so that `--help` and a wrong option answer at once.


@dataclass
class SCSTArguments:
    """The captioner to fine-tune, and its reward."""

    # Needed, on the command line or in the recipe.
    model_name_or_path: str | None = option(None, "Folder or Hub id of the captioner to fine-tune, of either kind.")
    num_samples: int = option(5, "Number of captions sampled per image and step.", min=1)
    baseline: Literal["leave_one_out", "greedy"] = option(
        "leave_one_out", "Baseline of a sample's reward: the mean of the image's other samples, or its greedy caption."
    )
    bleu_weight: float = option(0.0, "Weight of BLEU-4 (0 to 1) in the reward, beside CIDEr-D (0 to 10).", min=0)
    rouge_weight: float = option(0.0, "Weight of ROUGE-L (0 to 1) in the reward, beside CIDEr-D (0 to 10).", min=0)
    kl_coef: float = option(
        0.0, "KL coefficient: CIDEr-D that a nat of divergence from the starting model costs a caption.", min=0
    )
    init_weight_share: float = option(
        0.0,
        "Fraction of the starting weights in the model that is evaluated and saved (weight interpolation, WiSE-FT).",
        min=0,
        below=1,
    )
    xe_weight: float = option(0.0, "Weight of the cross entropy of a training caption in the loss.", min=0, below=1)
    dropout: float = option(
        0.0,
        "Dropout of the decoder, attention included, where it is trained on its samples, which are drawn without.",
        min=0,
        below=1,
    )
    sample_no_repeat_ngram_size: int = option(
        0, "Size of n-grams that occur at most once in a sample, by the policy; 0 disables.", min=0
    )
    sample_min_length: int = option(0, "Min length of a sample in tokens, by the policy.", min=0)

    def __post_init__(self):
        if self.model_name_or_path is None:
            raise UserError("--model_name_or_path is missing: give the folder or Hub id of the captioner to fine-tune")
        if self.num_samples == 1 and self.baseline == "leave_one_out":
            raise UserError(
                "--num_samples 1: there is no other sample to compare with; give 2 or more, or --baseline greedy"
            )
        if self.dropout and self.kl_coef:
            raise UserError(
                "--dropout and --kl_coef do not go together: the effect of dropout would count as divergence"
            )


@dataclass
class DecodingArguments(arguments.DecodingArguments):
    """How captions are generated in evaluation; what is not given stays as the captioner has it."""

    logit_adjustment_tau: float | None = option(
        None,
        "Logit adjustment of rare tokens in evaluation: nats for each factor of e by which a token is rarer in the "
        "training captions than 1 in 1,000; 0 disables.",
        min=0,
    )


@dataclass
class TrainingArguments(arguments.TrainingArguments):
    """The training loop."""

    output_dir: str = option("outputs/scst", "Folder for model, results and checkpoints.")
    num_train_epochs: int = option(5, "Number of epochs.", min=1)
    per_device_train_batch_size: int = option(16, "Images per batch and device.", min=1)
    learning_rate: float = option(5e-5, "Peak learning rate of AdamW.", min=0)
    weight_decay: float = option(0.0, "Weight decay of AdamW.", min=0)
    eval_on_start: bool = option(
        True, "Evaluate before the first step, too; the starting captioner stays if it is the best."
    )
    early_stopping_patience: int | None = option(
        2, "Number of evaluations without a better validation CIDEr after which training stops.", min=1
    )


@one_line_errors()
def main(argv: list[str] | None = None, loss_class: "type[SelfCriticalLoss] | None" = None) -> None:
    """Train as the options say; a subclass of `SelfCriticalLoss` may reward captions in another way, see docs/scst.md."""
    kinds = (DataArguments, SCSTArguments, DecodingArguments, TrainingArguments)
    data_args, scst_args, decoding_args, args = parse_recipe(kinds, argv, __doc__)
    options = {**vars(data_args), **vars(scst_args), **vars(decoding_args), **vars(args)}

    import numpy as np

    from data_scripts import load_for_training
    from metrics import CiderD
    from modeling.caption_loss import teacher_forcing_loss
    from modeling.fingerprint import weights_digest
    from training.averaging import mixed_with
    from training.batches import AugmentedImages, CaptionCollator, CaptionSampler
    from training.evaluation import Evaluator
    from training.features import encode_splits
    from training.launch import refuse_fsdp
    from training.optimizer import build_adamw
    from training.pairs import pairs_of_split, refuse_shards
    from training.run import TrainingRun
    from training.sampling import set_sampling_mode, share_images_by
    from training.self_critical import SelfCriticalLoss, check_scst_start, load_start, set_decoding

    # ---- Accelerator and seed ---------------------------------------------------------------------------------------
    refuse_fsdp("train_scst.py")
    check_scst_start(scst_args.model_name_or_path, args.output_dir)
    with TrainingRun(args, options, script="train_scst", unit="images") as run:
        # ---- Data ---------------------------------------------------------------------------------------------------
        dataset, training_captions = load_for_training(
            data_args.dataset_name, data_args.max_train_samples, data_args.streaming, data_args.strict
        )
        refuse_shards(dataset["train"])

        # ---- Model --------------------------------------------------------------------------------------------------
        captioner = load_start(scst_args.model_name_or_path)
        start_digest = weights_digest(captioner.model)
        model, processor = captioner.model.to(run.accelerator.device), captioner.processor
        num_augmentations = data_args.num_augmentations
        features = encode_splits(dataset, captioner.encoder, processor.image_processor, data_args, num_augmentations)
        train_pairs, val_pairs = (
            pairs_of_split(dataset[split], captioner, data_args.max_caption_length, features[split])
            for split in ("train", "validation")
        )
        set_decoding(captioner, decoding_args, train_pairs, scst_args.sample_min_length)
        start = copy.deepcopy(model) if scst_args.kl_coef or scst_args.init_weight_share else None
        criterion = (loss_class or SelfCriticalLoss)(
            captioner,
            CiderD(dataset["train"]["captions"], count_end=True),
            scst_args,
            args.seed,
            ref_model=start if scst_args.kl_coef else None,
            token_ids=(train_pairs.token_ids, train_pairs.mirrored_ids),
            num_augmentations=num_augmentations,
        )

        # ---- Optimizer ----------------------------------------------------------------------------------------------
        train_images = AugmentedImages(dataset["train"], features["train"])
        sampler = CaptionSampler(
            np.ones(len(train_images)),
            run.step_size,
            group_by_length=False,
            seed=args.seed,
            images=np.arange(len(train_images)),
            num_augmentations=num_augmentations,
        )
        mixes = scst_args.init_weight_share > 0
        wrapped = run.prepare(
            captioner,
            build_adamw(model, args),
            train_images,
            sampler,
            CaptionCollator(processor, share_images_by(model)),
            data_args.dataloader_num_workers,
            start_digest=start_digest,
            export=partial(mixed_with, start=start, weight=scst_args.init_weight_share) if mixes else nullcontext,
            train_mode=set_sampling_mode,
        )

        # ---- Training -----------------------------------------------------------------------------------------------
        val_rows, max_images = dataset["validation"], data_args.max_eval_samples
        evaluate = Evaluator(
            run,
            val_pairs,
            val_rows,
            features["validation"],
            max_images,
            training_captions,
            loss_of=lambda model, batch: teacher_forcing_loss(model, model, batch, num_items_in_batch=1),
        )
        for batches in run.steps(evaluate, criterion.summarize):
            num_images = run.total(sum(len(batch["index"]) for batch in batches))
            for batch in run.micro_batches(batches):
                with run.accelerator.autocast():
                    loss, sums = criterion.loss(wrapped, batch, run.state.epoch)
                run.backward(loss / num_images, loss=loss.detach(), **sums)
            run.optimizer_step()

        # ---- Evaluation and saving ----------------------------------------------------------------------------------
        run.finish(
            dataset,
            features,
            training_captions,
            data_args=data_args,
            started_from=[scst_args.model_name_or_path],
            self_critical=True,
        )


if __name__ == "__main__":
    main()
