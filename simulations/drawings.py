"""Figures of `spending.py` and `widths.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

MARKERS = {"compute_bound": ("C1", "<"), "balanced": ("C0", "o"), "slow_uplink": ("C2", ">")}


def over_time(panels: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], path: Path, limits: tuple[float, float]) -> None:
    """Validation quality over virtual time, a panel per title and a colour per strategy; each seed is a thin line."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.8), layout="constrained", squeeze=False)
    for axis, (title, runs) in zip(axes[0], panels.items(), strict=True):
        for number, (name, results) in enumerate(runs.items()):
            for result in results:
                curve = [(point["seconds"], point["validation"]) for point in result["curve"]]
                axis.plot(*zip(*curve, strict=True), color=f"C{number}", linewidth=0.8, alpha=0.7)
            axis.plot([], [], color=f"C{number}", label=name)
        axis.set(title=title, xlabel="virtual seconds", xscale="log", ylim=limits)
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("validation NDCG@10, 1+99")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def grid(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Seconds to the target by class of devices, a line per arm; who never met it, by quality alone."""
    panels = {key: [r for r in rows if (r["model"], r["sigma"]) == key] for key in {(r["model"], r["sigma"]): 0 for r in rows}}
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9.5, 0.24 * len(rows) + 1.1 * len(panels)), layout="constrained", squeeze=False,
        gridspec_kw={"height_ratios": [len(own) + 3 for own in panels.values()]},
    )  # fmt: skip
    for axis, ((model, sigma), own) in zip(axes[:, 0], panels.items(), strict=True):
        times = [[time for time in row["balanced"] if time] for row in own]
        order = sorted(range(len(own)), key=lambda i: fmean(times[i]) if times[i] else 1e9 - fmean(own[i]["ndcg10_expected"]))
        for place, row in enumerate(own[i] for i in order):
            _arm(axis, place, row)
        axis.set(title=f"{model}, sigma {sigma}", xscale="log", ylim=(len(own) - 0.4, -0.6))
        axis.set_yticks(range(len(own)), [own[i]["arm"] for i in order], fontsize=8)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25, axis="x")
    for name, (colour, marker) in MARKERS.items():
        axes[0][0].plot([], [], color=colour, marker=marker, linestyle="", markersize=5, label=name.replace("_", " "))
    axes[0][0].legend(frameon=False, fontsize=8, loc="upper right")
    axes[-1][0].set_xlabel("virtual seconds to the target; right: test NDCG@10, 1+99")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _arm(axis: Axes, place: int, row: Mapping[str, Any]) -> None:
    reached = False
    for device_class, (colour, marker) in MARKERS.items():
        times = [time for time in row[device_class] if time]
        if times:
            reached = True
            axis.plot(fmean(times), place, color=colour, marker=marker, markersize=5)
            axis.plot([min(times), max(times)], [place, place], color=colour, linewidth=1)
    quality = f"{fmean(row['ndcg10_expected']):.4f}" + ("" if reached else ", never")
    axis.text(1.01, place, quality, transform=axis.get_yaxis_transform(), fontsize=8, va="center")


def widths(found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Quality of each arm, of all users and by the width of their devices; a panel per model.

    Args:
        found: by title and arm, a result per seed: `{"own": {"all": ..., a width: ...}}`.
    """
    lines = sum(map(len, found.values()))
    figure, axes = plt.subplots(
        len(found), 1, figsize=(8.5, 0.27 * lines + 1.0 * len(found)), layout="constrained", squeeze=False, sharex=True,
        gridspec_kw={"height_ratios": [len(arms) + 2 for arms in found.values()]},
    )  # fmt: skip
    for axis, (title, arms) in zip(axes[:, 0], found.items(), strict=True):
        for place, results in enumerate(arms.values()):
            groups = [group for group in results[0]["own"] if group != "all"]
            for group in groups:
                colour = plt.get_cmap("viridis")(0.1 + 0.25 * len([g for g in groups if float(g) > float(group)]))
                axis.plot(fmean(r["own"][group] for r in results), place, "|", color=colour, markersize=11, markeredgewidth=2)
            values = [r["own"]["all"] for r in results]
            spread = stdev(values) if len(values) > 1 else None
            axis.errorbar(fmean(values), place, xerr=spread, fmt="o", color="black", markersize=5, capsize=3)
        for number, group in enumerate(sorted((g for g in next(iter(arms.values()))[0]["own"] if g != "all"), key=float)[::-1]):
            axis.plot(
                [], [], "|", color=plt.get_cmap("viridis")(0.1 + 0.25 * number), markeredgewidth=2, label=f"width {group}"
            )
        axis.set_title(title)
        axis.set_yticks(range(len(arms)), list(arms), fontsize=8)
        axis.set_ylim(len(arms) - 0.4, -0.6)
        axis.grid(alpha=0.25, axis="x")
        axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[-1][0].set_xlabel("NDCG@10, 1+99: all users (dot, ± standard deviation over seeds), and by the width of their devices")
    figure.savefig(path, dpi=110)
    plt.close(figure)
