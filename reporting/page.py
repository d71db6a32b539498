"""captions.html: the images of a split with their generated captions, in one file that opens anywhere, offline."""

import base64
import hashlib
import io
import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from reporting.results import ALL_TITLES, TRUTH_TITLES
from system.files import write_file

TEMPLATES = Path(__file__).parent / "templates"
NUM_IMAGES = 200
NUM_ATTENTION_MAPS = 48  # images with attention maps: 5 kB each for 20 tokens on a grid of 14 x 14
IMAGE_SIZE = 400  # longest side in pixels: tens of kB per image, so that 200 of them still fit into an email


def write_page(
    output_dir: str | os.PathLike,
    images: Iterable[Image.Image],
    records: list[dict],
    results: dict,
    num_images: int = NUM_IMAGES,
) -> Path:
    """Write captions.html, with the curves on it if `output_dir` holds a curves.png.

    Args:
        images: One for each record, in the same order; only the first `num_images` are read.
        records: {"image_id", "caption", "references"}, and optionally "shuffled_caption", "cider" (of this image),
            "truth" as in `report_captions`, "confidence" of the caption, and its "tokens": {"text", "probability"} and optionally
            "attention", a grid of weights over the whole image or, if "center_crop" is a number, over the centered
            square whose side is that fraction of the short side. Attention maps are kept for `NUM_ATTENTION_MAPS`
            images; if there are more, for the first, worst and best, a third each.
        results: What `write_results` writes; missing keys are not shown.
        num_images: Maximum number of images on the page.

    Returns:
        The path of the page.

    Raises:
        ValueError: There are fewer images than records.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    shown = records[:num_images]
    cards = _cards(shown, images)
    script = (TEMPLATES / "captions.js").read_text(encoding="utf-8")
    curves = Path(output_dir) / "curves.png"
    # Captions, names and ids are untrusted text. Autoescape makes them inert, and the page's content security policy
    # allows no script but ours, by its hash.
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
            "Caption statistics": known_facts(results.get("diagnostics")),
        },
        has_tokens=any(record.get("tokens") for record in shown),
        num_attention_maps=sum(card["attention"] is not None for card in cards),
        results=results,
        rows=score_rows(results),
        aspects={key: TRUTH_TITLES[key] for key in results.get("true_captions") or {} if key != "all"},
        has_truth=any(record.get("truth") for record in shown),
        has_confidence=bool(shown) and all(record.get("confidence") is not None for record in shown),
        sortable=all(record.get("cider") is not None for record in shown),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup((TEMPLATES / "captions.css").read_text(encoding="utf-8")),
    )
    return write_file(Path(output_dir) / "captions.html", page.encode("utf-8", "replace"))


def image_data_uri(image: Image.Image) -> str:
    """An image as a small JPEG in a data URI; transparent pixels become white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    small = image.convert("RGB")
    small.thumbnail((IMAGE_SIZE, IMAGE_SIZE))
    content = io.BytesIO()
    # A small image is enlarged on the page, and its JPEG blocks with it: higher quality.
    small.save(content, format="JPEG", quality=80 if max(small.size) > IMAGE_SIZE // 2 else 95)
    return _data_uri(content.getvalue(), "image/jpeg")


def score_rows(results: dict) -> list[dict]:
    """Rows of the score table, one per metric: title, score, interval [low, high], shuffled, constant; None if unknown.

    "scale" maps the row's numbers to its axis, 0 to 1: by 1, or for a score above 1 by the inverse of the largest.
    """
    rows = []
    for name, title in ALL_TITLES.items():
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
        row["scale"] = 1.0 / max(highest, 1.0)  # CIDEr and CLIPScore may exceed 1
        rows.append(row)
    return rows


def known_facts(values: dict | None) -> dict[str, str]:
    """Names and values as a table shows them, numbers to four digits, unknown values left out."""
    facts = {}
    for name, value in (values or {}).items():
        if isinstance(value, float):
            value = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        if value is not None:
            facts[name.replace("_", " ")] = str(value)
    return facts


def _cards(records: list[dict], images: Iterable[Image.Image]) -> list[dict]:
    """What the template needs for each record: its image, the parts of its caption, its attention maps and itself."""
    with_attention = _with_attention(records)
    cards = [
        {
            "source": image_data_uri(image),
            "ratio": round(image.width / image.height, 4),
            "grid_box": _grid_box(image, record.get("center_crop")),
            "attention": _attention_maps(record.get("tokens") or []) if index in with_attention else None,
            "parts": _caption_parts(record),
            "verdict": _verdict(record.get("truth")),
            "record": record,
        }
        for index, (record, image) in enumerate(zip(records, images, strict=False))
    ]
    if len(cards) < len(records):
        raise ValueError(f"the page needs an image for each record: {len(cards)} images, {len(records)} records")
    return cards


def _with_attention(records: list[dict]) -> set[int]:
    """Indices of the records whose attention maps are kept: those at the top in each order of the page."""
    indices = range(len(records))
    if len(records) <= NUM_ATTENTION_MAPS:
        return set(indices)
    by_quality = sorted(indices, key=lambda index: (_is_true(records[index]), records[index].get("cider") or 0.0))
    third = NUM_ATTENTION_MAPS // 3
    return {*indices[:third], *by_quality[:third], *by_quality[-third:]}


def _is_true(record: dict) -> bool:
    return bool((record.get("truth") or {"all": True})["all"])


def _verdict(truth: dict | None) -> str | None:
    """What is false in a caption, in words: the underlines of its false words are not for everybody."""
    if truth is None or truth["all"]:
        return None if truth is None else "True"
    aspects = [title.lower() for key, title in TRUTH_TITLES.items() if key != "all" and not truth.get(key, True)]
    return f"False: {', '.join(aspects)}" if aspects else "False"


def _caption_parts(record: dict) -> list[dict]:
    """A caption cut into its tokens or, without tokens, at its false words.

    Returns:
        For each part its "text", whether a space comes before it ("space"), whether it has a false word ("false"), and
        the "probability" of a token, else None.
    """
    caption, spans = record["caption"], (record.get("truth") or {}).get("false_words", ())
    if not record.get("tokens"):
        cuts = sorted({0, len(caption), *(cut for span in spans for cut in span)})
        parts = [(start, end, caption[start:end], False, None) for start, end in pairwise(cuts)]
    else:
        parts, end = [], 0
        for index, token in enumerate(record["tokens"]):
            text = token["text"].lstrip()
            start = caption.find(text.rstrip(), end)  # -1 in a caption that is not made up of its tokens
            end = end if start < 0 else start + len(text.rstrip())
            parts.append((start, end, text, index > 0 and token["text"][:1].isspace(), token["probability"]))
    return [
        {"text": text, "space": space, "false": _overlaps(start, end, spans), "probability": probability}
        for start, end, text, space, probability in parts
    ]


def _overlaps(start: int, end: int, spans: Iterable[tuple[int, int]]) -> bool:
    return start >= 0 and any(start < span_end and span_start < end for span_start, span_end in spans)


def _attention_maps(tokens: list[dict]) -> dict | None:
    """The attention weights of each token, one byte per grid cell; each token's largest weight is 255."""
    maps = [[weight for row in token.get("attention", ()) for weight in row] for token in tokens]
    if not maps or not all(maps):
        return None
    content = b"".join(bytes(round(255 * weight / (max(weights) or 1)) for weight in weights) for weights in maps)
    return {"side": len(tokens[0]["attention"]), "bytes": base64.b64encode(content).decode()}


def _grid_box(image: Image.Image, center_crop: float | None) -> str:
    """CSS box of the encoder's grid on the image: left, top, width and height in percent."""
    width, height = image.size
    encoded = (width, height) if center_crop is None else (center_crop * min(width, height),) * 2
    box_width, box_height = (100 * side / whole for side, whole in zip(encoded, (width, height), strict=True))
    left, top = 50 - box_width / 2, 50 - box_height / 2
    return f"left:{left:.2f}%;top:{top:.2f}%;width:{box_width:.2f}%;height:{box_height:.2f}%"


def _data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
