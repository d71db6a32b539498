"""Imports follow the arrows: scripts -> training, captioning -> reporting -> modeling, data_scripts, metrics -> system."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {  # what each may import besides itself
    "system": set(),
    "modeling": {"system"},
    "data_scripts": {"system"},
    "metrics": {"system"},
    "reporting": {"modeling", "data_scripts", "metrics", "system"},
    "captioning": {"reporting", "modeling", "data_scripts", "system"},
    "training": {"reporting", "modeling", "data_scripts", "metrics", "system"},
}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
OUTER = {"benchmarks", "tests"}  # these may import everything
# Saved beside a model and run by transformers on a machine without this repository.
TRAVELS = {
    "modeling_inception_lstm",
    "caption_loss",
    "captioning_pipeline",
    "image_processing_timm",
    "transformers_versions",
}
OURS = {*ROOMS, *SCRIPTS, *OUTER, "recipes"}


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, full name of the module) of every import in a file, also of those inside a function."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{module}.{name.name}") for name in node.names]
    return found


def our_modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def violations(path: Path, allowed: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports(path)
        if (top := name.split(".")[0]) in OURS and top not in allowed
    ]


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_arrows_allow(room):
    assert our_modules(room)
    assert not [line for path in our_modules(room) for line in violations(path, ROOMS[room] | {room})]


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_script_imports_rooms_and_no_other_script(script):
    assert not violations(ROOT / f"{script}.py", set(ROOMS))


@pytest.mark.parametrize("name", sorted(TRAVELS))
def test_a_file_that_travels_to_the_hub_imports_only_its_companions(name):
    path = ROOT / "modeling" / f"{name}.py"
    statements = ast.parse(path.read_text(encoding="utf-8")).body
    for node in statements:  # transformers copies relative imports, and can follow no other form of them
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in TRAVELS, f"{path.name}:{node.lineno}"
    companions = {f"modeling.{other}" for other in TRAVELS}
    ours = [full for _, full in imports(path) if full.split(".")[0] in OURS]
    assert all(full.rsplit(".", 1)[0] in companions for full in ours), ours


def test_every_room_and_module_is_named_for_what_is_in_it():
    modules = [path for room in ROOMS for path in our_modules(room)]
    vague = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [str(path) for path in modules if vague & {path.stem, path.parent.name}]


@pytest.mark.slow
def test_data_scripts_import_no_model_and_no_training():
    """Read from the process rather than the files: none of its modules brings torch by itself or through another."""
    names = [f"data_scripts.{path.stem}" for path in our_modules("data_scripts") if path.stem != "__init__"]
    code = f"import sys, importlib\nfor name in {names}: importlib.import_module(name)\nprint('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


COMMANDS = [
    f"{room}.{path.stem}"
    for room in ("data_scripts", "training")
    for path in our_modules(room)
    if "def main(" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_data_command_imports_nothing_heavy(command):
    code = (
        "import sys, runpy\n"
        "sys.argv = ['x', '--help']\n"
        "try:\n"
        f"    runpy.run_module('{command}', run_name='__main__')\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code\n"
        "heavy = {'torch', 'datasets', 'transformers', 'pyarrow', 'pandas'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-1000:]
    assert result.stdout.startswith("usage:")
