"""Rates that nobody learns: the same for everybody, or by what is known of the devices beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedprune.errors import ConfigError
from fedprune.exchange import Lost, Report, Roster
from fedprune.rates.base import Forecast, Offer
from fedprune.types import FloatArray, IntArray, Memory, Rate

FJORD = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Tiers of ordered dropout: Horvath et al. 2021, as in its Flower baseline."""


@dataclass(frozen=True)
class Fixed:
    """The same rate for everybody; 0 stands for the smallest the model allows or `floor`, whichever is larger."""

    rate: Rate = 1.0
    floor: Rate = 0.125

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ConfigError(f"rate is {self.rate}; it must be in (0, 1], or 0 for the smallest")

    def propose(self, memory: Memory, clients: IntArray, roster: Roster, offer: Offer) -> FloatArray:
        """One constant."""
        return np.full(len(clients), self.rate or max(self.floor, offer.smallest))

    def learn(self, memory: Memory, reports: Sequence[Report], lost: Sequence[Lost], population: int, offer: Offer) -> Memory:
        """Nothing."""
        return memory

    def forecast(self, memory: Memory, population: int) -> Forecast | None:
        """Nothing."""
        return None


@dataclass(frozen=True)
class ByCapability:
    """The largest of the levels that a device carries in the fastest one's time, from a speed known beforehand.

    HeteroFL's setting (Diao et al. 2021, section 3): devices belong to levels and keep them. `grid` counts equal steps up to
    1; levels of the paper are halves, which `powers` selects. `tiers` names levels one by one: with `FJORD`, a device is in
    the largest p that its capability reaches (Horvath et al. 2021). Differs from the paper: there a device's tier is drawn,
    and it trains narrower selves as well (`Objective.nested`).
    """

    grid: int = 8
    powers: bool = False
    tiers: tuple[Rate, ...] = ()

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise ConfigError(f"grid is {self.grid}; it must be at least 1 step")
        if any(not 0 < tier <= 1 for tier in self.tiers) or list(self.tiers) != sorted(set(self.tiers)):
            raise ConfigError(f"tiers are {self.tiers}; they must be ascending rates in (0, 1], as {FJORD} are")
        if self.tiers and self.powers:
            raise ConfigError("levels are halves (powers) or tiers, not both; leave one out")

    def propose(self, memory: Memory, clients: IntArray, roster: Roster, offer: Offer) -> FloatArray:
        """1 / slowness, rounded down to a level, but not below the lowest."""
        share = 1.0 / roster.slowness[clients]
        if self.tiers:
            levels = np.array(self.tiers)
            return np.maximum(levels[np.maximum(np.searchsorted(levels, share + 1e-9, "right") - 1, 0)], offer.smallest)
        halves, steps = np.exp2(np.floor(np.log2(share) + 1e-9)), np.floor(share * self.grid + 1e-9) / self.grid
        levels = halves if self.powers else steps
        return np.clip(levels, max(1.0 / self.grid, offer.smallest), 1.0)

    def learn(self, memory: Memory, reports: Sequence[Report], lost: Sequence[Lost], population: int, offer: Offer) -> Memory:
        """Nothing: what it knows it knew before."""
        return memory

    def forecast(self, memory: Memory, population: int) -> Forecast | None:
        """Nothing."""
        return None
