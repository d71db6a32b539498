"""Code run where the installed libraries are and nothing of this project has been imported: what a user's own script finds.

Each run is a fork of one process that has imported the libraries, which takes seconds and is the same for all.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

OURS = {"captioning", "data_scripts", "metrics", "modeling", "reporting", "system", "training"}


def run_fresh(code: str, *arguments: str | Path, folder: Path) -> str:
    """What Python code prints, run with these arguments in this folder; it must end well."""
    folder.mkdir(exist_ok=True)
    said = {name: str(folder / f"fresh.{name}") for name in ("stdout", "stderr")}
    request = {"code": code, "arguments": [str(argument) for argument in arguments], "folder": str(folder), **said}
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    status = int(server.stdout.readline())
    assert status == 0, Path(said["stderr"]).read_text(encoding="utf-8")
    return Path(said["stdout"]).read_text(encoding="utf-8")


@functools.cache
def _server() -> subprocess.Popen:
    home = tempfile.TemporaryDirectory(prefix="fresh_home_")
    environment = {"HF_HOME": home.name, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, __file__], env=os.environ | environment, cwd=home.name, **pipes)
    atexit.register(home.cleanup)
    atexit.register(server.kill)
    return server


def _serve() -> None:
    sys.path = [path for path in sys.path if path != str(Path(__file__).parent)]
    import timm  # noqa: F401
    import torch
    from transformers import (  # noqa: F401
        AutoImageProcessor,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
        GPT2LMHeadModel,
        VisionEncoderDecoderModel,
        ViTModel,
        pipeline,
    )

    torch.set_num_threads(1)
    assert not OURS & set(sys.modules)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(code: str, arguments: list[str], folder: str, stdout: str, stderr: str) -> None:
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    status = 0
    try:
        exec(compile(code, "fresh", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
