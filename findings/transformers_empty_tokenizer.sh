#!/usr/bin/env bash
# transformers 5.24.0 (tokenizers 0.23.3), no torch.
#
# Expected: AutoTokenizer.from_pretrained of a folder with a model and no tokenizer, as model.save_pretrained or a Trainer
# without processing_class leaves it, is an error that says which files are missing.
# Seen: where config.json names a kind that has a tokenizer class (GPT-2, BART, BERT, RoBERTa, mBART, T5, BLIP) a tokenizer
# comes back that has the special tokens alone. No error and no warning. GPT-2's gives no token at all for any caption,
# BART's start and end, BERT's an unknown token for each word, and all of them decode to nothing.
# For users: compare len(tokenizer) with config.vocab_size, or tokenize one caption and decode it, before training.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3

venv/bin/python - 2>log.txt <<'PY' || { cat log.txt; exit 1; }
from transformers import AutoTokenizer, BartConfig, BertConfig, GPT2Config

captions = ("a dog runs on grass", "two cats sleep on a sofa")
seen = {}
for config in (GPT2Config(), BartConfig(), BertConfig()):
    config.save_pretrained(config.model_type)  # a model's folder has its weights besides, which play no part
    tokenizer = AutoTokenizer.from_pretrained(config.model_type)
    ids = [tokenizer(caption).input_ids for caption in captions]
    seen[config.model_type] = len(tokenizer), ids, tokenizer.batch_decode(ids, skip_special_tokens=True)
sizes = {kind: size for kind, (size, *_) in seen.items()}
assert sizes == {"gpt2": 1, "bart": 5, "bert": 5}, seen
assert seen["gpt2"][1] == [[], []], seen
assert len(set(map(tuple, seen["bart"][1]))) == 1 and len(seen["bart"][1][0]) == 2, seen
assert len(set(seen["bert"][1][0][1:-1])) == 1, seen
assert all(not any(texts) for *_, texts in seen.values()), seen
with open("log.txt") as file:
    said = [line for line in file if "oken" in line and "PyTorch was not found" not in line]
assert not said, said
print(
    f"AutoTokenizer of a folder without tokenizer files: {sizes['gpt2']}, {sizes['bart']} and {sizes['bert']} tokens for GPT-2, BART and"
    f" BERT, no error or warning; a caption is {len(seen['gpt2'][1][0])}, 2 and as many unknown tokens as words"
)
PY
