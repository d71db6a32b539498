#!/usr/bin/env bash
# Pillow 12.3.0.
#
# Expected: Image.save does not change what later calls do with the image: an image that was saved as a JPEG or PNG can be a page of a
# TIFF afterwards.
# Seen: save leaves its encoder's settings on the image (encoderconfig). image.save("x.tif", save_all=True, append_images=[page]) takes
# those of a page that has any, and ends with "TypeError: function takes at most 4 arguments (18 given)" where the page was saved as a
# JPEG before (8 given after PNG, 20 after JPEG 2000), leaving half a file. The first image's own are set anew.
# For users: append page.copy().
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check pillow==12.3.0

venv/bin/python - <<'PY'
import io

from PIL import Image


def save_pages(kind, copy):
    first, page = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    if kind:
        page.save(io.BytesIO(), kind)
    file = io.BytesIO()
    try:
        first.save(file, "TIFF", save_all=True, append_images=[page.copy() if copy else page])
    except TypeError as error:
        return str(error)
    return Image.open(file).n_frames


fresh, copied = save_pages(None, copy=False), save_pages("JPEG", copy=True)
after = {kind: save_pages(kind, copy=False) for kind in ("JPEG", "PNG", "JPEG2000")}
assert fresh == copied == 2 and all("at most 4 arguments" in str(error) for error in after.values()), (fresh, copied, after)
print(f"pages of a TIFF: {fresh} of fresh images, {copied} of a copy; of an image that was saved as a JPEG before: {after['JPEG']!r}")
PY
