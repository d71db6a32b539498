#!/usr/bin/env bash
# torchmetrics 1.9.0 (functional.text.bleu_score), beside sacrebleu 2.6.0 and nltk 3.10.4; torch 2.13.0.
#
# Expected: the references of an image are a set, so that BLEU does not depend on their order. Where two references are
# equally close in length to a caption, BLEU takes the shorter one.
# Seen: torchmetrics takes the one that stands first. A caption of five words with references of four and six words has
# .819 as a brevity penalty with the longer one first, and none with the shorter one first: BLEU .819 or 1.0 for the same
# data. sacrebleu and nltk give 1.0 in either order.
# For users: captions of a data set often have references one word shorter and one word longer, so the score changes with
# the order in which a table lists them, by a few ten-thousandths over a test split. Not comparable with other packages.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0 sacrebleu==2.6.0 nltk==3.10.4

venv/bin/python - <<'PY'
from nltk.translate.bleu_score import corpus_bleu
from sacrebleu.metrics import BLEU
from torchmetrics.functional.text import bleu_score

caption = "a dog runs on grass"
short, long = "a dog runs on", "a dog runs on grass today"
seen = []
for references in ([short, long], [long, short]):
    seen.append(
        (
            round(bleu_score([caption], [references]).item(), 3),
            round(BLEU().corpus_score([caption], [[reference] for reference in references]).score / 100, 3),
            round(corpus_bleu([[reference.split() for reference in references]], [caption.split()]), 3),
        )
    )
assert seen == [(1.0, 1.0, 1.0), (0.819, 1.0, 1.0)], seen
print("torchmetrics' BLEU of the same caption and references: 1.0 or .819, by the order of the references")
PY
