"""How much of the model does each client get?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedprune.errors import ConfigError
from fedprune.exchange import Lost, Report, Roster
from fedprune.types import FloatArray, IntArray, Memory, Rate


class RateLearner(Protocol):
    """Proposes a rate per chosen client and learns from the times that come back."""

    def propose(self, memory: Memory, clients: IntArray, roster: Roster, smallest: Rate) -> FloatArray:
        """Rates in [smallest, 1], one per client."""
        ...

    def learn(self, memory: Memory, reports: Sequence[Report], lost: Sequence[Lost], population: int) -> Memory:
        """What to remember after a round."""
        ...


@dataclass(frozen=True)
class Fixed:
    """The same rate for everybody; 0 stands for the smallest the model allows or `floor`, whichever is larger."""

    rate: Rate = 1.0
    floor: Rate = 0.125

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ConfigError(f"rate is {self.rate}; it must be in (0, 1], or 0 for the smallest")

    def propose(self, memory: Memory, clients: IntArray, roster: Roster, smallest: Rate) -> FloatArray:
        """One constant."""
        return np.full(len(clients), self.rate or max(self.floor, smallest))

    def learn(self, memory: Memory, reports: Sequence[Report], lost: Sequence[Lost], population: int) -> Memory:
        """Nothing."""
        return memory


@dataclass(frozen=True)
class ByCapability:
    """The largest of the levels that a device carries in the fastest one's time, from a speed known beforehand.

    HeteroFL's setting (Diao et al. 2021, section 3): devices belong to levels and keep them. `grid` counts equal steps up to
    1; levels of the paper are halves, which `powers` selects.
    """

    grid: int = 8
    powers: bool = False

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise ConfigError(f"grid is {self.grid}; it must be at least 1 step")

    def propose(self, memory: Memory, clients: IntArray, roster: Roster, smallest: Rate) -> FloatArray:
        """1 / slowness, rounded down to a level, but not below the lowest."""
        share = 1.0 / roster.slowness[clients]
        halves, steps = np.exp2(np.floor(np.log2(share) + 1e-9)), np.floor(share * self.grid + 1e-9) / self.grid
        levels = halves if self.powers else steps
        return np.clip(levels, max(1.0 / self.grid, smallest), 1.0)

    def learn(self, memory: Memory, reports: Sequence[Report], lost: Sequence[Lost], population: int) -> Memory:
        """Nothing: what it knows it knew before."""
        return memory


@dataclass(frozen=True)
class EqualTime:
    """AdaptCL-style: everybody's update time becomes the fastest's, learned from measured times alone.

    Every client starts with the whole model. Whenever `interval` new times of a client are in, its rate moves by one
    proportional step towards the target, phi*: rate <- rate * phi* / phi, where phi is the median of the new times. The target
    is anchored to the client that was fastest in the first round, which keeps the whole model; its time is smoothed. A
    moving minimum over all clients instead would race to the bottom under 3 % of timing noise.

    Zhou et al. 2021, arXiv:2106.14126. Differs from the paper: its constants and its interpolation are not public; the
    proportional step, the anchor and the numbers here are ours.

    Attributes:
        interval: times per client between two steps.
        step: a client keeps at least this share of its rate in one step.
        tolerance: no step while phi is within this share of the target.
        floor: smallest rate; the model's own may be larger.
        grid: rates are rounded down to steps of 1/grid, so that many clients share a width.
    """

    interval: int = 2
    step: float = 0.2
    tolerance: float = 0.05
    floor: Rate = 0.0625
    grid: int = 16

    def __post_init__(self) -> None:
        if self.interval < 1 or self.grid < 1:
            raise ConfigError(f"interval {self.interval} and grid {self.grid} must be at least 1")
        if not 0 < self.step <= 1 or not 0 < self.floor <= 1 or self.tolerance < 0:
            raise ConfigError(
                f"step {self.step} and floor {self.floor} must be in (0, 1], tolerance {self.tolerance} not negative"
            )

    def propose(self, memory: Memory, clients: IntArray, roster: Roster, smallest: Rate) -> FloatArray:
        """What was learned so far; the whole model for who has not reported yet."""
        if not memory:
            return np.ones(len(clients))
        return np.maximum(memory["rate"][clients], smallest)

    def learn(self, memory: Memory, reports: Sequence[Report], lost: Sequence[Lost], population: int) -> Memory:
        """Note the new times and step where enough are in."""
        if not reports:
            return memory
        rate = memory["rate"].copy() if memory else np.ones(population)
        recent = memory["recent"].copy() if memory else np.full((population, self.interval), np.nan)
        anchor, target = (int(memory["anchor"]), float(memory["target"])) if memory else (-1, np.nan)
        clients = np.array([r.order.client for r in reports])
        seconds = np.array([r.cost.seconds.total for r in reports])
        ordered = np.array([r.order.rate for r in reports])
        fresh = np.array([r.staleness == 0 for r in reports])
        rate[clients[fresh]] = ordered[fresh]  # the model's smallest rate, where less was remembered
        current = rate[clients] == ordered  # not from before the last step
        clients, seconds = clients[current], seconds[current]
        if anchor < 0:
            anchor, target = int(clients[seconds.argmin()]), float(seconds.min())
        elif anchor in clients:
            target += 0.3 * (float(seconds[clients == anchor][0]) - target)

        place = np.isnan(recent[clients]).argmax(1)  # the first empty one
        recent[clients, place] = seconds
        full = clients[place == self.interval - 1]
        phi = np.median(recent[full], axis=1)
        recent[full] = np.nan
        ideal = np.clip(rate[full] * target / phi, self.step * rate[full], 1.0)
        stepped = np.maximum(np.floor(ideal * self.grid + 1e-6) / self.grid, self.floor)
        moving = (np.abs(phi / target - 1) > self.tolerance) & (full != anchor)
        rate[full[moving]] = stepped[moving]
        return {"rate": rate, "recent": recent, "anchor": np.array(anchor), "target": np.array(target)}
