#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0.
#
# Expected: BartForCausalLM is BART's decoder alone; its config's encoder_layers describe an encoder that it does not
# have, and decoder_layers how many layers it runs.
# Seen: a forward pass and generate() make a cache of num_hidden_layers, which is another name for encoder_layers there.
# With fewer encoder layers than decoder layers both end in an IndexError ("list index out of range"), while a forward
# pass with use_cache=False, and so training, works. MBartForCausalLM likewise.
# For users: a decoder taken from such a model trains for hours and cannot generate. Set config.encoder_layers to
# decoder_layers before the model is built.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.13.0 numpy

venv/bin/python - <<'PY'
import torch
from transformers import BartConfig, BartForCausalLM, MBartConfig, MBartForCausalLM

sizes = {"vocab_size": 20, "d_model": 16, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "decoder_layers": 2}
ids = torch.tensor([[2, 5]])
for config_class, model_class in ((BartConfig, BartForCausalLM), (MBartConfig, MBartForCausalLM)):
    seen = []
    for encoder_layers in (1, 2, 3):
        config = config_class(**sizes, encoder_layers=encoder_layers, bos_token_id=0, pad_token_id=1, eos_token_id=2)
        model = model_class(config).eval()
        with torch.no_grad():
            assert model(input_ids=ids, use_cache=False).logits.shape == (1, 2, 20)
        try:
            model.generate(ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
            seen.append("generates")
        except IndexError:
            seen.append("IndexError")
    assert seen == ["IndexError", "generates", "generates"], (model_class, seen)
print("BartForCausalLM and MBartForCausalLM of 2 decoder layers: generate() is an IndexError with 1 encoder layer in the config")
PY
