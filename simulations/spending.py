"""What a slow device's budget is best spent on: time to target against FedAvg as usual, FedAvg with cheap reports, and `skip`.

    python simulations/spending.py main      four strategies, one client per user and ten silos, five seeds: tables/spending.md
    python simulations/spending.py grid      each spending and mix, MF and a wide NeuMF: tables/spending_grid.md
    python simulations/spending.py tafeng    the four strategies on Ta-Feng, a sampled cohort a round: tables/spending_tafeng.md

    --quick      `main` at sigma 10 on a 10-core of the data, one seed, in half a minute; writes no table
    --json       rows on standard output

Each finished run is one file under `results/spending`, and is not repeated. Times, bytes and joules are modelled.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from curves import Job, final, gathered, mean, reached, stretch

from fedprune.devices import CLASSES

HERE = Path(__file__).parent
NAMES = ("fedavg", "fedavg_tuned", "skip", "fedprune")
TARGETS = (0.95, 0.99)
QUICK = ("min_interactions=20", "evaluations=20")


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
            for sigma in sigmas:
                jobs.append(Job("skip", ("strategy=skip", f"sigma={sigma}", *own), seed))
                ours = [
                    "fedprune.precision=int8",
                    *(["fedprune.share=0.6"] if fleet == "silos" else []),
                ]
                jobs.append(Job("fedprune", ("strategy=fedprune", *ours, f"sigma={sigma}", *own), seed))
    return jobs


def pick(found: dict[Job, dict[str, Any]], name: str, fleet: str, sigma: int, device_class: str) -> list[dict[str, Any]]:
    """Results of one row, seeds in order, on this class's clock."""
    rows = {}
    for job, result in found.items():
        waits, given = name in NAMES[:2], dict(change.split("=") for change in job.changes)
        if job.arm != name or ("silos" in given) != (fleet == "silos") or not (waits or given["sigma"] == str(sigma)):
            continue
        full = next(r for j, r in found.items() if j.arm == "fedavg" and ("silos=10" in j.changes) == (fleet == "silos"))
        factor = stretch(result, full, device_class) * (sigma / 10 if waits else 1.0)
        curve = [point | {"seconds": point["seconds"] * factor} for point in result["curve"]]
        rows[job.seed] = result | {"curve": curve}
    return [rows[seed] for seed in sorted(rows)]


def main_rows(found: dict[Job, dict[str, Any]], fleets: Sequence[str], sigmas: Sequence[int]) -> list[dict[str, Any]]:
    return [
        row
        for fleet in fleets
        for sigma in sigmas
        for c in CLASSES
        for row in compared(
            {name: pick(found, name, fleet, sigma, c) for name in NAMES}, {"fleet": fleet, "sigma": sigma, "class": c}
        )
    ]


def compared(runs: dict[str, list[dict[str, Any]]], where: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per strategy: times to fedavg's levels, how many times as fast as others that is, and quality."""
    peaks = [final(result)["validation"] for result in runs["fedavg"]]
    rows = []
    for name in NAMES:
        row: dict[str, Any] = where | {"strategy": name, "ceiling": runs["skip"][0]["ceiling"]}
        for share in TARGETS:
            times = {n: [reached(r, share * p) for r, p in zip(runs[n], peaks, strict=True)] for n in NAMES}
            row[f"seconds_{share:.0%}"] = times[name]
            for rival in NAMES[:3]:
                row[f"{rival}_{share:.0%}"] = [
                    a / b if a and b else None for a, b in zip(times[rival], times[name], strict=True)
                ]
        for key in ("validation", "ndcg10_expected", "ndcg10_expected_slow", "ndcg10_full"):
            row[key] = [final(result)[key] for result in runs[name]]
        rows.append(row)
    return rows


def main_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for fleet, sigma in dict.fromkeys((row["fleet"], row["sigma"]) for row in rows):
        own = [row for row in rows if (row["fleet"], row["sigma"]) == (fleet, sigma)]
        lines += [
            f"\n**{fleet}, sigma {sigma}** (loss-free ceiling over waiting for all: {own[0]['ceiling']:.2f})\n",
            "| devices | strategy | to 95 %, s | to 99 %, s | x fedavg | x fedavg_tuned | x skip | 1+99 | slow users' | full |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in own:
            cells = [row["class"].replace("_", " "), row["strategy"], mean(row["seconds_95%"]), mean(row["seconds_99%"])]
            cells += [
                f"{mean(row[f'{rival}_95%'], '.1f').split(' ±')[0]} / {mean(row[f'{rival}_99%'], '.1f').split(' ±')[0]}"
                for rival in NAMES[:3]
            ]
            cells += [mean(row[key], ".4f") for key in ("ndcg10_expected", "ndcg10_expected_slow", "ndcg10_full")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines).strip() + "\n"


def draw(rows: Sequence[dict[str, Any]], found: dict[Job, dict[str, Any]], path: Path) -> None:
    """Validation quality over virtual time on balanced devices, seeds in thin lines."""
    panels = list(dict.fromkeys((row["fleet"], row["sigma"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.8), layout="constrained", squeeze=False)
    for axis, (fleet, sigma) in zip(axes[0], panels, strict=True):
        for number, name in enumerate(NAMES):
            for result in pick(found, name, fleet, sigma, "balanced"):
                curve = [(p["seconds"], p["validation"]) for p in result["curve"]]
                axis.plot(*zip(*curve, strict=True), color=f"C{number}", linewidth=0.8, alpha=0.7)
            axis.plot([], [], color=f"C{number}", label=name)
        axis.set(title=f"{fleet}, sigma {sigma}", xlabel="virtual seconds", xscale="log", ylim=(0.30, 0.49))
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("validation NDCG@10, 1+99")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---- each spending, and mixes ----------------------------------------------------------------------------------------

TUNED = "strategy=fedavg_tuned"
GRID: dict[str, tuple[tuple[str, ...], str]] = {
    "fedavg as usual": (("strategy=fedavg",), ""),
    "tuned rates": ((TUNED, "fedavg_tuned.negatives=8", "fedavg_tuned.precision=float32"), ""),
    "+ 3 negatives": ((TUNED, "fedavg_tuned.precision=float32"), ""),
    "+ int8 = fedavg_tuned": ((TUNED,), ""),
    "+ half of the rows sampled": ((TUNED,), "sampled"),
    "+ downloads cached for 4 rounds": ((TUNED, "fedavg_tuned.refresh=4"), ""),
    "server width 16": ((TUNED, "latent=16"), ""),
    "server width 64": ((TUNED, "latent=64"), ""),
    "narrower for good, known speeds": (("strategy=heterofl", "heterofl.powers=false"), "cheap width"),
    "narrower for good, learned": (("strategy=heterofl",), "learned width"),
    "narrower, the wide half taught": (
        ("strategy=heterofl", "distillation.teacher=local", "distillation.weight=0.5"), "cheap width, taught",
    ),
    "rotating window": (("strategy=window",), "cheap width"),
    "rotating window, cached rest": (("strategy=window", "window.refresh=4"), "cheap width"),
    "fewer negatives, learned": ((TUNED,), "learned examples"),
    "half in width, half in time": (("strategy=skip",), "half and half"),
    "less often": (("strategy=skip",), ""),
    "asynchronous, buffer of 350, discounted": (
        ("strategy=fedbuff", "fedbuff.buffer=350", "fedbuff.refill=16", "negatives=3", "lr_private=0.08", "server_lr=0.0075"),
        "",
    ),
    "fedprune": (("strategy=fedprune",), ""),
    "fedprune, equal weights": (("strategy=fedprune",), "unweighted"),
    "fedprune, asked at merges only": (("strategy=fedprune",), "no refill"),
    "fedprune, half of the rows sampled": (("strategy=fedprune",), "sampled"),
    "fedprune, downloads cached for 4": (("strategy=fedprune", "fedprune.refresh=4"), ""),
}  # fmt: skip
WIDE = ("recommender=neumf", "latent=64", "hidden=[256,128]")
WIDE_ARMS = (
    "fedavg as usual", "+ int8 = fedavg_tuned", "server width 16", "narrower for good, learned", "rotating window",
    "half in width, half in time", "fedprune",
)  # fmt: skip


GRID_NOTE = """
Seconds (and kJ, on balanced devices) to 95 % of the peak of `fedavg as usual`'s validation NDCG@10 (1+99). How runs on other
classes follow from those on balanced devices, and all else: `spending.md`. {seeds} seed(s); below .005 nothing is a finding.
"""


def grid_jobs(seeds: int) -> list[Job]:
    jobs = []
    for sigma in (2, 5, 10):
        for arm, (changes, variant) in GRID.items():
            if ("strategy=fedavg" not in changes and TUNED not in changes) or sigma == 10 or variant == "learned examples":
                own = (*changes, f"sigma={sigma}")
                jobs += [Job(arm, own, seed, variant) for seed in range(seeds)]
    for arm in WIDE_ARMS:
        changes, variant = GRID[arm]
        jobs += [Job(f"wide {arm}", (*changes, "sigma=10", *WIDE), seed, variant) for seed in range(seeds)]
    return jobs


def grid_rows(found: dict[Job, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for wide in ("", "wide "):
        full = next(r for j, r in found.items() if j.arm == f"{wide}fedavg as usual")
        peaks = {j.seed: final(r)["validation"] for j, r in found.items() if j.arm == f"{wide}fedavg as usual"}
        for sigma in (2, 5, 10) if not wide else (10,):
            for arm in GRID:
                own = {j.seed: (j, r) for j, r in found.items() if j.arm == wide + arm and f"sigma={sigma}" in j.changes}
                scale = 1.0
                if not own:  # who waits for all: the same run on another clock
                    own, scale = {j.seed: (j, r) for j, r in found.items() if j.arm == wide + arm}, sigma / 10
                if not own:
                    continue
                row: dict[str, Any] = {"model": "NeuMF" if wide else "MF", "sigma": sigma, "arm": arm}
                for device_class in CLASSES:
                    row[device_class] = []
                    for seed, (_, result) in sorted(own.items()):
                        time = reached(result, 0.95 * peaks[seed])
                        row[device_class].append(time and time * scale * stretch(result, full, device_class))
                for key in ("ndcg10_expected", "ndcg10_expected_slow"):
                    row[key] = [final(result)[key] for _, result in own.values()]
                row["joules"] = [reached(result, 0.95 * peaks[seed], "joules") for seed, (_, result) in own.items()]
                rows.append(row)
    return rows


def grid_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for model, sigma in dict.fromkeys((row["model"], row["sigma"]) for row in rows):
        lines += [
            f"\n**{model}, sigma {sigma}**\n",
            "| what | compute-bound, s | balanced, s | slow uplink, s | kJ | NDCG@10 1+99 | slow users' |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in rows:
            if (row["model"], row["sigma"]) == (model, sigma):
                cells = [row["arm"], *(mean(row[c]) for c in ("compute_bound", "balanced", "slow_uplink"))]
                cells += [mean([j and j / 1e3 for j in row["joules"]])]
                cells += [mean(row[key], ".4f") for key in ("ndcg10_expected", "ndcg10_expected_slow")]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines).strip() + "\n"


# ---- Ta-Feng ---------------------------------------------------------------------------------------------------------

TAFENG = ("data=ta-feng", "min_interactions=5", "sigma=10", "cohort=1500")


def tafeng_jobs(seeds: int) -> list[Job]:
    return [
        Job(name, (f"strategy={name}", *TAFENG), seed, every=12.0, until=600.0, patience=8)
        for seed in range(seeds)
        for name in NAMES
    ]


def tafeng_rows(found: dict[Job, dict[str, Any]]) -> list[dict[str, Any]]:
    runs = {name: [found[job] for job in sorted(found, key=lambda j: j.seed) if job.arm == name] for name in NAMES}
    return compared(runs, {"fleet": "Ta-Feng", "sigma": 10, "class": "balanced"})


# ---- command line ----------------------------------------------------------------------------------------------------

NOTE = """
Seconds to 95 % and 99 % of the peak of `fedavg`'s own validation NDCG@10 (1+99) with the same seed, warm start included, and
how many times as fast as three rivals that is (at 95 % / 99 %); test NDCG@10 where validation was best, 1+99 and full ranking.
`fedavg`: eight negatives, float32, usual rates; `fedavg_tuned`: the cheap reports of `fedprune`, waiting for all; `skip`: the
same, closing a round at five times the fastest device's report. All ran on balanced devices; with
equal work and linear devices another class is another clock, computed from bytes and FLOPs. `configs/budget.toml`: recency on,
touched rows. {seeds} seeds, ± their standard deviation; "n of m": so many seeds reached it. Times are modelled, quality is
measured.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("main", "grid", "tafeng"), nargs="?", default="main")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    seeds = arguments.seeds or {"main": 5, "grid": 1, "tafeng": 3}[arguments.what]
    fleets, sigmas, extra = ("users", "silos"), (2, 10), ()
    if arguments.quick:
        seeds, fleets, sigmas, extra = 1, ("users",), (10,), QUICK
    match arguments.what:
        case "main":
            found = gathered(main_jobs(seeds, fleets, sigmas, extra), arguments.jobs)
            rows, table = main_rows(found, fleets, sigmas), main_table
        case "grid":
            found = gathered(grid_jobs(seeds), arguments.jobs)
            rows, table = grid_rows(found), grid_table
        case _:
            found = gathered(tafeng_jobs(seeds), arguments.jobs)
            rows, table = tafeng_rows(found), main_table
    if arguments.json:
        json.dump(rows, sys.stdout)
        return
    if arguments.quick:
        print(table(rows))
        return
    name = {"main": "spending", "grid": "spending_grid", "tafeng": "spending_tafeng"}[arguments.what]
    (HERE / "tables").mkdir(exist_ok=True)
    (HERE / "tables" / f"{name}.md").write_text(
        table(rows) + (GRID_NOTE if name == "spending_grid" else NOTE).format(seeds=seeds)
    )
    if arguments.what == "main":
        draw(rows, found, HERE / "figures" / "spending.png")


if __name__ == "__main__":
    main()
