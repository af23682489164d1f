"""Runs for `spending.py` and `memory.py`: from settings to a curve of quality over virtual time, one file per run."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from fedprune.codec import Codec
from fedprune.config import read
from fedprune.devices import CLASSES
from fedprune.gather import Gather
from fedprune.merge import Adam
from fedprune.rates import ByCapability, Learned
from fedprune.record import line
from fedprune.simulation import prepare, read_data, warm_start_event
from fedprune.spending import Mix
from fedprune.strategy import Strategy, one_round
from fedprune.submodel import Submodel

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "budget.toml"
OUT = Path("results") / "spending"


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        arm: what it is called.
        changes: of `configs/budget.toml`, `strategy=...` among them.
        variant: a change of the strategy that no setting makes (`VARIANTS`).
        every: seconds between evaluations, at sigma 1.
        until: at the latest, likewise.
        patience: evaluations without a better one after which it stops.
    """

    arm: str
    changes: tuple[str, ...]
    seed: int
    variant: str = ""
    every: float = 4.0
    until: float = 1300.0
    patience: int = 25

    @property
    def file(self) -> Path:
        """Where its result is kept."""
        about = json.dumps([self.changes, self.variant, self.every, self.until, self.patience])
        return (
            OUT / f"{self.arm.replace(' ', '_')}-{hashlib.blake2b(about.encode(), digest_size=5).hexdigest()}-{self.seed}.json"
        )


FIGURES = (
    "ndcg10_expected", "ndcg10_expected_slow", "ndcg10_full", "ndcg10_expected_limited", "ndcg10_expected_limited_global",
)  # fmt: skip
"""Of the test items; the last two where there are devices of limited memory."""

CHEAP = Mix(negatives=3, lr_private=0.08, precision="int8")


def _cheap(strategy: Strategy, mix: Mix = CHEAP, server_lr: float = 0.015) -> Strategy:
    return replace(strategy, spending=mix, merge=replace(strategy.merge, optimiser=Adam(server_lr)))


VARIANTS: dict[str, Callable[[Strategy], Strategy]] = {
    "": lambda s: s,
    "cheap width": lambda s: _cheap(s, replace(CHEAP, width=1.0), 0.008),
    "cheap width, taught": lambda s: _cheap(s, replace(CHEAP, width=1.0, taught=0.5), 0.008),
    "learned width": lambda s: replace(_cheap(s, replace(CHEAP, width=1.0), 0.008), rates=Learned()),
    "learned examples": lambda s: replace(_cheap(s, replace(CHEAP, examples=1.0, weigh=True)), rates=Learned()),
    "half and half": lambda s: replace(
        s, rates=ByCapability(), spending=replace(CHEAP, width=0.5), gather=Gather(pace=3.0, late="keep", refill=16)
    ),
    "sampled auto": lambda s: replace(s, spending=replace(s.spending, sampled="auto")) if isinstance(s.spending, Mix) else s,
    "sampled": lambda s: replace(s, spending=replace(s.spending, sampled=0.5)) if isinstance(s.spending, Mix) else s,
    "unweighted": lambda s: replace(s, merge=replace(s.merge, weights="equal")),
    "no refill": lambda s: replace(s, gather=replace(s.gather, refill=0)),
}  # fmt: skip


def learn(job: Job) -> dict[str, Any]:
    """Run it, unless its result is there."""
    if job.file.exists():
        return json.loads(job.file.read_text())
    torch.set_num_threads(1)
    settings = read(CONFIG, [*job.changes, f"seed={job.seed}"])
    settings = settings.only(settings.strategy)
    simulation = prepare(settings, read_data(settings))
    simulation = replace(simulation, strategy=VARIANTS[job.variant](simulation.strategy))
    state, event = simulation.begin()
    fleet, every = simulation.fleet, job.every * settings.sigma ** (0.0 if settings.strategy == "fedprune" else 1.0)
    joules, due, best, flat, reports = sum(event["joules"].values()), 0.0, 0.0, 0, 0
    moved, asked, curve = dict.fromkeys(("flops", "bytes_down", "bytes_up"), 0.0), set(), []
    while fleet.now() < job.until * settings.sigma and flat < job.patience:
        state, done = one_round(simulation.strategy, state, fleet)
        asked |= {order.client for order in done.orders}
        happened = line(done)
        joules += sum(happened["joules"].values())
        reports += happened["reports"]
        moved = {name: value + happened[name] for name, value in moved.items()}
        if fleet.now() >= due:
            due = fleet.now() + every
            silent = [client for client in range(simulation.clients) if client not in asked]
            here = simulation.evaluate(state, silent)
            value = here["validation"]["ndcg10_expected"]
            best, flat = (value, 0) if value > best else (best, flat + 1)
            point = {key: here["test"][key] for key in FIGURES if key in here["test"]}
            curve.append({"seconds": fleet.now(), "joules": joules, "validation": value, "reports": reports} | point)
    spread = simulation.heterogeneity()
    result = {"arm": job.arm, "seed": job.seed, "curve": curve, "reports": reports, "rounds": state.version}
    result |= {name: value / max(reports, 1) for name, value in moved.items()} | {"ceiling": spread["ceiling"]}
    job.file.parent.mkdir(parents=True, exist_ok=True)
    job.file.write_text(json.dumps(result))
    return result


def gathered(jobs: Sequence[Job], processes: int) -> dict[Job, dict[str, Any]]:
    """All results; progress on standard error is one line per run."""
    if processes == 1:
        return {job: learn(job) for job in jobs}
    found: dict[Job, dict[str, Any]] = {}
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(learn, job): job for job in jobs}
        for number, future in enumerate(as_completed(waiting), 1):
            job = waiting[future]
            found[job] = future.result()
            print(f"{number} of {len(jobs)}: {job.arm}, seed {job.seed}", file=sys.stderr, flush=True)
    return {job: found[job] for job in jobs}


# ---- what a run came to ----------------------------------------------------------------------------------------------


def reached(result: dict[str, Any], target: float, what: str = "seconds") -> float | None:
    """Virtual seconds (or joules) when validation first met a target, linear between evaluations; None if it never did."""
    before = None
    for point in result["curve"]:
        if point["validation"] >= target:
            if before is None:
                return point[what]
            part = (target - before["validation"]) / (point["validation"] - before["validation"])
            return before[what] + part * (point[what] - before[what])
        before = point
    return None


def final(result: dict[str, Any]) -> dict[str, Any]:
    """Quality where validation was best."""
    return max(result["curve"], key=lambda point: point["validation"])


SHARED = ("data", "min_interactions", "silos", "warm_start", "recommender", "latent", "hidden")
"""Settings that what a full report and a warm start cost follow from, whatever the strategy."""


@cache
def full_report(changes: tuple[str, ...]) -> dict[str, float]:
    """What an average client's report of the whole model moves and computes, as FedAvg is usually configured."""
    settings = read(CONFIG, [*changes, "strategy=fedavg"]).only("fedavg")
    simulation = prepare(settings, read_data(settings))
    whole = Submodel.full(simulation.recommender.layout)
    load = simulation.fleet.workload_of(None, whole, simulation.strategy.objective, Codec(rows=settings.rows))
    return {"bytes_down": load.down, "bytes_up": load.up, "flops": load.training}


@cache
def warm_start(changes: tuple[str, ...]) -> dict[str, float]:
    """What the warm start moves and computes per client, and its seconds on balanced devices at sigma 10."""
    settings = read(CONFIG, [*changes, "sigma=10"])
    simulation = prepare(settings.only(settings.strategy), read_data(settings))
    event = warm_start_event(simulation)
    return {"seconds": event["ended"]} | {
        name: event[name] / simulation.clients for name in ("bytes_down", "bytes_up", "flops")
    }


def clocked(job: Job, result: dict[str, Any], device_class: str, scale: float = 1.0) -> dict[str, Any]:
    """The same run on another class of devices, all times `scale` times as long.

    With equal work and linear devices every order takes its device's slowness times the same sum over download, training and
    upload, so all orders are longer by one factor, and the warm start by another.
    """
    named = {change: change.partition("=")[0].split(".") for change in job.changes}
    common = tuple(change for change, words in named.items() if len(words) == 1 and words[0] in SHARED)
    own = tuple(change for change, words in named.items() if words[-1] in (*SHARED, "strategy"))
    (sigma,) = [float(change.partition("=")[2]) for change, words in named.items() if words == ["sigma"]]
    full, warm = full_report(common), warm_start(own)
    begins = warm["seconds"] * sigma / 10
    early, late = begins * stretch(warm, full, device_class), stretch(result, full, device_class)
    times = [scale * (early + (point["seconds"] - begins) * late) for point in result["curve"]]
    return result | {"curve": [point | {"seconds": time} for point, time in zip(result["curve"], times, strict=True)]}


def stretch(moved: dict[str, Any], full: dict[str, float], device_class: str) -> float:
    """How much longer something takes on devices of another class than on balanced ones, by its bytes and FLOPs."""

    def seconds(name: str) -> float:
        parts = zip(CLASSES[name], ("bytes_down", "flops", "bytes_up"), strict=True)
        return sum(share * moved[part] / full[part] for share, part in parts)

    return seconds(device_class) / seconds("balanced")


def mean(values: Sequence[float | None], form: str = ",.0f") -> str:
    """Mean ± standard deviation, and how many there are if some are missing."""
    known = [value for value in values if value is not None]
    if not known:
        return "never"
    text = format(fmean(known), form) + (f" ± {format(stdev(known), form)}" if len(known) > 1 else "")
    return text + (f" ({len(known)} of {len(values)})" if len(known) < len(values) else "")
