"""Folders that are there whole, or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(output_dir: str | Path) -> Iterator[tuple[Path, Path]]:
    """Give (folder, scratch): what stands in `folder` at the end becomes `output_dir`, unless an error ends the block.

    Raises:
        FileExistsError: There is something in `output_dir` already.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir} exists already: remove it, or give another --output_dir")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # Beside the result, hence on the same disk: the last step is then one rename.
    scratch = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.partial-", dir=output_dir.parent))
    try:
        folder = scratch / "whole"
        folder.mkdir()
        yield folder, scratch
        folder.replace(output_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
