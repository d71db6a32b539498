#!/usr/bin/env bash
# lm-eval 0.4.13 (lm_eval.api.metrics) with sacrebleu 2.6.0.
#
# Expected: bleu, chrf and ter score a caption against all references of its image, as sacrebleu does. Images may have
# different numbers of them: COCO has five to seven.
# Seen: the references are turned from a list for each image into one for each place by zip(*references), which ends with
# the shortest: every image is left with as many references as the image that has fewest, in the order given. One image
# with one reference among three takes two thirds of the others' away. No warning; scores are too low, and depend on an
# image that is scored beside them.
# For users: pad the lists with None, which sacrebleu passes over, or use sacrebleu itself; compare only splits with the
# same number of references everywhere. lmms-eval 0.7.3 has the same function.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check lm-eval==0.4.13 sacrebleu==2.6.0

venv/bin/python -W ignore - <<'PY'
import sacrebleu
from lm_eval.api.metrics import bleu, chrf

images = [
    (["two dogs", "two dogs play", "two dogs run on the green grass"], "two dogs run on the green grass"),
    (["some bikes", "bikes stand", "a row of bikes stands by a wall"], "a row of bikes stands by a wall"),
]
single = (["a cat sits on a wooden table"], "a cat sits on a wooden table")
captions = [caption for _, caption in [*images, single]]
padded = [(references + [None] * (3 - len(references)), caption) for references, caption in [*images, single]]

assert round(bleu(images), 1) == 100, bleu(images)
truth = sacrebleu.corpus_bleu(captions, list(zip(*(references for references, _ in padded)))).score
assert round(truth, 1) == round(bleu(padded), 1) == 100, (truth, bleu(padded))
seen, first = bleu([*images, single]), bleu([(references[:1], caption) for references, caption in [*images, single]])
assert seen == first and seen < 50, (seen, first)
letters = chrf([*images, single])
assert letters < 80, letters
print(
    f"captions that equal one of their references: BLEU {truth:.0f} in sacrebleu, {seen:.0f} in lm-eval (chrF {letters:.0f}), as one"
    " of three images has one reference and the others lose two of three"
)
PY
