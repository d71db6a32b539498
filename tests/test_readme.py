"""The README's commands are ones that the scripts know, and they run."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
from datasets import load_from_disk
from PIL import Image

import evaluate_captions
from data_scripts import flickr8k, image_folder, paragraphs, recaption

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(
    set(re.findall(r"(?:python|accelerate launch) (?:-m )?(?:\w+\.py|(?:data_scripts|reporting)\.\w+)[^`\n]*", README))
)


# What the README writes about the Hub runs in test_hub.py, against a Hub on the loopback address; a command that stands in a
# sentence, without anything to work on, is only named there.
RUN = [
    command
    for command in COMMANDS
    if "me/" not in command and "FOLDER" not in command and (" " in command.split(".py")[-1] or "app.py" in command)
    if not re.fullmatch(r"python -m [\w.]+", command)
]
TINY = [
    *(
        "--num_train_epochs",
        "1",
        "--per_device_train_batch_size",
        "8",
        "--hidden_size",
        "16",
        "--num_hidden_layers",
        "1",
    ),
    *("--vocab_size", "90", "--max_train_samples", "6", "--max_eval_samples", "2", "--publish_images", "true"),
    *("--image_size", "32", "--pretrained_encoder", "false", "--no_repeat_ngram_size", "0", "--report_to", "none"),
    *("--overwrite_output_dir", "true"),  # of the command that came before into the same folder
]
# Accelerate wants the same precision in all runs of a process.
# Added to a command, so that it ends in seconds; the last value of an option counts.
FASTER = {
    "train_lstm": [*TINY, "--encoder", "test_efficientnet", "--image_embed_dim", "16", "--mixed_precision", "no"],
    "train_vit_gpt2": [
        *(*TINY, "--pretrained_decoder", "false", "--num_attention_heads", "2", "--use_cpu", "true"),
        *("--freeze_encoder", "false", "--encoder_learning_rate", "1e-3"),
        *("--trim_vocabulary", "false", "--bf16", "false"),
    ],
    "train_scst": [
        *("--num_train_epochs", "1", "--per_device_train_batch_size", "3", "--num_samples", "2", "--report_to", "none"),
        *("--max_train_samples", "6", "--max_eval_samples", "2", "--eval_steps", "9", "--save_steps", "9"),
        *("--mixed_precision", "no", "--sample_min_length", "0", "--min_length", "0"),
        *("--overwrite_output_dir", "true"),
    ],
}


def split_command(command: str) -> tuple[str, list[str]]:
    """The module that a command runs, and its arguments."""
    words = shlex.split(command.removeprefix("accelerate launch ").removeprefix("python ").removeprefix("-m "))
    return words[0].removesuffix(".py"), words[1:]


def test_the_readme_names_every_way_in():
    named = {split_command(command)[0] for command in COMMANDS}
    sources = {"paragraphs", "flickr8k", "karpathy", "image_folder", "hub", "scenes"}
    scripts = {
        "train_lstm",
        "train_scst",
        "caption",
        "evaluate_captions",
        "export_onnx",
        "reporting.push",
        "data_scripts.push",
        "data_scripts.recaption",
    }
    assert scripts | {f"data_scripts.{source}" for source in sources} <= named


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_has_only_options_there_are(command, capsys):
    module, arguments = split_command(command)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(module).main(["--help"])
    assert stopped.value.code == 0
    known = capsys.readouterr().out
    for option in (word for word in arguments if word.startswith("--")):
        assert re.search(rf"{option}\b", known), option
    for recipe in (word for word in arguments if word.endswith(".yaml")):
        assert (ROOT / recipe).is_file(), recipe


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with all that the README's commands work on, small."""
    folder = tmp_path_factory.mktemp("workshop")
    names = [f"{number}.jpg" for number in range(10)]
    captions = [f"an image of {number} things on the {side}" for number in "01234" for side in ("left", "right")]
    for place in ("images", "folder"):
        (folder / place).mkdir()
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (25 * number, 90, 120)).save(folder / "images" / name)
    shutil.copy(folder / "images" / "1.jpg", folder / "folder")
    shutil.copy(folder / "images" / "2.jpg", folder / "image.jpg")
    lines = [f"{name},{caption}" for name, caption in zip(names, captions, strict=True)]
    (folder / "images" / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]))
    karpathy = [
        {"filename": name, "split": split, "sentences": [{"raw": caption}]}
        for name, caption, split in zip(names, captions, ["train"] * 6 + ["val"] * 2 + ["test"] * 2, strict=True)
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": karpathy, "dataset": "coco"}))
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    with zipfile.ZipFile(folder / "captions.zip", "w") as archive:
        for split, part in (("train", slice(0, 6)), ("val", slice(6, 8)), ("test", slice(8, 10))):
            numbered = [f"{number},{line}" for number, line in enumerate(lines[part])]
            archive.writestr(f"{split}.csv", "\n".join([",filename,caption", *numbered]))
            for name in names[part]:
                archive.write(folder / "images" / name, f"{split}/{name}")
    shutil.copy(folder / "captions.zip", folder / "custom_captions_dataset.zip")
    with zipfile.ZipFile(folder / "Flickr8k_Dataset.zip", "w") as archive:
        for name in names:
            archive.write(folder / "images" / name, f"Flicker8k_Dataset/{name}")
    with zipfile.ZipFile(folder / "Flickr8k_text.zip", "w") as archive:
        tokens = [f"{name}#0\t{caption}" for name, caption in zip(names, captions, strict=True)]
        archive.writestr("Flickr8k.token.txt", "\n".join(tokens))
        for split, part in (("train", names[:6]), ("dev", names[6:8]), ("test", names[8:])):
            archive.writestr(f"Flickr_8k.{split}Images.txt", "\n".join(part))
    inside = pytest.MonkeyPatch()
    inside.chdir(folder)
    image_folder.main(["images/", "--output_dir", "data/mine"])
    flickr8k.main(["Flickr8k_Dataset.zip", "--text", "Flickr8k_text.zip", "--output_dir", "data/flickr8k"])
    paragraphs.main(["captions.zip", "--output_dir", "data/paragraphs"])
    table = load_from_disk("data/paragraphs")
    table.map(lambda row: {"text": row["captions"][0]}, remove_columns="captions").save_to_disk("name")
    for script, output in (("train_lstm", "lstm"), ("train_vit_gpt2", "vit_gpt2")):
        options = ["--dataset_name", "data/mine", "--output_dir", f"outputs/demo/{output}", *FASTER[script]]
        importlib.import_module(script).main([*options, "--prompt", "a"] if script == "train_vit_gpt2" else options)
    for name in ("mine", "lstm_flickr8k", "lstm_best"):
        shutil.copytree("outputs/demo/lstm", f"outputs/{name}")
    shutil.copy("outputs/mine/captions.jsonl", ".")
    written = ["--split", "train", "--output_dir", "outputs/written", "--num_beams", "2"]
    written += ["--num_return_sequences", "2"]
    evaluate_captions.main(
        ["--model_name_or_path", "outputs/lstm_flickr8k", "--dataset_name", "data/flickr8k", *written]
    )
    recaption.main(
        ["data/flickr8k", "outputs/written/best_captions.jsonl", "--output_dir", "data/flickr8k_recaptioned"]
    )
    inside.undo()
    return folder


@pytest.mark.parametrize("command", RUN)
def test_a_command_of_the_readme_runs(command, workshop, tmp_path, monkeypatch, capsys):
    module, arguments = split_command(command)
    if module == "app":
        gradio = pytest.importorskip("gradio", reason="needs Gradio (pip install 'gradio>=6')")
        monkeypatch.setattr(gradio.Blocks, "launch", lambda *_, **__: None)
    folder = tmp_path / "workshop"
    shutil.copytree(workshop, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    made = dict(pairwise(arguments))
    output = made.get("--output_dir") or made.get("--output")
    if output:
        shutil.rmtree(output, ignore_errors=True)  # another command has made it before
    arguments = [word for word in arguments if not word.startswith("https://")]
    assert importlib.import_module(module).main([*arguments, *FASTER.get(module, ())]) in (None, 0)
    if output:
        assert Path(output).exists()


def test_the_readmes_lines_of_python_run(workshop):
    lines = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    run = subprocess.run(
        [sys.executable, "-c", lines], cwd=workshop, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""}
    )
    assert run.returncode == 0, run.stderr
    told = run.stdout.splitlines()
    assert len(told) == 2 and told[0].strip() == told[1].strip()


def test_the_images_on_top_are_there_and_small():
    (image,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    with Image.open(ROOT / image) as opened:
        assert opened.format == "PNG" and opened.width > 600
    assert (ROOT / image).stat().st_size < 150_000


def test_the_makefile_has_what_the_readme_calls():
    targets = set(re.findall(r"^make (\w+)$", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
