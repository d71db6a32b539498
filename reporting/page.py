"""captions.html: the images of a run with their captions, one file that opens anywhere, offline."""

import base64
import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from reporting.results import METRIC_TITLES
from system.errors import UserError
from system.files import write_file

TEMPLATES = Path(__file__).parent / "templates"
NUM_IMAGES = 200
NUM_LOOKS = 48  # images with maps of where the model looked: 5 kB each for 20 words over 14 x 14 places
IMAGE_SIZE = 400  # longest side in pixels: tens of kB an image, so that 200 of them still travel by mail


def write_page(
    output_dir: str | os.PathLike,
    images: Iterable[Image.Image],
    records: list[dict],
    results: dict,
    num_images: int = NUM_IMAGES,
) -> Path:
    """Write captions.html, with the curves on it where `output_dir` holds a curves.png.

    Args:
        images: One for each record, in the same order; only the first `num_images` are taken from it.
        records: {"image_id", "caption", "references"}, and where known "shuffled_caption", "cider" (this image's), and
            "tokens" of the caption: {"text", "probability"} and "attention", rows of a grid over the image or, where
            "center_crop" is a number, over the square of that share of its short side. Of these maps the first `NUM_LOOKS`
            images' are kept, or where there are more a third each for the first, the worst and the best images.
        results: What `write_results` writes; whatever is missing is not shown.

    Returns:
        The path of the page.

    Raises:
        ValueError: There are fewer images than records.
    """
    shown = records[:num_images]
    cards = _cards(shown, images)
    script = (TEMPLATES / "captions.js").read_text(encoding="utf-8")
    curves = Path(output_dir) / "curves.png"
    # Captions, names and ids are other people's text. Autoescape makes them inert wherever they land, and the page's
    # content policy lets no script run but this one, known by its hash.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("captions.html.jinja").render(
        cards=cards,
        curves=_data_uri(curves.read_bytes(), "image/png") if curves.exists() else None,
        num_records=len(records),
        facts={
            "Decoding": known_facts(results.get("decoding")),
            "Training": known_facts(results.get("train")),
            "The captions": known_facts(results.get("diagnostics")),
        },
        has_tokens=any(record.get("tokens") for record in shown),
        num_looks=sum(card["looks"] is not None for card in cards),
        results=results,
        rows=score_rows(results),
        sortable=all(record.get("cider") is not None for record in shown),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup((TEMPLATES / "captions.css").read_text(encoding="utf-8")),
    )
    return write_file(Path(output_dir) / "captions.html", page.encode("utf-8", "replace"))


def image_data_uri(image: Image.Image) -> str:
    """An image as a small JPEG inside a data URI; what is transparent becomes white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    small = image.convert("RGB")
    small.thumbnail((IMAGE_SIZE, IMAGE_SIZE))
    content = io.BytesIO()
    # An image smaller than its place on the page is drawn larger, and its blocks with it.
    small.save(content, format="JPEG", quality=80 if max(small.size) > IMAGE_SIZE // 2 else 95)
    return _data_uri(content.getvalue(), "image/jpeg")


def score_rows(results: dict) -> list[dict]:
    """The table of scores, a row for each metric: title, score, interval [low, high], shuffled, constant; None if unknown.

    "share" is where score 1 lies on a line from 0 to the highest number in the row; fractions share the line 0 to 1.
    """
    rows = []
    for name, title in METRIC_TITLES.items():
        if name not in results.get("metrics", {}):
            continue
        row = {
            "title": title,
            "score": results["metrics"][name],
            "interval": (results.get("intervals") or {}).get(name),
            "shuffled": (results.get("shuffled") or {}).get(name),
            "constant": (results.get("constant") or {}).get(name),
        }
        highest = max(
            number or 0.0 for number in (row["score"], row["shuffled"], row["constant"], *(row["interval"] or ()))
        )
        row["share"] = 1.0 / max(highest, 1.0)  # CIDEr alone can pass 1
        rows.append(row)
    return rows


def known_facts(values: dict | None) -> dict[str, str]:
    """Names and values as a table shows them, four figures of a number, unknown values left out."""
    facts = {}
    for name, value in (values or {}).items():
        if isinstance(value, float):
            value = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        if value is not None:
            facts[name.replace("_", " ")] = str(value)
    return facts


def _cards(records: list[dict], images: Iterable[Image.Image]) -> list[dict]:
    """What the template shows of each record: its image, and where the model looked."""
    looks = _images_with_looks(records)
    cards = [
        {
            "source": image_data_uri(image),
            "ratio": round(image.width / image.height, 4),
            "grid_box": _grid_box(image, record.get("center_crop")),
            "looks": _look_maps(record.get("tokens") or []) if place in looks else None,
            "record": record,
        }
        for place, (record, image) in enumerate(zip(records, images, strict=False))
    ]
    if len(cards) < len(records):
        raise UserError(f"the page needs an image for each record: {len(cards)} images, {len(records)} records")
    return cards


def _images_with_looks(records: list[dict]) -> set[int]:
    """Places of the records whose maps are kept: what one sees first in each order of the page."""
    places = range(len(records))
    if len(records) <= NUM_LOOKS:
        return set(places)
    by_cider = sorted(places, key=lambda place: records[place].get("cider") or 0.0)
    third = NUM_LOOKS // 3
    return {*places[:third], *by_cider[:third], *by_cider[-third:]}


def _look_maps(tokens: list[dict]) -> dict | None:
    """Where the model looked at each token, a byte a place, each token's most looked at place 255."""
    maps = [[weight for row in token.get("attention", ()) for weight in row] for token in tokens]
    if not maps or not all(maps):
        return None
    content = b"".join(bytes(round(255 * weight / (max(weights) or 1)) for weight in weights) for weights in maps)
    return {"side": len(tokens[0]["attention"]), "bytes": base64.b64encode(content).decode()}


def _grid_box(image: Image.Image, center_crop: float | None) -> str:
    """Where the model's grid lies on the image, as CSS: left, top, width and height in per cent."""
    width, height = image.size
    seen = (width, height) if center_crop is None else (center_crop * min(width, height),) * 2
    shares = [100 * side / whole for side, whole in zip(seen, (width, height), strict=True)]
    left, top = (50 - share / 2 for share in shares)
    return f"left:{left:.2f}%;top:{top:.2f}%;width:{shares[0]:.2f}%;height:{shares[1]:.2f}%"


def _data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
