"""Compare several runs: one table and one plot.

python -m reporting.compare outputs/demo/lstm outputs/demo/vit_gpt2 --output compare.png
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from reporting.curves import COLORS, draw_line, finish_axis, new_figure, points, save_figure, time_key
from reporting.results import METRIC_TITLES, OPTIONAL_TITLES, TRUTH_TITLES, read_history, read_results
from system.errors import UserError, one_line_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Runs = dict[str, dict]  # output directory -> its results


def comparison_table(runs: Runs) -> str:
    """A Markdown table, one line per run: scores, CIDEr's interval, shuffled CIDEr, training time.

    The rate of true captions has a column if any run has one. A sentence follows if runs were scored on different
    images.
    """
    has_truth = any(results.get("true_captions") for results in runs.values())
    truth_title = [TRUTH_TITLES["all"]] if has_truth else []
    optional = {
        name: title
        for name, title in OPTIONAL_TITLES.items()
        if any(name in results["metrics"] for results in runs.values())
    }
    columns = METRIC_TITLES | optional
    titles = ["Run", *truth_title, *columns.values(), "95% interval", "Shuffled CIDEr", "Epochs", "Seconds"]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for name, results in runs.items():
        interval = (results.get("intervals") or {}).get("cider")
        train = results.get("train") or {}
        cells = [
            name.replace("|", "\\|"),
            *([_number((results.get("true_captions") or {}).get("all"))] if has_truth else []),
            *(_number(results["metrics"].get(metric)) for metric in columns),
            f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "—",
            _number(results["shuffled"]["cider"]) if has_shuffled(results) else "—",
            _number(train.get("epochs"), "g"),
            _number(train.get("seconds"), ".0f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    scored_on = {(results.get("dataset"), results.get("split"), results.get("num_images")) for results in runs.values()}
    if len(scored_on) > 1:
        images = "; ".join(
            f"{dataset}, {split}, {number} images" for dataset, split, number in sorted(scored_on, key=str)
        )
        lines += ["", f"These runs were scored on different images ({images}): their scores are not comparable."]
    tokenizers = {results["tokenizer"] for results in runs.values() if results.get("tokenizer")}
    if len(tokenizers) > 1:
        lines += [
            "",
            f"These runs' scores are of different tokenizers ({', '.join(sorted(tokenizers))}): not comparable.",
        ]
    return "\n".join(lines)


def short_of_truth(runs: Runs, rate: float) -> str | None:
    """A sentence that names the runs with a lower rate of true captions, or with none known; None if there is no such run."""
    rates = {name: (results.get("true_captions") or {}).get("all") for name, results in runs.items()}
    short = [
        f"{name} has {'no known rate' if value is None else format(value, '.4g')}"
        for name, value in rates.items()
        if value is None or value < rate
    ]
    return f"Too few true captions: {', '.join(short)}, and {rate:g} are required" if short else None


def draw_comparison(path: Path, runs: Runs, histories: dict[str, list[dict]]) -> Path:
    """Draw each run's final CIDEr with interval and shuffled baseline, and CIDEr and validation loss during training.

    Args:
        histories: Rows of each run's history.json; a panel without any values is left out.
    """
    panels = {
        key: title
        for key, title in {"cider": "CIDEr, and shuffled (dotted)", "eval_loss": "Validation loss"}.items()
        if any(points(history, key)[1] for history in histories.values())
    }
    figure, axes = new_figure(1 + len(panels))
    figure.set_figheight(max(figure.get_figheight(), 1.6 + 0.35 * len(runs)))
    _draw_final_scores(axes[0], runs)
    for axis, (key, title) in zip(axes[1:], panels.items(), strict=True):
        drawn = [history for history in histories.values() if points(history, key)[1]]
        for index, history in enumerate(histories.values()):
            color = COLORS[index % len(COLORS)]
            draw_line(axis, *points(history, key), label=None, color=color)
            draw_line(axis, *points(history, f"shuffled_{key}"), label=None, color=color, style=":")
        finish_axis(
            axis, title, " or ".join(sorted({time_key(history) for history in drawn})), from_zero=key == "cider"
        )
    return save_figure(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m reporting.compare", description="Compare several runs: one table and one plot."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output directory of a run, with its results.json")
    parser.add_argument(
        "--output", default="compare.png", metavar="FILE", help="file of the plot (default: compare.png)"
    )
    parser.add_argument(
        "--min_true_captions",
        type=float,
        metavar="RATE",
        help="required rate of true captions, from 0 to 1: runs below it are named, with exit code 1",
    )
    arguments = parser.parse_args(argv)
    with one_line_errors():
        if not 0 <= (arguments.min_true_captions or 0) <= 1:
            raise UserError(f"--min_true_captions {arguments.min_true_captions:g} must be a rate from 0 to 1")
        runs = {name: read_results(name) for name in arguments.runs}
        histories = {name: read_history(name) for name in arguments.runs}
        print(comparison_table(runs))
        path = draw_comparison(Path(arguments.output), runs, histories)
    print(f"plot: {path}", file=sys.stderr)  # stdout has the table alone, for a file or a pipe
    if arguments.min_true_captions is not None and (short := short_of_truth(runs, arguments.min_true_captions)):
        print(short, file=sys.stderr)
        raise SystemExit(1)


def _draw_final_scores(axis: "Axes", runs: Runs) -> None:
    for index, results in enumerate(runs.values()):
        color = COLORS[index % len(COLORS)]
        interval = (results.get("intervals") or {}).get("cider")
        if interval:
            axis.plot(interval, [index, index], color=color, linewidth=6, alpha=0.3, solid_capstyle="round")
        if has_shuffled(results):
            axis.plot(results["shuffled"]["cider"], index, "|", color="#777777", markersize=13, markeredgewidth=2)
        axis.plot(results["metrics"].get("cider", float("nan")), index, "o", color=color, markersize=7)
    finish_axis(axis, "CIDEr with 95% interval, and shuffled ( | )", "")
    rates = [(results.get("true_captions") or {}).get("all") for results in runs.values()]
    names = [name if rate is None else f"{name}\n{rate:.3f} true" for name, rate in zip(runs, rates, strict=True)]
    axis.set_yticks(range(len(runs)), names)
    for label, color in zip(axis.get_yticklabels(), cycle(COLORS), strict=False):
        label.set_color(color)  # the legend of the other panels
    axis.set_ylim(len(runs) - 0.4, -0.6)  # the first run on top
    axis.set_xlim(left=0)


def has_shuffled(results: dict) -> bool:
    """Whether there is a shuffled baseline: one image has none."""
    return "cider" in (results.get("shuffled") or {}) and results.get("num_images", 2) > 1


def _number(value: float | None, form: str = ".3f") -> str:
    return "—" if value is None else format(value, form)


if __name__ == "__main__":
    main()
