"""What is a client's budget spent on?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from fedprune.codec import Codec
from fedprune.errors import ConfigError
from fedprune.exchange import PARTS, Report
from fedprune.objective import Objective
from fedprune.types import FloatArray, Memory, Rate


@dataclass(frozen=True)
class Plan:
    """One order, before it is cut: how much of the model, trained how, travelling how."""

    rate: Rate
    objective: Objective
    codec: Codec


class Spending(Protocol):
    """Turns a budget, the share of a full report that a client is to do, into a plan. Equal plans are one object."""

    def learn(self, memory: Memory, reports: Sequence[Report], population: int) -> Memory:
        """What to remember of a round. Under "seconds", `[population, parts]`, is what plans are made by."""
        ...

    def plan(
        self, budget: Rate, period: float, seconds: FloatArray | None, objective: Objective, codec: Codec, tight: bool = False
    ) -> Plan:
        """What to ask for.

        Args:
            budget: in (0, 1], what the rate learner proposed.
            period: how much seldomer than the fastest this client reports, as far as that is known beforehand; at least 1.
            seconds: `[parts]` (`exchange.PARTS`) of the client's last reports, had they travelled as float32; None or NaN:
                there are none.
            tight: the device's memory cannot hold the model as float32.
        """
        ...


@dataclass(frozen=True)
class Width:
    """All of it on the model's size: what pruning strategies do. How much is cut, and whether for good, is `Pruning`'s."""

    def learn(self, memory: Memory, reports: Sequence[Report], population: int) -> Memory:
        """Nothing."""
        return memory

    def plan(
        self, budget: Rate, period: float, seconds: FloatArray | None, objective: Objective, codec: Codec, tight: bool = False
    ) -> Plan:
        """The budget is the rate."""
        return _plan(budget, objective, codec)


@dataclass(frozen=True)
class Mix:
    """Several spendings under one budget b: width b^width, examples b^examples, and what is left in time, so less often.

    With width 1 that is `Width`, with width 0 the model is whole and a slow device reports less often, which costs nothing but
    staleness. What every report costs is chosen here too: cheap reports are not heterogeneity handling, and gain more.

    Attributes:
        width, examples: exponents, together at most 1.
        negatives: per positive, in a report at budget 1; None: the experiment's.
        weigh: fewer negatives weigh more, so that their sum is expected to be that of the experiment's.
        lr_private: of the private rows of who reports every round; None: the experiment's.
        stride: private rows that are trained p times as seldom as the fastest clients' go p^stride times as far.
        precision: of what travels; None: the strategy's codec's; "auto": int8 where a device spends at least `worth` of a
            report on moving bytes, where that is not known yet, and where memory is tight.
        sampled: share of the touched rows that go up, drawn by size and weighted by 1/chance; None: the codec's; "auto": half
            of them where the upload alone takes most of a report.
        worth: see `precision`.
        taught: devices below this budget get no teacher; 0: all get what the experiment says.
    """

    width: float = 0.0
    examples: float = 0.0
    negatives: int | None = None
    weigh: bool = False
    lr_private: float | None = None
    stride: float = 0.0
    precision: str | None = None
    sampled: float | str | None = None
    worth: float = 0.02
    taught: Rate = 0.0

    def __post_init__(self) -> None:
        if self.width < 0 or self.examples < 0 or self.width + self.examples > 1:
            raise ConfigError(
                f"width {self.width} and examples {self.examples} are exponents of one budget: neither may be negative, nor "
                f"both together above 1"
            )
        if self.negatives is not None and self.negatives < 1:
            raise ConfigError(f"negatives is {self.negatives}; it must be at least 1, or left out for the experiment's")
        if self.lr_private is not None and not self.lr_private > 0:
            raise ConfigError(f"lr_private is {self.lr_private}; it must be above 0, or left out for the experiment's")
        if not 0 <= self.stride <= 1 or not 0 <= self.worth <= 1 or not 0 <= self.taught <= 1:
            raise ConfigError(f"stride {self.stride}, worth {self.worth} and taught {self.taught} must be in [0, 1]")
        if self.precision not in (None, "float32", "int8", "auto"):
            raise ConfigError(f'precision "{self.precision}"; it is float32, int8 or auto')
        if not (
            self.sampled in (None, "auto")
            or (isinstance(self.sampled, int | float) and self.sampled is not True and 0 < self.sampled <= 1)
        ):
            raise ConfigError(f'sampled "{self.sampled}"; it is a share in (0, 1] or auto')

    def plan(
        self, budget: Rate, period: float, seconds: FloatArray | None, objective: Objective, codec: Codec, tight: bool = False
    ) -> Plan:
        """See the class."""
        known: dict[str, float] = {}
        if seconds is not None and not np.isnan(seconds).any():
            known = {part: float(own) for part, own in zip(PARTS, seconds, strict=True)}
        most = self.negatives or objective.negatives
        negatives = max(1, round(most * budget**self.examples))
        told = replace(
            objective,
            negatives=negatives,
            weight_negatives=objective.weight_negatives * (objective.negatives / negatives if self.weigh else 1.0),
            lr_private=(self.lr_private or objective.lr_private) * _level(period) ** self.stride,
            distillation=objective.distillation if budget >= self.taught else None,
        )
        return _plan(budget**self.width, told, self.travelling(known, codec, tight))

    def learn(self, memory: Memory, reports: Sequence[Report], population: int) -> Memory:
        """What each client's last reports would have taken as float32, all rows of them; smoothed."""
        if "auto" not in (self.precision, self.sampled) or not reports:
            return memory
        seconds = memory["seconds"].copy() if memory else np.full((population, len(PARTS)), np.nan)
        for report in reports:
            short, client = INT8 if report.order.codec.precision == "int8" else 1.0, report.order.client
            scale = {"download": short, "upload": short * report.order.codec.sampled}
            own = np.array([getattr(report.cost.seconds, part) / scale.get(part, 1.0) for part in PARTS])
            before = own if np.isnan(seconds[client]).any() else seconds[client]
            seconds[client] = before + SMOOTHING * (own - before)
        return {"seconds": seconds}

    def travelling(self, seconds: dict[str, float], codec: Codec, tight: bool = False) -> Codec:
        """The wire, by what a device's full report spends its time on."""
        total = sum(seconds.values())
        moving = self.worth * total <= seconds["download"] + seconds["upload"] if seconds else True
        short = self.precision == "int8" or (self.precision == "auto" and (moving or tight))
        precision = codec.precision if self.precision is None else "int8" if short else "float32"
        uphill = bool(seconds) and seconds["upload"] > 0.5 * total and codec.rows == "touched"
        sampled = (
            codec.sampled if self.sampled is None else (0.5 if uphill else 1.0) if self.sampled == "auto" else self.sampled
        )
        return replace(codec, precision=precision, sampled=float(sampled))


INT8 = 0.27
"""What int8 takes of float32's bytes, for rows of 32 entries and a bias."""
SMOOTHING = 0.3
"""Weight of a client's newest times."""


def _level(period: float) -> float:
    """Periods a fifth apart count as one, so that clients still share their plans."""
    return float(1.2 ** round(np.log(max(1.0, period)) / np.log(1.2)))


@lru_cache(maxsize=8192)
def _plan(rate: Rate, objective: Objective, codec: Codec) -> Plan:
    """One object for equal plans: clients with the same objective are trained together."""
    return Plan(rate, objective, codec)
