#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: BLIP, BLIP-2 and InstructBLIP, beside GIT.
#
# Expected: generate() without arguments decodes as generation_config.json says, in every model.
# Seen: with max_new_tokens 3 in a saved generation_config.json, GIT generates three tokens, as with the argument. BLIP,
# BLIP-2 and InstructBLIP go on to their default length. Their generate() calls that of the language model inside, which
# has a generation config of its own, and hands on the arguments alone. A warning names a default max_length, and no config.
# For users: beams, lengths and penalties that were saved with such a captioner, or set in model.generation_config, have
# no effect, and a comparison of captioners "as they are saved" compares something else. Give them as arguments.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 pillow==12.0.0

venv/bin/python - <<'PY'
import tempfile

import torch
from transformers import AutoModelForImageTextToText, Blip2Config, BlipConfig, GenerationConfig, GitConfig
from transformers import InstructBlipConfig, OPTConfig

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SIZES, "intermediate_size": 32, "image_size": 32, "patch_size": 16, "initializer_range": 0.5}
TEXT = {**SIZES, **IDS, "vocab_size": 50, "intermediate_size": 32}
OPT = OPTConfig(**SIZES, **IDS, vocab_size=50, ffn_dim=32, word_embed_proj_dim=32).to_dict()
QFORMER = {**SIZES, "vocab_size": 50, "intermediate_size": 32, "encoder_hidden_size": 32, "hidden_dropout_prob": 0.0}
PARTS = {"vision_config": VISION, "qformer_config": QFORMER, "text_config": OPT}
PARTS |= {"num_query_tokens": 2, "image_token_index": 49}
CONFIGS = {
    "BLIP": BlipConfig(text_config={**TEXT, "encoder_hidden_size": 32, "sep_token_id": 2}, vision_config=VISION),
    "BLIP-2": Blip2Config(**PARTS),
    "InstructBLIP": InstructBlipConfig(**PARTS),
    "GIT": GitConfig(**TEXT, vision_config=VISION),
}
obeyed = {}
for name, config in CONFIGS.items():
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    settings = {"max_new_tokens": 3, "suppress_tokens": [2]}  # EOS is suppressed: all captions have that length
    model.generation_config = GenerationConfig(**IDS, **settings)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert model.generation_config.max_new_tokens == 3
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name == "InstructBLIP":
        ids = torch.tensor([[49, 49, 1, 5]] * 2)
        request = ids[:, 2:]
        inputs |= {"input_ids": ids, "qformer_input_ids": request, "qformer_attention_mask": torch.ones_like(request)}
    by_argument = model.generate(**inputs, **settings)
    obeyed[name] = model.generate(**inputs).shape == by_argument.shape
assert obeyed == {"BLIP": False, "BLIP-2": False, "InstructBLIP": False, "GIT": True}, obeyed
print("generate() of BLIP, BLIP-2 and InstructBLIP ignores the saved generation_config.json; GIT's obeys")
PY
