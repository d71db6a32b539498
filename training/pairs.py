"""The (image, caption) pairs of a split and the order in which they are trained on, of a table or of shards."""

import logging
from collections.abc import Sequence

from datasets import Dataset

from data_scripts.load import Shards
from data_scripts.shards import feature_shards, shown
from modeling.captioner import Captioner
from system.errors import UserError
from training.batches import CaptionPairs, CaptionSampler
from training.features import Features, encoder_fingerprint
from training.shards import CaptionStream, StreamSampler

logger = logging.getLogger(__name__)


def pairs_of_split(
    rows: Dataset | Shards,
    captioner: Captioner,
    max_length: int | None,
    features: Sequence[Features | None],
    loss_on_prompt: bool = False,
) -> CaptionPairs | CaptionStream:
    """The (image, caption) pairs of a split, a table or shards, whose captions fit the decoder; arguments as of `CaptionPairs`.

    Raises:
        UserError: The shards have features of another encoder, or augmentations are wanted of them.
    """
    start_ids = captioner.start_token_ids
    max_length = min(filter(None, (max_length, captioner.max_caption_tokens)), default=None)
    if not isinstance(rows, Shards):
        return CaptionPairs(rows, captioner.tokenizer, max_length, features, start_ids, loss_on_prompt)
    about = feature_shards(rows.addresses)
    if about and any(parameter.requires_grad for parameter in captioner.encoder.parameters()):
        logger.info("The features in the shards are not used: the encoder is trained, on their images.")
        about = None
    if about:
        if about["fingerprint"] != encoder_fingerprint(captioner.encoder, captioner.image_processor):
            raise UserError(
                f"{shown(rows.addresses[0])} has features of another encoder than --encoder or --model_name_or_path"
            )
        if len(features) > 1:
            raise UserError("--num_augmentations does not go with shards of features, which have one of each image")
    return CaptionStream(rows, captioner.tokenizer, max_length, start_ids, loss_on_prompt, len(features), about)


def sampler_of(pairs: CaptionPairs | CaptionStream, run, data_args) -> CaptionSampler | StreamSampler:
    """The order in which a run trains on its pairs.

    Args:
        run: The `TrainingRun`.
        data_args: `train_sampling_strategy` and `num_augmentations`.
    """
    by_image = data_args.train_sampling_strategy == "group_by_image"
    by_length = data_args.train_sampling_strategy != "random"
    seed = run.args.seed
    if isinstance(pairs, CaptionStream):
        process, num_processes = run.accelerator.process_index, run.accelerator.num_processes
        return StreamSampler(pairs, run.step_size // num_processes, by_length, by_image, seed, process, num_processes)
    return CaptionSampler(
        pairs.lengths, run.step_size, by_length, seed, pairs.row_of_pair, by_image, data_args.num_augmentations
    )


def refuse_shards(rows: Dataset | Shards) -> None:
    """SCST compares with the captions of all training images, and needs a table.

    Raises:
        UserError: They are shards.
    """
    if isinstance(rows, Shards):
        raise UserError(
            "train_scst.py needs a table: prepare one with `python -m data_scripts.hub`, or name fewer shards there"
        )
