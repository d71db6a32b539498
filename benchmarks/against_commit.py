"""Time small trainings, `--help` and a cold caption of this working tree against an earlier commit of it.

    python -m benchmarks.against_commit COMMIT --json against_commit.json

The commit is cloned into a temporary folder. Both sides run the same scripts on the same drawn scenes, in turns, on one thread of
the CPU. All seconds are processor time, user and system, on which other work on the machine has little effect.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.machine import benchmark_parser, describe_machine, in_turns, medians, ratio_of_medians, write_result
from data_scripts.caption_table import write_caption_table
from data_scripts.scenes import scene_rows
from system.errors import UserError, one_line_errors

ROOT = Path(__file__).resolve().parents[1]
FORMER_NAMES = {"dataset_name": "dataset", "model_name_or_path": "model"}  # of options, until 2026-11-27
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

NUM_IMAGES = {"train": 400, "validation": 20}
NUM_CAPTIONS = dict.fromkeys(NUM_IMAGES, 5)
BATCH_SIZE = 16
NUM_EPOCHS = 2  # so that the end of an epoch is timed; the only evaluation is after the last step, and is not
OPTIONS = {
    "pretrained_encoder": "false",
    "vocab_size": 300,
    "per_device_train_batch_size": BATCH_SIZE,
    "num_train_epochs": NUM_EPOCHS,
    "eval_epochs": NUM_EPOCHS,
    "save_epochs": NUM_EPOCHS,
    "report_to": "none",
    "overwrite_output_dir": "true",
}
SMALL = {"image_embed_dim": 16, "hidden_size": 16, "num_hidden_layers": 1}
LSTM = ("train_lstm.py", {"encoder": "test_efficientnet", "image_size": 64})
VIT_GPT2 = ("train_vit_gpt2.py", {"pretrained_decoder": "false", "prompt": "", "image_size": 64, "patch_size": 16})
# The small models take hardly more time than the loop around them; a trainable encoder decodes each image in each epoch.
TRAININGS = {
    "lstm, small": (*LSTM, SMALL),
    "lstm, trainable encoder": (*LSTM, {**SMALL, "freeze_encoder": "false"}),
    "lstm, larger": (*LSTM, {"image_embed_dim": 512, "hidden_size": 512, "num_hidden_layers": 2}),
    "vit_gpt2, small": (*VIT_GPT2, {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}),
    "vit_gpt2, larger": (*VIT_GPT2, {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}),
}

# Runs a script, and writes the processor time at the end of each optimizer step.
TIMED_STEPS = """
import json, runpy, sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook
moments = []
register_optimizer_step_post_hook(lambda *_: moments.append(time.process_time()))
path, *sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
with open(path, "w") as file:
    json.dump(moments, file)
"""


@dataclass
class Tree:
    """The repository at one commit, and the folder that its runs write to."""

    root: Path
    outputs: Path

    def run(self, *command) -> float:
        """Processor seconds of a Python process that is started in the repository."""
        own = {"HF_DATASETS_CACHE": str(self.outputs / "cache"), "PYTHONPATH": str(self.root)}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=self.root,
            env=os.environ | ENVIRONMENT | own,
            capture_output=True,
            text=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            raise RuntimeError(f"{command} in {self.root} failed:\n{process.stderr}")
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def option(self, script: str, name: str) -> str:
        """An option by the name that it has at this commit."""
        return f"--{name if name in (self.root / script).read_text() else FORMER_NAMES[name]}"

    def train(self, name: str, dataset: Path) -> tuple[float, float]:
        """Processor milliseconds per caption from the first optimizer step to the last, and of the median step alone."""
        script, model, sizes = TRAININGS[name]
        options = {"output_dir": self.output_dir(name), **OPTIONS, **model, **sizes}
        words = [word for option, value in options.items() for word in (f"--{option}", value)]
        moments = self.outputs / "moments.json"
        self.run("-c", TIMED_STEPS, moments, script, self.option(script, "dataset_name"), dataset, *words)
        steps = [1000 * (end - start) / BATCH_SIZE for start, end in pairwise(json.loads(moments.read_text()))]
        return sum(steps) / len(steps), median(steps)

    def caption(self, name: str, image: Path) -> float:
        """Processor seconds of `caption.py` with the captioner that `train` left."""
        option = self.option("caption.py", "model_name_or_path")
        return self.run("caption.py", option, self.output_dir(name), image)

    def exported(self, name: str, image: Path) -> Callable[[], float]:
        """As `caption`, with an export of that captioner, made now."""
        folder = self.output_dir(name).with_name(f"{self.output_dir(name).name}_onnx")
        self.run("export_onnx.py", self.output_dir(name), folder)
        return partial(self.run, "caption.py", "--model_name_or_path", folder, image)

    def output_dir(self, name: str) -> Path:
        return self.outputs / name.replace(", ", "-").replace(" ", "-")


def main(argv: list[str] | None = None) -> None:
    parser = benchmark_parser(__doc__, runs=3)
    parser.add_argument("commit", help="commit to compare with")
    parser.add_argument("--trainings", choices=TRAININGS, nargs="*", default=list(TRAININGS), help="models to train")
    args = parser.parse_args(argv)
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        write_result(compare(args, Path(folder)), args.json)


def compare(args, folder: Path) -> dict:
    trees = {args.commit: Tree(clone(args.commit, folder / "clone"), folder / "before")}
    trees["working tree"] = Tree(ROOT, folder / "now")
    for tree in trees.values():
        tree.outputs.mkdir()
    rows = scene_rows(NUM_IMAGES, num_captions=NUM_CAPTIONS)
    write_caption_table(rows, folder / "scenes", validation_share=0, test_share=0)
    (folder / "image.png").write_bytes(rows[0].read())

    def compared(sides: dict) -> dict:
        measured = in_turns(sides, args.runs)
        ratio = ratio_of_medians(measured, "working tree", args.commit)
        return {"runs": measured, "medians": medians(measured), "ratio": ratio}

    result = {"machine": describe_machine()}
    result["milliseconds_per_caption"] = {}
    for name in args.trainings:
        print(name)
        steps = {side: [] for side in trees}

        def train(side: str, name=name, steps=steps) -> float:
            mean, of_step = trees[side].train(name, folder / "scenes")
            steps[side].append(of_step)
            return mean

        timed = compared({side: partial(train, side) for side in trees})
        timed["median_step"] = medians(steps)
        timed["ratio_of_median_steps"] = ratio_of_medians(steps, "working tree", args.commit)
        result["milliseconds_per_caption"][name] = timed
    result["seconds"] = {}
    for command in (["caption.py", "--help"], ["train_lstm.py", "--help"]):
        print(*command)
        result["seconds"][" ".join(command)] = compared(
            {side: partial(tree.run, *command) for side, tree in trees.items()}
        )
    for name in args.trainings:
        if "small" in name:
            print(f"caption.py, {name}")
            sides = {side: partial(tree.caption, name, folder / "image.png") for side, tree in trees.items()}
            result["seconds"][f"caption.py, {name}"] = compared(sides)
            sides["working tree"] = trees["working tree"].exported(name, folder / "image.png")
            result["seconds"][f"caption.py, {name}, exported"] = compared(sides)
    return result


def clone(commit: str, folder: Path) -> Path:
    """The repository at a commit, in a folder.

    Raises:
        UserError: The repository has no such commit.
    """
    for command in (["clone", "--quiet", "--no-checkout", ROOT, folder], ["-C", folder, "checkout", "--quiet", commit]):
        if subprocess.run(["git", *command]).returncode:
            raise UserError(f"there is no commit {commit} of {ROOT}; `git log` lists them")
    return folder


if __name__ == "__main__":
    main()
