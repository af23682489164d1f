"""Tables of runs: for the terminal, and as Markdown and CSV files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from rich.table import Table

Row = Mapping[str, Any]

COLUMNS = (
    ("strategy", "strategy"),
    ("seconds_to_target", "to target"),
    ("virtual_seconds", "in all"),
    ("joules", "energy"),
    ("waiting_share", "waiting"),
    ("mean_rate", "mean rate"),
    ("bytes_up", "uploaded"),
    ("ndcg10_full", "NDCG@10"),
    ("ndcg10_expected", "NDCG@10 1+99"),
    ("ndcg10_expected_slow", "slow users'"),
)
"""Keys of a summary, and how a table heads them."""

SOURCES = {
    "modelled": "Virtual time, energy and bytes are modelled.",
    "measured": "Time, bytes and, where a meter was there, energy are measured on real devices.",
}
CAPTION = (
    "NDCG@10: full ranking; 1+99: exact expectation over all draws of 99 negatives. Test quality at the round that validation "
    "chose. Slow users: the 1+99 figure for users of the slowest quarter."
)


def caption(runs: Sequence[Row]) -> str:
    """What the figures are and where they come from."""
    sources = sorted({run["source"] for run in runs})
    return " ".join([*(SOURCES[source] for source in sources), CAPTION])


UNEQUAL = (
    ("slowest_over_fastest", "slowest over fastest"),
    ("mean_shortfall", "mean shortfall H"),
    ("variation", "variation"),
    ("ceiling", "ceiling"),
)
"""Keys of a summary that are there twice, of the full model and, with `_after`, of what clients did in the end."""


def unequal(run: Row) -> str:
    """How unequally long clients' reports took, with the full model and in the last quarter of the rounds."""
    pairs = [(text, run.get(key), run.get(f"{key}_after")) for key, text in UNEQUAL]
    said = [
        f"{text} {before:.2f} → {'–' if after is None else f'{after:.2f}'}"
        for text, before, after in pairs
        if before is not None
    ]
    share = run.get("clients_after")
    about = "" if share is None else f" (reports of {share:.0%} of the clients)"
    return f"Full model → last quarter of the rounds{about}: {', '.join(said)}." if said else ""


def body(runs: Sequence[Row], baselines: Mapping[str, Row]) -> list[list[str]]:
    """One row of texts per strategy (mean and, over several seeds, standard deviation), then the baselines."""
    rows = []
    for name, own in grouped(runs).items():
        rows.append([name, *(_cell(key, [run.get(key) for run in own]) for key, _ in COLUMNS[1:])])
    for name, quality in baselines.items():
        rows.append([name, *(_cell(key, [quality.get(key)], missing="") for key, _ in COLUMNS[1:])])
    return rows


def grouped(runs: Sequence[Row]) -> dict[str, list[Row]]:
    """Runs that differ by seed alone, under their strategy's name; with the settings' hash where a name stands for several."""
    groups: dict[str, list[Row]] = {}
    for run in runs:
        groups.setdefault(run["identity"], []).append(run)
    names = [own[0]["strategy"] for own in groups.values()]
    return {own[0]["strategy"] if names.count(own[0]["strategy"]) == 1 else identity: own for identity, own in groups.items()}


def terminal(runs: Sequence[Row], baselines: Mapping[str, Row]) -> Table:
    """For the screen; of a run alone it also says how unequal the clients were."""
    said = [caption(runs), *(unequal(run) for run in runs if len(runs) == 1)]
    table = Table(caption="\n".join(filter(None, said)), caption_justify="left")
    for key, heading in COLUMNS:
        table.add_column(heading, justify="left" if key == "strategy" else "right", no_wrap=key == "strategy")
    for row in body(runs, {}):
        table.add_row(*row)
    table.add_section()
    for row in body([], baselines):
        table.add_row(*row, style="dim")
    return table


def markdown(runs: Sequence[Row], baselines: Mapping[str, Row]) -> str:
    """For a file or a README."""
    head = [heading for _, heading in COLUMNS]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in body(runs, baselines)]
    return "\n".join([*lines, "", caption(runs), ""])


def csv(runs: Sequence[Row], path: Path) -> None:
    """Every key of every run."""
    pl.DataFrame([dict(run) for run in runs], infer_schema_length=None).write_csv(path)


def _cell(key: str, values: Sequence[Any], missing: str = "never") -> str:
    known = [v for v in values if v is not None and not (isinstance(v, float) and math.isnan(v))]
    if not known:
        return missing if key == "seconds_to_target" else "" if missing == "" else "–"
    mean = statistics.fmean(known)
    text = _text(key, mean)
    if len(known) > 1 and key.startswith(("ndcg", "hr", "seconds_to")):
        spread = _text(key, statistics.stdev(known))
        text += f" ±{spread.removeprefix('0') if spread.startswith('0.') else spread}"
    return text + (f" ({len(known)} of {len(values)})" if len(known) < len(values) else "")


def _text(key: str, value: float) -> str:
    if key.startswith(("ndcg", "hr")):
        return f"{value:.4f}"
    if key.endswith("seconds") or key.startswith("seconds"):
        return f"{value:,.0f} s"
    if key == "joules":
        return f"{value / 1e3:,.0f} kJ"
    if key.startswith("bytes"):
        return f"{value / 1e6:,.0f} MB"
    if key == "waiting_share":
        return f"{value:.0%}"
    return f"{value:.2f}"
