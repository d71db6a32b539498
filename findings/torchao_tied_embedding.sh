#!/usr/bin/env bash
# torchao 0.18.0, transformers 5.24.0, torch 2.13.0.
#
# Expected: quantize_(model, Int8WeightOnlyConfig()) of a GPT-2 decoder makes it about four times as small.
# Seen: it grows. GPT-2's layers are Conv1D, which are no nn.Linear and stay in float32; the one nn.Linear is lm_head, whose
# weight is the token embedding's. It is quantized into a tensor of its own, the embedding stays, and the two are no
# longer tied: everything there was remains, with an int8 copy of the vocabulary added. No error and no warning, and an
# embedding that is trained or replaced later no longer changes the output layer.
# For users: count the bytes after quantizing; replace Conv1D by nn.Linear first, and leave a tied lm_head out.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torchao==0.18.0 transformers==5.24.0 torch==2.13.0 numpy==2.4.6

venv/bin/python - 2>log.txt <<'PY' || { cat log.txt; exit 1; }
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import GPT2Config, GPT2LMHeadModel


def size(model):
    """Bytes of the different parameters, plain or quantized."""
    total = 0
    for parameter in model.parameters():  # each shared one once
        names = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else None
        parts = [getattr(parameter, name) for name in names] if names else [parameter]
        total += sum(part.numel() * part.element_size() for part in parts if part is not None)
    return total


config = GPT2Config(vocab_size=5000, n_embd=128, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config).eval()
assert model.lm_head.weight is model.transformer.wte.weight
before = size(model)
quantize_(model, Int8WeightOnlyConfig())
after = size(model)
quantized = [name for name, parameter in model.named_parameters() if type(parameter) is not torch.nn.Parameter]
assert quantized == ["lm_head.weight"], quantized
assert model.transformer.wte.weight.dtype == torch.float32
assert model.lm_head.weight is not model.transformer.wte.weight
assert after > before + config.vocab_size * config.n_embd, (before, after)
print(f"a GPT-2 of {before / 1e6:.2f} MB has {after / 1e6:.2f} MB as int8: only lm_head is quantized, as a second copy of the tied embedding")
PY
