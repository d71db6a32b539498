"""Objects that captions name and images do not have, in the manner of CHAIR (Rohrbach et al. 2018), by word lists of the user.

No list of synonyms comes with this package: CHAIR's own, for COCO's 80 objects, can be given as it is. Unlike CHAIR, which finds
singulars by a lemmatizer, words are compared as they are, and with a plural's -s, -es or -ies; irregular plurals ("men") belong
in the list.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .coco_caption import InputError
from .intervals import bootstrap_interval
from .ptb_tokenizer import tokenize


class ObjectMentions(NamedTuple):
    """Of each image: how many objects its caption names, and how many of these it does not have; int64 (images,)."""

    named: np.ndarray
    hallucinated: np.ndarray

    def scores(self) -> dict[str, float]:
        """ "chair_i", the rate of mentions that are false, and "chair_s", the rate of captions that have a false one."""
        named = int(self.named.sum())
        return {
            "chair_i": float(self.hallucinated.sum() / named) if named else 0.0,
            "chair_s": float((self.hallucinated > 0).mean()),
        }

    def intervals(self) -> dict[str, list[float]]:
        """95 % intervals of the scores over images."""
        return {
            "chair_i": bootstrap_interval(self.hallucinated, self.named),
            "chair_s": bootstrap_interval(self.hallucinated > 0),
        }


class ObjectVocabulary:
    """Finds objects in captions by their names and synonyms, each of one or more words; of two that overlap, the longer.

    Args:
        objects: All names that annotations use.
        synonyms: For each object other words for it. A word for two objects stands for the first.
    """

    def __init__(self, objects: Iterable[str], synonyms: Mapping[str, Sequence[str]] | None = None) -> None:
        self.names: dict[tuple[str, ...], str] = {}
        for name in objects:
            self._add(name, name)
        for name, words in (synonyms or {}).items():
            self._add(name, name)
            for word in words:
                self._add(word, self.name(name))
        self.longest = max(map(len, self.names), default=0)

    def name(self, text: str) -> str:
        """The one name of an object that annotations may call by a synonym."""
        return self.names.get(tuple(tokenize(text)), text)

    def find(self, caption: str) -> list[str]:
        """The objects that a caption names, in its order; an object that is named twice is there twice."""
        words, found, place = tuple(tokenize(caption)), [], 0
        while place < len(words):
            sizes = range(min(self.longest, len(words) - place), 0, -1)
            size = next((size for size in sizes if words[place : place + size] in self.names), 0)
            if size:
                found.append(self.names[words[place : place + size]])
            place += size or 1
        return found

    def _add(self, text: str, name: str) -> None:
        *before, last = tokenize(text) or [""]
        for form in _singular_and_plurals(last) if last else ():
            self.names.setdefault((*before, form), name)


def count_mentions(
    captions: Sequence[str],
    objects: Sequence[Iterable[str]],
    references: Sequence[Sequence[str]],
    vocabulary: ObjectVocabulary,
) -> ObjectMentions:
    """Count the objects that captions name, and those among them that neither annotations nor references have.

    Args:
        captions: One per image.
        objects: The annotated objects of each image.
        references: The reference captions of each image; what these name is there, as in CHAIR.
        vocabulary: Finds objects in captions.
    """
    counts = []
    for caption, names, texts in zip(captions, objects, references, strict=True):
        there = {vocabulary.name(name) for name in names}.union(*map(vocabulary.find, texts))
        found = vocabulary.find(caption)
        counts.append((len(found), sum(name not in there for name in found)))
    return ObjectMentions(*np.array(counts, dtype=np.int64).reshape(-1, 2).T)


def read_objects(file: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Read the objects of images: COCO's instances json, or a JSON object {image id: [objects]}.

    Returns:
        the names of each image's objects, by the image's id as text; and all names there are, also those of no image.

    Raises:
        InputError: A file that is missing or in another format.
    """
    content = _read_json(file)
    if _is_lists_of_text(content):
        return content, list(dict.fromkeys(chain.from_iterable(content.values())))
    try:
        names = {category["id"]: category["name"] for category in content["categories"]}
        objects: dict[str, list[str]] = {str(image["id"]): [] for image in content.get("images", [])}
        for row in content["annotations"]:
            objects.setdefault(str(row["image_id"]), []).append(names[row["category_id"]])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: has no objects of images ({error!r}): give COCO's instances json, with `categories` and `annotations`, or a "
            "JSON object of image id: [objects]"
        ) from None
    return objects, list(names.values())


def objects_of(images: Sequence[object], objects: Mapping[str, list[str]], file: Path) -> list[list[str]]:
    """The objects of each image; InputError if the file has not all of them."""
    missing = [image for image in images if str(image) not in objects]
    if missing:
        raise InputError(
            f"{file}: {len(missing):,} of {len(images):,} images, such as {missing[0]!r}, are not in it: give the objects of the "
            "images that were captioned"
        )
    return [objects[str(image)] for image in images]


def read_synonyms(file: Path) -> dict[str, list[str]]:
    """Synonyms by object: JSON {object: [synonyms]}, or lines of "object, synonym, synonym", as CHAIR's list has them.

    Raises:
        InputError: A file that is missing or in another format.
    """
    if file.suffix == ".json":
        content = _read_json(file)
        if not _is_lists_of_text(content):
            raise InputError(f"{file}: is not a list of synonyms: give a JSON object of object: [synonyms]")
        return content
    lines = [[word.strip() for word in line.split(",")] for line in _read(file).splitlines() if line.strip()]
    synonyms: dict[str, list[str]] = {}
    for name, *words in lines:
        synonyms.setdefault(name, []).extend(words)
    return synonyms


def _singular_and_plurals(word: str) -> Iterator[str]:
    yield word
    yield f"{word}s"
    if word.endswith(("s", "x", "z", "ch", "sh", "o")):
        yield f"{word}es"
    if word.endswith("y"):
        yield f"{word[:-1]}ies"


def _is_lists_of_text(content: object) -> bool:
    return isinstance(content, dict) and all(
        isinstance(words, list) and all(isinstance(word, str) for word in words) for words in content.values()
    )


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}): give its path"
        ) from None


def _read_json(file: Path):
    try:
        return json.loads(_read(file))
    except json.JSONDecodeError:
        raise InputError(f"{file}: is not JSON") from None
