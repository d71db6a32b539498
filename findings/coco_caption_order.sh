#!/usr/bin/env bash
# pycocoevalcap 1.2 (the reference scorer of image captioning; needs Java).
#
# Expected: scores do not depend on the order in which the images are given.
# Seen: all generated captions go through the Java tokenizer as one text, all references as another. After a single
# letter with a period ("... the letter B.") it looks at the first word of the *next image's* caption to decide
# between "b" and "b.": the capital "A" of a reference ends the sentence, the small "a" of a generated caption does
# not. A caption equal to its reference matches if its image stands last, and not if it stands first.
# For users: the same captions in another order of images get other BLEU, ROUGE-L and CIDEr. Sort by image id before
# scoring, and do not expect scores of a split to be the mean of scores of its parts.
set -euo pipefail
command -v java >/dev/null || { echo "needs Java" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pycocoevalcap==1.2

venv/bin/python - 2>/dev/null <<'PY' || { echo "the scores are not those described" >&2; exit 1; }
import contextlib
import io

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

generated = {"sign": "a street sign with the letter b.", "cat": "a cat sleeps on the sofa."}
references = {"sign": "A street sign with the letter B.", "cat": "A cat sleeping on the sofa."}


def scores(order):
    """BLEU-4 and CIDEr of the two images in this order."""
    hypotheses, truth = (
        PTBTokenizer().tokenize({image: [{"caption": captions[image]}] for image in order})
        for captions in (generated, references)
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return Bleu(4).compute_score(truth, hypotheses)[0][3], float(Cider().compute_score(truth, hypotheses)[0])


first, last = scores(["sign", "cat"]), scores(["cat", "sign"])
assert abs(first[0] - 0.619) < 0.001 and abs(last[0] - 0.732) < 0.001, (first, last)
assert abs(first[1] - 5.979) < 0.001 and abs(last[1] - 7.0) < 0.001, (first, last)
print(
    f"two images in two orders: BLEU-4 {first[0]:.3f} and {last[0]:.3f},"
    f" CIDEr {first[1]:.3f} and {last[1]:.3f}, with the same captions"
)
PY
