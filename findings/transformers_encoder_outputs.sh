#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0.
#
# Expected: generate(encoder_outputs=states, num_beams=3) reads the caller's encoder states, so that one encoding
# serves several calls (greedy, then beams; several decoding settings).
# Seen: it writes the states repeated per beam into the caller's object. The second call takes the 2 images for 6 and
# returns 6 captions, the third for 18. Row i of the result no longer belongs to image i. So with sampling and
# num_return_sequences, and with BART as with VisionEncoderDecoderModel. No error, no warning.
# For users: captions paired with images by position are wrong from the second call on: the second image is given one
# of the first image's captions. Pass a new BaseModelOutput(last_hidden_state=...) to each call.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.13.0 numpy

venv/bin/python -W ignore - <<'PY'
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.modeling_outputs import BaseModelOutput

torch.manual_seed(0)
tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
vit = ViTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
)
gpt2 = GPT2Config(
    n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=32, is_decoder=True, add_cross_attention=True, **tokens
)
captioner = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt2)).eval()
bart = BartForConditionalGeneration(
    BartConfig(
        vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, **tokens,
    )
).eval()  # fmt: skip


def captions_per_call(model, states, **options):
    """Numbers of captions that three equal calls return for the same states of two images."""
    model.generation_config.update(decoder_start_token_id=1, **tokens)
    return [len(model.generate(encoder_outputs=states, max_new_tokens=4, **options)) for _ in range(3)]


with torch.no_grad():
    states = captioner.encoder(torch.randn(2, 3, 32, 32))
    first_state = states.last_hidden_state[0].clone()
    copies = [len(captioner.generate(encoder_outputs=BaseModelOutput(states.last_hidden_state), num_beams=3,
              max_new_tokens=4, decoder_start_token_id=1, pad_token_id=0)) for _ in range(3)]  # fmt: skip
    assert copies == [2, 2, 2], copies
    beams = captions_per_call(captioner, states, num_beams=3)
    assert all(torch.equal(state, first_state) for state in states.last_hidden_state[:27])
    of_bart = captions_per_call(bart, bart.get_encoder()(torch.randint(3, 30, (2, 6))), num_beams=3)
assert beams == [2, 6, 18] and len(states.last_hidden_state) == 54, (beams, len(states.last_hidden_state))
assert of_bart == beams, of_bart
print(f"three calls of generate(num_beams=3) with the encoder states of 2 images return {beams} captions")
PY
