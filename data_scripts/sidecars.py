"""Read images whose captions lie beside them in text files of the same name, `x.jpg` and `x.txt` or `x.caption`."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from data_scripts.archives import SourceFiles
from data_scripts.row_checks import SourceRow, note_row, problem_row
from data_scripts.splits import SplitNames
from data_scripts.text_files import IMAGE_SUFFIXES, ImageRef, gather_images, read_text
from system.errors import UserError

SIDECAR_SUFFIXES = (".txt", ".caption")


def pair_sidecars(files: SourceFiles) -> dict[str, list[str]]:
    """Return the image files of each sidecar file, by its name; a text file without an image has none."""
    images: dict[PurePosixPath, list[str]] = {}
    paths = [PurePosixPath(name) for name in files.names]
    for path in paths:
        if path.suffix.lower() in IMAGE_SUFFIXES:
            images.setdefault(path.with_suffix(""), []).append(str(path))
    return {
        str(path): images.get(path.with_suffix(""), []) for path in paths if path.suffix.lower() in SIDECAR_SUFFIXES
    }


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
