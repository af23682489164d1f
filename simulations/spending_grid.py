"""Each spending and mix on its own, for `spending.py grid`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from curves import Job, clocked, final, mean, reached

from fedprune.devices import CLASSES

TUNED, OURS = "strategy=fedavg_tuned", ("strategy=fedprune", "fedprune.precision=int8")
ARMS: dict[str, tuple[tuple[str, ...], str]] = {
    "fedavg": (("strategy=fedavg",), ""),
    "tuned rates": ((TUNED, "fedavg_tuned.negatives=8", "fedavg_tuned.precision=float32"), ""),
    "tuned rates, 3 negatives": ((TUNED, "fedavg_tuned.precision=float32"), ""),
    "fedavg_tuned": ((TUNED,), ""),
    "fedavg_tuned, half of the rows sampled": ((TUNED,), "sampled"),
    "fedavg_tuned, downloads cached for 4": ((TUNED, "fedavg_tuned.refresh=4"), ""),
    "fedavg_tuned, server width 16": ((TUNED, "fedavg_tuned.latent=16"), ""),
    "fedavg_tuned, server width 64": ((TUNED, "fedavg_tuned.latent=64"), ""),
    "narrower for good, known speeds": (("strategy=heterofl", "heterofl.powers=false"), "cheap width"),
    "narrower for good, learned": (("strategy=heterofl",), "learned width"),
    "narrower, damped": (("strategy=heterofl", "heterofl.powers=false", "heterofl.damp=2"), "cheap width"),
    "narrower, the wide half taught": (
        ("strategy=heterofl", "distillation.teacher=local", "distillation.weight=0.5"),
        "cheap width, taught",
    ),
    "rotating window": (("strategy=window",), "cheap width"),
    "rotating window, cached rest": (("strategy=window", "window.refresh=4"), "cheap width"),
    "fewer negatives, learned": ((TUNED,), "learned examples"),
    "half in width, half in time": (("strategy=skip",), "half and half"),
    "skip": (("strategy=skip",), ""),
    "fedbuff, 350 reports": (
        (
            "strategy=fedbuff",
            "fedbuff.buffer=350",
            "fedbuff.refill=16",
            "fedbuff.negatives=3",
            "fedbuff.lr_private=0.08",
            "fedbuff.server_lr=0.0075",
            "fedbuff.decay_private=0.01",
        ),
        "",
    ),
    "fedprune": (OURS, ""),
    "fedprune, equal weights": (OURS, "unweighted"),
    "fedprune, asked at merges only": (OURS, "no refill"),
    "fedprune, half of the rows sampled": (OURS, "sampled"),
    "fedprune, downloads cached for 4": ((*OURS, "fedprune.refresh=4"), ""),
}
MAIN = ("fedavg", "fedavg_tuned", "skip", "fedprune")
CHOSEN = "fedprune, each device's wire chosen for it"
"""Precision and sampling by what its reports have spent their seconds on; run on each class of devices."""
WIDE = ("recommender=neumf", "latent=64", "hidden=[256,128]")
WIDE_ARMS = ("fedavg_tuned", "narrower for good, learned", "half in width, half in time", "fedprune")
SOME = (
    "skip",
    "fedprune",
    "narrower for good, learned",
    "rotating window",
    "half in width, half in time",
    "fewer negatives, learned",
)
NOTE = """
Seconds (and kJ, on balanced devices) to 95 % of the peak of `fedavg`'s validation NDCG@10 (1+99; of `fedavg_tuned`'s for
NeuMF). How runs on other classes follow from those on balanced devices, and all else: `spending.md`; where clients' orders
differ (windows, fewer negatives) that is an approximation. {seeds} seed(s); below .005 nothing is a finding. Rates as in
`spending.md`; narrower models and windows have one each. Where no sigma 2 or 5 is given, it was not run.
"""


def jobs(seeds: int) -> list[Job]:
    """Who waits for all is run at sigma 10 alone. The four strategies of the main table are its own runs."""
    todo = []
    for seed in range(seeds):
        for sigma in (10, 2, 5):
            for arm, (changes, variant) in ARMS.items():
                if sigma == 10 or arm in SOME:
                    until, patience = 2400.0 if arm == "fedavg" else 1300.0, 25 if arm in MAIN else 12
                    todo.append(Job(arm, (*changes, f"sigma={sigma}"), seed, variant, until=until, patience=patience))
        for device_class in CLASSES:
            changes = ("strategy=fedprune", "fedprune.precision=auto", "sigma=10", f"device_class={device_class}")
            todo.append(Job(CHOSEN, changes, seed, "sampled auto"))
        for arm in WIDE_ARMS:
            changes, variant = ARMS[arm]
            todo.append(Job(f"wide {arm}", (*changes, "sigma=10", *WIDE), seed, variant, every=10.0, patience=8))
    return todo


def rows(found: dict[Job, dict[str, Any]]) -> list[dict[str, Any]]:
    """One per model, sigma and arm, as far as it was run."""
    several = []
    for wide, reference in (("", "fedavg"), ("wide ", "fedavg_tuned")):
        peaks = {job.seed: final(result)["validation"] for job, result in found.items() if job.arm == wide + reference}
        for sigma in (2, 5, 10) if not wide else (10,):
            for arm in ARMS:
                own = {j: r for j, r in found.items() if j.arm == wide + arm and f"sigma={sigma}" in j.changes}
                scale = 1.0
                waits = ARMS[arm][0][0] in ("strategy=fedavg", TUNED) and ARMS[arm][1] != "learned examples"
                if not own and waits:  # the same run on another clock
                    own, scale = {j: r for j, r in found.items() if j.arm == wide + arm}, sigma / 10
                own = {job: result for job, result in own.items() if job.seed in peaks}
                classes = {c: {job: clocked(job, r, c, scale) for job, r in own.items()} for c in CLASSES}
                if own:
                    several.append(
                        {"model": "NeuMF" if wide else "MF", "sigma": sigma, "arm": arm} | _row(classes, peaks, scale)
                    )
    peaks = {job.seed: final(result)["validation"] for job, result in found.items() if job.arm == "fedavg"}
    known = {job: result for job, result in found.items() if job.arm == CHOSEN and job.seed in peaks}
    chosen = {c: {job: result for job, result in known.items() if f"device_class={c}" in job.changes} for c in CLASSES}
    if all(chosen.values()):
        several.append({"model": "MF", "sigma": 10, "arm": CHOSEN} | _row(chosen, peaks, 1.0))
    return several


def _row(classes: dict[str, dict[Job, dict[str, Any]]], peaks: dict[int, float], scale: float) -> dict[str, Any]:
    """Its figures, a value per seed: times by class of devices, the rest on balanced ones."""

    def first(device_class: str, what: str = "seconds") -> list[float | None]:
        return [reached(result, 0.95 * peaks[job.seed], what) for job, result in classes[device_class].items()]

    ends = [final(result) for result in classes["balanced"].values()]
    quality = {key: [end[key] for end in ends] for key in ("ndcg10_expected", "ndcg10_expected_slow")}
    # Who waits shorter for the slowest burns less: joules are of a run's own sigma alone.
    return {c: first(c) for c in CLASSES} | quality | {"joules": first("balanced", "joules") if scale == 1.0 else []}


def table(of: Sequence[dict[str, Any]]) -> str:
    lines = []
    for model, sigma in dict.fromkeys((row["model"], row["sigma"]) for row in of):
        lines += [
            f"\n**{model}, sigma {sigma}**\n",
            "| what | compute-bound, s | balanced, s | slow uplink, s | kJ | NDCG@10 1+99 | slow users' |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in of:
            if (row["model"], row["sigma"]) == (model, sigma):
                cells = [row["arm"], *(mean(row[c]) for c in ("compute_bound", "balanced", "slow_uplink"))]
                cells += [mean([j and j / 1e3 for j in row["joules"]]) if row["joules"] else ""]
                cells += [mean(row[key], ".4f") for key in ("ndcg10_expected", "ndcg10_expected_slow")]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines).strip() + "\n"
