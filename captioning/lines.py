"""A file of lines that grows as captions come, survives a kill at any byte, and may be written by several processes.

The first process appends to the file itself, the others to NAME.part-1, NAME.part-2 and so on, which the first process adds to the
file when all have ended, or when the next run begins.
"""

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np

from system.errors import UserError
from system.files import write_file

LINES_AT_ONCE = 10_000  # of a part that is added


class Names:
    """A set of names at eight bytes each: of a million, two share their digest with a probability of 3e-8."""

    def __init__(self, names: Iterable[str] = ()):
        self._digests = np.sort(np.fromiter(map(self._digest, names), dtype=np.uint64))

    @staticmethod
    def _digest(name: str) -> int:
        return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")

    def __contains__(self, name: str) -> bool:
        digest = np.uint64(self._digest(name))
        place = np.searchsorted(self._digests, digest)
        return place < len(self._digests) and self._digests[place] == digest


class LineFile:
    """Lines of one process; see the module.

    Args:
        path: The file of all processes.
        name_of: A line's image.
        lines_per_image: Lines that belong together: an image that lacks one is captioned anew.
        process: This process's number; 0 is the one that owns the file.
    """

    def __init__(self, path: Path, name_of: Callable[[str], str], lines_per_image: int = 1, process: int = 0):
        self.path, self.name_of, self.lines_per_image = path, name_of, lines_per_image
        self.own = path if process == 0 else path.with_name(f"{path.name}.part-{process}")
        self._file = None

    def __iter__(self) -> Iterator[str]:
        """The lines of the file, without those of parts."""
        if self.path.exists():
            with open(self.path, encoding="utf-8", newline="\n") as file:
                yield from file

    def names(self) -> Iterator[str]:
        """The image of each line of the file.

        Raises:
            UserError: A line is none of this output.
        """
        for number, line in enumerate(self, 1):
            try:
                yield self.name_of(line)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path}, line {number}: no line of captions: remove it, or --resume false to begin the output anew"
                ) from error

    def parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.part-*"))

    def recover(self) -> None:
        """Cut what a kill has left behind the last whole image, and add the parts of other processes; for the first process."""
        for path in [self.path, *self.parts()]:
            if path.exists():
                self.cut(path)
        if parts := self.parts():
            # A kill may come between adding a part and removing it: its images are then there already.
            known = Names(self.names())
            for part in parts:
                with open(part, encoding="utf-8", newline="\n") as file:
                    lines = (line for line in file if self.name_of(line) not in known)
                    while chunk := list(islice(lines, LINES_AT_ONCE)):
                        self.append(chunk)
                part.unlink()
            self.close()

    def cut(self, path: Path) -> None:
        """Cut a torn last line, and lines of an image that lacks one."""
        with open(path, "rb+") as file:
            end = _last_line_end(file)
            file.seek(0)
            if self.lines_per_image > 1:
                number = sum(1 for _ in _whole_lines(file, end))
                keep = number - number % self.lines_per_image
                file.seek(0)
                end = sum(len(line) for line, _ in zip(_whole_lines(file, end), range(keep), strict=False))
            file.truncate(end)

    def append(self, lines: Iterable[str]) -> None:
        """Append lines; they are the system's when this returns, so that no kill of this process loses them."""
        if self._file is None:
            self.own.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.own, "ab")  # noqa: SIM115 (until `close`)
        self._file.write("".join(lines).encode("utf-8", "backslashreplace"))
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Remove the file and its parts."""
        self.close()
        for path in [self.path, *self.parts()]:
            path.unlink(missing_ok=True)

    def rewrite(self, lines: Iterable[str]) -> None:
        """Replace this process's file, whole or not at all."""
        self.close()
        write_file(self.own, "".join(lines).encode("utf-8", "backslashreplace"))


def json_line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def image_id_of(line: str) -> str:
    """The image of a line of JSON."""
    return json.loads(line)["image_id"]


def _last_line_end(file) -> int:
    """The number of bytes up to and with the last line end."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 2**16)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _whole_lines(file, end: int) -> Iterator[bytes]:
    """The lines up to a byte."""
    while file.tell() < end and (line := file.readline()):
        yield line
