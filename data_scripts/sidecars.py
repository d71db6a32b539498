"""Read images whose captions lie beside them in text files of the same name, `x.jpg` and `x.txt` or `x.caption`."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from data_scripts.archives import SourceFiles, name_key
from data_scripts.row_checks import SourceRow, note_row, problem_row
from data_scripts.splits import SplitNames
from data_scripts.text_files import IMAGE_SUFFIXES, SPELLED_DIFFERENTLY, ImageRef, gather_images, read_text
from system.errors import UserError

SIDECAR_SUFFIXES = (".txt", ".caption")


def pair_sidecars(files: SourceFiles) -> dict[str, list[str]]:
    """Return the image files of each sidecar file, by its name; a text file without an image has none.

    Images without a sidecar of exactly their name have one that differs from it as `name_key` allows.
    """
    paths = [PurePosixPath(name) for name in files.names]
    texts = [path for path in paths if path.suffix.lower() in SIDECAR_SUFFIXES]
    stems = {path.with_suffix("") for path in texts}
    images: dict[PurePosixPath | str, list[str]] = {}
    for path in paths:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            stem = path.with_suffix("")
            images.setdefault(stem if stem in stems else name_key(str(stem)), []).append(str(path))
    by_stem = {path: images.get(path.with_suffix(""), []) for path in texts}
    return {str(path): found or images.get(name_key(str(path.with_suffix(""))), []) for path, found in by_stem.items()}


def sidecar_rows(files: SourceFiles, one_caption: bool = False, splits: str | None = None) -> list[SourceRow]:
    """Return one row per image that has a sidecar. Its split is that of its folders' names, its ID its path in the source.

    Args:
        files: Where images and sidecars are.
        one_caption: Whether the lines of a sidecar are one caption, instead of one each.
        splits: Names of the splits, see `SplitNames`.
    """
    split_of = SplitNames(splits)
    others: list[SourceRow] = []
    captioned: set[str] = set()

    def refs() -> Iterator[ImageRef]:
        for name, images in pair_sidecars(files).items():
            if not images:
                others.append(note_row(name, "text file without an image of its name"))
                continue
            if len(images) > 1:
                others.append(note_row(name, "text file of several images of its name"))
            if captioned & set(images):
                others.append(note_row(name, "second text file of an image, whose captions it gets too"))
            captioned.update(images)
            if PurePosixPath(images[0]).with_suffix("") != PurePosixPath(name).with_suffix(""):
                others.append(note_row(name, SPELLED_DIFFERENTLY))
            try:
                lines = [line.strip() for line in read_text(files, name).splitlines() if line.strip()]
            except UserError as error:
                others.append(problem_row(name, f"sidecar cannot be read ({error})"))
                lines = []
            captions = [" ".join(lines)] if one_caption and lines else lines
            for image in images:
                split = next(filter(None, map(split_of, PurePosixPath(image).parts[:-1])), split_of.default)
                yield ImageRef(split, image, captions, name)

    return [*gather_images(files, refs(), ""), *others]
