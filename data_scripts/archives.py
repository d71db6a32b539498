"""Files of a folder, a zip or a zip's URL, read by relative name and never from outside it."""

import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from system.downloads import download
from system.errors import UserError

GIGABYTE = 2**30
MAX_FILE_BYTES = GIGABYTE  # of one file; the largest honest one, COCO's captions, has a seventh of it
MAX_UNPACKED_GIGABYTES = 64.0  # of a whole zip; all of COCO has a third of it
HOW_TO_RAISE_THE_LIMIT = "raise --max_unpacked_gigabytes if you trust it"


class SourceFiles:
    """The files of a folder or a zip.

    A name can be read only if the listing has it, and the listing has no name that leads outside: that one rule
    answers absolute names, `..` and links, whether they stand in an archive or in a caption table.

    Args:
        location: What to call the source in a sentence to the user.
        readers: Reads a file's bytes, by relative name with forward slashes.
    """

    def __init__(self, location: str, readers: dict[str, Callable[[], bytes]]):
        self.location = location
        self.names = sorted(readers)
        self._readers = readers
        self._names_by_basename: dict[str, list[str]] = {}
        for name in self.names:
            self._names_by_basename.setdefault(PurePosixPath(name).name, []).append(name)

    def read(self, name: str) -> bytes:
        """Return the bytes of one file.

        Raises:
            FileNotFoundError: The source has no such file.
            OSError: The file is damaged or too large.
        """
        if name not in self._readers:
            raise FileNotFoundError(f"{self.location} has no file '{name}'")
        return self._readers[name]()

    def find(self, name: str) -> str | None:
        """Return the listed name that is `name`, or else ends with it in whatever folder."""
        if name in self._readers:
            return name
        candidates = self._names_by_basename.get(PurePosixPath(name).name, [])
        return next((candidate for candidate in candidates if candidate.endswith("/" + name)), None)


@contextmanager
def open_files(source: str | Path, max_unpacked_gigabytes: float = MAX_UNPACKED_GIGABYTES) -> Iterator[SourceFiles]:
    """Open a folder, a zip or the http(s) URL of a zip. A zip is read in place, a download is removed afterwards.

    Raises:
        UserError: Nothing is there, the file is not a zip, or the zip declares more than `max_unpacked_gigabytes` unpacked.
    """
    if "://" in str(source):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "download.zip"
            download(str(source), path, int(max_unpacked_gigabytes * GIGABYTE), advice=HOW_TO_RAISE_THE_LIMIT)
            with _open_zip(path, str(source), max_unpacked_gigabytes) as files:
                yield files
    elif Path(source).is_dir():
        yield _list_folder(Path(source))
    elif Path(source).is_file():
        with _open_zip(Path(source), str(source), max_unpacked_gigabytes) as files:
            yield files
    else:
        raise UserError(f"{source} is neither a folder nor a file")


def _list_folder(root: Path) -> SourceFiles:
    root = root.resolve()
    readers = {}
    for folder, _, file_names in os.walk(root):
        for file_name in file_names:
            path = Path(folder, file_name)
            # A link may point anywhere on the machine; only what it reaches inside the folder is the source's own.
            if not path.is_symlink() or _is_inside(path, root):
                readers[path.relative_to(root).as_posix()] = partial(read_file, path)
    return SourceFiles(str(root), readers)


def _is_inside(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # a link that leads to itself
        return False


def read_file(path: Path) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: There is none, or it is too large; a pipe or a device would have no end.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise OSError(f"{path} is larger than {MAX_FILE_BYTES / GIGABYTE:g} GiB")
    return path.read_bytes()


@contextmanager
def _open_zip(path: Path, location: str, max_unpacked_gigabytes: float) -> Iterator[SourceFiles]:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"{location} cannot be read as a zip ({error}): unpack it and give the folder") from error
    with archive:
        unpacked = sum(member.file_size for member in archive.infolist()) / GIGABYTE
        if unpacked > max_unpacked_gigabytes:
            raise UserError(
                f"{location} unpacks to {unpacked:.1f} GiB, more than the {max_unpacked_gigabytes:g} GiB allowed: {HOW_TO_RAISE_THE_LIMIT}"
            )
        readers = {
            member.filename: _member_reader(archive, member, location)
            for member in archive.infolist()
            if not member.is_dir() and not _leads_outside(member.filename)
        }
        yield SourceFiles(location, readers)


def _leads_outside(name: str) -> bool:
    return name.startswith("/") or ".." in PurePosixPath(name).parts


def _member_reader(archive: zipfile.ZipFile, member: zipfile.ZipInfo, location: str) -> Callable[[], bytes]:
    def read() -> bytes:
        if member.file_size > MAX_FILE_BYTES:
            raise OSError(f"'{member.filename}' in {location} is larger than {MAX_FILE_BYTES / GIGABYTE:g} GiB")
        try:
            with archive.open(member) as file:
                # With the size given, a member that unpacks to more than it declares is cut there, then fails its
                # checksum; a bare read() would first unpack all of it into memory.
                return file.read(member.file_size)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise OSError(f"'{member.filename}' in {location} is damaged or locked ({error})") from error

    return read
