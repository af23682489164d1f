"""The figure of a comparison: quality over virtual time, and where each client's seconds go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import polars as pl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fedprune.exchange import PARTS
from fedprune.record import RunRecord

INK = "#222222"
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#000000", "#ff9933", "#663300")
"""Paul Tol's "bright" scheme, told apart by colour-blind readers, and three more."""
PART_COLOURS = {
    "download": "#88ccee",
    "loading": "#ddcc77",
    "training": "#4477aa",
    "teacher": "#aa3377",
    "upload": "#44aa99",
    "waiting": "#dddddd",
}


def draw(records: Mapping[str, Sequence[RunRecord]], path: Path) -> None:
    """Write the figure; the suffix of the path decides the format.

    Left: validation NDCG@10 (expected 1+99) over time, one line per strategy (mean over seeds, band: their range).
    Right: mean seconds of a client-round by what they went to, one bar per strategy.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[1.35, 1], layout="constrained")
    for number, (strategy, runs) in enumerate(records.items()):
        _curve(left, strategy, [run.events() for run in runs], COLOURS[number % len(COLOURS)])
    target = next((s["target"] for rs in records.values() for r in rs if (s := r.finished) and s["target"]), None)
    if target is not None:
        left.axhline(target, color=INK, linewidth=0.8, linestyle=":")
        left.annotate(" target", (0, target), xycoords=("axes fraction", "data"), ha="left", va="bottom", fontsize=8)
    summaries = [summary for runs in records.values() for run in runs if (summary := run.finished)]
    modelled = all(summary["source"] == "modelled" for summary in summaries)
    clock = "virtual time" if modelled else "time"
    left.set_xlabel(f"{clock} [s]")
    left.set_ylabel("validation NDCG@10, expected 1+99")
    left.set_xlim(left=0)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    left.set_title(f"Quality over {clock}", loc="left", fontsize=10)
    _bars(right, {strategy: [_means(run) for run in runs] for strategy, runs in records.items()})
    right.set_xlabel(f"mean seconds per client and round ({'modelled' if modelled else 'measured'})")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _curve(axes: Any, strategy: str, runs: Sequence[Sequence[Mapping[str, Any]]], colour: str) -> None:
    curves = []
    for events in runs:
        points = [(e["ended"], e["evaluation"]["validation"]["ndcg10_expected"]) for e in events if "evaluation" in e]
        curves.append(np.array(points))
    grid = np.linspace(max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves), 200)
    values = np.array([np.interp(grid, c[:, 0], c[:, 1]) for c in curves])
    axes.plot(grid, values.mean(0), color=colour, label=strategy, linewidth=1.6)
    if len(curves) > 1:
        axes.fill_between(grid, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)


def _means(run: RunRecord) -> dict[str, float]:
    parts = [*PARTS, "waiting"]
    files = sorted((run.folder / "ledger").glob("*.parquet"))
    if not files:
        return dict.fromkeys(parts, 0.0)
    frame = pl.scan_parquet(files).select(pl.col(f"seconds_{part}").mean() for part in parts).collect()
    return {part: float(frame[f"seconds_{part}"][0] or 0.0) for part in parts}


def _bars(axes: Any, means: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    names = list(means)
    start = np.zeros(len(names))
    for part in (*PARTS, "waiting"):
        width = np.array([np.mean([seconds[part] for seconds in means[name]]) for name in names])
        if width.sum() > 0:
            axes.barh(names, width, left=start, color=PART_COLOURS[part], label=part, height=0.65)
        start += width
    axes.invert_yaxis()
    axes.legend(
        frameon=False, fontsize=7.5, ncols=len(PART_COLOURS), loc="lower left", bbox_to_anchor=(-0.02, 1.0),
        handlelength=0.9, handletextpad=0.4, columnspacing=0.9,
    )  # fmt: skip
    axes.set_title("Where a client's seconds go", loc="left", fontsize=10, pad=22)
