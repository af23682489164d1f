"""Who trains next?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedprune.errors import ConfigError
from fedprune.exchange import Lost, Report, Roster
from fedprune.types import IntArray, Memory


class Selector(Protocol):
    """Chooses among the idle clients."""

    def choose(self, memory: Memory, roster: Roster, rng: np.random.Generator) -> IntArray:
        """Client numbers, ascending; a subset of `roster.clients`."""
        ...

    def learn(self, memory: Memory, reports: Sequence[Report], lost: Sequence[Lost]) -> Memory:
        """What to remember after a round."""
        ...


@dataclass(frozen=True)
class Uniform:
    """`cohort` of the idle clients at random (all with equal chance), or everybody if there are no more than that.

    With late reports kept (`Gather`), the busy are not idle, so everybody means: whoever is done gets the next order.
    """

    cohort: int | None = None

    def __post_init__(self) -> None:
        if self.cohort is not None and self.cohort < 1:
            raise ConfigError(f"cohort is {self.cohort}; it must be at least 1, or left out for everybody")

    def choose(self, memory: Memory, roster: Roster, rng: np.random.Generator) -> IntArray:
        """A sample without replacement."""
        return _sample(roster.clients, self.cohort, rng)

    def learn(self, memory: Memory, reports: Sequence[Report], lost: Sequence[Lost]) -> Memory:
        """Nothing."""
        return memory


@dataclass(frozen=True)
class KeepBusy:
    """As many of the idle clients at random as it takes to have `concurrency` at work; everybody if None.

    FedBuff's and FedAsync's M.
    """

    concurrency: int | None = None

    def __post_init__(self) -> None:
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"concurrency is {self.concurrency}; it must be at least 1, or left out for everybody")

    def choose(self, memory: Memory, roster: Roster, rng: np.random.Generator) -> IntArray:
        """A sample without replacement; nobody if enough are busy."""
        if self.concurrency is None:
            return roster.clients
        return _sample(roster.clients, max(0, self.concurrency - roster.busy), rng)

    def learn(self, memory: Memory, reports: Sequence[Report], lost: Sequence[Lost]) -> Memory:
        """Nothing."""
        return memory


@dataclass(frozen=True)
class Strongest:
    """`Uniform` among the fastest `share` of all devices; the others never train.

    The rival that every way of including weak devices has to beat (Cho et al. 2022; the DepthFL reproduction in Flower).
    """

    share: float = 0.5
    cohort: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"share is {self.share}; it must be in (0, 1]")

    def choose(self, memory: Memory, roster: Roster, rng: np.random.Generator) -> IntArray:
        """A sample of the strong."""
        limit = np.sort(roster.slowness)[max(0, round(self.share * roster.population) - 1)]
        strong = roster.clients[roster.slowness[roster.clients] <= limit]
        return _sample(strong, self.cohort, rng)

    def learn(self, memory: Memory, reports: Sequence[Report], lost: Sequence[Lost]) -> Memory:
        """Nothing."""
        return memory


def _sample(clients: IntArray, cohort: int | None, rng: np.random.Generator) -> IntArray:
    if cohort is None or cohort >= len(clients):
        return clients
    return np.sort(rng.choice(clients, size=cohort, replace=False))
