#!/usr/bin/env bash
# nltk 3.10.4, compared with sacrebleu 2.6.0.
#
# Expected: corpus_bleu of captions that equal their references is 1.
# Seen: 0.87. For an n-gram order that a caption is too short to have, its denominator is counted as 1 instead of 0 (a
# guard against division by zero that is meant for the whole corpus), so a two-word caption adds one missed 3-gram and
# one missed 4-gram. sacrebleu and coco-caption add none.
# For users: on short captions corpus_bleu is too low by an amount that depends on how many of *the model's* captions
# have fewer than four words, so it ranks models by length. A perfect caption file shows it at once.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check nltk==3.10.4 sacrebleu==2.6.0

venv/bin/python - <<'PY'
import sacrebleu
from nltk.translate.bleu_score import corpus_bleu

captions = ["a dog", "two men", "a man rides a brown horse on the beach"]
words = [caption.split() for caption in captions]
by_nltk = corpus_bleu([[caption] for caption in words], words)
by_sacrebleu = sacrebleu.corpus_bleu(captions, [captions]).score / 100
long_only = corpus_bleu([[words[2]]], [words[2]])
assert abs(long_only - 1) < 1e-9 and abs(by_sacrebleu - 1) < 1e-9, (long_only, by_sacrebleu)
# 3-grams: 7 of 7 + 1 + 1; 4-grams: 6 of 6 + 1 + 1
assert abs(by_nltk - (7 / 9 * 6 / 8) ** 0.25) < 1e-9, by_nltk
print(f"corpus BLEU-4 of three captions equal to their references: nltk {by_nltk:.3f}, sacrebleu {by_sacrebleu:.3f}")
PY
