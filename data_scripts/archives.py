"""Files of a folder, a zip or a zip's URL, read by relative name and never from outside it."""

import os
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

from system.errors import UserError

GIGABYTE = 2**30
MAX_FILE_BYTES = GIGABYTE  # of one file; COCO's captions, the largest real one, have a seventh of it
MAX_UNPACKED_GIGABYTES = 64.0  # of a whole zip; all of COCO has a third of it
HOW_TO_RAISE_THE_LIMIT = "raise --max_unpacked_gigabytes if you trust it"


class SeveralFiles(OSError):
    """A name fits several files of a source, and which one is meant cannot be known."""


class SourceFiles:
    """The files of a folder or a zip.

    A name can be read only if the listing has it, and the listing has no name that leads outside: that one rule
    covers absolute names, `..` and links, in an archive as well as in a caption table.

    Args:
        location: The source's name in messages.
        readers: Functions that return a file's bytes, by relative name with forward slashes.
        links: Names of links that are not followed.

    `named` are the files that a reader has been asked for.
    """

    def __init__(self, location: str, readers: dict[str, Callable[[], bytes]], links: Sequence[str] = ()):
        self.location = location
        self.links = sorted(links)
        self.names = sorted(readers)
        self.named: set[str] = set()
        self._readers = readers
        self._names_by_key: dict[str, list[str]] = {}
        self._names_by_basename: dict[str, list[str]] = {}
        for name in self.names:
            key = name_key(name)
            self._names_by_key.setdefault(key, []).append(name)
            self._names_by_basename.setdefault(key.rpartition("/")[2], []).append(name)

    def read(self, name: str) -> bytes:
        """Return the bytes of one file.

        Raises:
            FileNotFoundError: The source has no such file.
            OSError: The file is damaged or too large.
        """
        if name not in self._readers:
            raise FileNotFoundError(f"{self.location} has no file '{name}'")
        return self._readers[name]()

    def find(self, name: str, anywhere: bool = False) -> list[str]:
        """Return the listed names that `name` can mean: itself, else those that differ from it as `name_key` allows.

        Args:
            name: Relative name.
            anywhere: Whether to search for it in all folders where it is not found; the outermost ones win.
        """
        if name in self._readers:
            return [name]
        key = name_key(name)
        found = self._names_by_key.get(key, [])
        if not found and anywhere and key:
            inside = "/" + key
            found = [
                candidate
                for candidate in self._names_by_basename.get(key.rpartition("/")[2], [])
                if name_key(candidate).endswith(inside)
            ]
            exact = [candidate for candidate in found if candidate.endswith("/" + name)]
            found = exact or found
            depth = min((candidate.count("/") for candidate in found), default=0)
            found = [candidate for candidate in found if candidate.count("/") == depth]
        return found

    def reader(self, name: str, found: Sequence[str]) -> Callable[[], bytes]:
        """Return the function that reads the one file of `found`; it raises FileNotFoundError or SeveralFiles if there is not one."""

        self.named.update(found)

        def several() -> bytes:
            raise SeveralFiles(f"{self.location} has several files '{name}': {', '.join(found)}")

        return several if len(found) > 1 else partial(self.read, found[0] if found else name)


def name_key(name: str) -> str:
    """What names have in common that differ in case, Unicode form, blanks at either end of a part, or the kind of slash."""
    parts = unicodedata.normalize("NFC", name).replace("\\", "/").split("/")
    return "/".join(part.strip().casefold() for part in parts if part != ".")


@contextmanager
def open_files(source: str | Path, max_unpacked_gigabytes: float = MAX_UNPACKED_GIGABYTES) -> Iterator[SourceFiles]:
    """Open a folder, a zip or the http(s) URL of a zip. A zip is read in place, a download is removed afterwards.

    Raises:
        UserError: Nothing is there, the file is not a zip, or the zip declares more than `max_unpacked_gigabytes` unpacked.
    """
    if "://" in str(source):
        with tempfile.TemporaryDirectory() as folder:
            from system.downloads import download  # and requests with it, which what lies on disk need not wait for

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
    readers, links = {}, []
    for folder, folder_names, file_names in os.walk(root):
        for name in folder_names:
            if (path := Path(folder, name)).is_symlink():
                links.append(path.relative_to(root).as_posix())
        for file_name in file_names:
            path = Path(folder, file_name)
            # A link may point anywhere on the machine; only its targets inside the folder belong to the source. (One to
            # itself does not exist; `resolve()` raises on it up to Python 3.12.)
            if not path.is_symlink() or (path.exists() and path.resolve().is_relative_to(root)):
                readers[path.relative_to(root).as_posix()] = partial(read_file, path)
            else:
                links.append(path.relative_to(root).as_posix())
    return SourceFiles(str(root), readers, links)


def read_file(path: Path) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: There is none, or it is too large, or a pipe or a device.
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
            name: _member_reader(archive, member, location)
            for member in archive.infolist()
            if not member.is_dir() and not _leads_outside(name := _member_name(member))
        }
        yield SourceFiles(location, readers)


@lru_cache(maxsize=4)
def _open_again(path: str, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _member_name(member: zipfile.ZipInfo) -> str:
    """The member's name, also from archivers that store UTF-8 without saying so (macOS): zipfile reads that as code page 437."""
    if member.flag_bits & 0x800:
        return member.filename
    try:
        return member.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return member.filename


def _leads_outside(name: str) -> bool:
    return name.startswith("/") or ".." in PurePosixPath(name).parts


def _member_reader(archive: zipfile.ZipFile, member: zipfile.ZipInfo, location: str) -> Callable[[], bytes]:
    opened_by = os.getpid()

    def read() -> bytes:
        # A process started since then shares the place in the file with this one, and opens the zip for itself.
        archive_here = archive if os.getpid() == opened_by else _open_again(archive.filename, os.getpid())
        if member.file_size > MAX_FILE_BYTES:
            raise OSError(f"'{member.filename}' in {location} is larger than {MAX_FILE_BYTES / GIGABYTE:g} GiB")
        try:
            with archive_here.open(member) as file:
                # With the size given, a member that unpacks to more than it declares stops there and fails its checksum;
                # a bare read() would first unpack all of it into memory.
                return file.read(member.file_size)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise OSError(f"'{member.filename}' in {location} is damaged or locked ({error})") from error

    return read
