"""Atomic writes: files and folders that are complete or absent."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from system.errors import UserError


def write_file(path: str | os.PathLike, content: bytes, sync: bool = True) -> Path:
    """Write a file atomically: to a temporary file in the same folder, then renamed. Parent folders are created.

    Args:
        sync: Whether it survives a power cut, too, and not only a kill: some milliseconds for each file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())  # else a power cut can leave the new name on an empty file
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


@contextmanager
def atomic_folder(output_dir: str | Path) -> Iterator[tuple[Path, Path]]:
    """Yield (folder, scratch): `folder` becomes `output_dir` when the block ends without an error; `scratch` is removed.

    Raises:
        UserError: `output_dir` exists and is not empty.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"{output_dir} already exists: remove it, or choose another --output_dir")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # In the same parent folder, hence on the same disk: the last step is one rename.
    scratch = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.partial-", dir=output_dir.parent))
    try:
        folder = scratch / "whole"
        folder.mkdir()
        yield folder, scratch
        folder.replace(output_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
