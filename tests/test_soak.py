"""Captioning takes as much memory for many images as for few.

python tests/test_soak.py --images 20000     the long version: one image in a hundred is broken
"""

import argparse
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
from kill_points import start_server
from PIL import Image
from small_captioners import build

FEW, MANY = 100, 500
GROWTH_IN_MEGABYTES = 40  # a hundred decoded images of this size have 75

pytestmark = pytest.mark.slow


def make_images(folder: Path, number: int) -> int:
    """Fill a folder with links to one image of 500 x 500, every hundredth broken. Returns how many are whole."""
    folder.mkdir(parents=True)
    Image.effect_noise((500, 500), 60).convert("RGB").save(folder.parent / "whole.jpg")
    (folder.parent / "broken.jpg").write_bytes((folder.parent / "whole.jpg").read_bytes()[:3000])
    for place in range(number):
        os.link(folder.parent / ("broken.jpg" if place % 100 == 7 else "whole.jpg"), folder / f"{place:06}.jpg")
    return number - len(range(7, number, 100))


def caption(model: str, folder: str, output: str, peak) -> None:
    import torch

    import caption as script

    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    options = [
        "--batch_size",
        "16",
        "--max_length",
        "8",
        "--encoder_engine",
        "torch",
    ]  # onnxruntime is loaded for many alone
    script.main(["--model_name_or_path", model, folder, "--output", output, *options])
    peak.value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_megabytes(context, model: str, folder: Path, number: int) -> float:
    """The most memory that the captioning of so many images takes, in a process of its own."""
    whole = make_images(folder / str(number) / "images", number)
    output = folder / f"{number}.jsonl"
    peak = context.Value("q", 0)
    arguments = (model, str(folder / str(number) / "images"), str(output), peak)
    process = context.Process(target=caption, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0
    captions = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(captions) == len({line["image_id"] for line in captions}) == whole
    return peak.value / 1024


def test_captioning_five_times_as_many_images_takes_no_more_memory(tmp_path):
    context = start_server()
    build("lstm").save(tmp_path / "model")
    model = str(tmp_path / "model")
    few, many = (peak_megabytes(context, model, tmp_path, number) for number in (FEW, MANY))
    assert many - few < GROWTH_IN_MEGABYTES, f"{few:.0f} MB for {FEW} images, {many:.0f} MB for {MANY}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    number = parser.parse_args().images
    context = start_server()
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(folder) / "model")
        build("lstm").save(model)
        for size in (number // 10, number):
            print(f"{size:,} images: {peak_megabytes(context, model, Path(folder), size):,.0f} MB at most", flush=True)


if __name__ == "__main__":
    main()
