"""What differs between the versions of transformers that showtell runs with, 5.4 and newer.

This file travels to the Hub with every saved LSTM captioner, so that one saved with any of them is loaded by any other.
"""

from dataclasses import fields

from transformers import PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

# Before transformers 5.24, `forward`, its outputs and `generate()` call `past_key_values` what is `cache` since. To go with 5.23.
CACHE = "cache" if "cache" in {field.name for field in fields(Seq2SeqLMOutput)} else "past_key_values"


def set_attn_implementation(model: PreTrainedModel, implementation: str) -> None:
    """Set the attention implementation of a decoder and of every part of it.

    Its own method alone does not reach, before transformers 5.20, a part whose config is another object of the same class, as
    `VisionEncoderDecoderModel` makes them: the layers then return no weights. To go with 5.19.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation(implementation)
