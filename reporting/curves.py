"""curves.png: losses and scores of one run during training."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from system.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinct to color-blind readers too (after Okabe and Ito), and dark enough on white for small text.
COLORS = ("#0072b2", "#c04a00", "#00805f", "#a3407f", "#6b5b00", "#444444")
Lines = dict[str, tuple[str, str, str]]  # key in the history -> label, color, line style
PANELS: dict[str, Lines] = {
    "Loss": {
        "train_loss": ("training", COLORS[0], "-"),
        "eval_loss": ("validation", COLORS[1], "-"),
    },
    "Reward": {
        "reward": ("sampled captions", COLORS[2], "-"),
    },
    "CIDEr": {
        "cider": ("this model", COLORS[0], "-"),
        "shuffled_cider": ("shuffled", COLORS[0], ":"),
    },
    "BLEU-4 and ROUGE-L": {
        "bleu_4": ("BLEU-4", COLORS[1], "-"),
        "shuffled_bleu_4": ("BLEU-4, shuffled", COLORS[1], ":"),
        "rouge_l": ("ROUGE-L", COLORS[2], "-"),
        "shuffled_rouge_l": ("ROUGE-L, shuffled", COLORS[2], ":"),
    },
}


def draw_curves(output_dir: str | os.PathLike, history: Sequence[dict]) -> Path:
    """Draw curves.png: training and validation loss, and the scores of each evaluation with the shuffled baseline.

    Args:
        history: Rows such as {"step", "epoch", "train_loss", "eval_loss", "cider", "shuffled_cider", "bleu_4",
            "rouge_l"} in the order of training; any key may be missing, None or NaN in any row.

    Returns:
        The path of the image.

    Raises:
        ValueError: No row has a loss or a score.
    """
    panels = {title: lines for title, lines in PANELS.items() if any(points(history, key)[1] for key in lines)}
    if not panels:
        raise ValueError(f"{Path(output_dir) / 'curves.png'} is not drawn: the history has no loss and no score")
    figure, axes = new_figure(len(panels))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for key, (label, color, style) in lines.items():
            draw_line(axis, *points(history, key), label=label, color=color, style=style)
        # Zero is meaningful for a score, not for a loss.
        finish_axis(axis, title, time_key(history), from_zero=title != "Loss")
    return save_figure(figure, Path(output_dir) / "curves.png")


def time_key(history: Sequence[dict]) -> str:
    """Unit of the horizontal axis: epochs if every row has one, else steps."""
    return "epoch" if all(_is_number(row.get("epoch")) for row in history) else "step"


def points(history: Sequence[dict], key: str) -> tuple[list[float], list[float]]:
    """Times and values of one key of the history, without the rows that lack it."""
    time = time_key(history)
    rows = [row for row in history if _is_number(row.get(key)) and _is_number(row.get(time))]
    return [row[time] for row in rows], [row[key] for row in rows]


def new_figure(num_panels: int) -> "tuple[Figure, list[Axes]]":
    """A figure with panels side by side. Not by pyplot, which would keep every figure of a long run in memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * num_panels, 3.4), dpi=160, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def draw_line(
    axis: "Axes", times: list[float], values: list[float], label: str | None, color: str, style: str = "-"
) -> None:
    """Draw one curve; up to 30 points are marked, so that a run of one epoch shows something."""
    if values:
        marker = "o" if len(values) <= 30 else None
        axis.plot(times, values, style, color=color, label=label, marker=marker, markersize=3.2, linewidth=1.6)


def finish_axis(axis: "Axes", title: str, time: str, from_zero: bool = False) -> None:
    """Add title, legend and frame, the same in every panel."""
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color="#222222")
    if time == "epoch":
        from matplotlib.ticker import MaxNLocator

        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_xlabel(time, fontsize=9, color="#555555")
    axis.tick_params(labelsize=8.5, colors="#555555", length=3)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#bbbbbb")
    axis.margins(y=0.12)
    if from_zero:
        axis.set_ylim(bottom=0)
    if axis.get_legend_handles_labels()[1]:
        # Below the axis: inside, four entries would cover a curve.
        style = {"frameon": False, "fontsize": 8.5, "labelcolor": "#333333", "handlelength": 1.8, "columnspacing": 1.4}
        axis.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.2), ncols=2, **style)


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write the figure as PNG, atomically."""
    content = io.BytesIO()
    figure.savefig(content, format="png", bbox_inches="tight", pad_inches=0.1)  # a title may be longer than its panel
    return write_file(path, content.getvalue())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
