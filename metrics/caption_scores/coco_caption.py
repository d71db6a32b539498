"""pycocoevalcap's classes over this package's scorer, and COCO's files: change the import, keep the code.

from caption_scores.coco_caption import Bleu, Cider, COCOEvalCap, PTBTokenizer, Rouge
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .overlap import bleu
from .ptb_tokenizer import tokenize_in_order
from .scorer import METRIC_NAMES, CaptionScorer


class InputError(ValueError):
    """Captions or files that cannot be scored; one sentence that names the file or image and says what to do."""


def compute_score(
    gts: Mapping[object, Sequence[str]], res: Mapping[object, Sequence[str]], tokenizer: str = "auto"
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """All six scores of captions by image id, and those of each image in the order of `gts`.

    Args:
        gts: The references of each image.
        res: A list with the one caption of each of the same images.
        tokenizer: As of `CaptionScorer`; "none" for captions that PTBTokenizer has split.

    Raises:
        InputError: Other images in one than in the other, or not one caption of an image.
    """
    if unequal := gts.keys() ^ res.keys():
        where = "res" if next(iter(unequal)) in gts else "gts"
        raise InputError(
            f"{len(unequal)} images are missing, among them {next(iter(unequal))!r} in {where}: give both the same"
        )
    for image, captions in res.items():
        if isinstance(captions, str) or len(captions) != 1:
            raise InputError(f"res[{image!r}] is {captions!r}: give a list with one caption")
    scorer = CaptionScorer(list(gts.values()), tokenizer=tokenizer)
    rows = scorer.measure([res[image][0] for image in gts])
    bleus = bleu(rows[:, :4], rows[:, 4:8], rows[:, 8], rows[:, 9])
    columns = np.column_stack([bleus, rows[:, 10:]]).T
    return scorer.mean(rows), dict(zip(METRIC_NAMES, columns, strict=True))


class Bleu:
    """BLEU-1 to BLEU-n of tokenized captions, as `pycocoevalcap.bleu.bleu.Bleu`."""

    def __init__(self, n: int = 4) -> None:
        self.n = n

    def compute_score(self, gts, res, verbose: int = 0) -> tuple[list[float], list[list[float]]]:
        scores, per_image = compute_score(gts, res, "none")
        names = METRIC_NAMES[: self.n]
        return [scores[name] for name in names], [per_image[name].tolist() for name in names]

    def method(self) -> str:
        return "Bleu"


class Rouge:
    """ROUGE-L of tokenized captions, as `pycocoevalcap.rouge.rouge.Rouge`."""

    def compute_score(self, gts, res) -> tuple[float, np.ndarray]:
        scores, per_image = compute_score(gts, res, "none")
        return scores["rouge_l"], per_image["rouge_l"]

    def method(self) -> str:
        return "Rouge"


class Cider:
    """CIDEr-D of tokenized captions, as `pycocoevalcap.cider.cider.Cider`, which calls it CIDEr."""

    def compute_score(self, gts, res) -> tuple[float, np.ndarray]:
        scores, per_image = compute_score(gts, res, "none")
        return scores["cider"], per_image["cider"]

    def method(self) -> str:
        return "CIDEr"


class PTBTokenizer:
    """Tokenized captions by image id, as `pycocoevalcap.tokenizer.ptbtokenizer.PTBTokenizer` gives them."""

    def tokenize(self, captions_for_image: Mapping[object, Sequence[Mapping[str, str]]]) -> dict[object, list[str]]:
        rows = [(image, row["caption"]) for image, rows in captions_for_image.items() for row in rows]
        tokenized: dict[object, list[str]] = {}
        for (image, _), tokens in zip(rows, tokenize_in_order([caption for _, caption in rows]), strict=True):
            tokenized.setdefault(image, []).append(" ".join(tokens))
        return tokenized


class COCOEvalCap:
    """`pycocoevalcap.eval.COCOEvalCap` without its Java programs, METEOR and SPICE.

    Args:
        coco: pycocotools' COCO of the annotations.
        cocoRes: What its `loadRes` gives.

    Attributes:
        params: "image_id": the images to score, all annotated ones unless it is changed.
        eval: The scores, under pycocoevalcap's names.
        imgToEval, evalImgs: Those of each image.
    """

    NAMES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr")

    def __init__(self, coco, cocoRes) -> None:
        self.coco, self.cocoRes = coco, cocoRes
        self.params = {"image_id": coco.getImgIds()}
        self.eval: dict[str, float] = {}
        self.imgToEval: dict[object, dict] = {}
        self.evalImgs: list[dict] = []

    def evaluate(self) -> None:
        images = list(self.params["image_id"])
        gts, res = (
            {image: [row["caption"] for row in source.imgToAnns[image]] for image in images}
            for source in (self.coco, self.cocoRes)
        )
        scores, per_image = compute_score(gts, res, "ptb_in_order")
        self.eval = dict(zip(self.NAMES, scores.values(), strict=True))
        columns = np.column_stack(list(per_image.values())).tolist()
        self.imgToEval = {
            image: {"image_id": image, **dict(zip(self.NAMES, row, strict=True))}
            for image, row in zip(images, columns, strict=True)
        }
        self.evalImgs = list(self.imgToEval.values())


def read_coco(results_file: Path, annotations_file: Path) -> tuple[list, list[str], list[list[str]], int]:
    """Read captions in COCO's result format and their references in its annotation format.

    Returns:
        the images' ids, their captions, their references, and how many images with references have no caption.

    Raises:
        InputError: A file that is missing or in another format, a caption without references, two of an image.
    """
    references: dict[object, list[str]] = {}
    for row in _read_rows(annotations_file, "annotations"):
        references.setdefault(row["image_id"], []).append(row["caption"])
    captions: dict[object, str] = {}
    for row in _read_rows(results_file, None):
        image = row["image_id"]
        if image not in references:
            other = int(image) if isinstance(image, str) and image.isdecimal() else str(image)
            known = f", which has {other!r}: write ids alike" if other in references else ": give its annotations"
            raise InputError(f"{results_file}: image {image!r} has no caption in {annotations_file}{known}")
        if image in captions:
            raise InputError(f"{results_file}: image {image!r} has two captions: give one of each image")
        captions[image] = row["caption"]
    if not captions:
        raise InputError(f"{results_file}: has no captions: give a list of rows with `image_id` and `caption`")
    return (
        list(captions),
        list(captions.values()),
        [references[image] for image in captions],
        len(references) - len(captions),
    )


def find_images(annotations_file: Path, folder: Path, images: Sequence) -> list[Path]:
    """The file of each image, by the names that the annotations' list `images` has.

    Raises:
        InputError: An image that the list does not have, or whose file is missing.
    """
    content = _read_json(annotations_file)
    rows = content.get("images") if isinstance(content, dict) else None
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    names = {row.get("id"): row["file_name"] for row in rows if isinstance(row.get("file_name"), str)}
    if unnamed := [image for image in images if image not in names]:
        raise InputError(
            f"{annotations_file}: {len(unnamed)} of {len(images)} images, the first {unnamed[0]!r}, have no `file_name` in "
            "its list `images`: give COCO's annotations with it"
        )
    files = [folder / names[image] for image in images]
    if absent := [file for file in files if not file.is_file()]:
        raise InputError(f"{len(absent)} of {len(files)} images are missing, the first {absent[0]}: give their folder")
    return files


def _read_json(file: Path):
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}): give the path of COCO's file") from None
    except ValueError:
        raise InputError(f"{file}: is not JSON: give the file as COCO publishes it") from None


def _read_rows(file: Path, key: str | None) -> list[dict]:
    content = _read_json(file)
    rows = content.get(key) if key and isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise InputError(f"{file}: is not a COCO caption file: it needs a list of rows with `image_id` and `caption`")
    for number, row in enumerate(rows):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("caption"), str)
            or not isinstance(row.get("image_id"), int | str)
        ):
            raise InputError(
                f"{file}: row {number} needs `image_id`, a number or string, and `caption`, a string: {row!r:.80}"
            )
    return rows
