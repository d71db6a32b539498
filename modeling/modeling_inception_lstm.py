"""The LSTM captioner: a timm image encoder, a linear projection of its features, and an LSTM that generates the caption.

Show and Tell (Vinyals et al., 2015, https://arxiv.org/abs/1411.4555, section 3.1) with Inception-ResNet-v2 as encoder: the
image embedding takes the start token's place in the inputs of the LSTM, and the token embeddings follow.

Config, encoder, state and model share this file because the file itself travels to the Hub with every saved model, and those of
the loss and the pipeline with it.
"""

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from .caption_loss import caption_loss
from .captioning_pipeline import CUSTOM_PIPELINES
from .transformers_versions import CACHE


class InceptionLSTMConfig(PreTrainedConfig):
    """Configuration of the LSTM captioner; the defaults are those of the course report this project reimplements.

    Args:
        encoder_name: timm architecture. Never a path or a repository: weights are loaded after construction.
        encoder_args: Arguments of the architecture that differ from its defaults, see `timm_model_args`.
        freeze_encoder: Whether the encoder's weights and BatchNorm statistics stay fixed.
        vocab_size: Vocabulary size, special tokens included.
        image_embed_dim: Dimension of the image embedding and of the token embeddings, the inputs of the LSTM.
        hidden_size: Hidden size of each LSTM layer.
        num_hidden_layers: Number of LSTM layers.
        dropout: Dropout rate of the LSTM's inputs, between its layers and of its outputs.
        attention: Whether each token attends to the encoder's feature map; otherwise the LSTM gets its pooled features alone.
        num_attention_heads: Number of attention heads.
        attention_dropout: Dropout rate of the keys and values of the feature map.
    """

    model_type = "inception_lstm"
    # Of the outputs in evaluation, transformers' Trainer then takes the logits alone for predictions.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [CACHE, "encoder_last_hidden_state"]

    def __init__(
        self,
        encoder_name: str = "inception_resnet_v2",
        encoder_args: dict[str, Any] | None = None,
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
        self.encoder_args = encoder_args or {}
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
        kwargs.setdefault("custom_pipelines", CUSTOM_PIPELINES)  # its file is saved with this one, which imports it
        kwargs["is_encoder_decoder"] = True  # generate() then runs the encoder once and keeps its output
        kwargs.setdefault("decoder_start_token_id", bos_token_id)
        super().__init__(pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)


class TimmEncoder(nn.Module):
    """A timm model without its classifier, with the output that `generate()` expects of an encoder.

    Args:
        architecture: timm architecture.
        grid: Whether to return the feature map, one state per position, in place of the pooled features.
        model_args: Arguments of the architecture that differ from its defaults.
    """

    main_input_name = "pixel_values"

    def __init__(self, architecture: str, grid: bool = False, model_args: dict[str, Any] | None = None):
        super().__init__()
        self.architecture = architecture
        self.grid = grid
        self.model_args = model_args or {}
        self.backbone = self.create_backbone(architecture, pretrained=False)
        self.is_built_on_meta = next(self.backbone.parameters()).is_meta
        # timm has initialized its layers; transformers' `post_init` would initialize them again, in another way.
        for module in self.modules():
            module._is_hf_initialized = True

    def create_backbone(self, name: str, pretrained: bool) -> nn.Module:
        """The timm model with all its buffers made persistent: `from_pretrained` leaves the others uninitialized."""
        import timm  # half a second, which ViT-GPT2 need not spend

        pooling = {"global_pool": ""} if self.grid else {}
        backbone = timm.create_model(name, pretrained=pretrained, **{**self.model_args, "num_classes": 0, **pooling})
        for module in backbone.modules():
            for buffer_name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(buffer_name, buffer)
        return backbone

    @torch.no_grad()
    def initialize_missing(self) -> None:
        """Give what `from_pretrained` found in no checkpoint the values of a new timm model: weights, statistics, tables."""
        tensors = {**dict(self.backbone.named_parameters()), **dict(self.backbone.named_buffers())}
        missing = [name for name, value in tensors.items() if not getattr(value, "_is_hf_initialized", False)]
        if missing:
            new = self.create_backbone(self.architecture, pretrained=False).state_dict()
            for name in missing:
                tensors[name].copy_(new[name])

    def extra_repr(self) -> str:
        return f"grid={self.grid}, {self.model_args}"  # part of the encoder's fingerprint, which its cached features are stored under

    @property
    def output_size(self) -> int:
        """Dimension of one state, 1,536 for Inception-ResNet-v2."""
        return getattr(self.backbone, "head_hidden_size", self.backbone.num_features)

    def memory_format(self, device: torch.device) -> torch.memory_format:
        """Memory order of the pixels: channels last, in which convolutions are faster, and which they keep.

        Not where a 1 x 1 convolution of the image itself (RepVGG, MobileOne) is trained on a CPU, which torch 2.14 cannot do
        in this order.
        """
        if device.type == "cpu" and torch.is_grad_enabled():
            for module in self.backbone.modules():
                reads_image = isinstance(module, nn.Conv2d) and module.in_channels == 3
                if reads_image and module.kernel_size == (1, 1) and module.weight.requires_grad:
                    return torch.contiguous_format
        return torch.channels_last

    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs) -> BaseModelOutput:
        if pixel_values is None or pixel_values.ndim != 4:
            raise ValueError(
                "the encoder takes pixel_values of shape (batch, 3, height, width), as the processor makes them"
            )
        memory_format = self.memory_format(pixel_values.device)
        pixel_values = pixel_values.to(next(self.backbone.parameters()).dtype).contiguous(memory_format=memory_format)
        features = self.backbone(pixel_values)
        if features.ndim == 2:  # pooled: (batch, encoder size)
            features = features.unsqueeze(1)
        elif features.ndim == 4:  # a feature map, (batch, encoder size, height, width) or channels last
            channels_first = getattr(self.backbone, "output_fmt", "NCHW") == "NCHW"
            features = features.flatten(2).transpose(1, 2) if channels_first else features.flatten(1, 2)
        return BaseModelOutput(last_hidden_state=features)  # (batch, positions, encoder size)


@dataclass
class LSTMState:
    """State of the LSTM between two decoding steps: what `generate()` keeps as the cache.

    hidden, cell: (layers, batch, hidden size); num_tokens: decoder positions decoded so far; keys_values: of the feature map,
    each (batch, positions, hidden size), or None without attention. As with transformers' caches, what `__iter__` gives makes up
    the state again: `torch.nn.DataParallel` puts the parts of its devices together so.
    """

    hidden: torch.Tensor
    cell: torch.Tensor
    num_tokens: int
    keys_values: tuple[torch.Tensor, torch.Tensor] | None

    def __init__(
        self,
        hidden: torch.Tensor | Iterable,
        cell: torch.Tensor | None = None,
        num_tokens: int = 0,
        keys_values: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        if cell is None:
            hidden, cell, numbers, keys_values = hidden
            hidden, cell = (value.transpose(0, 1).contiguous() for value in (hidden, cell))
            num_tokens = int(numbers[0])
        self.hidden, self.cell, self.num_tokens, self.keys_values = hidden, cell, num_tokens, keys_values

    def __iter__(self) -> Iterator[Any]:
        """Its tensors with the batch as first dimension."""
        numbers = torch.full((self.hidden.shape[1],), self.num_tokens, device=self.hidden.device)
        return iter((self.hidden.transpose(0, 1), self.cell.transpose(0, 1), numbers, self.keys_values))

    is_compileable = False
    is_linear = (False,)  # as transformers asks of each layer of a cache: it knows how many tokens it has decoded

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_tokens

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select the states of the beams that survive, in their new order. All beams of an image share its keys and values."""
        beam_idx = beam_idx.to(self.hidden.device)
        self.hidden = self.hidden.index_select(1, beam_idx)
        self.cell = self.cell.index_select(1, beam_idx)


torch.export.register_dataclass(LSTMState, serialized_type_name="showtell.LSTMState")


class GridAttention(nn.Module):
    """Attention of the LSTM's outputs to the encoder's feature map.

    Attention after the recurrence (Luong et al., 2015, https://arxiv.org/abs/1508.04025, section 3.1, "general" score): the
    state of the LSTM does not depend on it, so that all tokens of a caption are computed in parallel. Its heads are those of
    Vaswani et al., 2017 (https://arxiv.org/abs/1706.03762, section 3.2.2).
    """

    def __init__(self, encoder_size: int, hidden_size: int, num_heads: int = 1, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.key = nn.Linear(encoder_size, hidden_size)
        self.value = nn.Linear(encoder_size, hidden_size)
        self.output = nn.Linear(2 * hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def project_keys_values(
        self, states: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each (batch, positions, hidden), of encoder states (images, positions, encoder size)."""
        # Captions that share an image share its dropout mask.
        keys, values = self.dropout(self.key(states)), self.dropout(self.value(states))  # (images, positions, hidden)
        if image_index is not None:
            keys, values = keys[image_index], values[image_index]  # (batch, positions, hidden)
        return keys, values

    def forward(self, query: torch.Tensor, keys_values: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Attend with the outputs of the LSTM, (batch, length, hidden), and merge both; same shape."""
        queries, keys, values = map(self._split_heads, (query, *keys_values))
        context = nn.functional.scaled_dot_product_attention(queries, keys, values)  # (batch, heads, length, head size)
        return torch.tanh(self.output(torch.cat([query, context.transpose(1, 2).flatten(2)], dim=-1)))

    def attention_weights(self, query: torch.Tensor, keys_values: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Attention weights, (batch, heads, length, positions), which the fused kernel of `forward` does not return."""
        queries, keys = self._split_heads(query), self._split_heads(keys_values[0])
        scores = queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5  # (batch, heads, length, positions)
        return scores.softmax(dim=-1)

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden) as (batch, heads, length, head size)."""
        return states.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class InceptionLSTMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Generates the caption of an image; trained with teacher forcing.

    `__init__` builds random weights and never downloads; `load_pretrained_encoder` loads a trained encoder.
    """

    config_class = InceptionLSTMConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _is_stateful = True  # transformers then refuses assisted decoding: an LSTM's state cannot be rolled back

    def __init__(self, config: InceptionLSTMConfig):
        super().__init__(config)
        self.encoder = TimmEncoder(config.encoder_name, config.attention, config.encoder_args)
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
        """He for linear layers, normal for embeddings, torch's own uniform for the LSTM, as the course report has it."""
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.LSTM):
            module.reset_parameters()

    def initialize_weights(self) -> None:
        """As always; what a checkpoint lacks of the encoder is initialized as timm does it."""
        if self.encoder.is_built_on_meta:  # by `from_pretrained`
            self.encoder.initialize_missing()
        super().initialize_weights()

    def train(self, mode: bool = True):
        """As always, but a frozen encoder stays in eval: `requires_grad_(False)` alone lets BatchNorm statistics drift."""
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoder.eval()
        return self

    def load_pretrained_encoder(self, name: str) -> None:
        """Load a trained encoder's weights, without its classifier.

        Args:
            name: timm name ("inception_resnet_v2.tf_in1k"), Hub id ("timm/inception_resnet_v2.tf_in1k"), or a local folder
                with timm's `config.json` and `model.safetensors`.

        Raises:
            ValueError: Its model has other arguments than this one's encoder, see `timm_model_args`.
        """
        model_args = timm_model_args(name)
        own_args = {
            key: value for key, value in self.config.encoder_args.items() if key != "output_stride"
        }  # no weights
        if model_args != own_args:
            raise ValueError(f"{name} has model_args {model_args}, the config encoder_args {self.config.encoder_args}")
        pretrained = self.encoder.create_backbone(timm_source(name), pretrained=True)
        self.encoder.backbone.load_state_dict(pretrained.state_dict())

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.encoder

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.token_embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate()` would pass a cache of keys and values; forward makes an LSTMState instead

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        cache: LSTMState | None = None,
        past_key_values: LSTMState | None = None,
        labels: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> Seq2SeqLMOutput | tuple:
        """Predict each next token of the captions; the loss where `labels` are given.

        Args:
            pixel_values: float (batch, 3, height, width), normalized as the processor does it.
            decoder_input_ids: int64 (batch, length). The first is the start token, whose place the image embedding takes; made
                from `labels` where absent. With `cache`, only the tokens not yet decoded.
            encoder_outputs: In place of `pixel_values`, the encoder's output: (batch, positions, encoder size); one position
                without attention.
            cache, past_key_values: State of the LSTM after the tokens decoded before, under the name that transformers has for it,
                see `CACHE`; either is taken.
            labels: int64 (batch, length), caption and EOS, -100 where a caption has ended.
            image_index: int64 (batch,). Index of each caption's image, where captions share images; their order where absent.
            use_cache: Whether to return the state; by default where there are no `labels`.
            num_items_in_batch, label_smoothing: See `caption_loss`. (The second is not in the signature: of every argument
                there that has "label" in its name, transformers' Trainer expects a column.)
            skip_logits: Whether to compute the loss alone, chunk by chunk, so that the logits of a whole batch of captions are
                never in memory at once; by default in training where there are `labels`.
            output_attentions, output_hidden_states: Whether to return the attention weights, or what is between the layers;
                the config's where None.
            return_dict: Whether to return a `Seq2SeqLMOutput`, or a tuple of what is not None; the config's where None.

        Returns:
            loss: Nats per token, where `labels` are given.
            logits: (batch, length, vocabulary), unless skipped.
            cache or past_key_values, see `CACHE`: The state, where `use_cache`.
            decoder_hidden_states: Inputs of the LSTM, its outputs and, with attention, those of the attention, each (batch,
                length, size), where `output_hidden_states`.
            cross_attentions: Of the one attention layer, (batch, heads, length, positions), where `output_attentions`.
            encoder_last_hidden_state, encoder_hidden_states: (images, positions, encoder size), where the image was given; the
                second is a tuple of the first, where `output_hidden_states`.

        Raises:
            ValueError: Neither image nor state is given, or no tokens.
        """
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        use_cache = labels is None if use_cache is None else use_cache
        skip_logits = self.training and labels is not None if skip_logits is None else skip_logits
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError(
                    "forward takes decoder_input_ids or labels besides the image; captions come from generate()"
                )
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        inputs = self.token_embedding(decoder_input_ids)  # (batch, length, image embedding)
        cache = past_key_values if cache is None else cache
        if cache is None:
            if encoder_outputs is None:
                if pixel_values is None:
                    raise ValueError(
                        "forward takes an image: pixel_values, encoder_outputs or the cache of a call before"
                    )
                encoder_outputs = self.encoder(pixel_values)
            inputs, keys_values = self.prepend_image(encoder_outputs[0].to(inputs.dtype), inputs, image_index)
            lstm_state, num_tokens = None, 0
        else:
            keys_values, num_tokens, lstm_state = cache.keys_values, cache.num_tokens, (cache.hidden, cache.cell)

        outputs, query, lstm_state = self.decode(inputs, keys_values, lstm_state)
        loss, logits = None, None
        if labels is not None:
            label_smoothing = kwargs.get("label_smoothing", 0.0)
            loss = caption_loss(outputs, labels, self.lm_head, num_items_in_batch, label_smoothing)
        if not skip_logits:
            logits = self.lm_head(outputs)  # (batch, length, vocabulary)
        cross_attentions, hidden_states = None, None
        if output_attentions and self.attention:
            cross_attentions = (self.attention.attention_weights(query, keys_values),)
        if output_hidden_states:
            hidden_states = (inputs, query, outputs) if self.attention else (inputs, query)
        num_tokens += decoder_input_ids.shape[1]
        encoder_states = None if encoder_outputs is None else encoder_outputs[0]
        output = Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: LSTMState(*lstm_state, num_tokens, keys_values) if use_cache else None},
            decoder_hidden_states=hidden_states,
            cross_attentions=cross_attentions,
            encoder_last_hidden_state=encoder_states,
            encoder_hidden_states=(encoder_states,) if output_hidden_states and encoder_states is not None else None,
        )
        return output if return_dict else output.to_tuple()

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs) -> dict[str, Any]:
        """Arguments of `forward` at a decoding step: of the tokens (batch, length), those that the cache has not decoded.

        Raises:
            ValueError: It has decoded them all.
        """
        if (cache := kwargs.get(CACHE)) is not None:
            input_ids = input_ids[:, cache.num_tokens :]  # (batch, tokens to decode)
            if not input_ids.shape[1]:
                raise ValueError(
                    f"the cache has decoded all {cache.num_tokens} tokens given: it must not have the last one"
                )
        kwargs["next_sequence_length"] = None
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def prepend_image(
        self, states: torch.Tensor, inputs: torch.Tensor, image_index: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Put the image embedding in the start token's place.

        Args:
            states: Encoder states, (images, positions, encoder size).
            inputs: Token embeddings, (batch, length, image embedding).
            image_index: See `forward`.

        Returns:
            inputs: (batch, length, image embedding).
            keys_values: Of the feature map, see `GridAttention`; None without attention.
        """
        image = self.image_projection(states.mean(1))  # (images, image embedding)
        image = image if image_index is None else image[image_index]  # (batch, image embedding)
        inputs = torch.cat([image.unsqueeze(1), inputs[:, 1:]], dim=1)  # (batch, length, image embedding)
        return inputs, self.attention.project_keys_values(states, image_index) if self.attention else None

    def decode(
        self,
        inputs: torch.Tensor,
        keys_values: tuple[torch.Tensor, torch.Tensor] | None,
        lstm_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Run the LSTM, and attention where there is one.

        Args:
            inputs: Embeddings of image and tokens, (batch, length, image embedding).
            keys_values: Of the feature map; None without attention.
            lstm_state: Hidden and cell state, each (layers, batch, hidden), after the tokens decoded before.

        Returns:
            outputs: Inputs of `lm_head`, (batch, length, hidden).
            query: Outputs of the LSTM, (batch, length, hidden), with which attention queries the feature map.
            lstm_state: As above, after these inputs.
        """
        query, lstm_state = run_lstm(self.lstm, self.dropout(inputs), lstm_state)
        outputs = self.attention(query, keys_values) if self.attention else query
        return self.dropout(outputs), query, lstm_state

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Decoder inputs from labels (batch, length): the start token, then every label but the last."""
        start = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, self.config.pad_token_id)


def run_lstm(
    lstm: nn.LSTM, inputs: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """`lstm(inputs, state)`; under autocast to bfloat16 on a GPU in bfloat16, and of one token of one caption on a CPU cell by cell.

    On that GPU torch runs LSTMs in float16 whatever the dtype of autocast: gradients of batches of many tokens round to zero.
    """
    device = inputs.device.type
    if state is not None and _is_one_token(lstm, inputs):
        return _run_cells(lstm, inputs[:, 0], state)
    if device != "cuda" or not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) != torch.bfloat16:
        return lstm(inputs, state)
    weights = [weight.bfloat16() for layer in lstm.all_weights for weight in layer]
    if state is None:
        zeros = inputs.new_zeros(lstm.num_layers, len(inputs), lstm.hidden_size)
        state = zeros, zeros
    state = [value.bfloat16() for value in state]
    options = (lstm.bias, lstm.num_layers, lstm.dropout, lstm.training, lstm.bidirectional, lstm.batch_first)
    with torch.autocast(device, enabled=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        outputs, *state = torch.lstm(inputs.bfloat16(), state, weights, *options)
    return outputs, tuple(state)


def _is_one_token(lstm: nn.Module, inputs: torch.Tensor) -> bool:
    """Whether `nn.LSTM` would reorder its weights, as it does at each call on a CPU, for longer than it computes.

    Not so where the module is quantized, or its weights are offloaded: only calling it brings them then.
    """
    if torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return False
    is_plain = isinstance(lstm, nn.LSTM) and not lstm.training and lstm.weight_ih_l0.device.type == "cpu"
    return is_plain and inputs.device.type == "cpu" and inputs.dtype == torch.float32 and inputs.shape[:2] == (1, 1)


def _run_cells(
    lstm: nn.LSTM, inputs: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """One token of each caption, (batch, input size), in evaluation; outputs (batch, 1, hidden) and the state after it."""
    states = []
    for weights, hidden, cell in zip(lstm.all_weights, *state, strict=True):
        states.append(torch.lstm_cell(inputs, (hidden, cell), *weights))  # each (batch, hidden)
        inputs = states[-1][0]
    hidden, cell = (torch.stack(values) for values in zip(*states, strict=True))  # each (layers, batch, hidden)
    return inputs.unsqueeze(1), (hidden, cell)


def timm_source(name: str) -> str:
    """The name as `timm.create_model` takes it: folders and Hub ids have a scheme there, timm names have none."""
    if os.path.isdir(name):
        return f"local-dir:{name}"
    return f"hf-hub:{name}" if "/" in name and ":" not in name else name


def timm_model_args(name: str) -> dict[str, Any]:
    """Arguments that a timm folder or Hub repository gives its architecture beyond its defaults, such as an activation.

    Args:
        name: As in `load_pretrained_encoder`; a timm name has none.
    """
    source = timm_source(name)
    if source.startswith("local-dir:"):
        with open(os.path.join(name, "config.json"), encoding="utf-8") as file:
            model_args = json.load(file).get("model_args")
    elif source.startswith("hf-hub:"):
        from timm.models import load_model_config_from_hf

        model_args = load_model_config_from_hf(source.removeprefix("hf-hub:"))[2]
    else:
        model_args = None
    return {key: value for key, value in (model_args or {}).items() if key != "num_classes"}


InceptionLSTMConfig.register_for_auto_class()
InceptionLSTMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
