#!/usr/bin/env bash
# img2dataset 1.47.0 (opencv-python-headless 4.14.0.94, albumentations 1.4.24), with Pillow 13.0.0 to look at the result.
#
# Expected: a downloaded photo shows what it shows at its address. Its EXIF says how it is to be turned, as most of those
# taken upright on a phone do; a tool that shrinks it turns it, or keeps that tag.
# Seen: it is read by cv2.IMREAD_UNCHANGED, which does not turn it, and written anew without EXIF: the photo lies on its
# side for good, beside a caption that says what is upright. That is so of every resize_mode, resize_mode "no" among
# them. The orientation remains in the sample's .json alone, as text ("Rotated 90 CW" under "Image Orientation").
# width and height there are those of the photo on its side too, so that min_image_size and max_aspect_ratio do not tell.
# For users: download with --disable_all_reencoding True and shrink afterwards, or turn the images as the .json says.
set -euo pipefail
work=$(mktemp -d)
trap 'kill "${server:-0}" 2>/dev/null || true; rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 NO_ALBUMENTATIONS_UPDATE=1
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check img2dataset==1.47.0 opencv-python-headless==4.14.0.94 \
    albumentations==1.4.24 pillow==13.0.0

mkdir web
venv/bin/python - <<'PY'
from PIL import Image, ImageDraw

photo = Image.new("RGB", (400, 300), "white")
ImageDraw.Draw(photo).rectangle((0, 0, 99, 299), fill="red")  # the sky, when the photo is turned upright
exif = Image.Exif()
exif[0x0112] = 6
photo.save("web/photo.jpg", exif=exif)
PY
touch server.txt
venv/bin/python -u -m http.server 0 --bind 127.0.0.1 --directory web >server.txt 2>/dev/null &
server=$!
until grep -q "port [0-9]" server.txt; do sleep 0.2; done
port=$(sed -n 's/.*port \([0-9]*\).*/\1/p' server.txt)
printf 'url,caption\nhttp://127.0.0.1:%s/photo.jpg,a red sky above white sand\n' "$port" >urls.csv
for options in "--resize_mode keep_ratio --image_size 128" "--resize_mode no" "--disable_all_reencoding True"; do
    folder=out$((number = ${number:-0} + 1))
    # shellcheck disable=SC2086
    venv/bin/img2dataset --url_list urls.csv --input_format csv --url_col url --caption_col caption --output_folder $folder \
        --output_format files --processes_count 1 --thread_count 1 $options >log.txt 2>&1 || { cat log.txt; exit 1; }
done

venv/bin/python - <<'PY'
import json

from PIL import Image, ImageOps

looks = []
for folder in ("out1", "out2", "out3"):
    with Image.open(f"{folder}/00000/000000000.jpg") as image:
        looks.append((ImageOps.exif_transpose(image), 0x0112 in image.getexif()))
    with open(f"{folder}/00000/000000000.json") as file:
        noted = json.loads(json.load(file)["exif"])["Image Orientation"]
    assert noted == "Rotated 90 CW", noted
(shrunk, tag), (same, same_tag), (kept, kept_tag) = looks
assert (shrunk.size, tag) == ((171, 128), False), (shrunk.size, tag)
assert (same.size, same_tag) == ((400, 300), False), (same.size, same_tag)
assert (kept.size, kept_tag) == ((300, 400), True), (kept.size, kept_tag)
assert kept.getpixel((150, 20))[1] < 30 < 200 < shrunk.getpixel((85, 10))[1]  # red above, and white there in the shrunk one
print(f"a portrait photo of {kept.size} is {shrunk.size} shrunk and {same.size} not resized, on its side and without EXIF")
PY
