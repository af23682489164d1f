"""What tickets, dynamic masks and teachers are worth in a federation with tenfold speed differences.

    python simulations/tickets.py parts       each part alone and with the others, at mixed capacities: tables/tickets.md
    python simulations/tickets.py feedback    DPF against a permanent mask at 80, 90 and 95 % sparsity: tables/feedback.md

Runs are kept under `results/tickets` and go on where they were stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from fedprune.config import Settings, read
from fedprune.entries import All, Entries, Feedback
from fedprune.exchange import Lost, Report, Roster
from fedprune.pruning import Whole
from fedprune.rates import Forecast, Offer
from fedprune.record import RunRecord
from fedprune.simulation import prepare, read_data, run
from fedprune.strategy import one_round
from fedprune.types import FloatArray, IntArray, Memory, Rate

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "quickstart.toml"
SECONDS = 2000
LOCAL = ["distillation.teacher=local", "distillation.weight=0.5"]
NARROW = ["strategy=heterofl", "heterofl.server_lr=0.008"]
PARTS: dict[str, list[str]] = {
    "fedavg": ["strategy=fedavg"],
    "heterofl": NARROW,
    "heterofl + teacher on the device": [*NARROW, *LOCAL],
    "heterofl + teacher's scores sent": [*NARROW, "distillation.teacher=sent", "distillation.weight=0.5"],
    "heterofl + attention, relation": [*NARROW, "distillation.attention=0.1", "distillation.relation=0.1"],
    "heterofl + narrower self": [*NARROW, "nested=0.5"],
    "heterofl + ticket of 1/2": [*NARROW, "entries.kind=lottery", "entries.keep=0.5", "entries.every=15", "entries.rewind=5"],
    "sp_sad": ["strategy=sp_sad", "sp_sad.server_lr=0.008"],
    "ss_sad": ["strategy=ss_sad", "ss_sad.server_lr=0.008", "ss_sad.every=15", "ss_sad.rewind=5"],
    "lth_sad": ["strategy=lth_sad", "lth_sad.every=2", "lth_sad.rewind=1"],
    "lth_sad untaught": ["strategy=lth_sad", "lth_sad.every=2", "lth_sad.rewind=1", "lth_sad.taught=false"],
    "lth_sad untaught, not rewound": ["strategy=lth_sad", "lth_sad.every=2", "lth_sad.rewind=none", "lth_sad.taught=false"],
    "dpf by capability": ["strategy=dpf"],
    "dpf by capability, permanent mask": ["strategy=dpf", "dpf.every=0"],
    "dpp": ["strategy=dpp", "dpp.over=20"],
    "lotteryfl": ["strategy=lotteryfl"],
    "sub_fedavg": ["strategy=sub_fedavg"],
    "hermes": ["strategy=hermes"],
    "prunefl": ["strategy=prunefl", "prunefl.every=5", "prunefl.keep=0.33"],
}  # fmt: skip


# ---- parts -----------------------------------------------------------------------------------------------------------


def settings_of(name: str, seed: int) -> Settings:
    return read(CONFIG, [f"virtual_seconds={SECONDS}", "evaluations=15", f"seed={seed}", *PARTS[name]])


def parts_of(name: str, seed: int, out: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    settings = settings_of(name, seed)
    settings = settings.only(settings.strategy)
    summary = run(settings, out)
    events = RunRecord(out / settings.identity() / f"seed{seed}").events()
    seconds = [event["seconds"] for event in events]
    busy = sum(sum(v for part, v in s.items() if part != "waiting") for s in seconds)
    curve = [
        (event["ended"], event["evaluation"]["validation"]["ndcg10_expected"]) for event in events if "evaluation" in event
    ]
    return summary | {"name": name, "teacher": sum(s["teacher"] for s in seconds) / busy, "curve": curve}


def parts(seeds: int, jobs: int, out: Path, names: Sequence[str]) -> None:
    found = gathered(parts_of, [(name, seed, out) for seed in range(seeds) for name in names], jobs)
    by_name = {name: [row for row in found if row["name"] == name] for name in names}
    lines = [
        "| what | rounds | NDCG@10 1+99 | NDCG@10 full | slow users | entries | up, GB | down, GB | kJ | teacher's share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in by_name.items():
        cells = [f"{fmean(row['rounds'] for row in rows):.0f}"]
        cells += [spread([row[key] for row in rows]) for key in ("ndcg10_expected", "ndcg10_full", "ndcg10_expected_slow")]
        cells += [f"{fmean(row['kept_entries'] for row in rows):.2f}" if rows[0]["kept_entries"] is not None else ""]
        cells += [f"{fmean(row[key] for row in rows) / 1e9:.1f}" for key in ("bytes_up", "bytes_down")]
        cells += [f"{fmean(row['joules'] for row in rows) / 1e3:,.0f}", f"{fmean(row['teacher'] for row in rows):.0%}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    note = (
        f"\nMovieLens-100K, one client per user, sigma 10, {SECONDS:,} virtual seconds (`configs/quickstart.toml`), {seeds} "
        "seeds, ± their standard deviation; times, bytes and joules are modelled. Test quality at the round that validation "
        "chose among those with the final masks, each user scored by its own device's submodel. "
        "The teacher's share is of the time that devices are busy. What needs 100 s a round has just begun to learn by then.\n"
    )
    (HERE / "tables" / "tickets.md").write_text("\n".join(lines) + "\n" + note)
    draw(by_name, HERE / "figures" / "tickets.png")


def draw(by_name: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Validation quality over virtual time, mean of the seeds, in three panels."""
    panels = {
        "teachers, by width": [n for n in by_name if n.startswith(("heterofl", "sp_sad", "ss_sad", "fedavg"))],
        "tickets of the whole model": [n for n in by_name if n.startswith(("l", "sub", "hermes", "prune", "fedavg"))],
        "masks that move": [n for n in by_name if n.startswith(("dp", "fedavg"))],
    }
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained", sharey=True)
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            curves = [row["curve"] for row in by_name[name]]
            times = np.linspace(200, SECONDS, 60)
            means = np.mean([np.interp(times, *zip(*curve, strict=True)) for curve in curves], axis=0)
            axis.plot(times, means, label=name, color="black" if name == "fedavg" else None, linewidth=1.3)
        axis.set(title=title, xlabel="virtual seconds", ylim=(0.23, 0.42))
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=7, loc="upper left")
    axes[0].set_ylabel("validation NDCG@10, 1+99")
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---- feedback --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quarter:
    """A quarter of the clients is dense, the others get `keep`."""

    keep: Rate

    def propose(self, memory: Memory, clients: IntArray, roster: Roster, offer: Offer) -> FloatArray:
        """By number."""
        return np.where(clients % 4 == 0, 1.0, self.keep)

    def learn(self, memory: Memory, reports: Sequence[Report], lost: Sequence[Lost], population: int, offer: Offer) -> Memory:
        """Nothing."""
        return memory

    def forecast(self, memory: Memory, population: int) -> Forecast | None:
        """Nothing."""
        return None


WAYS: dict[str, Entries] = {
    "dense": All(),
    "permanent mask": Feedback(every=0),
    "DPF": Feedback(every=2),
    "DPF, full gradients": Feedback(every=2, through=True),
}
ROUNDS = 40


def feedback_of(way: str, sparsity: float, seed: int, out: Path) -> dict[str, Any]:
    """Forty rounds on equal devices; the users of masked devices are judged through their masks."""
    torch.set_num_threads(1)
    settings = read(CONFIG, ["strategy=fedavg", "sigma=1", f"seed={seed}", f"rounds={ROUNDS}"]).of("fedavg")[0]
    simulation = prepare(settings, read_data(settings))
    strategy = replace(simulation.strategy, rates=Quarter(1 - sparsity), pruning=Whole(), entries=WAYS[way])
    simulation = replace(simulation, strategy=strategy)
    state, back, best = simulation.state, 0.0, None
    for number in range(1, ROUNDS + 1):
        state, happened = one_round(strategy, state, simulation.fleet)
        back += happened.facts.get("reactivated", 0.0)
        if number % 4 == 0:
            here = simulation.evaluate(state)
            if best is None or here["validation"]["ndcg10_expected"] > best["validation"]["ndcg10_expected"]:
                best = here
    assert best is not None
    return {"way": way, "sparsity": sparsity, "seed": seed, "back": back} | best["test"]


def feedback(seeds: int, jobs: int, out: Path) -> None:
    work = [(way, s, seed, out) for seed in range(seeds) for s in (0.8, 0.9, 0.95) for way in WAYS if way != "dense"]
    found = gathered(feedback_of, [*work, *(("dense", 0.0, seed, out) for seed in range(seeds))], jobs)
    lines = [
        "| sparsity | mask | NDCG@10 1+99 | NDCG@10 full | without a mask, 1+99 | entries that came back |",
        "|---|---|---|---|---|---|",
    ]
    for sparsity in (0.0, 0.8, 0.9, 0.95):
        for way in WAYS:
            rows = [row for row in found if row["way"] == way and row["sparsity"] == sparsity]
            if rows:
                cells = [spread([r[k] for r in rows]) for k in ("ndcg10_expected", "ndcg10_full", "ndcg10_expected_global")]
                back = fmean(row["back"] for row in rows) / (1682 * 32)
                lines.append(f"| {sparsity:.0%} | {way} | {' | '.join(cells)} | {back:.2f} |")
    note = (
        f"\nMovieLens-100K, one client per user, {ROUNDS} rounds on equal devices; every fourth client dense, the others "
        f"masked (MF, 32 dimensions); {seeds} seeds, ± their standard deviation. Entries that came back: how often one "
        "returned, over all choices, per entry of the table (among the largest fifth).\n"
    )
    (HERE / "tables" / "feedback.md").write_text("\n".join(lines) + "\n" + note)


# ---- both ------------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.4f} ± {stdev(values) if len(values) > 1 else 0.0:.4f}"


def gathered(function: Any, work: Sequence[tuple[Any, ...]], jobs: int) -> list[dict[str, Any]]:
    """All results, in processes, with a line for each that is done."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(function, *arguments): arguments for arguments in work}
        for number, future in enumerate(as_completed(futures), start=1):
            future.result()
            print(f"{number} of {len(work)}: {futures[future][:-1]}", flush=True)
        return [future.result() for future in futures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("parts", "feedback"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("results/tickets"))
    arguments = parser.parse_args()
    if arguments.what == "parts":
        parts(arguments.seeds, arguments.jobs, arguments.out, arguments.only or list(PARTS))
    else:
        feedback(arguments.seeds, arguments.jobs, arguments.out)


if __name__ == "__main__":
    main()
