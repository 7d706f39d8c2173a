"""The picture of `bench --plot`: our speed over the best peer's, by input and width.

    python -m bench.plot bench/results/h200/prefill.jsonl prefill.png --only causal append mixed

draws rows that are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilewright.errors import ArgumentError, MissingExtra
from tilewright.tools.cli import check_output, guarded

_COLOURS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
)  # distinct also for colour-blind readers


def check(path: Path) -> None:
    """That `draw` can make a picture of this name. Raises MissingExtra[E101] without matplotlib,
    ArgumentError[A109] for a format that it does not know."""
    known = pyplot_module().FigureCanvasBase.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise ArgumentError(
            "A109",
            f"{path.name} is no picture that can be drawn",
            where="--plot",
            hint=f"endings: {', '.join(sorted(known))}",
        )


def pyplot_module() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise MissingExtra(
            "E101", "--plot needs matplotlib", hint="pip install 'tilewright[plot]'"
        ) from None
    return pyplot


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of `ratio` on a log scale, 1 in the middle; on a GPU dots for the replayed ratio.

    Rows of `bench serve --peers` have `measures`, which are drawn instead; of rows without a ratio
    their values are. Raises MissingExtra[E101] without matplotlib, ArgumentError[A109] without any.
    """
    pyplot = pyplot_module()
    if rows and "measures" in rows[0]:
        return _draw_served(pyplot, rows, path)
    ours = [r for r in rows if r.get("ratio")]
    if not ours:
        return _draw_values(pyplot, [r for r in rows if r.get("value") is not None], path)
    inputs = list(dict.fromkeys(r["input"] for r in ours))
    widths = sorted({r["width"] for r in ours})
    figure, axes = pyplot.subplots(
        figsize=(min(max(6.0, 1.0 + 0.9 * len(inputs)), 14.0), 4.2), layout="constrained"
    )
    bar = 0.8 / len(widths)
    for n, width in enumerate(widths):
        colour = _COLOURS[n % len(_COLOURS)]
        mine = [r for r in ours if r["width"] == width]
        at = [inputs.index(r["input"]) + (n - (len(widths) - 1) / 2) * bar for r in mine]
        heights = [r["ratio"] for r in mine]
        mean = math.exp(statistics.fmean(map(math.log, heights)))
        axes.bar(
            at,
            [h - 1 for h in heights],
            bar * 0.92,
            bottom=1,
            color=colour,
            label=f"width {width} (mean {mean:.2f})",
        )
        replayed = [
            (x, r["graph_ratio"]) for x, r in zip(at, mine, strict=True) if r.get("graph_ratio")
        ]
        if replayed:
            axes.plot(*zip(*replayed, strict=True), "o", color="black", markersize=3.5, label="_")
    values = [r["ratio"] for r in ours] + [r["graph_ratio"] for r in ours if r.get("graph_ratio")]
    low, high = min(0.5, *values), max(2.0, *values)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.15, high * 1.15)
    ticks = [
        t
        for t in (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50)
        if low / 1.15 <= t <= high * 1.15
    ]
    axes.set_yticks(ticks, [f"{t:g}×" for t in ticks])
    axes.minorticks_off()
    axes.axhline(1, color="black", linewidth=1)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    small = {"fontsize": 7} if len(inputs) > 16 else {}
    axes.set_xticks(range(len(inputs)), inputs, rotation=35, ha="right", **small)
    axes.set_ylabel("best peer's time ÷ ours")
    first = ours[0]
    dots = "; dots: replayed from a graph" if any(r.get("graph_ratio") for r in ours) else ""
    axes.set_title(f"{first['op']}, {first['dtype']}, {first['device']}{dots}", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_values(pyplot: Any, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel of bars for each metric, a bar for each row."""
    if not rows:
        raise ArgumentError("A109", "no row has a ratio or a value to draw", where="--plot")
    metrics = list(dict.fromkeys(r["metric"] for r in rows))
    figure, axes = pyplot.subplots(
        len(metrics), figsize=(9, len(metrics) + 0.3 * len(rows)), squeeze=False,
        height_ratios=[1 + sum(r["metric"] == m for r in rows) for m in metrics],
        layout="constrained",
    )  # fmt: skip
    for axis, metric in zip(axes[:, 0], metrics, strict=True):
        mine = [r for r in rows if r["metric"] == metric]
        bars = axis.barh(range(len(mine)), [r["value"] for r in mine], color=_COLOURS[0])
        axis.margins(x=0.12)  # room for the numbers
        axis.bar_label(bars, fmt="%.4g", padding=3, fontsize=8)
        names = [f"{r['input']}, {r['width']}: {r['impl']}" for r in mine]
        axis.set_yticks(range(len(mine)), names, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel(metric, fontsize=9)
    figure.suptitle(f"{rows[0]['suite']}, {rows[0]['device']}", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_served(pyplot: Any, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of each way to serve, side by side: rate, first token, gaps, goodput."""
    goodput = [name for name in rows[0]["measures"] if name.startswith("goodput")]
    panels = {
        "answer tokens a second": ["answer tokens/s"],
        "ms to the first token": ["ms first token p50", "ms first token p90"],
        "ms between tokens": ["ms gap p50", "ms gap p99"],
        "requests/s in time": goodput,
    }
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(15, 1.2 + 0.5 * len(rows)), sharey=True, layout="constrained"
    )
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        bar = 0.8 / len(names)
        for n, name in enumerate(names):
            at = [i + (n - (len(names) - 1) / 2) * bar for i in range(len(rows))]
            values = [row["measures"][name] for row in rows]
            axis.barh(
                at, values, bar * 0.92, color=_COLOURS[n], label=name.removeprefix("goodput ")
            )
        axis.set_title(title, fontsize=10)
        axis.set_axisbelow(True)
        axis.grid(axis="x", alpha=0.3)
        if len(names) > 1:
            axis.legend(frameon=False, fontsize=8)
    axes[0].set_yticks(range(len(rows)), [row["impl"] for row in rows])
    axes[0].invert_yaxis()
    figure.suptitle(f"{rows[0]['input']}, {rows[0]['dtype']}, {rows[0]['device']}", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str]) -> int:
    """Draws the rows of files, of each input the last ones."""
    parser = argparse.ArgumentParser(prog="bench.plot", description="Draw rows that are kept.")
    parser.add_argument("rows", type=Path, help="a file of rows, JSON lines")
    parser.add_argument("picture", type=Path, help="PNG, SVG or what else matplotlib writes")
    parser.add_argument("--only", nargs="*", default=[""], help="inputs that begin so")
    parser.add_argument("--width", type=int, help="rows of this width")
    args = parser.parse_args(argv)
    check_output("picture", args.picture)
    check(args.picture)
    last = {}
    for row in map(json.loads, args.rows.read_text(encoding="utf-8").splitlines()):
        if row["input"].startswith(tuple(args.only)) and args.width in (None, row["width"]):
            last[row["input"], row["width"], row["impl"]] = row
    draw(list(last.values()), args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
