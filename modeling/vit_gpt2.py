"""ViT-GPT2: a Vision Transformer reads the image, GPT-2 writes the caption and attends to it at every word.

The model is transformers' own `VisionEncoderDecoderModel`, not a subclass: it loads everywhere without remote code.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

from system.errors import UserError


def build_vit_gpt2(
    encoder: str | PreTrainedConfig,
    decoder: str | PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str = "",
    freeze_encoder: bool = True,
    dropout: float | None = None,
    token_ids: Sequence[int] | None = None,
) -> VisionEncoderDecoderModel:
    """Put an image encoder and a language model together.

    Args:
        encoder: Of the ViT kind. A Hub id or local folder brings its trained weights, a config random ones; of a model with
            two towers, such as CLIP, the one for images is taken.
        decoder: Of the GPT-2 kind, likewise; of a captioner that `train_vit_gpt2.py` has saved, the decoder is taken. Cross
            attention is added and fresh; a decoder that brings trained cross attention keeps it.
        tokenizer: The decoder's; BOS starts a caption, EOS ends it.
        prompt: Text every caption starts with; it is kept in the generation config, so that `generate()` starts from it.
        freeze_encoder: Whether the encoder stays as it is.
        dropout: Of the decoder; its own where None.
        token_ids: Where the tokenizer has been trimmed, the number that each of its tokens has in `decoder`, rising.

    Raises:
        ValueError: The tokenizer has more tokens than the decoder, or the decoder is no language model.
    """
    decoder_model = _build_decoder(decoder, dropout)
    num_tokens = token_ids[-1] + 1 if token_ids else len(tokenizer)
    if num_tokens > decoder_model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {num_tokens:,} tokens, the decoder {decoder_model.config.vocab_size:,}: "
            "give --tokenizer_name the one the decoder was trained with"
        )
    if token_ids:
        _keep_tokens(decoder_model, token_ids)
    encoder_model = _build_encoder(encoder)
    special_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    decoder_model.config.update(special_ids)
    start_ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder_model.config, decoder_model.config, decoder_start_token_id=start_ids[0], **special_ids
    )
    model = VisionEncoderDecoderModel(config=config, encoder=encoder_model, decoder=decoder_model)
    # `generate()` multiplies a column of ones with this: a list in a list starts every caption with all its tokens.
    model.generation_config = GenerationConfig(
        decoder_start_token_id=[start_ids] if prompt else start_ids[0], **special_ids
    )
    if freeze_encoder:
        freeze(model.encoder)
    return model


def encoder_config(
    image_size: int, patch_size: int, hidden_size: int, num_hidden_layers: int, num_attention_heads: int
) -> ViTConfig:
    """A ViT of these sizes, as wide in its feed-forward layers as they all are: four times."""
    return ViTConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        intermediate_size=4 * hidden_size,
    )


def decoder_config(vocab_size: int, hidden_size: int, num_hidden_layers: int, num_attention_heads: int) -> GPT2Config:
    """A GPT-2 of these sizes; its special tokens come with the tokenizer."""
    return GPT2Config(
        vocab_size=vocab_size,
        n_embd=hidden_size,
        n_layer=num_hidden_layers,
        n_head=num_attention_heads,
        bos_token_id=None,
        eos_token_id=None,
    )


def brings_cross_attention(decoder: str) -> bool:
    """Whether a decoder, see `build_vit_gpt2`, has trained cross attention, so that none is added fresh."""
    source = AutoConfig.from_pretrained(decoder)
    return getattr(getattr(source, "decoder", source), "add_cross_attention", False)


def vit_image_processor(encoder: str | ViTConfig):
    """What a trained encoder was trained on; for a config, images squeezed to its size and scaled to -1 .. 1."""
    if isinstance(encoder, str):
        return AutoImageProcessor.from_pretrained(encoder)
    return ViTImageProcessor(size={"height": encoder.image_size, "width": encoder.image_size})


def freeze(encoder: nn.Module) -> None:
    """Keep an encoder as it is: no gradients, and in eval whenever it runs, though a trainer puts the model in train."""
    encoder.requires_grad_(False)
    encoder.register_forward_pre_hook(_stay_in_eval)


@contextmanager
def hidden_states_as_logits(decoder: PreTrainedModel) -> Iterator[nn.Linear]:
    """Let the decoder give what its last linear layer reads, in the place of `logits`; that layer is what this gives.

    For a loss that scores the vocabulary itself, a few tokens at a time: `caption_loss`.
    """
    head = decoder.get_output_embeddings()
    decoder.set_output_embeddings(nn.Identity())
    try:
        yield head
    finally:
        decoder.set_output_embeddings(head)


class BeamCache(EncoderDecoderCache):
    """Keys and values in which beams change places for the words alone: all beams of an image attend to the same states.

    transformers' own copies those of the image too at every word, which takes longer than all the rest.
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
    # A pooler would get no gradient; models that know the option have one, the others (DINOv2, CLIP) have not.
    options = {"add_pooling_layer": False} if config.model_type in ("vit", "deit", "beit", "data2vec-vision") else {}
    if isinstance(encoder, str):
        return AutoModel.from_pretrained(encoder, config=config, **options)
    return AutoModel.from_config(config, **options)


def _build_decoder(decoder: str | PreTrainedConfig, dropout: float | None) -> PreTrainedModel:
    source = AutoConfig.from_pretrained(decoder) if isinstance(decoder, str) else decoder
    config = getattr(source, "decoder", source)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"decoder {decoder} is of the kind {config.model_type}, which is no language model: give one of the GPT-2 kind, or a "
            "captioner that train_vit_gpt2.py has saved"
        )
    config.is_decoder, config.add_cross_attention = True, True
    if dropout is not None:
        config.embd_pdrop = config.attn_pdrop = config.resid_pdrop = dropout
    if source is not config:
        return VisionEncoderDecoderModel.from_pretrained(decoder, config=source).decoder
    if isinstance(decoder, str):
        return AutoModelForCausalLM.from_pretrained(decoder, config=config)
    return AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def _keep_tokens(decoder: PreTrainedModel, token_ids: Sequence[int]) -> None:
    """Leave of embeddings and head the rows of these tokens, numbered anew in this order."""
    layers = (decoder.get_input_embeddings(), decoder.get_output_embeddings())
    for rows in {rows for layer in layers for rows in layer.parameters()}:  # once where the two are tied
        rows[: len(token_ids)] = rows[token_ids]
    decoder.resize_token_embeddings(len(token_ids))
