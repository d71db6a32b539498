"""Laws of the captioning pipeline: the captions of `Captioner.generate`, for both captioners and for old checkpoints."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh import run_fresh
from PIL import Image
from small_captioners import COLORS, IMAGES, build
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderProcessor,
    pipeline,
)

from modeling.captioner import Captioner


def expected_captions(captioner, images, **generation) -> list[str]:
    inputs = captioner.processor(images=images, return_tensors="pt").to(captioner.model.device)  # a pipeline's, if any
    captions = captioner.generate(dict(inputs), **generation)
    return [text for made in captions for text in (made["caption"], *made.get("others", []))]


FRESH_PROCESS = """
import json, sys
from transformers import pipeline
captioner = pipeline("image-to-text", model=sys.argv[1], trust_remote_code=True)
print(json.dumps([made[0]["generated_text"] for made in captioner(sys.argv[2:], batch_size=2)]))
"""


def fresh_captions(model: Path, tmp_path: Path) -> list[str]:
    """What the README's one line gives in a process that has the installed packages and the saved folder alone."""
    names = [str(tmp_path / f"{color}.png") for color in COLORS]
    for image, name in zip(IMAGES, names, strict=True):
        image.save(name)
    return json.loads(run_fresh(FRESH_PROCESS, model, *names, folder=tmp_path / "elsewhere").splitlines()[-1])


@pytest.mark.parametrize(("kind", "prompt"), [("lstm", "attention"), ("vit_gpt2", "a big")])
@pytest.mark.slow
def test_one_line_captions_in_a_fresh_process_elsewhere(kind, prompt, tmp_path):
    captioner = build(kind, prompt)
    expected = expected_captions(captioner, IMAGES)
    assert len(set(expected)) > 1
    captioner.save(tmp_path / "saved")
    assert fresh_captions(tmp_path / "saved", tmp_path) == expected


SAVE_AGAIN = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, pipeline
source, target, way = sys.argv[1:]
captioner = pipeline("image-to-text", model=source, trust_remote_code=True)
if way == "pipe.save_pretrained":
    captioner.save_pretrained(target)
else:
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True)
    if way == "save_pretrained":
        model.save_pretrained(target)
        processor.save_pretrained(target)
    else:
        arguments = TrainingArguments(target, use_cpu=True)
        Trainer(model, arguments, processing_class=processor).save_model()
"""


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("lstm", "pipe.save_pretrained"),
        ("vit_gpt2", "pipe.save_pretrained"),
        ("lstm", "save_pretrained"),
        ("lstm", "Trainer.save_model"),
        ("vit_gpt2", "Trainer.save_model"),
    ],
)
@pytest.mark.slow
def test_a_model_saved_again_elsewhere_keeps_the_one_line(kind, way, tmp_path):
    captioner = build(kind)
    captioner.save(tmp_path / "saved")
    run_fresh(SAVE_AGAIN, tmp_path / "saved", tmp_path / "again", way, folder=tmp_path / "elsewhere")
    assert fresh_captions(tmp_path / "again", tmp_path) == expected_captions(captioner, IMAGES)


def test_a_processor_carries_the_pipelines_file_and_loads_without_remote_code(tmp_path):
    build("vit_gpt2").save(tmp_path / "saved")
    written = (tmp_path / "saved" / "captioning_pipeline.py").read_bytes()
    plain = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert type(plain) is VisionTextDualEncoderProcessor
    ours = AutoProcessor.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    ours.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "captioning_pipeline.py").read_bytes() == written
    for folder in ("saved", "again"):
        for part in (AutoTokenizer, AutoImageProcessor, AutoProcessor):
            assert not type(part.from_pretrained(tmp_path / folder)).__module__.startswith("transformers_modules")
    pixels = [one(images=IMAGES, return_tensors="pt")["pixel_values"] for one in (plain, ours)]
    assert torch.equal(*pixels)


@pytest.mark.slow
def test_an_lstm_captioner_that_was_never_saved_before_keeps_the_one_line(tmp_path):
    captioner = build("lstm")
    captioner.model.save_pretrained(tmp_path / "first")
    captioner.processor.save_pretrained(tmp_path / "first")
    assert fresh_captions(tmp_path / "first", tmp_path) == expected_captions(captioner, IMAGES)


@pytest.mark.slow
def test_a_pipeline_saved_here_keeps_the_one_line(tmp_path):
    captioner = build("vit_gpt2")
    parts = {"tokenizer": captioner.tokenizer, "image_processor": captioner.image_processor}
    pipeline("image-captioning", model=captioner.model, **parts).save_pretrained(tmp_path / "again")
    assert fresh_captions(tmp_path / "again", tmp_path) == expected_captions(captioner, IMAGES)


@pytest.mark.slow
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


def test_options_of_generate_are_taken_as_a_dict_too():
    built = build("lstm")
    parts = {"tokenizer": built.tokenizer, "image_processor": built.image_processor}
    captioner = pipeline("image-captioning", model=built.model, **parts)
    options = {"num_beams": 3, "max_length": 5}
    assert captioner(IMAGES, generate_kwargs=options) == captioner(IMAGES, **options) != captioner(IMAGES)
    once = pipeline("image-captioning", model=built.model, generate_kwargs=options, **parts)
    assert once(IMAGES) == captioner(IMAGES, **options)
    with pytest.raises(ValueError, match="num_beams"):
        captioner(IMAGES, generate_kwargs=options, num_beams=2)


@pytest.mark.parametrize("kind", ["lstm", "vit_gpt2"])
def test_a_photograph_lies_as_it_was_taken_and_16_bits_keep_their_shades(kind, tmp_path):
    built = build(kind, "attention" if kind == "lstm" else "")
    captioner = pipeline(
        "image-captioning", model=built.model, tokenizer=built.tokenizer, image_processor=built.image_processor
    )
    gray = Image.linear_gradient("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep.save(tmp_path / "deep.png")
    gray.rotate(90).save(tmp_path / "turned.jpg", exif=exif, quality=100)
    pixels = [
        captioner.preprocess(image)["pixel_values"]
        for image in (gray, deep, str(tmp_path / "deep.png"), tmp_path / "turned.jpg")
    ]
    encoded = base64.b64encode((tmp_path / "deep.png").read_bytes()).decode()
    pixels.append(captioner.preprocess(f"data:image/png;base64,{encoded}")["pixel_values"])
    for one in pixels[1:]:
        torch.testing.assert_close(one, pixels[0], atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", ["lstm", "vit_gpt2"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "CMYK", "1"])
def test_a_processor_takes_images_of_any_mode(kind, mode, tmp_path):
    captioner = build(kind)
    captioner.save(tmp_path)
    image = IMAGES[3]  # white in every mode
    processor = AutoProcessor.from_pretrained(tmp_path)
    pixels = processor(images=image.convert(mode), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, processor(images=image, return_tensors="pt")["pixel_values"])
