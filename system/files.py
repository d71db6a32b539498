"""Atomic writes: files and folders that are complete or absent."""

import glob
import hashlib
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


def _check_empty(output_dir: Path) -> None:
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(f"{output_dir} already exists: remove it, or choose another --output_dir")


@contextmanager
def atomic_folder(output_dir: str | Path) -> Iterator[tuple[Path, Path]]:
    """Yield (folder, scratch): `folder` becomes `output_dir` when the block ends without an error; `scratch` is removed.

    Raises:
        UserError: `output_dir` exists and is not empty.
    """
    output_dir = Path(output_dir)
    _check_empty(output_dir)
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


@contextmanager
def resumable_folder(output_dir: str | Path, key: str) -> Iterator[Path]:
    """Yield a folder to make in it what is then moved to `output_dir`; after a kill, the same one with what is in it already.

    An error removes it, as it does those that were begun for the same `output_dir` with another key.

    Raises:
        UserError: `output_dir` exists and is not empty.
    """
    output_dir = Path(output_dir)
    _check_empty(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output_dir.name}.partial-"
    folder = output_dir.parent / f"{prefix}{key}"
    for other in output_dir.parent.glob(f"{glob.escape(prefix)}*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def sha256_of(*paths: Path) -> str:
    """Digest of the content of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
