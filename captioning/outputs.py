"""What becomes of captions: text, lines of JSON, parquet, sidecars, webdataset, or text on the screen.

Every output but the screen keeps its promise at a SIGKILL: what `write` was given is there once it has returned, whole; of what it
was being given, each image is there whole or not at all after the next run's `recover`.
"""

import codecs
import io
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from captioning.lines import LineFile, Names, image_id_of, json_line
from captioning.sources import ImageRef, safe_parts
from data_scripts.images import has_image_suffix
from system.errors import printable
from system.files import write_file

ROWS_PER_PART = 10_000  # of parquet
BYTES_PER_SHARD = 2**30  # of webdataset
END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)


class Output(Protocol):
    """Where the captions of one process go."""

    def recover(self) -> None:
        """Mend what a kill has left; the first process does, before any other opens the output."""

    def open(self) -> None:
        """Learn what is there already."""

    def has(self, ref: ImageRef) -> bool:
        """Whether an image is there already."""

    def write(self, items: list[dict]) -> None:
        """Write one batch: items with `ref`, the `caption` and whatever else is known of it."""

    def close(self) -> None:
        """End this process's part."""

    def finish(self) -> None:
        """Put together what several processes have written; the first process does, after all have ended."""

    def remove(self) -> None:
        """Remove all of it, to begin anew."""


def record(item: dict) -> dict:
    """What is published of an item: its image's name first, and what is known of its caption."""
    kept = ("caption", "others", "log_probability", "confidence", "least_sure_word")
    return {"image_id": item["ref"].name} | {name: item[name] for name in kept if name in item}


class Lines:
    """A .jsonl file, or a .txt file of lines `name<TAB>caption`.

    Args:
        num_captions: Of each image.
    """

    def __init__(self, path: Path, num_captions: int = 1, process: int = 0):
        self.is_json = path.suffix == ".jsonl"
        self.file = LineFile(
            path, image_id_of if self.is_json else _name_of, 1 if self.is_json else num_captions, process
        )
        self.there = Names()

    def recover(self) -> None:
        self.file.recover()

    def open(self) -> None:
        self.there = Names(self.file.names())

    def has(self, ref: ImageRef) -> bool:
        return (ref.name if self.is_json else printable(ref.name)) in self.there

    def write(self, items: list[dict]) -> None:
        if self.is_json:
            self.file.append([json_line(record(item)) for item in items])
        else:
            self.file.append([line for item in items for line in text_lines(item)])

    def close(self) -> None:
        self.file.close()

    def finish(self) -> None:
        self.file.recover()

    def remove(self) -> None:
        self.file.remove()


def text_lines(item: dict) -> list[str]:
    """Lines `name<TAB>caption`, one for each caption of an image."""
    captions = [item["caption"], *item.get("others", [])]
    return [f"{printable(item['ref'].name)}\t{printable(caption)}\n" for caption in captions]


def _name_of(line: str) -> str:
    return line.partition("\t")[0]


class Screen:
    """Text on stdout as it comes."""

    def recover(self) -> None: ...

    def open(self) -> None: ...

    def has(self, ref: ImageRef) -> bool:
        return False

    def write(self, items: list[dict]) -> None:
        for item in items:
            for line in text_lines(item):
                print(line, end="", flush=True)

    def close(self) -> None: ...

    def finish(self) -> None: ...

    def remove(self) -> None: ...


class Parquet:
    """A folder of part-*.parquet; rows that do not fill a part yet are in a hidden journal, which becomes a part at the end."""

    def __init__(self, folder: Path, process: int = 0):
        self.folder, self.process = folder, process
        self.journal = LineFile(folder / ".showtell.journal.jsonl", image_id_of, process=process)
        self.rows: list[dict] = []
        self.there = Names()

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))

    def _part_names(self) -> Iterator[str]:
        import pyarrow.parquet as pq

        for path in self.parts():
            yield from pq.read_table(path, columns=["image_id"])["image_id"].to_pylist()

    def recover(self) -> None:
        self.journal.recover()
        in_parts = Names(self._part_names())  # of a kill between a part and the removal of its journal
        rest = [json.loads(line) for line in self.journal if image_id_of(line) not in in_parts]
        while len(rest) > ROWS_PER_PART:
            self._write_part(rest[:ROWS_PER_PART])
            rest = rest[ROWS_PER_PART:]
        self.journal.rewrite(map(json_line, rest))

    def open(self) -> None:
        names = [row["image_id"] for row in map(json.loads, self.journal)]
        if self.journal.own == self.journal.path:  # the rows of before are the first process's
            self.rows = [json.loads(line) for line in self.journal]
        self.there = Names([*names, *self._part_names()])

    def has(self, ref: ImageRef) -> bool:
        return ref.name in self.there

    def write(self, items: list[dict]) -> None:
        rows = [record(item) for item in items]
        self.journal.append(map(json_line, rows))
        self.rows += rows
        if len(self.rows) >= ROWS_PER_PART:
            self._write_part(self.rows)
            self.journal.rewrite([])
            self.rows = []

    def _write_part(self, rows: list[dict]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        word = pa.struct({"word": pa.string(), "probability": pa.float64()})
        kinds = {"others": pa.list_(pa.string()), "log_probability": pa.float64(), "confidence": pa.float64()}
        kinds |= {"image_id": pa.string(), "caption": pa.string(), "least_sure_word": word}
        table = pa.Table.from_pylist(rows, pa.schema({name: kinds[name] for name in rows[0]}))
        content = io.BytesIO()
        pq.write_table(table, content)
        ours = sorted(self.folder.glob(f"part-{self.process:02d}-*.parquet"))
        number = int(ours[-1].stem.rpartition("-")[2]) + 1 if ours else 0  # beyond those that somebody took away
        write_file(self.folder / f"part-{self.process:02d}-{number:05d}.parquet", content.getvalue())

    def close(self) -> None:
        self.journal.close()

    def finish(self) -> None:
        self.recover()
        if rows := [json.loads(line) for line in self.journal]:
            self._write_part(rows)
        self.journal.remove()

    def remove(self) -> None:
        self.journal.remove()
        for path in self.parts():
            path.unlink()


class Sidecars:
    """A text file for each image, beside it or below a folder of their own.

    What is going to be written into the files of a batch stands in a journal first, and after them that it was: what a kill has
    interrupted is written once more, the same.

    Args:
        folder: Of all sidecars, in the folders of the images; None puts each beside its image.
        journal: Hidden file that says what was done.
        existing: "skip", "overwrite", "append" or "prepend" where there is a sidecar; none is skipped that is empty, as some
            trainers leave them and others refuse them.
        suffix: Of the files.
        texts: What stands before a caption, behind it, and between a caption and what was there.
    """

    def __init__(
        self,
        folder: Path | None,
        journal: Path,
        existing: str = "skip",
        suffix: str = ".txt",
        texts: tuple[str, str, str] = ("", "", ", "),
        process: int = 0,
    ):
        self.folder, self.existing, self.suffix, self.texts = folder, existing, suffix, texts
        self.journal = LineFile(journal, lambda line: json.loads(line).get("image_id", line), process=process)
        self.there = Names()
        self.num_empty = 0  # sidecars that were asked for and have no text

    def path_of(self, ref: ImageRef) -> Path:
        """The sidecar of an image; beside it, the one that is there in upper case, as X.TXT beside X.JPG."""
        if self.folder:
            return self.folder.joinpath(*safe_parts(ref.relative)).with_suffix(self.suffix)
        path = Path(ref.path).with_suffix(self.suffix)
        upper = path.with_suffix(self.suffix.upper())
        return upper if not path.exists() and upper.exists() else path

    def problem_of(self, ref: ImageRef) -> str:
        """Why an image's caption cannot be joined with what its sidecar has; "" if it can."""
        path = self.path_of(ref)
        if self.existing in ("append", "prepend") and path.exists():
            try:
                self.read_text(path)
            except UnicodeDecodeError:
                return f"its sidecar {printable(path.name)} is not UTF-8 text, and stays as it is: save it as UTF-8"
        return ""

    def recover(self) -> None:
        for path in [self.journal.path, *self.journal.parts()]:
            if path.exists():
                self.journal.cut(path)
                self._replay(path)
        self.journal.recover()

    def _replay(self, path: Path) -> None:
        """Write the files of the last batch again, unless it was done."""
        batch: list[dict] = []
        with open(path, encoding="utf-8", newline="\n") as file:
            for line in file:
                entry = json.loads(line)
                batch = [] if "done" in entry else [*batch, entry]
        for entry in batch:
            self.write_text(Path(entry["sidecar"]), entry["text"])
        with open(path, "a", encoding="utf-8") as file:
            file.write(json_line({"done": len(batch)}) if batch else "")

    def open(self) -> None:
        self.there = Names(entry["image_id"] for entry in map(json.loads, self.journal) if "image_id" in entry)

    def has(self, ref: ImageRef) -> bool:
        if self.existing != "skip":
            return ref.name in self.there
        path = self.path_of(ref)
        is_empty = is_blank(path)
        self.num_empty += is_empty
        return path.exists() and not is_empty

    def write(self, items: list[dict]) -> None:
        entries = []
        for item in items:
            path = self.path_of(item["ref"])
            entries.append({"image_id": item["ref"].name, "sidecar": str(path), "text": self.text(path, item)})
        self.journal.append(map(json_line, entries))
        for entry in entries:
            self.write_text(Path(entry["sidecar"]), entry["text"])
        self.journal.append([json_line({"done": len(entries)})])

    def close(self) -> None:
        self.journal.close()

    def text(self, path: Path, item: dict) -> str:
        """What the sidecar will have: a line for each caption, joined with what is there."""
        before, behind, between = self.texts
        captions = [f"{before}{caption}{behind}" for caption in [item["caption"], *item.get("others", [])]]
        new = "\n".join(captions)
        if self.existing in ("append", "prepend") and path.exists():
            old = self.read_text(path).strip()
            parts = [old, new] if self.existing == "append" else [new, old]
            new = between.join(part for part in parts if part)
        return new + "\n"

    def read_text(self, path: Path) -> str:
        return path.read_text(encoding="utf-8-sig")

    def write_text(self, path: Path, text: str) -> None:
        write_file(path, text.encode("utf-8", "backslashreplace"), sync=False)

    def finish(self) -> None:
        self.recover()

    def remove(self) -> None:
        """Forget what was done; the sidecars stay, as `existing` says."""
        self.journal.remove()


def is_blank(path: Path) -> bool:
    """Whether a text file is there and has white space at most."""
    try:
        return not path.read_bytes().removeprefix(codecs.BOM_UTF8).strip()
    except OSError:  # there is none, or it is not for us to read
        return False


class WebDataset:
    """A folder of tars: each image as it is, a .txt with its caption and a .json with what else is known, under one key.

    A process appends to a tar of its own; after a kill it is closed behind its last whole image, and another is begun.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.there = Names()
        self._tar = None
        self._shard = self._number = 0  # of the tar, and of the image in it

    def tars(self) -> list[Path]:
        return sorted(self.folder.glob("*.tar"))

    def recover(self) -> None:
        for path in self.tars():
            with open(path, "rb+") as file:
                end = 0
                for name, offset, size in _members(file):
                    if name.endswith(".json"):  # the last of an image's members
                        end = offset + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                file.truncate(end)
                file.seek(end)
                file.write(END_OF_TAR)

    def open(self) -> None:
        self.there = Names(self._names())

    def _names(self) -> Iterator[str]:
        for path in self.tars():
            with open(path, "rb") as file:
                for name, offset, size in _members(file):
                    if name.endswith(".json"):
                        place = file.tell()
                        file.seek(offset)
                        yield json.loads(file.read(size))["image_id"]
                        file.seek(place)

    def has(self, ref: ImageRef) -> bool:
        return ref.name in self.there

    def write(self, items: list[dict]) -> None:
        if self._tar is None:
            self._begin()
        self._tar.write(b"".join(self._sample(item) for item in items))
        self._tar.flush()
        if self._tar.tell() > BYTES_PER_SHARD:
            self.close()

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 0
        while self._tar is None:  # whoever creates a name first has it
            try:
                self._tar = open(self.folder / f"{number:05d}.tar", "xb")  # noqa: SIM115 (until `close`)
            except FileExistsError:
                number += 1
        self._shard, self._number = number, 0

    def _sample(self, item: dict) -> bytes:
        key = f"{self._shard:05d}{self._number:07d}"
        self._number += 1
        suffix = image_suffix(item["ref"].relative, item["content"])
        about = json_line(record(item)).encode("utf-8", "backslashreplace")
        texts = "\n".join([item["caption"], *item.get("others", [])]).encode("utf-8", "backslashreplace")
        members = ((suffix, item["content"]), (".txt", texts), (".json", about))
        return b"".join(_member(key + suffix, content) for suffix, content in members)

    def close(self) -> None:
        if self._tar is not None:
            self._tar.write(END_OF_TAR)
            self._tar.close()
            self._tar = None

    def finish(self) -> None:
        self.close()
        self.recover()

    def remove(self) -> None:
        for path in self.tars():
            path.unlink()


def image_suffix(name: str, content: bytes) -> str:
    """The suffix of an image file by which others know what it is: that of its name, or else of its format."""
    if has_image_suffix(name):
        return Path(name).suffix.lower()
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        kind = "JPEG" if image.format == "MPO" else image.format
    known = Image.registered_extensions()
    return next(suffix for suffix in (".jpg", *known) if known[suffix] == kind)


def _member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf() + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def _members(file) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of the members of a tar that are there whole."""
    length = file.seek(0, os.SEEK_END)
    offset = 0
    while offset + tarfile.BLOCKSIZE <= length:
        file.seek(offset)
        try:
            info = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        except tarfile.HeaderError:  # the end
            return
        offset += tarfile.BLOCKSIZE
        if offset + info.size > length:
            return
        yield info.name, offset, info.size
        offset += -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


class Page:
    """A page of the first images with their captions, whole or not at all; it is made anew each time."""

    num_images = 200

    def __init__(self, path: Path):
        self.path = path
        self.count = 0
        self.images: list = []
        self.records: list[dict] = []

    @staticmethod
    def image_size() -> int:
        """Longest side of an image on the page, in pixels."""
        from reporting.page import IMAGE_SIZE

        return IMAGE_SIZE

    def recover(self) -> None: ...

    def open(self) -> None: ...

    def has(self, ref: ImageRef) -> bool:
        return False

    def write(self, items: list[dict]) -> None:
        for item in items[: self.num_images - len(self.images)]:
            self.images.append(item["image"])
            self.records.append({**item, **record(item), "references": []})
        self.count += len(items)

    def close(self) -> None: ...

    def finish(self) -> None:
        from reporting.page import write_page

        if not self.count:
            return
        if self.count > self.num_images:
            shown = f"{self.path} shows the first {self.num_images} of {self.count:,} images"
            print(f"{shown}; --output captions.jsonl has all", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            write_file(self.path, write_page(folder, self.images, self.records, {}).read_bytes())

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
