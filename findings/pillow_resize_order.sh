#!/usr/bin/env bash
# Pillow 13.0.0 beside 12.3.0.
#
# Expected: a new version resizes an image to the pixels of the one before, or to within a gray level: an image that a
# captioner was trained on is not another one for it after an upgrade.
# Seen: 13 resizes a height that shrinks much more than the width first, where 12.3 always began with the width. Between the
# passes values are rounded and cut to 0 to 255, so that bicubic and Lanczos, which overshoot at edges, give another image:
# where the width grows and the height shrinks, 180 x 480 squashed to 224 x 224 as ViT's processors do, a drawing differs by
# up to 15 gray levels with bicubic and 19 with Lanczos, bilinear by 1. The same image on its side is equal bit for bit, so
# that turning and resizing no longer commute as before. 13 is nearer to a resize in floats, which cuts nothing.
# For users: do not mix Pillow 12 and 13 between cached features, training and captioning, and compare golden pixels by tall
# images too. torchvision's resize of a tensor begins with the width, as Pillow 12 does.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for version in 12.3.0 13.0.0; do
    python3 -m venv "venv-$version"
    "venv-$version/bin/pip" install --quiet --disable-pip-version-check "pillow==$version" numpy==2.4.6
done

cat >resize.py <<'PY'
import sys

import numpy as np
from PIL import Image

FILTERS = ("BILINEAR", "BICUBIC", "LANCZOS")
drawing = Image.effect_mandelbrot((180, 480), (-2, -1, 1, 1), 60)
arrays = {}
for name in FILTERS:
    resample = Image.Resampling[name]
    arrays[f"tall {name}"] = np.asarray(drawing.resize((224, 224), resample))
    arrays[f"wide {name}"] = np.asarray(drawing.transpose(Image.Transpose.ROTATE_90).resize((224, 224), resample))
    exact = drawing.convert("F").resize((224, 224), resample)  # floats are neither rounded nor cut between the passes
    arrays[f"exact {name}"] = np.asarray(exact).clip(0, 255)
np.savez(sys.argv[1], **arrays)
PY
for version in 12.3.0 13.0.0; do "venv-$version/bin/python" resize.py "$version.npz"; done

venv-13.0.0/bin/python - <<'PY'
import numpy as np

old, new = np.load("12.3.0.npz"), np.load("13.0.0.npz")


def apart(first, second):
    return round(float(np.abs(first.astype(float) - second).max()), 1)


seen = {name: apart(old[f"tall {name}"], new[f"tall {name}"]) for name in ("BILINEAR", "BICUBIC", "LANCZOS")}
assert seen == {"BILINEAR": 1, "BICUBIC": 15, "LANCZOS": 19}, seen
for name in seen:
    assert np.array_equal(old[f"wide {name}"], new[f"wide {name}"])
    assert apart(old[f"exact {name}"], new[f"exact {name}"]) < 0.1
error = [apart(arrays["tall BICUBIC"], arrays["exact BICUBIC"]) for arrays in (old, new)]
assert error[1] < error[0], error
print(
    f"180 x 480 to 224 x 224 in Pillow 12.3 and 13: up to {seen['BICUBIC']:.0f} gray levels apart with bicubic, {seen['LANCZOS']:.0f} with"
    f" Lanczos, 0 on its side; from floats {error[0]} and {error[1]} with bicubic"
)
PY
