"""Scores that are computed where they are asked for: METEOR, SPICE, CLIPScore, RefCLIPScore, and rates of hallucinated objects."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metrics.caption_scores.baselines import derangement
from metrics.caption_scores.coco_caption import InputError
from metrics.caption_scores.intervals import interval_of_images
from metrics.caption_scores.java_metrics import JavaMetricError, check_installation, measure_java
from metrics.caption_scores.object_hallucination import (
    ObjectVocabulary,
    count_mentions,
    objects_of,
    read_objects,
    read_synonyms,
)
from system.errors import UserError


@dataclass
class OptionalMetrics:
    """Scores beside those of `CaptionScorer`, with 95 % intervals and, where no Java program runs, of the shuffled baseline.

    Args:
        meteor, spice: Whether they are scored; Java programs.
        clip_model: Model of CLIPScore and RefCLIPScore, see `ClipScorer`.
        objects: File of the images' objects, for CHAIR; see `read_objects`.
        synonyms: File of synonyms of objects, see `read_synonyms`.
        batch_size: Images or texts that the CLIP model encodes together.

    Raises:
        UserError: A Java program or its package is missing; the model does not load; a file cannot be read.
    """

    meteor: bool = False
    spice: bool = False
    clip_model: str | None = None
    objects: str | None = None
    synonyms: str | None = None
    batch_size: int = 64
    _objects: dict = field(default_factory=dict, init=False, repr=False)
    _clip: Any = field(default=None, init=False, repr=False)
    _vocabulary: ObjectVocabulary | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Finds at once what would end an evaluation after its captions are generated."""
        try:
            for name in self._java_names():
                check_installation(name)
            if self.objects:
                self._objects, names = read_objects(Path(self.objects))
                self._vocabulary = ObjectVocabulary(
                    names, read_synonyms(Path(self.synonyms)) if self.synonyms else None
                )
        except (JavaMetricError, InputError) as error:
            raise UserError(str(error)) from error
        if self.clip_model:
            from metrics.caption_scores.clip_score import ClipScorer

            try:
                self._clip = ClipScorer(self.clip_model, self.batch_size)
            except ValueError as error:
                raise UserError(f"--clip_model: {error}") from error

    def objects_of(self, image_ids: Sequence[str]) -> list[list[str]]:
        """The objects of each image, none where they are not scored; UserError if the file has not all images."""
        try:
            return objects_of(image_ids, self._objects, Path(self.objects)) if self.objects else []
        except InputError as error:
            raise UserError(str(error)) from error

    def score(
        self, captions: Sequence[str], references: Sequence[Sequence[str]], image_ids: Sequence[str], rows=None
    ) -> dict:
        """Score one caption per image.

        Args:
            image_ids: Ids of the images, as the file of objects has them.
            rows: Of each image its row, with `image` and perhaps `content_hash`; for the CLIP model.

        Returns:
            {"metrics", "intervals", "shuffled"}: scores by the names of `OPTIONAL_TITLES`, and "clip_model" where there is one.
        """
        result: dict = {"metrics": {}, "intervals": {}, "shuffled": {}}
        for name in self._java_names():
            self._score_java(name, captions, references, result)
        shuffled = derangement(len(captions)) if len(captions) > 1 else None
        if self.clip_model:
            self._score_clip(captions, references, rows, result)
        if self.objects:
            self._score_objects(captions, references, image_ids, shuffled, result)
        return result

    def _java_names(self) -> list[str]:
        return [name for name in ("meteor", "spice") if getattr(self, name)]

    @staticmethod
    def _score_java(name: str, captions, references, result: dict) -> None:
        try:
            score, of_images = measure_java(name, captions, references)
        except JavaMetricError as error:
            raise UserError(str(error)) from error
        result["metrics"][name] = score
        result["intervals"][name] = interval_of_images(score, of_images)

    def _score_clip(self, captions, references, rows, result: dict) -> None:
        for part, values in self._clip.report(rows["image"], image_hashes(rows), captions, references).items():
            result[part] |= values
        result["clip_model"] = Path(self.clip_model).name if os.path.exists(self.clip_model) else self.clip_model

    def _score_objects(self, captions, references, image_ids, shuffled, result: dict) -> None:
        objects = self.objects_of(image_ids)
        mentions = count_mentions(captions, objects, references, self._vocabulary)
        result["metrics"] |= mentions.scores()
        result["intervals"] |= mentions.intervals()
        if shuffled is not None:
            others = [captions[source] for source in shuffled]
            result["shuffled"] |= count_mentions(others, objects, references, self._vocabulary).scores()


def image_hashes(rows) -> list[str]:
    """A digest of each image's content: the table's own where it has them, else of the pixels."""
    if "content_hash" in rows.column_names and all(rows["content_hash"]):
        return list(rows["content_hash"])
    return [
        hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest() for image in rows["image"]
    ]


def add_scores(report: dict, optional: dict) -> dict:
    """The report of `CaptionScorer` with optional scores in the same tables."""
    parts = ("metrics", "intervals", "shuffled")
    merged = {name: {**report[name], **optional.get(name, {})} for name in parts}
    return {**report, **optional, **merged}
