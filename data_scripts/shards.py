"""Read shards of captioned images one after the other: webdataset tars and Parquet files, local or anywhere fsspec reads.

A sample of a tar is an image beside a `.json`, `.txt` or `.caption` of the same name, as img2dataset writes them; a row of a Parquet file
has an image, bytes or {bytes, path}, and captions. `python -m training.encode` adds a column of encoder features.
"""

import io
import json
import os
import re
import tarfile
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from data_scripts.images import NOTED, keep_noted_orientation
from data_scripts.row_checks import caption_problem, listed_captions, valid_id
from data_scripts.splits import SplitNames
from data_scripts.text_files import IMAGE_SUFFIXES, find_column
from system.errors import UserError, printable
from system.retries import ATTEMPTS, SECRETS

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
SUFFIXES = (*TAR_SUFFIXES, ".parquet")
TEXT_SUFFIXES = ("txt", "caption", "text")
CAPTION_NAMES = ("captions", "caption", "text", "txt")
FEATURES_KEY = b"showtell_features"  # of the schema's metadata: what `encode` says of its column
FIRST_WAIT_SECONDS = 0.5  # doubled each time
SIGNATURE = re.compile(r"\?.*$")  # of a signed URL
PERMANENT = (FileNotFoundError, PermissionError, UserError, ImportError)


@dataclass(frozen=True)
class Sample:
    """One image of a shard with its captions, and its encoder features where the shard has them. `name` is for messages."""

    name: str
    image_id: str | None
    image: bytes
    captions: list[str]
    features: dict[str, bytes] | None = None


@dataclass
class Skipped:
    """What of the shards was not used: samples, parts of samples that are, and the shards that are missing or damaged."""

    samples: Counter = field(default_factory=Counter)  # by reason
    parts: Counter = field(default_factory=Counter)  # by reason
    shards: dict[str, str] = field(default_factory=dict)  # address -> reason

    def __add__(self, other: "Skipped") -> "Skipped":
        return Skipped(self.samples + other.samples, self.parts + other.parts, self.shards | other.shards)

    def lines(self) -> list[str]:
        """A line for each reason and shard."""
        samples = [f"Samples skipped, {reason}: {number:,}" for reason, number in sorted(self.samples.items())]
        parts = [f"Of samples not used, {reason}: {number:,}" for reason, number in sorted(self.parts.items())]
        shards = [f"Shard skipped, {shard} {reason}" for shard, reason in sorted(self.shards.items())]
        return [*samples, *parts, *shards]


def shown(address: str) -> str:
    """A shard's address without user, password and signature."""
    return printable(SECRETS.sub("...", SIGNATURE.sub("", address)))


def is_shard_pattern(source: str) -> bool:
    """Whether a source names shards by itself: an address, a glob or a shard's file."""
    return "://" in source or any(character in source for character in "*?[{") or source.endswith(SUFFIXES)


def find_shards(source: str, revision: str | None = None) -> dict[str, list[str]]:
    """The shards of each split, in the order of their names.

    Args:
        source: A folder, a glob or an address of fsspec such as s3://bucket/name-*.tar, of which all are "train"; braces
            {00000..00010} count. Or a Hub id or folder, whose splits `datasets` reads off the files' names.

    Raises:
        UserError: There are none.
    """
    if is_shard_pattern(source):
        return {"train": _glob(source)}
    from datasets import load_dataset_builder

    try:
        # `datasets` takes the files of the commonest suffix, and of a draw Parquet: beside img2dataset's tars, its tables of URLs.
        if any(Path(source).rglob("*.tar")):
            data_files = load_dataset_builder("webdataset", data_dir=source).config.data_files
        else:
            data_files = load_dataset_builder(source, revision=revision).config.data_files or {}
    except Exception as error:  # datasets and the Hub's client each have their own
        raise UserError(f"dataset '{source}' cannot be opened: {SECRETS.sub('...', str(error))}") from error
    splits = {
        split: [str(path) for path in paths if str(path).endswith(SUFFIXES)] for split, paths in data_files.items()
    }
    # Beside each tar, img2dataset has a table of the same name with what it could not download, and no images.
    tars = {path for paths in splits.values() for path in paths if path.endswith(".tar")}
    splits = {
        split: [path for path in paths if f"{os.path.splitext(path)[0]}.tar" not in tars or path in tars]
        for split, paths in splits.items()
    }
    splits = {split: paths for split, paths in splits.items() if paths}
    if "train" not in splits:
        raise UserError(
            f"{source} has no shards for training (.tar, .parquet): prepare it as a table, without --streaming"
        )
    return splits


def _glob(pattern: str) -> list[str]:
    addresses = []
    try:
        for one in expand_braces(pattern):
            if not any(character in one for character in "*?["):
                addresses.append(one)
                continue
            system, path = fsspec.core.url_to_fs(one)
            found = sorted(system.glob(path))
            addresses += [system.unstrip_protocol(name) if "://" in one else name for name in found]
    except ImportError as error:
        raise UserError(f"{shown(pattern)}: {error}; pip install 'showtell[remote]'") from error
    except Exception as error:  # each file system has its own
        raise UserError(f"{shown(pattern)} cannot be listed: {SECRETS.sub('...', str(error))}") from error
    addresses = [address for address in addresses if SIGNATURE.sub("", address).endswith(SUFFIXES)]
    if not addresses:
        raise UserError(f"{shown(pattern)} names no shard: .tar and .parquet files are expected")
    return addresses


def expand_braces(pattern: str) -> list[str]:
    """Every name of a pattern with {00000..00331} or {a,b}, as shells and webdataset write it."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    inner = match[1]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if bounds:
        first, last = bounds.groups()
        names = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        names = inner.split(",")
    return [one for name in names for one in expand_braces(pattern[: match.start()] + name + pattern[match.end() :])]


def read_shard(
    address: str, start: int = 0, strict: bool = False, skipped: Skipped | None = None
) -> Iterator[tuple[int, Sample]]:
    """The samples of a shard and their numbers, from a number on; what cannot be used is counted.

    A connection that breaks is opened again, up to four times in a row, and reading resumes with the next sample.

    Raises:
        UserError: With `strict`, a shard is missing or damaged, or a sample cannot be used.
    """
    skipped = skipped if skipped is not None else Skipped()
    number, attempt = start, 0
    while True:
        try:
            with closing(_read(address, number)) as samples:
                for raw in samples:
                    sample, problem, unused = _checked(raw)
                    if problem and strict:
                        raise UserError(f"{shown(address)}, {printable(raw['name'])}: {problem} (--strict)")
                    number, attempt = number + 1, 0
                    if problem:
                        skipped.samples[problem] += 1
                    else:
                        skipped.parts.update(unused)
                        yield number - 1, sample
            return
        except (GeneratorExit, UserError):
            raise
        except ImportError as error:
            raise UserError(f"{shown(address)}: {error}; pip install 'showtell[remote]'") from error
        except Exception as error:  # each file system has its own
            attempt += 1
            if "://" in address and attempt < ATTEMPTS and not isinstance(error, PERMANENT):
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
                continue
            reason = SECRETS.sub("...", str(error) or type(error).__name__).splitlines()[0]
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else reason
            if strict:
                raise UserError(f"{shown(address)}, sample {number}: {reason} (--strict)") from error
            skipped.shards[shown(address)] = f"from sample {number:,} on: {reason}"
            return


def _checked(raw: dict[str, Any]) -> tuple[Sample | None, str, list[str]]:
    """A sample, or why it cannot be used; and what of a sample is not used."""
    captions, problems = [], []
    for cell in raw["captions"]:
        for caption in listed_captions(cell):
            if problem := caption_problem(caption):
                problems.append(problem)
            else:
                captions.append(unicodedata.normalize("NFC", caption).strip())
    if not captions:
        return None, problems[-1] if problems else "no caption", []
    if not raw["image"]:
        return None, "no image", []
    sample = Sample(raw["name"], raw["image_id"], raw["image"], captions, raw.get("features"))
    return sample, "", [*problems, *["second image of a sample"] * raw.get("num_others", 0)]


def _read(address: str, start: int) -> Iterator[dict[str, Any]]:
    reader = _read_parquet if SIGNATURE.sub("", address).endswith(".parquet") else _read_tar
    with fsspec.open(address, "rb") as file:
        yield from reader(file, start)


# ---- Tars -----------------------------------------------------------------------------------------------------------


def _read_tar(file: io.IOBase, start: int) -> Iterator[dict[str, Any]]:
    members: dict[str, bytes] = {}
    current, number = None, -1
    with tarfile.open(fileobj=file, mode="r|*", bufsize=2**20) as archive:
        for member in archive:
            archive.members = []  # else it keeps them all
            folder, base = os.path.split(member.name)
            stem, _, suffix = base.partition(".")
            if member.isdir() or not stem:
                continue
            key = os.path.join(folder, stem)
            if key != current:
                if members:
                    yield _tar_sample(current, members)
                current, members, number = key, {}, number + 1
            if number >= start:  # of a link, whose file a stream has passed or not reached, nothing
                members[suffix.lower()] = archive.extractfile(member).read() if member.isreg() else b""
    if members:
        yield _tar_sample(current, members)


def _tar_sample(name: str, members: dict[str, bytes]) -> dict[str, Any]:
    images = [content for suffix, content in members.items() if f".{suffix}" in IMAGE_SUFFIXES]
    try:
        about = json.loads(members.get("json", b"{}"))
    except ValueError:
        about = {}
    about = about if isinstance(about, dict) else {}
    captions = [about[key] for key in CAPTION_NAMES if about.get(key)]
    captions += [members[suffix].decode("utf-8", "replace") for suffix in TEXT_SUFFIXES if suffix in members]
    image = keep_noted_orientation(images[0], about) if images else b""
    return {
        "name": name,
        "image_id": name,
        "image": image,
        "captions": captions[:1],
        "num_others": len(images[1:]),
    }


# ---- Parquet --------------------------------------------------------------------------------------------------------


def _read_parquet(file: io.IOBase, start: int) -> Iterator[dict[str, Any]]:
    parquet = pq.ParquetFile(file)
    columns = _parquet_columns(parquet.schema_arrow)
    wanted = [name for name in columns.values() if name]
    wanted += [name for name in NOTED if name in parquet.schema_arrow.names and name not in wanted]
    features = features_of_shard(parquet.schema_arrow)
    wanted += list(features["columns"]) if features else []
    first = 0
    for group in range(parquet.num_row_groups):
        size = parquet.metadata.row_group(group).num_rows
        if first + size > start:
            number = first
            for batch in parquet.iter_batches(64, row_groups=[group], columns=wanted):
                for row in batch.to_pylist():
                    if number >= start:
                        yield _parquet_sample(row, number, columns, features)
                    number += 1
        first += size


def other_splits(addresses: Sequence[str]) -> list[str]:
    """What a column `split` of Parquet shards says beside "train": names of validation and test splits."""
    split_of, found = SplitNames(), {}
    for address in addresses:
        if not SIGNATURE.sub("", address).endswith(".parquet"):
            return []
        with fsspec.open(address, "rb") as file:
            parquet = pq.ParquetFile(file)
            column = find_column(parquet.schema_arrow.names, "split")
            if column is None:
                return []
            found |= dict.fromkeys(parquet.read([column])[column].unique().to_pylist())
    return [name for name in found if split_of(name) in ("validation", "test")]


def _parquet_columns(schema: pa.Schema) -> dict[str, str | None]:
    names = {name.casefold(): name for name in schema.names}
    images = [field.name for field in schema if holds_images(field.type)]
    image = next((name for name in images if name.casefold() in ("image", "jpg", "png")), next(iter(images), None))
    captions = next((names[name] for name in CAPTION_NAMES if name in names), None)
    if image is None or captions is None:
        raise UserError(
            f"no column of {'images' if image is None else 'captions'} in the Parquet file, only {', '.join(schema.names)}: prepare it "
            "with `python -m data_scripts.hub`, which takes --image_column and --caption_column"
        )
    return {"image": image, "captions": captions, "name": names.get("image_id")}


def holds_images(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold images: bytes, or {bytes, path} as `datasets` has them."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _parquet_sample(row: dict, number: int, columns: dict[str, str | None], features: dict | None) -> dict[str, Any]:
    image, captions = row[columns["image"]], row[columns["captions"]]
    image_id = valid_id(row[columns["name"]]) if columns["name"] else None
    content = image.get("bytes") if isinstance(image, dict) else image
    sample = {
        "name": f"row {number}" if image_id is None else image_id,
        "image_id": image_id,
        "image": keep_noted_orientation(content, row),
        "captions": captions if isinstance(captions, list) else [captions],
    }
    if features:
        sample["features"] = {column: row[column] for column in features["columns"]}
    return sample


def features_of_shard(schema: pa.Schema) -> dict | None:
    """What `encode` says of a shard's features: the encoder's "fingerprint", and "columns" with shape and type; None without them."""
    about = (schema.metadata or {}).get(FEATURES_KEY)
    return json.loads(about) if about else None


def feature_shards(addresses: Sequence[str]) -> dict | None:
    """`features_of_shard` of the first shard that can be read."""
    for address in addresses:
        if not SIGNATURE.sub("", address).endswith(".parquet"):
            return None
        try:
            with fsspec.open(address, "rb") as file:
                return features_of_shard(pq.ParquetFile(file).schema_arrow)
        except Exception:  # it is named when its turn comes
            continue
    return None
