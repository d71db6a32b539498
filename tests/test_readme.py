"""The commands of README.md and docs/ are ones that the scripts know, and they run; what is generated there is up to date."""

import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
import zipfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from datasets import load_from_disk
from fresh import run_fresh
from PIL import Image

import evaluate_captions
from data_scripts import flickr8k, image_folder, karpathy, paragraphs, recaption, scenes
from training.self_critical import SelfCriticalLoss

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
MORE_PAGES = [ROOT / "RESULTS.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "experiments").glob("*.md"))]
# What starts with a program and names a script or a module of ours.
COMMAND = re.compile(
    r"(?:python|accelerate launch(?: --[\w-]+(?: (?!train_)\S+)?)*) "
    r"(?:-m )?(?:\w+\.py|(?:reporting|training)\.\w+|data_scripts(?:\.\w+)?)[^`\n#]*"
)


def commands(text: str) -> list[str]:
    return sorted({command.strip() for command in COMMAND.findall(text)})


# Not run here: what needs the Hub (test_hub.py runs that against one on the loopback address), files of others or several
# devices (test_processes.py), shards (test_shard_training.py), the export, which takes long (test_export_onnx.py), and what has
# nothing to work on.
NOT_RUN = (
    "_onnx",
    "me/",
    "nlpconnect/",
    "blip",
    "--config_file",
    "--multi_gpu",
    "MODEL",
    "--help",
    "cc12m",
    "s3://",
    "--streaming",
    "laion/",  # test_layouts.py makes these
    "flickr30k",
    "xmp",  # needs an extra: test_descriptions.py
)
RUN = [
    command
    for command in commands(TEXT)
    if not any(part in command for part in NOT_RUN) and ("--" in command or "app.py" in command)
]
# Added to a command, so that it ends in seconds; the last value of an option counts.
SHORT = [
    *("--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--no_repeat_ngram_size", "0"),
    *("--max_train_samples", "6", "--max_eval_samples", "2", "--publish_images", "true", "--report_to", "none"),
    *("--bf16", "false", "--overwrite_output_dir", "true"),  # of the command before into the same folder
]
TINY = [
    *SHORT,
    *("--hidden_size", "16", "--num_hidden_layers", "1", "--image_size", "32", "--pretrained_encoder", "false"),
]
VIT = [
    *TINY,
    "--max_steps",
    "-1",
    "--num_attention_heads",
    "2",
    "--freeze_encoder",
    "false",
    "--trim_vocabulary",
    "false",
]
FASTER = {
    "train_lstm": [*TINY, "--encoder", "test_efficientnet", "--image_embed_dim", "16", "--vocab_size", "90"],
    "train_vit_gpt2": [*VIT, "--pretrained_decoder", "false", "--vocab_size", "90"],
    "train_scst": [
        *("--num_train_epochs", "1", "--per_device_train_batch_size", "3", "--num_samples", "2", "--report_to", "none"),
        *("--max_train_samples", "6", "--max_eval_samples", "2", "--eval_steps", "9", "--save_steps", "9"),
        *("--bf16", "false", "--sample_min_length", "0", "--min_length", "0", "--overwrite_output_dir", "true"),
    ],
}


def split_command(command: str) -> tuple[str, list[str]]:
    """The module that a command runs, and its arguments."""
    words = shlex.split(command)
    script = next(place for place, word in enumerate(words) if word.endswith(".py") or "-m" in words[place - 1 : place])
    module = words[script].removesuffix(".py")
    return "data_scripts.__main__" if module == "data_scripts" else module, words[script + 1 :]


def faster(module: str, command: str) -> list[str]:
    if "--decoder" in command:
        return VIT
    if module == "train_lstm" and ("--model_name_or_path" in command or "recaptioned.yaml" in command):
        return SHORT  # the captioner's sizes stay
    more = ["--dataset_name", "data/mine"] if "_demo.yaml" in command else []
    if "--resume_from_checkpoint" in command:
        more += ["--num_train_epochs", "2"]  # one more than the run that is resumed
    return [*FASTER.get(module, ()), *more]


def test_the_readme_names_every_way_in():
    named = {split_command(command)[0] for command in commands(PAGES[0].read_text(encoding="utf-8"))}
    sources = {
        "paragraphs",
        "flickr8k",
        "karpathy",
        "coco",
        "image_folder",
        "hub",
        "scenes",
        "__main__",
        "flickr30k",
        "img2dataset",
    }
    scripts = {"train_lstm", "train_vit_gpt2", "train_scst", "app", "caption", "evaluate_captions"}
    assert scripts | {f"data_scripts.{source}" for source in sources} <= named
    more = {"export_onnx", "reporting.push", "reporting.compare", "data_scripts.push", "data_scripts.recaption"}
    assert more <= {split_command(command)[0] for command in commands(TEXT)}


@pytest.mark.parametrize(
    "command", commands("\n".join([TEXT, *(path.read_text(encoding="utf-8") for path in MORE_PAGES)]))
)
def test_a_command_of_the_documentation_has_only_options_there_are(command, capsys):
    module, arguments = split_command(command)
    words = [word for word in arguments if word.startswith("--") and word != "--help"]
    main = importlib.import_module(module).main
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    known = capsys.readouterr().out
    for option in words:
        assert re.search(rf"{option}\b", known), option
    for recipe in (word for word in shlex.split(command) if word.endswith(".yaml")):
        assert (ROOT / recipe).is_file(), recipe


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with all that the commands work on, small."""
    folder = tmp_path_factory.mktemp("workshop")
    names = [f"{number}.jpg" for number in range(10)]
    captions = [f"an image of {number} things on the {side}" for number in "01234" for side in ("left", "right")]
    for place in ("images", "folder"):
        (folder / place).mkdir()
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (25 * number, 90, 120)).save(folder / "images" / name)
    shutil.copy(folder / "images" / "1.jpg", folder / "folder")
    shutil.copy(folder / "images" / "2.jpg", folder / "photo.jpg")
    lines = [f"{name},{caption}" for name, caption in zip(names, captions, strict=True)]
    (folder / "images" / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]))
    entries = [
        {"filename": name, "split": split, "sentences": [{"raw": caption}]}
        for name, caption, split in zip(names, captions, ["train"] * 6 + ["val"] * 2 + ["test"] * 2, strict=True)
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    for split, numbers in (("train", range(6)), ("val", range(6, 10))):
        coco = {
            "images": [{"id": number, "file_name": names[number]} for number in numbers],
            "annotations": [{"image_id": number, "caption": captions[number]} for number in numbers],
        }
        (folder / f"captions_{split}2017.json").write_text(json.dumps(coco))
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
    karpathy.main(["dataset_coco.json", "--images", "images/", "--output_dir", "data/coco"])
    predictions = [{"image_id": name, "caption": "an image"} for name in names[8:]]
    (folder / "results.json").write_text(json.dumps(predictions))
    table = load_from_disk("data/paragraphs")
    table.map(lambda row: {"text": row["captions"][0]}, remove_columns="captions").save_to_disk("NAME")
    for script, output in (("train_lstm", "lstm"), ("train_vit_gpt2", "vit_gpt2")):
        recipe = [f"recipes/{output}_demo.yaml", "--dataset_name", "data/mine"]
        importlib.import_module(script).main([*recipe, *FASTER[script]])
    for name in ("mine", "lstm_flickr8k", "lstm_best"):
        shutil.copytree("outputs/demo/lstm", f"outputs/{name}")
    shutil.copytree("outputs/demo/vit_gpt2", "outputs/vit_gpt2_flickr8k")
    shutil.copy("outputs/mine/captions.jsonl", ".")
    generated = ["--split", "train", "--num_beams", "2", "--num_return_sequences", "2"]
    for table in ("mine", "flickr8k"):
        about = ["--model_name_or_path", "outputs/lstm_flickr8k", "--dataset_name", f"data/{table}"]
        evaluate_captions.main([*about, *generated, "--output_dir", "outputs/generated"])
        recaptioned = ["--output_dir", f"data/{table}_recaptioned"]
        recaption.main([f"data/{table}", "outputs/generated/best_captions.jsonl", *recaptioned])
        shutil.copy("outputs/generated/best_captions.jsonl", f"outputs/{table}_generated.jsonl")
    inside.undo()
    return folder


@pytest.mark.parametrize("command", RUN)
def test_a_command_of_the_documentation_runs(command, workshop, tmp_path, monkeypatch, capsys):
    module, arguments = split_command(command)
    if module == "app":
        gradio = pytest.importorskip("gradio", reason="needs Gradio (pip install 'gradio>=6')")
        monkeypatch.setattr(gradio.Blocks, "launch", lambda *_, **__: None)
    folder = tmp_path / "workshop"
    shutil.copytree(workshop, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    if module == "data_scripts.scenes":
        monkeypatch.setattr(scenes, "NUM_SCENES", {"train": 9, "validation": 2, "test": 2})
    if "data/mine_recaptioned" in command:  # the captions of the other dataset are there
        shutil.copy("outputs/mine_generated.jsonl", "outputs/generated/best_captions.jsonl")
    made = dict(pairwise(arguments))
    output = made.get("--output_dir") or made.get("--output")
    if output:
        shutil.rmtree(output, ignore_errors=True)  # another command has made it before
        Path(output).unlink(missing_ok=True)
    assert importlib.import_module(module).main([*arguments, *faster(module, command)]) in (None, 0)
    if output:
        assert Path(output).exists()


PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def is_script(lines: str) -> bool:
    return "train_scst.main(" in lines


def test_the_script_with_another_reward_trains(workshop, tmp_path, monkeypatch):
    (script,) = filter(is_script, PYTHON)
    (tmp_path / "reward.py").write_text(script)
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(scenes, "NUM_SCENES", {"train": 9, "validation": 2, "test": 2})
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    output = ["--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["reward.py", "recipes/scst_demo.yaml", *output, *FASTER["train_scst"]])
    names = runpy.run_path(str(tmp_path / "reward.py"))
    assert (tmp_path / "out" / "results.json").is_file()

    criterion = names["TruthLoss"].__new__(names["TruthLoss"])
    captions = [row.captions[0] for row in scenes.scene_rows() if row.split == "train"]
    processor = SimpleNamespace(batch_decode=lambda captions, **_: captions)
    criterion.captioner = SimpleNamespace(processor=processor)
    monkeypatch.setattr(SelfCriticalLoss, "rewards", lambda self, captions, *_: torch.zeros(len(captions)))
    assert criterion.rewards([captions[1], captions[1]], [1, 2], [0, 0]).tolist() == [5, 0]


@pytest.mark.slow
def test_the_lines_of_python_run(workshop):
    lines = "\n".join(lines for lines in PYTHON if not is_script(lines))
    captions = run_fresh(lines, folder=workshop).splitlines()
    assert len(captions) == 2 and captions[0].strip() == captions[1].strip()


def test_the_image_on_top_is_there_and_small():
    (image,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGES[0].read_text(encoding="utf-8"))
    with Image.open(ROOT / image) as opened:
        assert opened.format == "PNG" and opened.width > 600
    assert (ROOT / image).stat().st_size < 150_000


def test_the_makefile_has_what_the_documentation_calls():
    targets = set(re.findall(r"(?:^|`)make ([\w-]+)\b(?!=)", TEXT, flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", [*PAGES, *MORE_PAGES], ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not heading or heading in slugs, target


def generated(name: str):
    return runpy.run_path(str(ROOT / "docs" / "generate.py"))[name]


def test_options_and_tables_are_those_of_dataclasses_and_csv():
    for path, text in generated("pages")().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `python -m docs.generate`"


@pytest.mark.parametrize("script", generated("SCRIPTS"))
def test_the_options_page_lists_what_help_lists(script, capsys):
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    section = page.split(f"\n## {script}.py\n")[1].split("\n## ")[0]
    with pytest.raises(SystemExit):
        importlib.import_module(script).main(["--help"])
    in_help = set(re.findall(r"^  (--\w+)", capsys.readouterr().out, re.MULTILINE))
    assert set(re.findall(r"^\| `(--\w+)`", section, re.MULTILINE)) == in_help


def test_the_readme_is_short():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 150
    assert len((ROOT / "RESULTS.md").read_text(encoding="utf-8").splitlines()) <= 80
