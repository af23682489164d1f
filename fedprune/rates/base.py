"""What every learner of rates answers, and what it is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from fedprune.exchange import Lost, Report, Roster
from fedprune.types import FloatArray, IntArray, Memory, Rate, Seconds


@dataclass(frozen=True)
class Offer:
    """What a client can be asked for: rates, and what a report at each costs beside one at rate 1.

    The server knows this without measuring anything: it is the FLOPs and bytes of the submodels that it would carve.

    Attributes:
        rates: `[levels]`, ascending, the last one 1.
        shares: `[levels, parts]` in the order of `exchange.PARTS`; 1 for a part that does not shrink (loading), 0 for one that
            there is none of.
    """

    rates: FloatArray
    shares: FloatArray

    @property
    def smallest(self) -> Rate:
        """Below this the model cannot be cut."""
        return float(self.rates[0])

    def at(self, rates: FloatArray) -> FloatArray:
        """Shares at any rates, `[rates, parts]`; linear between levels."""
        columns = [np.interp(rates, self.rates, self.shares[:, part]) for part in range(self.shares.shape[1])]
        return np.stack(columns, axis=-1)


@dataclass(frozen=True)
class Forecast:
    """What a learner expects of the next round.

    Attributes:
        target: seconds after which a round should be over; infinity: when the last report is in; None: nobody knows yet.
        seconds: `[population, parts]`, of a report at rate 1 by part; NaN where nothing is known.
    """

    target: Seconds | None
    seconds: FloatArray

    @cached_property
    def mean_period(self) -> float:
        """How many targets a report of the full model takes, at least 1; mean over the clients that are known."""
        if self.target is None:
            return 1.0
        own = self.seconds.sum(1)
        known = own[~np.isnan(own)]
        return float(np.maximum(known / self.target, 1.0).mean()) if len(known) else 1.0


class RateLearner(Protocol):
    """Proposes a rate per chosen client and learns from the times that come back."""

    def propose(self, memory: Memory, clients: IntArray, roster: Roster, offer: Offer) -> FloatArray:
        """Rates in [offer.smallest, 1], one per client."""
        ...

    def learn(self, memory: Memory, reports: Sequence[Report], lost: Sequence[Lost], population: int, offer: Offer) -> Memory:
        """What to remember after a round."""
        ...

    def forecast(self, memory: Memory, population: int) -> Forecast | None:
        """What it expects; None from whoever keeps no model of time."""
        ...
