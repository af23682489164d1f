"""AdaptCL: everybody's update time becomes the fastest's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedprune.errors import ConfigError
from fedprune.exchange import Lost, Report, Roster
from fedprune.rates.base import Forecast, Offer
from fedprune.rates.newton import retention
from fedprune.types import FloatArray, IntArray, Memory, Rate

POINTS = 6
"""Retentions of each client whose times are remembered."""
WINDOW = 9
"""Times at one retention that its median is of, at most (or `interval`, if that is more)."""
SMOOTHING = 0.3
"""Weight of the anchor's newest time in the target."""
PATIENCE = 10
"""Reports of the anchor that have to be missing, for all that can be expected, before another takes its place."""


@dataclass(frozen=True)
class EqualTime:
    """AdaptCL-style: everybody's update time becomes the fastest's, learned from measured times alone.

    Everybody starts with the whole model. After every `interval` times of a client at its retention g, phi is the median of
    those since its last pruning (the last nine). Where phi exceeds the target phi*, Newton's interpolation of retention as a
    function of time, through the client's points (phi_i, g_i) nearest to phi*, says which retention takes phi*:

    g(phi*) = g_0 + g[phi_0,phi_1] (phi* - phi_0) + g[phi_0,phi_1,phi_2] (phi* - phi_0)(phi* - phi_1) + ...

    With one point, where a larger retention took no longer, or where the value is not in (0, g (1 - smallest_step)), the
    proportional g phi*/phi takes its place. Pruning is one-way: nothing grows again,
    so noise ratchets (`simulations/rate_learners.py`).

    phi* is the time of the client that was fastest at its first measurement, the reference, which keeps the whole model; it
    is smoothed. A client first heard of later may still prove faster and take its place; and where the reference is not heard
    of for the time of ten of its reports, the fastest of those with the largest retention does. A "moving" target, the
    smallest median of all at any time, races to the bottom: whoever was pruned a little too far by noise sets it for all.

    Zhou et al. 2021, arXiv:2106.14126. Differs from the paper: its text was not to be had, beyond that rates are learned such
    that all take the fastest's time. Interpolation, safeguards, reference and all numbers here are ours.

    Attributes:
        interval: times per client between two prunings.
        step: a client keeps at least this share of its retention in one pruning; 1 - step is the largest pruned rate.
        tolerance: no pruning while phi is within this share of the target.
        floor: smallest rate; the model's own may be larger.
        grid: rates are rounded down to steps of 1/grid, so that many clients share a width.
        smallest_step: no pruning by less than this share of the retention.
        degree: of the interpolation, 1 or 2.
        anchor: where the target comes from, see above.
    """

    interval: int = 2
    step: float = 0.2
    tolerance: float = 0.05
    floor: Rate = 0.0625
    grid: int = 16
    smallest_step: float = 0.02
    degree: int = 1
    anchor: Literal["reference", "moving"] = "reference"

    def __post_init__(self) -> None:
        if self.interval < 1 or self.grid < 1:
            raise ConfigError(f"interval {self.interval} and grid {self.grid} must be at least 1")
        if not 0 < self.step <= 1 or not 0 < self.floor <= 1 or self.tolerance < 0:
            raise ConfigError(
                f"step {self.step} and floor {self.floor} must be in (0, 1], tolerance {self.tolerance} not negative"
            )
        if not 0 <= self.smallest_step < 1:
            raise ConfigError(f"smallest_step is {self.smallest_step}; it must be in [0, 1), and 0 prunes by however little")
        if self.degree not in (1, 2):
            raise ConfigError(f"degree is {self.degree}; it must be 1 or 2, since more only follows the noise")
        if self.anchor not in ("reference", "moving"):
            raise ConfigError(f'anchor "{self.anchor}"; it is reference (a client that keeps the whole model) or moving')

    def propose(self, memory: Memory, clients: IntArray, roster: Roster, offer: Offer) -> FloatArray:
        """What was learned so far; the whole model for who has not reported yet."""
        if not memory:
            return np.ones(len(clients))
        return np.maximum(memory["rate"][clients], offer.smallest)

    def learn(self, memory: Memory, reports: Sequence[Report], lost: Sequence[Lost], population: int, offer: Offer) -> Memory:
        """Note the new times and prune where enough are in."""
        if not reports:
            return memory
        memory = {k: v.copy() for k, v in memory.items()} if memory else self._empty(population)
        for clients, seconds in _each_once(memory, reports):
            memory["silence"] += len(clients) / max(int((memory["count"] > 0).sum()), 1)
            due = self._note(memory, clients, seconds)
            self._aim(memory, clients, seconds, due)
            self._prune(memory, due, offer)
        return memory

    def forecast(self, memory: Memory, population: int) -> Forecast | None:
        """Nothing."""
        return None

    def _empty(self, population: int) -> Memory:
        return {
            "rate": np.ones(population),
            "recent": np.full((population, max(self.interval, WINDOW)), np.nan),  # times at this rate, newest last
            "count": np.zeros(population, np.int64),  # of times at this rate
            "phi": np.full(population, np.nan),  # median of the last complete interval
            "rates": np.full((population, POINTS), np.nan),
            "times": np.full((population, POINTS), np.nan),
            "anchor": np.array(-1),
            "target": np.array(np.nan),
            "silence": np.array(0.0),  # the anchor's reports that could have been expected since its last
        }

    def _note(self, memory: Memory, clients: IntArray, seconds: FloatArray) -> IntArray:
        """Returns whose interval is complete."""
        recent = memory["recent"][clients]
        recent[:, :-1], recent[:, -1] = recent[:, 1:], seconds
        memory["recent"][clients] = recent
        memory["count"][clients] += 1
        complete = memory["count"][clients] % self.interval == 0
        due = clients[complete]
        memory["phi"][due] = _median(recent[complete])
        return due

    def _aim(self, memory: Memory, clients: IntArray, seconds: FloatArray, due: IntArray) -> None:
        """Move the target."""
        if self.anchor == "moving":
            if len(due):
                memory["target"] = np.array(np.nanmin(memory["phi"]))
            return
        anchor, target = int(memory["anchor"]), float(memory["target"])
        first = due[(memory["rate"][due] == 1) & (memory["count"][due] == self.interval)]
        faster = first[memory["phi"][first] < target * (1 - self.tolerance)] if anchor >= 0 else first
        if anchor < 0:
            anchor, target = int(clients[seconds.argmin()]), float(seconds.min())
            memory["silence"] = np.array(0.0)
        elif len(faster):
            anchor = int(faster[memory["phi"][faster].argmin()])
            target = float(memory["phi"][anchor])
            memory["silence"] = np.array(0.0)
        elif anchor in clients:
            target += SMOOTHING * (float(seconds[clients == anchor][0]) - target)
            memory["silence"] = np.array(0.0)
        elif memory["silence"] > PATIENCE:
            widest = clients[memory["rate"][clients] == memory["rate"][clients].max()]
            anchor = int(widest[seconds[np.isin(clients, widest)].argmin()])
            memory["silence"] = np.array(0.0)
        memory["anchor"], memory["target"] = np.array(anchor), np.array(target)

    def _prune(self, memory: Memory, due: IntArray, offer: Offer) -> None:
        target, smallest = float(memory["target"]), max(self.floor, offer.smallest)
        rate, phi = memory["rate"], memory["phi"]
        slow = due[(phi[due] > target * (1 + self.tolerance)) & (due != memory["anchor"]) & (rate[due] > smallest)]
        if not len(slow):
            return
        old = rate[slow]
        known_rates = np.column_stack((memory["rates"][slow, 1:], old))  # at the end, so that it is the oldest that goes
        known_times = np.column_stack((memory["times"][slow, 1:], phi[slow]))
        found = retention(known_times, known_rates, target, self.degree)
        good = (found > 0) & (found < old * (1 - self.smallest_step))  # NaN: no
        wanted = np.where(good, found, old * target / phi[slow])
        wanted = np.clip(wanted, self.step * old, old)
        new = np.maximum(np.floor(wanted * self.grid + 1e-6) / self.grid, smallest)
        pruned = (wanted <= old * (1 - self.smallest_step)) & (new < old)
        slow, new = slow[pruned], new[pruned]
        memory["rates"][slow], memory["times"][slow] = known_rates[pruned], known_times[pruned]
        rate[slow], memory["recent"][slow], memory["count"][slow] = new, np.nan, 0


def _each_once(memory: Memory, reports: Sequence[Report]) -> list[tuple[IntArray, FloatArray]]:
    """Clients and times, without those of an older rate; a second report of one client comes in a second pair."""
    clients = np.array([r.order.client for r in reports])
    seconds = np.array([r.cost.seconds.total for r in reports])
    ordered = np.array([r.order.rate for r in reports])
    fresh = np.array([r.staleness == r.order.age for r in reports])
    memory["rate"][clients[fresh]] = ordered[fresh]  # the model's smallest rate, where less was remembered
    current = (memory["rate"][clients] == ordered) & np.isfinite(seconds) & (seconds > 0)
    clients, seconds, found = clients[current], seconds[current], []
    while len(clients):
        _, first = np.unique(clients, return_index=True)
        found.append((clients[first], seconds[first]))
        clients, seconds = np.delete(clients, first), np.delete(seconds, first)
    return found


def _median(rows: FloatArray) -> FloatArray:
    """Of each row's numbers; NaN is none."""
    ascending, count = np.sort(rows, axis=1), (~np.isnan(rows)).sum(1)
    middle = (ascending[np.arange(len(rows)), (count - 1) // 2], ascending[np.arange(len(rows)), count // 2])
    return (middle[0] + middle[1]) / 2
