"""What differs between the versions of transformers that showtell runs with, 5.4 and newer.

This file travels to the Hub with every saved LSTM captioner, so that one saved with any of them is loaded by any other.
"""

from dataclasses import fields

from transformers.modeling_outputs import Seq2SeqLMOutput

# Before transformers 5.24, `forward`, its outputs and `generate()` call `past_key_values` what is `cache` since. To go with 5.23.
CACHE = "cache" if "cache" in {field.name for field in fields(Seq2SeqLMOutput)} else "past_key_values"
