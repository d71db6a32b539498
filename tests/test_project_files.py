"""The files about the project agree with the project."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def test_the_citation_is_one():
    """The keys that the Citation File Format 1.2.0 requires, and the project's own version and license."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    for paper in [citation, *citation["references"]]:
        assert paper["title"] and all("name" in author or "family-names" in author for author in paper["authors"])
    assert (citation["version"], citation["license"]) == (SETUP["metadata"]["version"], SETUP["metadata"]["license"])


def test_the_changes_begin_with_this_version():
    newest = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE).group(1)
    assert newest == SETUP["metadata"]["version"]


def test_forks_run_what_ci_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    job = workflow["jobs"]["test"]
    ran = {step["run"] for step in job["steps"] if "run" in step}
    assert ran == set(re.findall(r"^make \w+$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE))
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {command.removeprefix("make ") for command in ran} <= set(targets)
    assert workflow[True].keys() >= {"push", "pull_request"}  # YAML reads `on` as true


def test_every_python_of_the_classifiers_is_run_by_forks():
    """And the floors are, by the Makefile's target, in a job of their own."""
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    ran = workflows["test"]["jobs"]["test"]["strategy"]["matrix"]["python-version"]
    named = re.findall(r"^Programming Language :: Python :: (3\.\d+)$", SETUP["metadata"]["classifiers"], re.MULTILINE)
    assert ran == named and SETUP["options"]["python_requires"] == f">={named[0]}"
    (target,) = [step["run"] for step in workflows["floors"]["jobs"]["floors"]["steps"] if "run" in step]
    assert re.search(rf"^{target.removeprefix('make ')}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_torch_without_cuda_stays(tmp_path):
    """What TORCH_INDEX gave is not replaced by the index's own torch, to which `uv pip install --upgrade` would upgrade it."""
    ready = tmp_path / "venv" / ".ready"
    command = ["make", "--dry-run", f"VENV={ready.parent}", "TORCH_INDEX=https://example.org/cpu", str(ready)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    torch, project = (line for line in printed if "install --quiet" in line)
    assert "--index-url https://example.org/cpu" in torch and "--upgrade" not in project


def test_the_floors_are_the_lower_bounds():
    """What `make test-floors` installs is what setup.cfg says is enough."""
    bounds = dict(line.split(">=") for line in SETUP["options"]["install_requires"].split())
    lines = (ROOT / "tests" / "floors.txt").read_text().splitlines()
    floors = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: bounds[name] for name in floors} == {
        name: ".".join(version.split(".")[: bounds[name].count(".") + 1]) for name, version in floors.items()
    }
    assert {"torch", "transformers", "datasets", "accelerate", "timm", "tokenizers"} <= floors.keys()
