"""captions.html: the pictures of a run with their captions, one file that opens anywhere, offline."""

import base64
import hashlib
import io
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from reporting.results import METRIC_TITLES, write_file

TEMPLATES = Path(__file__).parent / "templates"
PICTURE_SIZE = 400  # longest side in pixels: tens of kB a picture, so that 200 of them still travel by mail


def write_page(
    output_dir: str | os.PathLike,
    pictures: Iterable[Image.Image],
    records: list[dict],
    results: dict,
    num_pictures: int = 200,
) -> Path:
    """Write captions.html, with the curves on it where `output_dir` holds a curves.png.

    Args:
        pictures: One for each record, in the same order; only the first `num_pictures` are taken from it.
        records: {"image_id", "caption", "references"}, and where known "blind_caption" and "cider" (this picture's).
        results: What `write_results` writes; whatever is missing is not shown.

    Returns:
        The path of the page.

    Raises:
        ValueError: There are fewer pictures than records.
    """
    shown = records[:num_pictures]
    sources = [picture_data_uri(picture) for picture in islice(pictures, len(shown))]
    if len(sources) < len(shown):
        raise ValueError(f"the page needs a picture for each record: {len(sources)} pictures, {len(shown)} records")
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
        cards=list(zip(sources, shown, strict=True)),
        curves=_data_uri(curves.read_bytes(), "image/png") if curves.exists() else None,
        num_records=len(records),
        facts={
            "Decoding": known_facts(results.get("decoding")),
            "Training": known_facts(results.get("train")),
            "The captions": known_facts(results.get("diagnostics")),
        },
        results=results,
        rows=score_rows(results),
        sortable=all(record.get("cider") is not None for record in shown),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup((TEMPLATES / "captions.css").read_text(encoding="utf-8")),
    )
    return write_file(Path(output_dir) / "captions.html", page.encode("utf-8", "replace"))


def picture_data_uri(picture: Image.Image) -> str:
    """A picture as a small JPEG inside a data URI; what is transparent becomes white."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    small = picture.convert("RGB")
    small.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    content = io.BytesIO()
    small.save(content, format="JPEG", quality=80)
    return _data_uri(content.getvalue(), "image/jpeg")


def score_rows(results: dict) -> list[dict]:
    """The table of scores, a row for each metric: title, score, interval [low, high], blind, constant; None if unknown.

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
            "blind": (results.get("blind") or {}).get(name),
            "constant": (results.get("constant") or {}).get(name),
        }
        highest = max(
            number or 0.0 for number in (row["score"], row["blind"], row["constant"], *(row["interval"] or ()))
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


def _data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
