"""Devices whose memory holds half, a quarter or an eighth of the model: what is best for their users? tables/memory.md.

    python simulations/memory.py             three seeds
    python simulations/memory.py --quick     one seed on a 60-core of the data; writes no table
    python simulations/memory.py --json      rows on standard output

A quarter of the devices, drawn at random, hold no more than that; `fedprune` otherwise, as in `spending.py`, whose finished
runs it shares a folder with. Memory is that of the model's parameters alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from curves import Job, final, gathered, mean

HERE = Path(__file__).parent
OURS = ("strategy=fedprune", "sigma=10", "memory_limited=0.25", "memory_who=random")
ARMS: dict[str, tuple[float, tuple[str, ...]]] = {
    "1/2, narrower": (0.5, ("fedprune.precision=float32",)),
    "1/2, narrower, damped": (0.5, ("fedprune.precision=float32", "fedprune.damp=2")),
    "1/4, narrower": (0.25, ("fedprune.precision=float32",)),
    "1/4, narrower, damped": (0.25, ("fedprune.precision=float32", "fedprune.damp=2")),
    "1/2 and 1/4, all of it as int8": (0.25, ("fedprune.precision=int8",)),
    "1/8, half of it as int8": (0.125, ("fedprune.precision=int8",)),
    "1/8, half of it as int8, damped": (0.125, ("fedprune.precision=int8", "fedprune.damp=2")),
}
"""Memory as a share of the float32 model, and the rest."""
FIGURES = ("validation", "ndcg10_expected_limited", "ndcg10_expected_limited_global", "ndcg10_expected")
"""Of the table, column by column."""


def called(arm: str) -> str:
    """Its run; a file is named after it."""
    return f"memory {arm}".replace("/", " of ")


def jobs(seeds: int, extra: Sequence[str] = ()) -> list[Job]:
    return [
        Job(called(arm), (*OURS, f"memory_rate={rate}", *changes, *extra), seed, until=150.0)
        for seed in range(seeds)
        for arm, (rate, changes) in ARMS.items()
    ]


def rows(found: Mapping[Job, Mapping[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """Per arm the test quality where validation was best, a value per seed."""
    result = []
    for arm in ARMS:
        own = [final(dict(r)) for job, r in found.items() if job.arm == called(arm)]
        result.append({"arm": arm, "seeds": seeds} | {key: [point[key] for point in own] for key in FIGURES})
    return result


def table(of: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| memory, and what is kept in it | validation | users of limited devices | the same by the whole model | everybody |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in of:
        lines.append(f"| {row['arm']} | {' | '.join(mean(row[key], '.4f') for key in FIGURES)} |")
    return "\n".join(lines) + "\n"


NOTE = """
MovieLens-100K, one client per user, sigma 10, balanced devices, `configs/budget.toml`; a quarter of the devices, any, have
memory for so much of the float32 model's parameters. NDCG@10 (1+99), test, where validation was best, {seeds} seeds, ± their
standard deviation; each user by its own device's model. By the whole model: float32 and all 32 dimensions, with private rows
that were trained at the narrower width. As int8 an item takes 36 bytes where float32 takes 132, so that a quarter of the
memory (36) holds all of it and an eighth (20) 16 dimensions; its users are served with the rounded table.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    seeds = 1 if arguments.quick else arguments.seeds
    work = jobs(seeds, ("min_interactions=60",) if arguments.quick else ())
    if arguments.quick:
        work = [replace(job, every=20.0, until=job.until / 5) for job in work]
    found = rows(gathered(work, arguments.jobs), seeds)
    if arguments.json:
        json.dump(found, sys.stdout)
    elif arguments.quick:
        print(table(found))
    else:
        (HERE / "tables" / "memory.md").write_text(table(found) + NOTE.format(seeds=seeds))


if __name__ == "__main__":
    main()
