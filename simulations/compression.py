"""What pruning costs: SP-SAD, LTH-SAD and SS-SAD against the dense model and plain magnitude pruning, on two data sets.

    python simulations/compression.py                      both data sets, 5 seeds, 1/3, 1/5 and 1/10 of the parameters
    python simulations/compression.py --data ml-100k --seeds 1 --keep 0.3333

Writes `simulations/tables/compression.md` and `simulations/figures/compression.png`; trained models are kept under
`results/compression` and go on where they were stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from fedprune.baselines import baselines
from fedprune.compress import METHODS, Recipe, compress
from fedprune.config import Settings, validated
from fedprune.simulation import read_data

HERE = Path(__file__).parent
COMMON = {"latent": 64, "negatives": 3, "server_lr": 0.02, "warm_start": 8}
# Settings, recipe, and how many seeds go below a third.
DATA: dict[str, tuple[dict[str, Any], Recipe, int]] = {
    "ml-100k": (COMMON, Recipe(), 3),
    # 10-core, and 2,000 of the 19,451 users a round: every user trains about twelve times.
    "ta-feng": (
        COMMON | {"data": "ta-feng", "min_interactions": 10, "cohort": 2000},
        Recipe(dense=120, rounds=60, retrain=15, evaluations=6),
        1,
    ),
}
KEEPS = (1 / 3, 1 / 5, 1 / 10)
QUALITY = ("ndcg10_full", "hr10_full", "ndcg10_expected", "mse", "mae")


def settings_of(data: str, seed: int) -> Settings:
    return validated(DATA[data][0] | {"seed": seed})


def work(data: str, seed: int, keep: float, out: Path) -> list[dict[str, Any]]:
    """All methods of one seed and share; shares have the dense model in common."""
    torch.set_num_threads(1)
    settings = settings_of(data, seed)
    split = read_data(settings)
    return [compress(settings, method, keep, out, split=split, recipe=DATA[data][1]) for method in METHODS]


def mean_and_spread(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float] | None:
    values = [row[key] for row in rows]
    if any(value is None for value in values):
        return None
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def cell(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    found = mean_and_spread(rows, key)
    return "" if found is None else f"{found[0]:.4f} ± {found[1]:.4f}"


def table(data: str, results: Sequence[Mapping[str, Any]]) -> str:
    """One data set: the dense model, then per share each method. Costs are those of the first seed."""
    first = results[0]
    split = read_data(settings_of(data, 0))
    lines = [
        f"### {data}: {first['users']:,} users, {first['items']:,} items\n",
        "| model | seeds | parameters | FLOPs (dense kernel) | file, kB | latency | J per 1,000 | NDCG@10 full "
        "| HR@10 full | NDCG@10 1+99 | MSE | MAE |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def line(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
        one = rows[0]
        costs = [
            f"{one['parameters']:,}", f"{one['flops']:,.0f} ({one['flops_dense']:,.0f})", f"{one['file_bytes'] / 1000:,.0f}",
            f"{one['latency_ms']:.0f} ms" if name == "dense" else f"{one['latency_ratio']:.2f}", f"{one['joules']:.4f}",
        ]  # fmt: skip
        return f"| {name} | {len(rows)} | {' | '.join(costs)} | {' | '.join(cell(rows, key) for key in QUALITY)} |"

    seeds = {r["seed"]: r["dense"] for r in results}
    lines.append(line("dense", list(seeds.values())))
    for keep in sorted({r["keep"] for r in results}, reverse=True):
        for method in METHODS:
            rows = [r["pruned"] for r in results if r["method"] == method and r["keep"] == keep]
            if rows:
                lines.append(line(f"{method}, keep {keep:.3g}", rows))
    for name, quality in baselines(split).items():
        figures = [f"{quality[key]:.4f}" if key in quality else "" for key in QUALITY]
        lines.append(f"| {name} | | | | | | | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


def draw(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """The frontier: quality over what is left of the parameters, the dense model's mean and spread as a band."""
    panels = [(data, "ndcg10_full", "NDCG@10, full ranking") for data in results]
    panels += [(data, "mse", "MSE of ratings") for data, rows in results.items() if rows[0]["dense"]["mse"] is not None]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axis, (data, key, label) in zip(axes[0], panels, strict=True):
        rows = results[data]
        dense = mean_and_spread(list({r["seed"]: r["dense"] for r in rows}.values()), key)
        assert dense is not None
        axis.axhline(dense[0], color="black", linewidth=1, label="dense")
        axis.axhspan(dense[0] - dense[1], dense[0] + dense[1], color="black", alpha=0.1, linewidth=0)
        for method, colour, marker in zip(METHODS, ("C0", "C1", "C2", "C7"), "osD^", strict=True):
            keeps = sorted({r["keep"] for r in rows if r["method"] == method})
            found = [
                mean_and_spread([r["pruned"] for r in rows if r["method"] == method and r["keep"] == k], key) for k in keeps
            ]
            values = [f for f in found if f is not None]
            axis.errorbar(
                [100 * k for k in keeps], [v[0] for v in values], [v[1] for v in values],
                color=colour, marker=marker, capsize=3, linewidth=1.2, markersize=4, label=method,
            )  # fmt: skip
        axis.set(title=data, xlabel="parameters left, % of dense", ylabel=label, xscale="log")
        axis.set_xticks([10, 20, 33.3], ["10", "20", "33"])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, action="append")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--keep", type=float, action="append")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/compression"))
    parser.add_argument("--finished", action="store_true", help="train nothing, tabulate what is there")
    arguments = parser.parse_args()
    keeps = tuple(arguments.keep or KEEPS)
    results: dict[str, list[dict[str, Any]]] = {data: [] for data in arguments.data or DATA}
    if arguments.finished:
        for path in sorted(arguments.out.glob("compress-*/seed*/*.json")):
            row = json.loads(path.read_text())
            results[row["data"]].append(row)
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
            jobs = {
                pool.submit(work, data, seed, keep, arguments.out): (data, seed, keep)
                for keep in keeps
                for seed in range(arguments.seeds)
                for data in results
                if keep >= 0.3 or seed < DATA[data][2]
            }
            for job in as_completed(jobs):
                data, seed, keep = jobs[job]
                results[data] += job.result()
                print(f"{data}, seed {seed}, keep {keep:.3g} done", flush=True)
    for rows in results.values():
        rows.sort(key=lambda row: row["seed"])
        for row in rows:
            row["pruned"]["latency_ratio"] = row["pruned"]["latency_ms"] / row["dense"]["latency_ms"]
    source = next(iter(results.values()))[0]["dense"]["joules_source"]
    note = (
        f"\n± is the standard deviation over seeds; costs are the first seed's. FLOPs per recommendation "
        "(the whole catalogue for one user) count stored entries; in brackets what dense kernels compute, zeros included. "
        "Latency per 1,000, measured here, one thread, top 10 for one user at a time, the faster of a dense and a packed "
        "kernel; pruned models relative to the dense one, taking turns (equal work still differed by a third at times). "
        f"Joules: {source}, from the FLOPs of dense kernels. Ranking and rating are two models of one architecture "
        "(MF, 64 dimensions).\n"
    )
    (HERE / "tables" / "compression.md").write_text("\n".join(table(data, rows) for data, rows in results.items()) + note)
    draw(results, HERE / "figures" / "compression.png")


if __name__ == "__main__":
    main()
