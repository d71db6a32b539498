"""The LSTM captioner: a frozen timm encoder, one trained projection of its last layer, and an LSTM that writes the caption.

Show and Tell (Vinyals et al., 2015, https://arxiv.org/abs/1411.4555, section 3.1) with Inception-ResNet-v2 as encoder: the
image's embedding is the first input of the LSTM, in the slot of the start token, and the words follow.

Config, encoder, state and model share this file because the file itself travels to the Hub with every saved model, and the
loss's with it.
"""

import os
from dataclasses import dataclass

import timm
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from .caption_loss import caption_loss

# What `generate()` and outputs call the state between two words; transformers 5.24 renamed it.
STATE_NAME = "cache" if "cache" in Seq2SeqLMOutput.__dataclass_fields__ else "past_key_values"


class InceptionLSTMConfig(PreTrainedConfig):
    """Sizes of the captioner; the defaults are those of the source report.

    Args:
        encoder_name: timm architecture. Never a path or a repository: weights are loaded after construction.
        freeze_encoder: Whether the encoder below the trained projection stays as it is, BatchNorm statistics included.
        vocab_size: Tokens of the tokenizer, special ones included.
        image_embed_dim: Length of the image's embedding, and so of each token's, which take turns as LSTM input.
        hidden_size: Width of each LSTM layer.
        num_hidden_layers: LSTM layers.
        dropout: Share of the LSTM's inputs, of the values between its layers and of its outputs zeroed in training.
        attention: Whether each word looks at the places of the encoder's grid, in place of the encoder's summary alone.
        num_attention_heads: Places it looks at in different ways at once.
        attention_dropout: Share of the grid's keys and values zeroed in training.
    """

    model_type = "inception_lstm"

    def __init__(
        self,
        encoder_name: str = "inception_resnet_v2",
        freeze_encoder: bool = True,
        vocab_size: int = 8000,
        image_embed_dim: int = 1024,
        hidden_size: int = 1024,
        num_hidden_layers: int = 3,
        dropout: float = 0.0,
        attention: bool = False,
        num_attention_heads: int = 1,
        attention_dropout: float = 0.0,
        pad_token_id: int = 0,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        **kwargs,
    ):
        self.encoder_name = encoder_name
        self.freeze_encoder = freeze_encoder
        self.vocab_size = vocab_size
        self.image_embed_dim = image_embed_dim
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.dropout = dropout
        self.attention = attention
        self.num_attention_heads = num_attention_heads
        self.attention_dropout = attention_dropout
        # transformers registers one auto class a model by itself; `AutoModel` has to be named here.
        kwargs.setdefault("auto_map", {"AutoModel": "modeling_inception_lstm.InceptionLSTMForConditionalGeneration"})
        kwargs["is_encoder_decoder"] = True  # generate() then runs the encoder once and keeps its output
        kwargs.setdefault("decoder_start_token_id", bos_token_id)
        super().__init__(pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)


class TimmEncoder(nn.Module):
    """A timm model without its classifier, in the form `generate()` expects of an encoder.

    Args:
        architecture: timm's name.
        grid: Whether to give one state for each place of the image, in place of their one summary.
    """

    main_input_name = "pixel_values"

    def __init__(self, architecture: str, grid: bool = False):
        super().__init__()
        self.grid = grid
        self.backbone = self.create_backbone(architecture, pretrained=False)
        # timm has initialized its layers its own way; transformers' `post_init` would do it again, and otherwise.
        for module in self.modules():
            module._is_hf_initialized = True

    def create_backbone(self, name: str, pretrained: bool) -> nn.Module:
        """The timm model, all of whose buffers are saved: `from_pretrained` leaves the others without a value."""
        pooling = {"global_pool": ""} if self.grid else {}
        backbone = timm.create_model(name, pretrained=pretrained, num_classes=0, **pooling)
        for module in backbone.modules():
            for buffer_name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(buffer_name, buffer)
        return backbone

    def extra_repr(self) -> str:
        return f"grid={self.grid}"  # part of what tells one encoder's kept features from another's

    @property
    def output_size(self) -> int:
        """Length of one state, 1,536 for Inception-ResNet-v2."""
        return getattr(self.backbone, "head_hidden_size", self.backbone.num_features)

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutput:
        # Convolutions are faster on pixels whose channels lie side by side, and hand that order on.
        pixel_values = pixel_values.to(next(self.backbone.parameters()).dtype, memory_format=torch.channels_last)
        features = self.backbone(pixel_values)
        if features.ndim == 2:  # one summary: (batch, encoder size)
            features = features.unsqueeze(1)
        elif features.ndim == 4:  # a grid, the sizes first or last: (batch, encoder size, height, width)
            channels_first = getattr(self.backbone, "output_fmt", "NCHW") == "NCHW"
            features = features.flatten(2).transpose(1, 2) if channels_first else features.flatten(1, 2)
        return BaseModelOutput(last_hidden_state=features)  # (batch, positions, encoder size)


@dataclass
class LSTMState:
    """What the LSTM remembers between two words, in the place of a transformer's keys and values.

    hidden, cell: (layers, batch, hidden size); num_tokens: decoder positions read so far; grid: what attention looks at.
    """

    hidden: torch.Tensor
    cell: torch.Tensor
    num_tokens: int
    grid: tuple[torch.Tensor, torch.Tensor] | None = None

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_tokens

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the states of the beams that go on, in their new order. All beams of an image look at the same grid."""
        beam_idx = beam_idx.to(self.hidden.device)
        self.hidden = self.hidden.index_select(1, beam_idx)
        self.cell = self.cell.index_select(1, beam_idx)


class GridAttention(nn.Module):
    """What the LSTM's output at each word sees of the image.

    Attention after the recurrence (Luong et al., 2015, https://arxiv.org/abs/1508.04025, section 3.1, "general" score): the
    state of the LSTM does not depend on it, so that all words of a caption are computed at once. It has heads, as in Vaswani
    et al., 2017 (https://arxiv.org/abs/1706.03762, section 3.2.2).
    """

    def __init__(self, encoder_size: int, hidden_size: int, num_heads: int = 1, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.key = nn.Linear(encoder_size, hidden_size)
        self.value = nn.Linear(encoder_size, hidden_size)
        self.output = nn.Linear(2 * hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def grid(self, states: torch.Tensor, image_index: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of every place, each (batch, positions, hidden), from states (images, positions, encoder size)."""
        # Where several captions share an image, they miss the same of it.
        keys, values = self.dropout(self.key(states)), self.dropout(self.value(states))  # (images, positions, hidden)
        if image_index is not None:
            keys, values = keys[image_index], values[image_index]  # (batch, positions, hidden)
        return keys, values

    def forward(self, hidden: torch.Tensor, grid: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Outputs of the LSTM and what they see, (batch, length, hidden) in and out."""
        query, keys, values = map(self._heads, (hidden, *grid))
        seen = nn.functional.scaled_dot_product_attention(query, keys, values)  # (batch, heads, length, head size)
        return torch.tanh(self.output(torch.cat([hidden, seen.transpose(1, 2).flatten(2)], dim=-1)))

    def weights(self, hidden: torch.Tensor, grid: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """How much each word looks at each place, (batch, heads, length, positions): what the fused kernel above keeps to itself."""
        query, keys = self._heads(hidden), self._heads(grid[0])
        scores = query @ keys.transpose(2, 3) / query.shape[-1] ** 0.5  # (batch, heads, length, positions)
        return scores.softmax(dim=-1)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, places, hidden) as (batch, heads, places, head size)."""
        return states.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class InceptionLSTMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Image in, caption out; trained with teacher forcing.

    `__init__` builds random weights and never downloads; `load_pretrained_encoder` brings a trained encoder in.
    """

    config_class = InceptionLSTMConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: InceptionLSTMConfig):
        super().__init__(config)
        self.encoder = TimmEncoder(config.encoder_name, grid=config.attention)
        self.image_projection = nn.Linear(self.encoder.output_size, config.image_embed_dim)
        self.token_embedding = nn.Embedding(config.vocab_size, config.image_embed_dim)
        self.lstm = nn.LSTM(
            config.image_embed_dim,
            config.hidden_size,
            config.num_hidden_layers,
            batch_first=True,
            dropout=config.dropout if config.num_hidden_layers > 1 else 0.0,
        )
        self.attention = None
        if config.attention:
            self.attention = GridAttention(
                self.encoder.output_size, config.hidden_size, config.num_attention_heads, config.attention_dropout
            )
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()
        if config.freeze_encoder:
            self.encoder.requires_grad_(False)

    def _init_weights(self, module: nn.Module) -> None:
        """He for linear layers, normal for embeddings (the report), torch's own uniform for the LSTM."""
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.LSTM):
            module.reset_parameters()

    def train(self, mode: bool = True):
        """As always, but a frozen encoder stays in eval: `requires_grad_(False)` alone lets BatchNorm statistics drift."""
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoder.eval()
        return self

    def load_pretrained_encoder(self, name: str) -> None:
        """Bring in a trained encoder's weights, classifier excepted.

        Args:
            name: timm name ("inception_resnet_v2.tf_in1k"), Hub id ("timm/inception_resnet_v2.tf_in1k"), or a local folder
                with timm's `config.json` and `model.safetensors`.
        """
        pretrained = self.encoder.create_backbone(timm_source(name), pretrained=True)
        self.encoder.backbone.load_state_dict(pretrained.state_dict())

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.encoder

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate()` would hand us a cache of keys and values; forward makes an LSTMState instead

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        cache: LSTMState | None = None,
        labels: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        label_smoothing: float = 0.0,
        output_attentions: bool | None = None,
        past_key_values: LSTMState | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """Score each next token of the captions, and their loss where `labels` are given.

        Args:
            pixel_values: float (batch, 3, height, width), normalized as the processor does it.
            decoder_input_ids: int64 (batch, length). The first is the start token, whose slot the image takes; made from
                `labels` where absent. With `cache`, only the tokens not yet read.
            encoder_outputs: In place of `pixel_values`, what the encoder gave: (batch, positions, encoder size); one position
                without attention.
            cache: State of the LSTM after the tokens read before.
            labels: int64 (batch, length), caption and EOS, -100 where a caption has ended.
            image_index: int64 (batch,). Which of the images each caption is about, where several captions share one; in their
                order where absent.
            use_cache: Whether to give the state back; False where `labels` are given.
            num_items_in_batch, label_smoothing: See `caption_loss`.
            output_attentions: Whether to tell where a model with attention looked.
            past_key_values: The name of `cache` before transformers 5.24.

        Returns:
            `loss` (nats a token) where `labels` are given, else `logits` (batch, length, vocabulary): the scores of a batch of
            captions are never held all at once. The state, under `STATE_NAME`, where `use_cache` says so. Where asked for,
            `cross_attentions` of one layer: (batch, heads, length, positions).
        """
        if decoder_input_ids is None:
            decoder_input_ids = self.shift_right(labels)
        inputs = self.token_embedding(decoder_input_ids)  # (batch, length, image embedding)
        cache = past_key_values if cache is None else cache
        if cache is None:
            if encoder_outputs is None:
                encoder_outputs = self.encoder(pixel_values)
            inputs, grid = self.show(encoder_outputs[0].to(inputs.dtype), inputs, image_index)
            memory, num_tokens = None, 0
        else:
            grid, num_tokens, memory = cache.grid, cache.num_tokens, (cache.hidden, cache.cell)

        outputs, looking, memory = self.read(inputs, grid, memory)
        cross_attentions = None
        if self.attention and output_attentions:
            cross_attentions = (self.attention.weights(looking, grid),)
        loss, logits = None, None
        if labels is None:
            logits = self.lm_head(outputs)  # (batch, length, vocabulary)
        else:
            head = self.lm_head
            loss = caption_loss(outputs, labels, head.weight, head.bias, num_items_in_batch, label_smoothing)

        use_cache = labels is None if use_cache is None else use_cache
        state = LSTMState(*memory, num_tokens + decoder_input_ids.shape[1], grid) if use_cache else None
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{STATE_NAME: state},
            cross_attentions=cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0] if encoder_outputs is not None else None,
        )

    def show(self, states: torch.Tensor, inputs: torch.Tensor, image_index: torch.Tensor | None = None) -> tuple:
        """Put the image, states (images, positions, encoder size), into the start token's slot of the LSTM's inputs.

        Returns:
            inputs: (batch, length, image embedding)
            grid: What attention looks at; None without it.
        """
        image = self.image_projection(states.mean(1))  # (images, image embedding)
        image = image if image_index is None else image[image_index]  # (batch, image embedding)
        inputs = torch.cat([image.unsqueeze(1), inputs[:, 1:]], dim=1)  # (batch, length, image embedding)
        return inputs, self.attention.grid(states, image_index) if self.attention else None

    def read(self, inputs: torch.Tensor, grid: tuple | None, memory: tuple[torch.Tensor, ...] | None = None) -> tuple:
        """Read the image and words, inputs (batch, length, image embedding).

        Args:
            grid: What attention looks at; None without it.
            memory: Hidden states and cells, each (layers, batch, hidden), after what was read before.

        Returns:
            outputs: (batch, length, hidden), what `lm_head` reads.
            looking: (batch, length, hidden), what attention looked with.
            memory: As above, after these inputs.
        """
        looking, memory = self.lstm(self.dropout(inputs), memory)
        outputs = self.attention(looking, grid) if self.attention else looking
        return self.dropout(outputs), looking, memory

    def shift_right(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (batch, length) as decoder inputs: the start token, then every label but the last."""
        start = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)


def timm_source(name: str) -> str:
    """The name as `timm.create_model` wants it: a folder and a Hub id bear a scheme there, a timm name does not."""
    if os.path.isdir(name):
        return f"local-dir:{name}"
    return f"hf-hub:{name}" if "/" in name and ":" not in name else name


InceptionLSTMConfig.register_for_auto_class()
InceptionLSTMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
