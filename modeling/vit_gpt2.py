"""ViT-GPT2: a Vision Transformer encodes the image, GPT-2 generates the caption and attends to the image at every token.

The model is transformers' own `VisionEncoderDecoderModel`, not a subclass: it loads everywhere without remote code.
"""

import copy
import inspect
import logging
import math
import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    DPTConfig,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ResNetConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
    ViTMAEConfig,
)
from transformers.modeling_outputs import BaseModelOutput

from system.errors import UserError

from .caption_loss import teacher_forcing_loss

logger = logging.getLogger(__name__)

FITTING = "give one with cross attention, of the kind GPT-2, BART, mBART, XGLM, TrOCR or RoBERTa"
FITTING_ENCODERS = "give one of the ViT kind, or a timm model, ViT or CNN"

# How configs of language models name their dropout rates: GPT-2, BART and XGLM, BERT.
DROPOUTS = (
    *("embd_pdrop", "attn_pdrop", "resid_pdrop"),
    *("dropout", "attention_dropout"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob"),
)


def build_vit_gpt2(
    encoder: str | PreTrainedConfig | PreTrainedModel,
    decoder: str | PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str = "",
    freeze_encoder: bool = True,
    dropout: float | None = None,
    token_ids: Sequence[int] | None = None,
) -> VisionEncoderDecoderModel:
    """Combine an image encoder and a language model.

    Args:
        encoder: A model of the ViT kind: Hub id or local folder for pretrained weights, config for random ones, or what
            `load_encoder` returns. Of a model with two towers, such as CLIP, the vision tower is used.
        decoder: A language model with cross attention, such as GPT-2 or BART: Hub id or local folder, or config for random weights;
            of a captioner saved by `train_vit_gpt2.py`, its decoder. Cross attention gets random weights unless the decoder has it.
        tokenizer: The decoder's tokenizer; BOS starts a caption, EOS ends it.
        prompt: Text every caption starts with; saved in the generation config, so that `generate()` starts from it.
        freeze_encoder: Whether the encoder's weights stay fixed.
        dropout: Dropout rate of the decoder; its own where None.
        token_ids: Where the tokenizer has been trimmed, the id of each of its tokens in `decoder`, ascending.

    Raises:
        UserError: The tokenizer has more tokens than the decoder, the decoder is no language model that attends to images, or the
            encoder is not of the ViT kind.
    """
    special_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    num_tokens = token_ids[-1] + 1 if token_ids else len(tokenizer)
    decoder_model = _build_decoder(decoder, dropout, num_tokens, special_ids)
    if token_ids:
        _keep_tokens(decoder_model, token_ids)
    encoder_model = encoder if isinstance(encoder, PreTrainedModel) else _build_encoder(encoder)
    start_ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder_model.config, decoder_model.config, decoder_start_token_id=start_ids[0], **special_ids
    )
    # Weights are trained in float32, also those that were saved in half precision; a mixture does not even run.
    model = VisionEncoderDecoderModel(config=config, encoder=encoder_model, decoder=decoder_model).float()
    # `generate()` multiplies a column of ones with this: a list in a list starts every caption with all its tokens.
    model.generation_config = GenerationConfig(
        decoder_start_token_id=[start_ids] if prompt else start_ids[0], **special_ids
    )
    if freeze_encoder:
        freeze(model.encoder)
    if model.device.type != "meta":  # where nothing can be computed
        _try_decoder(model, decoder)
    return model


def check_parts(encoder: str | None = None, decoder: str | None = None) -> None:
    """Refuse pretrained parts that do not fit by their configs alone, before data or weights are loaded.

    Args:
        encoder, decoder: Hub ids or local folders; None where the part is a new one.

    Raises:
        UserError: One cannot be found, or does not fit.
    """
    from .encoders import is_timm

    for option, name in {"encoder": encoder, "decoder": decoder}.items():
        if name is None:
            continue
        try:
            config = None if option == "encoder" and is_timm(name) else AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:  # not there, or of no kind that transformers has
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--{option} {name}: {reason}; give a Hub id that can be reached, or a folder") from error
        if option == "decoder":
            _check_decoder(getattr(config, "decoder", config), name)
        elif config is not None:
            _check_encoder(getattr(config, "vision_config", config), name)


def encoder_config(
    image_size: int,
    patch_size: int,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    convolutional_stem: bool = False,
) -> ViTConfig | DPTConfig:
    """A ViT of these sizes; its feed-forward layers are four times as wide, as in every ViT.

    Args:
        convolutional_stem: Whether a small ResNet makes the patches instead of one linear layer: the hybrid ViT of Dosovitskiy et
            al., 2021 (https://arxiv.org/abs/2010.11929, section 3.1), which transformers has as DPT's encoder.

    Raises:
        UserError: The ResNet has no such stride.
    """
    sizes = {
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "intermediate_size": 4 * hidden_size,
        # transformers' 0.02 is for wide models: in narrow ones attention starts flat
        "initializer_range": hidden_size**-0.5,
    }
    if not convolutional_stem:
        return ViTConfig(**sizes)
    if patch_size not in (8, 16, 32) or image_size % patch_size:
        raise UserError(
            f"--convolutional_stem true makes patches of 8, 16 or 32 pixels that divide --image_size {image_size}: --patch_size "
            f"{patch_size} is none of them"
        )
    num_stages = int(math.log2(patch_size)) - 1  # stride 4 of the stem, 1 of the first stage, 2 of each other
    names = ["stem", *(f"stage{stage + 1}" for stage in range(num_stages))]
    width = hidden_size // 3
    resnet = ResNetConfig(
        embedding_size=width,
        hidden_sizes=[width] * (num_stages - 1) + [4 * width],
        depths=[1] * num_stages,
        layer_type="basic",
        out_features=names[-3:],  # DPT requires three, and its encoder reads the last
    )
    side = image_size // patch_size
    return DPTConfig(is_hybrid=True, backbone_config=resnet, backbone_featmap_shape=[1, 4 * width, side, side], **sizes)


def decoder_config(vocab_size: int, hidden_size: int, num_hidden_layers: int, num_attention_heads: int) -> GPT2Config:
    """A GPT-2 of these sizes, without special tokens: `build_vit_gpt2` takes them from the tokenizer."""
    return GPT2Config(
        vocab_size=vocab_size,
        n_embd=hidden_size,
        n_layer=num_hidden_layers,
        n_head=num_attention_heads,
        initializer_range=hidden_size**-0.5,  # as the encoder's
        bos_token_id=None,
        eos_token_id=None,
    )


def brings_cross_attention(decoder: str) -> bool:
    """Whether a decoder, see `build_vit_gpt2`, comes with trained cross attention."""
    source = AutoConfig.from_pretrained(decoder)
    return getattr(getattr(source, "decoder", source), "add_cross_attention", False)


def load_encoder(encoder: str | PreTrainedConfig, image_size: int | None = None) -> tuple:
    """A pretrained encoder, or the config of a new one as it is, and its image processor.

    Args:
        encoder: As in `build_vit_gpt2`, or a model of timm: name, Hub id or local folder.
        image_size: Side of a pretrained encoder's input in pixels; its own where None.

    Raises:
        UserError: The encoder cannot be loaded, is of no kind that fits, or cannot encode images of this size.
    """
    # With timm, which a captioner of transformers' parts need not wait for.
    from .encoders import LARGE_FEATURES, feature_bytes, is_timm, load_timm_encoder

    if not isinstance(encoder, str):
        return encoder, vit_image_processor(encoder)
    if is_timm(encoder):
        model, image_processor = load_timm_encoder(encoder, image_size)
    else:
        model, image_processor = _build_encoder(encoder), vit_image_processor(encoder)
        if image_size:
            image_processor.size = {"height": image_size, "width": image_size}
            if getattr(image_processor, "do_center_crop", False):
                image_processor.crop_size = {"height": image_size, "width": image_size}
    try:
        size = feature_bytes(model, image_processor)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        given = f"--image_size {image_size}: " if image_size else ""
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{given}--encoder {encoder} cannot encode an image ({reason}): {FITTING_ENCODERS}") from error
    if size >= LARGE_FEATURES:
        logger.warning(
            f"--encoder {encoder} makes {size / 1e6:.1f} MB of features an image: a smaller --image_size makes fewer"
        )
    return model, image_processor


def vit_image_processor(encoder: str | ViTConfig | DPTConfig):
    """The image processor of a pretrained encoder; for a config, one that resizes to its size and scales to [-1, 1]."""
    if isinstance(encoder, str):
        return AutoImageProcessor.from_pretrained(encoder)
    return ViTImageProcessor(size={"height": encoder.image_size, "width": encoder.image_size})


def set_dropout(config: PreTrainedConfig, dropout: float) -> None:
    """Set every dropout rate of a language model's config."""
    config.update({name: dropout for name in DROPOUTS if hasattr(config, name)})


def freeze(encoder: nn.Module) -> None:
    """Freeze an encoder: no gradients, and in eval mode whenever it runs, although training puts the model in train mode."""
    encoder.requires_grad_(False)
    encoder.register_forward_pre_hook(_stay_in_eval)


class BeamCache(EncoderDecoderCache):
    """A cache whose cross attention is not reordered with the beams: all beams of an image attend to the same states.

    transformers' own copies the image's keys and values at every token, which takes longer than all the rest.
    """

    def __init__(self):
        super().__init__(DynamicCache(), DynamicCache())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.self_attention_cache.reorder_cache(beam_idx)


def _stay_in_eval(module: nn.Module, args: tuple) -> None:
    module.eval()


def _build_encoder(encoder: str | PreTrainedConfig) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(encoder) if isinstance(encoder, str) else encoder
    config = getattr(config, "vision_config", config)
    if isinstance(config, ViTMAEConfig) and isinstance(encoder, str):
        from .encoders import load_vit_mae

        return load_vit_mae(encoder, config)
    _check_encoder(config, encoder)
    # No captioner reads the pooler. Models without the option have none.
    options = (
        {"add_pooling_layer": False} if config.model_type in ("vit", "deit", "beit", "data2vec-vision", "dpt") else {}
    )
    if isinstance(encoder, str):
        return AutoModel.from_pretrained(encoder, config=config, **options)
    model = AutoModel.from_config(config, **options)
    if config.model_type in ("vit", "dpt"):
        _initialize_positions(model.embeddings.position_embeddings, config.image_size // config.patch_size)
    return model


def _check_encoder(config: PreTrainedConfig, encoder: str | PreTrainedConfig) -> None:
    """Raise UserError where a model encodes no images into a sequence."""
    model_class = MODEL_MAPPING.get(type(config), None)
    encodes = getattr(model_class, "main_input_name", None) == "pixel_values" and hasattr(config, "hidden_size")
    if encodes:  # of pixels alone: SigLIP 2 for images of any size also takes a mask
        inputs = inspect.signature(model_class.forward).parameters.values()
        needed = {one.name for one in inputs if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD}
        encodes = needed <= {"self", "pixel_values"}
    if not encodes:
        name = f"{encoder} " if isinstance(encoder, str) else ""
        raise UserError(
            f"encoder {name}is of the kind {config.model_type}, which gives no sequence of states for the pixels of an image: "
            f"{FITTING_ENCODERS}"
        )


@torch.no_grad()
def _initialize_positions(position_embeddings: nn.Parameter, side: int) -> None:
    """Start the positions of a grid as sines and cosines of row and column: where things are is learned far sooner.

    Args:
        position_embeddings: (1, positions, size); the grid's `side` * `side` are the last.
    """
    num_waves = position_embeddings.shape[-1] // 4
    # The slowest wave is longer than the grid, and the fastest tells neighbors apart, whatever the side.
    positions = torch.arange(side) * 8 / side
    angles = positions[:, None] * 100 ** -(torch.arange(num_waves) / num_waves)  # (side, waves)
    rows, columns = angles[:, None].expand(side, side, -1), angles[None].expand(side, side, -1)
    grid = torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=-1).flatten(
        0, 1
    )  # (side ** 2, 4 * waves)
    position_embeddings[0, -len(grid) :, : grid.shape[1]] = grid


def _build_decoder(
    decoder: str | PreTrainedConfig, dropout: float | None, num_tokens: int, special_ids: dict[str, int | None]
) -> PreTrainedModel:
    source = AutoConfig.from_pretrained(decoder) if isinstance(decoder, str) else decoder
    config = getattr(source, "decoder", source)
    if num_tokens > getattr(config, "vocab_size", num_tokens):
        raise UserError(
            f"the tokenizer has {num_tokens:,} tokens, the decoder {config.vocab_size:,}: "
            "give --tokenizer_name the one the decoder was trained with"
        )
    config.is_decoder, config.add_cross_attention = True, True
    # Before the model is built: decoders of the RoBERTa kind count positions from the padding id.
    config.update(special_ids)
    if hasattr(config, "encoder_layers") and hasattr(config, "decoder_layers"):
        # The encoder is not used, and transformers makes a cache of as many layers as it has (BART, mBART).
        config.encoder_layers = config.decoder_layers
    _check_decoder(config, decoder)
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"  # the same function in one kernel, where gelu_new takes eight
    if dropout is not None:
        set_dropout(config, dropout)
    if source is not config:
        return VisionEncoderDecoderModel.from_pretrained(decoder, config=source).decoder
    if isinstance(decoder, str):
        return AutoModelForCausalLM.from_pretrained(decoder, config=config)
    model = AutoModelForCausalLM.from_config(config)
    if config.model_type == "gpt2":
        # Logits start as small as with transformers' initializer_range: the first loss is log(vocabulary).
        nn.init.constant_(model.transformer.ln_f.weight, 0.02 * config.n_embd**0.5)
    return model


def _check_decoder(config: PreTrainedConfig, decoder: str | PreTrainedConfig) -> None:
    """Raise UserError where a model is no language model with cross attention, by its config."""
    name = f"decoder {decoder if isinstance(decoder, str) else ''}".strip()
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{name} is of the kind {config.model_type}, which is no language model: give one of the GPT-2 kind, or a "
            "captioner that train_vit_gpt2.py has saved"
        )
    config = copy.deepcopy(config)
    config.is_decoder, config.add_cross_attention = True, True
    reason = ""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        attends = any(re.search("cross_?att|encoder_attn", name) for name, _ in model.named_modules())
    except Exception as error:  # each kind has its own
        attends, reason = False, f" ({str(error).strip().splitlines()[0]})"
    if not attends or not hasattr(config, "vocab_size"):  # of models of several modalities, which have one in a part
        raise UserError(
            f"{name} is of the kind {config.model_type}, which cannot attend to an image{reason}: {FITTING}"
        )


@torch.no_grad()
def _try_decoder(model: VisionEncoderDecoderModel, decoder: str | PreTrainedConfig) -> None:
    """Raise UserError where a decoder cannot be trained or generate, before any image is encoded."""
    training = model.decoder.training
    model.decoder.eval()
    start = torch.full((1, 2), model.config.decoder_start_token_id)
    states = BaseModelOutput(last_hidden_state=torch.zeros(1, 2, model.encoder.config.hidden_size))
    try:
        teacher_forcing_loss(model, model, {"encoder_outputs": states, "decoder_input_ids": start, "labels": start})
        model.generate(encoder_outputs=states, decoder_input_ids=start[:, :1], max_new_tokens=2, num_beams=2)
    except Exception as error:  # each kind has its own
        name = f"decoder {decoder if isinstance(decoder, str) else ''}".strip()
        raise UserError(
            f"{name} is of the kind {model.decoder.config.model_type}, which does not work in a ViT-GPT2 "
            f"({' '.join(str(error).split())[:200]}): {FITTING}"
        ) from error
    model.decoder.train(training)


@torch.no_grad()
def _keep_tokens(decoder: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """Keep only these tokens' rows of embeddings and head, in this order."""
    layers = (decoder.get_input_embeddings(), decoder.get_output_embeddings())
    for rows in {rows for layer in layers for rows in layer.parameters()}:  # once where the two are tied
        rows[: len(token_ids)] = rows[token_ids]
    decoder.resize_token_embeddings(len(token_ids))
