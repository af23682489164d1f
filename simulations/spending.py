"""What a slow device's budget is best spent on: time to target against FedAvg as usual, FedAvg with cheap reports, and `skip`.

    python simulations/spending.py main      four strategies, one client per user and ten silos, five seeds: tables/spending.md
    python simulations/spending.py grid      each spending and mix, MF and a wide NeuMF: tables/spending_grid.md
    python simulations/spending.py tafeng    the four strategies on Ta-Feng, a sampled cohort a round: tables/spending_tafeng.md

    --quick      `main` at sigma 10 on a 60-core of the data, one seed, in half a minute; writes no table
    --json       rows on standard output

Each finished run is one file under `results/spending`, and is not repeated. Times, bytes and joules are modelled.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import drawings
import spending_grid
from curves import Job, clocked, final, gathered, mean, reached

from fedprune.devices import CLASSES

HERE = Path(__file__).parent
NAMES = ("fedavg", "fedavg_tuned", "skip", "fedprune")
DEARER = ("negatives=6", "lr_private=0.05", "server_lr=0.0075", "decay_private=0.005")
LARGER = ("lr_private=0.12", "server_lr=0.02")
MORE: dict[str, tuple[str, tuple[str, ...]]] = {
    "fedavg_tuned, 6 negatives": ("fedavg_tuned", DEARER),
    "fedprune, 6 negatives": ("fedprune", DEARER),
    "fedavg_tuned, larger steps": ("fedavg_tuned", LARGER),
    "skip, larger steps": ("skip", LARGER),
    "fedprune, larger steps": ("fedprune", LARGER),
}
"""Dearer reports and smaller steps, for who wants the last of the quality; and the rates that suit `fedavg_tuned` best."""
TARGETS = (0.95, 0.99)
QUICK = ("min_interactions=60",)


# ---- the main table --------------------------------------------------------------------------------------------------


def main_jobs(seeds: int, fleets: Sequence[str], sigmas: Sequence[int], extra: Sequence[str] = ()) -> list[Job]:
    """Strategies that wait for all do not see how slow the slowest is: sigma 10 stands for all there (and balanced devices for
    all classes, `stretch`)."""
    jobs = []
    for seed in range(seeds):
        for fleet in fleets:
            own = [*extra, *(["silos=10", "warm_start=3"] if fleet == "silos" else [])]
            jobs.append(Job("fedavg", ("strategy=fedavg", "sigma=10", *own), seed, until=2400.0))
            jobs.append(Job("fedavg_tuned", ("strategy=fedavg_tuned", "sigma=10", *own), seed))
            ours = ["fedprune.precision=int8", *(["fedprune.share=0.6"] if fleet == "silos" else [])]
            for name, (strategy, changes) in MORE.items():
                if fleet == "users" or changes == DEARER:
                    tables = [*(ours if strategy == "fedprune" else []), *(f"{strategy}.{change}" for change in changes)]
                    jobs.append(Job(name, (f"strategy={strategy}", *tables, "sigma=10", *own), seed))
            for sigma in sigmas:
                jobs.append(Job("skip", ("strategy=skip", f"sigma={sigma}", *own), seed))
                jobs.append(Job("fedprune", ("strategy=fedprune", *ours, f"sigma={sigma}", *own), seed))
    return jobs


def finished(jobs: Sequence[Job]) -> list[Job]:
    """Those of fleets and seeds of which all four strategies are."""
    lacking = {(job.seed, "silos=10" in job.changes) for job in jobs if job.arm in NAMES and not job.file.exists()}
    return [job for job in jobs if (job.seed, "silos=10" in job.changes) not in lacking and job.file.exists()]


def pick(found: dict[Job, dict[str, Any]], name: str, fleet: str, sigma: int, device_class: str) -> dict[int, dict[str, Any]]:
    """Results of one row by seed, on this class's clock."""
    rows = {}
    for job, result in found.items():
        waits, given = name.startswith("fedavg"), dict(change.split("=") for change in job.changes)
        if job.arm != name or ("silos" in given) != (fleet == "silos") or not (waits or given["sigma"] == str(sigma)):
            continue
        rows[job.seed] = clocked(job, result, device_class, sigma / 10 if waits else 1.0)
    return {seed: rows[seed] for seed in sorted(rows)}


def main_rows(found: dict[Job, dict[str, Any]], fleets: Sequence[str], sigmas: Sequence[int]) -> list[dict[str, Any]]:
    return [
        row
        for fleet in fleets
        for sigma in sigmas
        for c in CLASSES
        for row in compared(
            {name: pick(found, name, fleet, sigma, c) for name in (*NAMES, *MORE)},
            {"fleet": fleet, "sigma": sigma, "class": c},
        )
    ]


def compared(
    runs: dict[str, dict[int, dict[str, Any]]], where: dict[str, Any], reference: str = "fedavg"
) -> list[dict[str, Any]]:
    """A row per strategy: times to levels of a reference, how many times as fast as others that is, and quality."""
    peaks = {seed: final(result)["validation"] for seed, result in runs[reference].items()}
    one = next(iter(runs["fedavg"].values()))
    each = one["reports"] / one["rounds"]  # whom FedAvg asks in a round
    rows = []
    names = [name for name in runs if runs[name]]
    for name in names:
        own = runs[name]
        row: dict[str, Any] = where | {"strategy": name, "ceiling": next(iter(runs["skip"].values()))["ceiling"]}
        for share in TARGETS:
            times = {n: {seed: reached(r, share * peaks[seed]) for seed, r in runs[n].items()} for n in names}
            row[f"seconds_{share:.0%}"] = list(times[name].values())
            reports = [reached(result, share * peaks[seed], "reports") for seed, result in own.items()]
            row[f"reports_{share:.0%}"] = [done and done / each for done in reports]
            for rival in NAMES[:3]:
                pairs = [(times[rival][seed], time) for seed, time in times[name].items()]
                row[f"{rival}_{share:.0%}"] = [a / b if a and b else None for a, b in pairs]
        for key in ("validation", "ndcg10_expected", "ndcg10_expected_slow", "ndcg10_full"):
            row[key] = [final(result)[key] for result in own.values()]
        rows.append(row)
    return rows


def main_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for fleet, sigma in dict.fromkeys((row["fleet"], row["sigma"]) for row in rows):
        own = [row for row in rows if (row["fleet"], row["sigma"]) == (fleet, sigma)]
        lines += [
            f"\n**{fleet}, sigma {sigma}** (loss-free ceiling over waiting for all: {own[0]['ceiling']:.2f})\n",
            "| devices | strategy | to 95 %, s | to 99 %, s | reports | x fedavg | x fedavg_tuned | x skip | 1+99 "
            "| slow users' | full |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        seeds = max(len(row["validation"]) for row in rows)
        for row in own:
            few = len(row["validation"]) < seeds
            name = row["strategy"] + (f" ({len(row['validation'])} seed{'s' * (len(row['validation']) > 1)})" if few else "")
            cells = [row["class"].replace("_", " "), name, mean(row["seconds_95%"]), mean(row["seconds_99%"])]
            cells.append(mean(row["reports_95%"], ".1f"))
            cells += [" / ".join(unspread(row[f"{rival}_{share:.0%}"]) for share in TARGETS) for rival in NAMES[:3]]
            cells += [mean(row[key], ".4f") for key in ("ndcg10_expected", "ndcg10_expected_slow", "ndcg10_full")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines).strip() + "\n"


def unspread(values: Sequence[float | None]) -> str:
    """Their mean, and of how many of them if some are missing."""
    return re.sub(" ± [0-9.]+", "", mean(values, ".1f"))


def draw(rows: Sequence[dict[str, Any]], found: dict[Job, dict[str, Any]], path: Path) -> None:
    """On balanced devices."""
    names = (*NAMES, "fedprune, 6 negatives")
    panels = {
        f"{fleet}, sigma {sigma}": {name: list(pick(found, name, fleet, sigma, "balanced").values()) for name in names}
        for fleet, sigma in dict.fromkeys((row["fleet"], row["sigma"]) for row in rows)
    }
    drawings.over_time(panels, path, (0.30, 0.49))


# ---- Ta-Feng ---------------------------------------------------------------------------------------------------------

TAFENG = ("data=ta-feng", "min_interactions=5", "sigma=10", "cohort=1500")


EVERY = {"fedavg": 120.0, "fedavg_tuned": 35.0, "skip": 20.0, "fedprune": 120.0}
"""Seconds between evaluations, each of which takes as long as twenty rounds."""
PATIENCE = {"fedavg": 6, "fedavg_tuned": 5, "skip": 5, "fedprune": 10}
"""FedAvg as usual falls from the warm start on; the others fall first and rise for a long time."""


def tafeng_jobs(seeds: int) -> list[Job]:
    jobs = []
    for seed in range(seeds):
        for name in NAMES:
            until = EVERY[name] * (8.5 if name == "fedavg" else 20.0) * (0.1 if name == "fedprune" else 1.0)
            given = (f"strategy={name}", *TAFENG)
            jobs.append(Job(name, given, seed, every=EVERY[name], until=until, patience=PATIENCE[name]))
    return jobs


def tafeng_rows(found: dict[Job, dict[str, Any]]) -> list[dict[str, Any]]:
    """Targets are shares of `fedavg_tuned`'s peak: the warm start is better than all that comes after it of `fedavg`."""
    rows = []
    for c in CLASSES:
        runs = {name: {j.seed: clocked(j, result, c) for j, result in found.items() if j.arm == name} for name in NAMES}
        rows += compared(runs, {"fleet": "Ta-Feng", "sigma": 10, "class": c}, reference="fedavg_tuned")
    return rows


TAFENG_NOTE = """
Seconds to 95 % and 99 % of the peak of `fedavg_tuned`'s validation NDCG@10 (1+99) with the same seed, linear between
evaluations, and how many times as fast as three rivals that is; test NDCG@10 where validation was best. Not `fedavg`'s peak:
that is its warm start, from which it falls. 5-core, 1,500 clients a round, reports in rounds of so many, settings as in
`spending.md`. The cohorts of `skip` overlap, which gives it 8 % more reports a second than `fedprune` has. {seeds} seeds, ±
their standard deviation; "n of m": so many reached it. Times are modelled, quality is measured.
"""


# ---- command line ----------------------------------------------------------------------------------------------------

NOTE = """
Seconds to 95 % and 99 % of the peak of `fedavg`'s own validation NDCG@10 (1+99) with the same seed, warm start included, linear
between evaluations; reports merged by the 95 %, in rounds of `fedavg`'s reports; how many times as fast as three rivals that is
(at 95 % / 99 %; of the seeds where both got there); test NDCG@10 where validation was best, 1+99 and full ranking.

`fedavg`: eight negatives, float32, usual rates; `fedavg_tuned`: the cheap reports of `fedprune` (three negatives, int8),
waiting for all; `skip`: the same, closing a round at five times the fastest device's report; `fedprune`: int8 on all devices,
.4 of the reports a beat (.6 with ten silos). Larger steps: private rate .12 instead of .08, the server's .02 instead of .015,
the best for `fedavg_tuned` of four pairs on the first seed's time to 95 %. All ran on balanced devices; with equal work and
linear devices another class is another clock for the rounds and another for the warm start, computed from bytes and FLOPs.
`configs/budget.toml`: recency on, touched rows (their item numbers are charged to nobody). A run ends after 25 evaluations
without a better one, which are 25 reports a client for `fedavg`, 50 for `fedavg_tuned`, and 10 for `fedprune`. {seeds}
seeds where no other number is named, ± their standard deviation; "n of m": so many seeds reached it. The ceiling bounds
reports per second, not what is made of them. Times are modelled, quality is measured.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("main", "grid", "tafeng"), nargs="?", default="main")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--finished", action="store_true", help="run nothing; tabulate the seeds that are finished")
    arguments = parser.parse_args()
    if arguments.quick and arguments.what != "main":
        parser.error("--quick is for main; of the others, runs that are finished are kept, and --seeds 1 is the shortest")
    seeds = arguments.seeds or {"main": 5, "grid": 1, "tafeng": 3}[arguments.what]
    fleets, sigmas, extra = ("users", "silos"), (2, 10), ()
    if arguments.quick:
        seeds, fleets, sigmas, extra = 1, ("users",), (10,), QUICK
    match arguments.what:
        case "main":
            jobs = main_jobs(seeds, fleets, sigmas, extra)
            if arguments.quick:
                jobs = [replace(job, every=2 * job.every, until=job.until / 4) for job in jobs]
            if arguments.finished:
                jobs = finished(jobs)
            found = gathered(jobs, arguments.jobs)
            rows, table = main_rows(found, fleets, sigmas), main_table
        case "grid":
            jobs = spending_grid.jobs(seeds)
            found = gathered([j for j in jobs if j.file.exists()] if arguments.finished else jobs, arguments.jobs)
            rows, table = spending_grid.rows(found), spending_grid.table
        case _:
            jobs = tafeng_jobs(seeds)
            found = gathered(finished(jobs) if arguments.finished else jobs, arguments.jobs)
            rows, table = tafeng_rows(found), main_table
    if arguments.json:
        json.dump(rows, sys.stdout)
        return
    if arguments.quick:
        print(table(rows))
        return
    name = {"main": "spending", "grid": "spending_grid", "tafeng": "spending_tafeng"}[arguments.what]
    note = {"main": NOTE, "grid": spending_grid.NOTE, "tafeng": TAFENG_NOTE}[arguments.what]
    (HERE / "tables").mkdir(exist_ok=True)
    (HERE / "tables" / f"{name}.md").write_text(table(rows) + note.format(seeds=seeds))
    picture = HERE / "figures" / f"{name}.png"
    match arguments.what:
        case "main":
            draw(rows, found, picture)
        case "grid":
            drawings.grid(rows, picture)
        case _:
            runs = {name: [result for job, result in found.items() if job.arm == name] for name in NAMES}
            drawings.over_time({"Ta-Feng, sigma 10": runs}, picture, (0.335, 0.365))


if __name__ == "__main__":
    main()
