#!/usr/bin/env bash
# @huggingface/transformers 4.3.1 (JavaScript, npm) under Node, beside Pillow 12.0.0.
#
# Expected: an image processor with resample 2 (bilinear) or 3 (bicubic), as ViT's and CLIP's have, shrinks an image as it
# does in Python, where each new pixel is the average of all that it covers.
# Seen: transformers.js reads a few pixels around each new one and skips the rest, in both cases alike: noise of 896 pixels
# shrunk to 224 keeps a standard deviation of 74 with either, where Pillow leaves 12 (bilinear) and 15 (bicubic). Only
# lanczos (1) averages: 17 in both. No warning.
# For users: a photograph is many times as large as a model's input, so that captions and classes differ from Python's in
# the browser, most where there is texture or grain. Shrink images before, or put the resizing into the ONNX graph.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pillow==12.0.0 numpy==2.3.5
npm install --silent --no-audit --no-fund --ignore-scripts --prefix "$work" @huggingface/transformers@4.3.1 >/dev/null

cat > shrink.mjs <<'JS'
import { readFileSync } from "node:fs";
import { RawImage } from "@huggingface/transformers";
const noise = new RawImage(new Uint8ClampedArray(readFileSync("noise.rgb")), 896, 896, 3);
const spreads = [];
for (const resample of [1, 2, 3]) {
  const { data } = await noise.resize(224, 224, { resample });
  const mean = data.reduce((sum, value) => sum + value, 0) / data.length;
  spreads.push(Math.sqrt(data.reduce((sum, value) => sum + (value - mean) ** 2, 0) / data.length));
}
console.log(JSON.stringify(spreads));
JS

venv/bin/python - <<'PY'
import json
import subprocess

import numpy as np
from PIL import Image

noise = np.random.default_rng(0).integers(0, 256, (896, 896, 3), dtype=np.uint8)
with open("noise.rgb", "wb") as file:
    file.write(noise.tobytes())
pillow = [float(np.asarray(Image.fromarray(noise).resize((224, 224), resample)).std()) for resample in (1, 2, 3)]
there = json.loads(subprocess.run(["node", "shrink.mjs"], capture_output=True, text=True, check=True).stdout)
assert abs(there[0] - pillow[0]) < 0.5, (there, pillow)
assert there[1] == there[2] and 70 < there[1] < 78 and 11 < pillow[1] < 13 and 14 < pillow[2] < 16, (there, pillow)
print("transformers.js shrinks bilinear and bicubic without averaging: noise keeps 74 gray levels, in Pillow 12 and 15")
PY
