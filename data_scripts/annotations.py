"""Annotation files and their images: named apart, or together in one folder or zip, in which the files are recognized by what they hold."""

import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

from data_scripts.archives import SourceFiles, open_files, read_file
from data_scripts.text_files import IMAGE_SUFFIXES, read_text
from system.errors import UserError

IMAGES_HELP = "folder, zip, or http(s) URL of a zip with the images (default: SOURCE or the first file's folder, or the one zip in it)"


def is_file_of_its_own(source: str) -> bool:
    """Whether a source is a file to read, and not a folder, a zip or a zip's URL to read files from."""
    return "://" not in source and Path(source).is_file() and not zipfile.is_zipfile(source)


@contextmanager
def open_annotations(
    sources: Sequence[str],
    images: str | None,
    find: Callable[[SourceFiles], list[str]],
    max_unpacked_gigabytes: float,
) -> Iterator[tuple[dict[str, Callable[[], str]], SourceFiles]]:
    """Open the annotation files of a source, each by name as a function that returns its text, and its images.

    Args:
        sources: Annotation files; or one folder, zip or URL of a zip that has them.
        images: Folder, zip or URL of a zip of the images; None for that of the files.
        find: Names the annotation files among those of a folder or zip.

    Raises:
        UserError: A source is not there, or has no annotation file.
    """
    if len(sources) == 1 and not is_file_of_its_own(sources[0]):
        with open_files(sources[0], max_unpacked_gigabytes) as files:
            names = find(files)
            if not names:
                raise UserError(f"{sources[0]} has no annotation file of this layout")
            readers = {name: partial(read_text, files, name) for name in names}
            with open_images(images, sources[0], files, max_unpacked_gigabytes) as image_files:
                yield readers, image_files
        return
    for source in sources:
        if not is_file_of_its_own(source):
            raise UserError(f"{source} is not a file")
    own = SourceFiles("", {source: partial(read_file, Path(source)) for source in sources})
    beside = Path(sources[0]).parent
    with ExitStack() as stack:
        files = None if images else stack.enter_context(open_files(beside, max_unpacked_gigabytes))
        image_files = stack.enter_context(open_images(images, beside, files, max_unpacked_gigabytes))
        yield {source: partial(read_text, own, source) for source in sources}, image_files


@contextmanager
def open_images(
    images: str | None, source: str | Path, files: SourceFiles | None, max_unpacked_gigabytes: float
) -> Iterator[SourceFiles]:
    """Open the images of annotation files.

    Args:
        images: Where they are; None for `source`, or the one zip in it.
        source: Folder or zip of the annotation files.
        files: Its files.

    Raises:
        UserError: `source` has no images.
    """
    if images is None and any(PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES for name in files.names):
        yield files
        return
    if images is None:
        zips = [name for name in files.names if name.lower().endswith(".zip")]
        if len(zips) != 1 or not Path(source).is_dir():
            raise UserError(f"{source} has no images: give their folder or zip by --images")
        images = str(Path(source, zips[0]))
    with open_files(images, max_unpacked_gigabytes) as image_files:
        yield image_files


JSON_FORMS = {  # keys that a file of each form has
    "coco": (rb'"images"\s*:', rb'"annotations"\s*:', rb'"caption"\s*:'),
    "textcaps": (rb'"data"\s*:', rb'"caption_str"\s*:'),
    "karpathy": (rb'"images"\s*:', rb'"sentences"\s*:'),
}


def json_form(content: bytes) -> str | None:
    """Which annotation file a JSON text is: COCO's, with captions (not its boxes), TextCaps' or Karpathy's; None for any other."""
    found = (form for form, keys in JSON_FORMS.items() if all(re.search(key, content) for key in keys))
    return next(found, None)


def _form_of(files: SourceFiles, name: str) -> str | None:
    try:
        return json_form(files.read(name))
    except OSError:  # damaged, or larger than any annotation file
        return None


def find_json(files: SourceFiles, *forms: str) -> list[str]:
    """The annotation files of some forms in a source. A JSON file beside an image of its name is that image's alone."""
    stems = {path.with_suffix("") for path in map(PurePosixPath, files.names) if path.suffix.lower() in IMAGE_SUFFIXES}
    names = [name for name in files.names if name.lower().endswith(".json")]
    return [
        name for name in names if PurePosixPath(name).with_suffix("") not in stems and _form_of(files, name) in forms
    ]


@contextmanager
def open_annotation_file(
    source: str, images: str | None, find: Callable[[SourceFiles], list[str]], max_unpacked_gigabytes: float
) -> Iterator[tuple[str, str, SourceFiles]]:
    """The name and the text of a source's only annotation file, and its images; see `open_annotations`.

    Raises:
        UserError: There is none, or there are several.
    """
    with open_annotations([source], images, find, max_unpacked_gigabytes) as (readers, image_files):
        if len(readers) > 1:
            raise UserError(f"{source} has several caption files, {', '.join(readers)}: name one, and --images")
        ((path, read),) = readers.items()
        yield PurePosixPath(path).name, read(), image_files
