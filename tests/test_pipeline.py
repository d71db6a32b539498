"""Laws of the captioning pipeline: the captions of `Captioner.generate`, for both captioners and for old checkpoints."""

import json
import os
import subprocess
import sys

import pytest
from small_captioners import COLORS, IMAGES, build
from transformers import VisionEncoderDecoderModel, pipeline

from modeling.captioner import Captioner


def expected_captions(captioner, images, **generation) -> list[str]:
    inputs = captioner.processor(images=images, return_tensors="pt")
    captions = captioner.generate(dict(inputs), **generation)
    return [text for made in captions for text in (made["caption"], *made.get("others", []))]


FRESH_PROCESS = """
import json, sys
from transformers import pipeline
captioner = pipeline("image-to-text", model=sys.argv[1], trust_remote_code=True)
print(json.dumps([made[0]["generated_text"] for made in captioner(sys.argv[2:], batch_size=2)]))
"""


@pytest.mark.parametrize(("kind", "prompt"), [("lstm", "attention"), ("vit_gpt2", "a big")])
def test_one_line_captions_in_a_fresh_process_elsewhere(kind, prompt, tmp_path):
    captioner = build(kind, prompt)
    expected = expected_captions(captioner, IMAGES)
    assert len(set(expected)) > 1
    captioner.save(tmp_path / "saved")
    names = [str(tmp_path / f"{color}.png") for color in COLORS]
    for image, name in zip(IMAGES, names, strict=True):
        image.save(name)
    (tmp_path / "elsewhere").mkdir()
    made = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(tmp_path / "saved"), *names],
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"PYTHONPATH": "", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout.splitlines()[-1]) == expected


def test_an_old_checkpoint_captions_in_one_line_again(tmp_path):
    """A folder as nlpconnect/vit-gpt2-image-captioning is: no processor, no pipeline, ids in config.json."""
    saved = build("vit_gpt2")
    special_ids = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
    saved.model.config.update(special_ids)
    saved.model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    saved.image_processor.save_pretrained(tmp_path)
    saved.tokenizer.save_pretrained(tmp_path)
    captioner = pipeline("image-captioning", model=str(tmp_path))
    assert type(captioner.model) is VisionEncoderDecoderModel
    options = {"max_length": 10, "num_beams": 3}
    expected = expected_captions(Captioner.load(tmp_path), IMAGES, **options)
    assert [made[0]["generated_text"] for made in captioner(IMAGES, **options)] == expected


@pytest.mark.parametrize("kind", ["lstm", "vit_gpt2"])
def test_images_in_any_form_and_several_captions_each(kind, tmp_path):
    built = build(kind)
    captioner = pipeline(
        "image-captioning", model=built.model, tokenizer=built.tokenizer, image_processor=built.image_processor
    )
    IMAGES[0].save(tmp_path / "image.png")
    (one,) = expected_captions(built, IMAGES[:1])
    assert captioner(IMAGES[0]) == captioner(str(tmp_path / "image.png")) == [{"generated_text": one}]
    assert captioner(IMAGES[0].convert("L").convert("RGBA"))[0].keys() == {"generated_text"}
    options = {"num_beams": 4, "num_return_sequences": 2}
    beams = expected_captions(built, IMAGES, **options)
    for batch_size in (1, 2):
        made = captioner(IMAGES, batch_size=batch_size, **options)
        assert [caption["generated_text"] for image in made for caption in image] == beams
        assert [len(image) for image in made] == [2] * len(IMAGES)
