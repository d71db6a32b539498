"""Build the LSTM captioner from a timm encoder and a tokenizer, or take one that is trained already."""

import logging

import timm
import torch
from transformers import PreTrainedTokenizerBase

from system.errors import UserError

from .captioner import Captioner
from .modeling_inception_lstm import (
    InceptionLSTMConfig,
    InceptionLSTMForConditionalGeneration,
    timm_model_args,
    timm_source,
)
from .processing import build_processor, timm_image_processor

logger = logging.getLogger(__name__)


def build_inception_lstm(
    encoder: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pretrained_encoder: bool = True,
    image_size: int | None = None,
    center_crop: bool = True,
    output_stride: int | None = None,
    **sizes,
) -> Captioner:
    """A new captioner.

    Args:
        encoder: timm name, Hub id or local folder.
        pretrained_encoder: Whether to load the encoder's weights.
        image_size: Side of the encoder's input in pixels; its own where None.
        center_crop: Whether the encoder gets the center of an image, or all of it, resized.
        output_stride: Pixels from one position of the feature grid to the next; the encoder's own where None. Below that, its last
            stages are dilated instead of strided, with the same weights.
        sizes: Of `InceptionLSTMConfig`.

    Raises:
        UserError: The encoder cannot be loaded, or cannot encode such images.
    """
    hidden_size, num_heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if hidden_size % num_heads:
        raise UserError(f"--num_attention_heads {num_heads} does not divide --hidden_size {hidden_size}")
    try:
        backbone = timm.create_model(timm_source(encoder), pretrained=False, num_classes=0)
        encoder_args = timm_model_args(encoder) | ({"output_stride": output_stride} if output_stride else {})
    except RuntimeError as error:
        raise UserError(f"--encoder {encoder}: {error}; give a timm name, a Hub id or a local folder") from error
    config = InceptionLSTMConfig(
        encoder_name=backbone.pretrained_cfg["architecture"],
        encoder_args=encoder_args,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    try:
        model = InceptionLSTMForConditionalGeneration(config)
    except (AssertionError, NotImplementedError, TypeError) as error:  # timm's
        if output_stride:
            raise UserError(f"--output_stride {output_stride}: timm's {encoder} does not have it") from error
        if not config.attention:
            raise
        raise UserError(f"--attention true: timm's {encoder} gives no feature grid to attend to") from error
    if pretrained_encoder:
        try:
            model.load_pretrained_encoder(encoder)
        except Exception as error:  # timm, the Hub's client and torch each have their own
            raise UserError(
                f"--encoder {encoder}: its weights cannot be loaded ({str(error).strip().splitlines()[0]}); give a folder that "
                "holds them, or --pretrained_encoder false"
            ) from error
    image_processor = timm_image_processor(backbone, image_size, center_crop)
    if image_size or config.attention:
        _check_encoder(model, encoder, image_processor.crop_size)
    return Captioner(model, build_processor(image_processor, tokenizer))


@torch.no_grad()
def _check_encoder(model: InceptionLSTMForConditionalGeneration, encoder: str, size) -> None:
    """Encode one black image of this height and width, before all others are."""
    height, width = size["height"], size["width"]
    try:
        states = model.eval().encoder(torch.zeros(1, 3, height, width)).last_hidden_state
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"--image_size {height}: {encoder} cannot encode it ({error})") from error
    if model.config.attention and states.shape[1] == 1:
        logger.warning(
            f"--attention true: {encoder} gives a feature map of one position for {height} pixels, so that there is nothing to "
            "choose from."
        )


def load_for_fine_tuning(
    name_or_path: str, freeze_encoder: bool, dropout: float, attention_dropout: float
) -> Captioner:
    """A captioner that is trained already, to be trained as this run has it.

    Raises:
        UserError: It cannot be loaded.
    """
    captioner = Captioner.load(name_or_path)
    model = captioner.model
    config = model.config
    config.update({"freeze_encoder": freeze_encoder, "dropout": dropout, "attention_dropout": attention_dropout})
    # A new model with its weights: what is trained, dropout and decoding are this run's.
    fresh = InceptionLSTMForConditionalGeneration(config)
    fresh.load_state_dict(model.state_dict())
    return Captioner(fresh, captioner.processor)
