"""The README's commands are ones that the scripts know."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(
    set(re.findall(r"(?:python|accelerate launch) (?:-m )?(?:\w+\.py|(?:data_scripts|reporting)\.\w+)[^`\n]*", README))
)


def split_command(command: str) -> tuple[str, list[str]]:
    """The module that a command runs, and its arguments."""
    words = shlex.split(command.removeprefix("accelerate launch ").removeprefix("python ").removeprefix("-m "))
    return words[0].removesuffix(".py"), words[1:]


def test_the_readme_names_every_way_in():
    named = {split_command(command)[0] for command in COMMANDS}
    sources = {"paragraphs", "flickr8k", "karpathy", "image_folder", "hub", "scenes"}
    scripts = {"train_lstm", "caption", "evaluate_captions", "export_onnx", "reporting.push", "data_scripts.push"}
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


def test_the_makefile_has_what_the_readme_calls():
    targets = set(re.findall(r"^make (\w+)$", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
