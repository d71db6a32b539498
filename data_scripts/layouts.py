"""Which layout captioned images have: recognized by the names of files, and by what their first bytes or keys say."""

import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data_scripts import coco, flickr8k, flickr30k, image_folder, img2dataset, karpathy, sidecars
from data_scripts.annotations import is_file_of_its_own, json_form
from data_scripts.archives import MAX_UNPACKED_GIGABYTES, SourceFiles, open_files, read_file
from data_scripts.splits import SplitNames
from data_scripts.text_files import first_line
from system.errors import UserError


class Layout(NamedTuple):
    """A layout.

    Args:
        command: Module of `data_scripts` that reads it.
        title: In words.
        evidence: The file of a folder or zip that shows it; "" if there is none.
        covers: Layouts whose files this one has, too.
    """

    command: str
    title: str
    evidence: Callable[[SourceFiles], str]
    covers: tuple[str, ...] = ()


def _first(names: Sequence[str]) -> str:
    return names[0] if names else ""


def _named(*patterns: str) -> Callable[[SourceFiles], str]:
    """The first file whose own name is one of the patterns'."""
    return lambda files: next(
        (name for name in files.names if re.fullmatch("|".join(patterns), PurePosixPath(name).name.lower())), ""
    )


def _sidecar(files: SourceFiles) -> str:
    return next((name for name, images in sidecars.pair_sidecars(files).items() if images), "")


def _split_csv(files: SourceFiles) -> str:
    split_of = SplitNames()
    for name in files.names:
        path = PurePosixPath(name)
        if path.suffix.lower() == ".csv" and split_of(path.stem):
            columns = first_line(files, name).split(",")
            if {"filename", "caption"} <= {column.strip().strip('"') for column in columns}:
                return name
    return ""


LAYOUTS = {
    "metadata": Layout(
        "image_folder",
        "images beside a metadata file",
        _named(*(re.escape(name) for name in image_folder.METADATA_NAMES)),
    ),
    "sidecars": Layout("image_folder", "text files beside images", _sidecar),
    "paragraphs": Layout("paragraphs", "a csv and an image folder per split", _split_csv),
    "flickr8k": Layout(
        "flickr8k",
        "Flickr8k as distributed",
        _named(re.escape(flickr8k.TOKEN_FILE.lower()), r"flickr8k_text\.zip"),
    ),
    "flickr30k": Layout("flickr30k", "Flickr30k's csv", lambda files: _first(flickr30k.find_tables(files))),
    "coco": Layout("coco", "COCO's or TextCaps' annotation files", lambda files: _first(coco.find_tables(files))),
    "karpathy": Layout("karpathy", "Karpathy's json", lambda files: _first(karpathy.find_tables(files))),
    "img2dataset": Layout(
        "img2dataset",
        "img2dataset's output",
        img2dataset.find_stats,
        covers=("sidecars", "webdataset", "hub"),
    ),
    "webdataset": Layout("img2dataset", "webdataset tars", _named(r".*\.tar")),
    "hub": Layout(
        "hub",
        "dataset of `datasets`, on the Hub or on disk",
        _named(r"dataset_dict\.json", r"dataset_info\.json", r"(?!metadata\.).*\.(parquet|arrow)"),
    ),
}


def recognize(sources: Sequence[str]) -> str:
    """The layout of what a user named, by its name in `LAYOUTS`.

    Args:
        sources: Folder, zip, or URL of a zip; annotation files; tars or Parquet files; or a dataset on the Hub.

    Raises:
        UserError: It is of none, or of several, which the sentence names.
    """
    first = coco.split_and_path(sources[0])[1]
    suffix = PurePosixPath(first).suffix.lower()
    if "://" in first:
        raise UserError(f"{first} is not downloaded to recognize its layout: give --layout {', '.join(LAYOUTS)}")
    if suffix in (".tar", ".parquet") and not os.path.isdir(first):
        return _layout_of_shards(first)
    if not Path(first).exists():
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", first) and suffix not in (".zip", ".json", ".csv", ".txt"):
            return "hub"
        raise UserError(f"{first} is neither a folder nor a file")
    if is_file_of_its_own(first):
        return _layout_of_file(first)
    with open_files(first, MAX_UNPACKED_GIGABYTES) as files:
        hint = image_folder.rename_hint(files) or ": see docs/data.md"
        if files.links:
            hint += f"; {len(files.links):,} links to folders or out of it, such as {files.links[0]}, are not followed: copy the files"
        found = {name: evidence for name, layout in LAYOUTS.items() if (evidence := layout.evidence(files))}
    covered = {other for name in found for other in LAYOUTS[name].covers}
    found = {name: evidence for name, evidence in found.items() if name not in covered}
    if not found:
        raise UserError(
            f"{first} has no layout that is known ({', '.join(layout.title for layout in LAYOUTS.values())}){hint}"
        )
    if len(found) > 1:
        candidates = "; or ".join(
            f"--layout {name} ({LAYOUTS[name].title}: {evidence})" for name, evidence in found.items()
        )
        raise UserError(f"{first} can be read in {len(found)} ways: give {candidates}")
    return next(iter(found))


def _layout_of_shards(pattern: str) -> str:
    import pyarrow as pa  # here, so that --help need not import it
    import pyarrow.parquet as pq

    from data_scripts.shards import find_shards

    path = find_shards(pattern)["train"][0]
    if path.endswith(".tar"):
        beside = f"{os.path.splitext(path)[0]}_stats.json"
        return "img2dataset" if os.path.isfile(beside) else "webdataset"
    try:
        columns = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    return "img2dataset" if {"key", "status"} <= set(columns) else "hub"


def _layout_of_file(name: str) -> str:
    if PurePosixPath(name).name.casefold() in image_folder.METADATA_NAMES:
        raise UserError(f"{name} describes the images of its folder: give the folder")
    files = SourceFiles("", {name: partial(read_file, Path(name))})
    if flickr30k.is_flickr_header(first_line(files, name)):
        return "flickr30k"
    form = json_form(files.read(name))
    if form is None:
        raise UserError(f"{name} is no caption file of a known layout: see docs/data.md, or give --layout")
    return "karpathy" if form == "karpathy" else "coco"
