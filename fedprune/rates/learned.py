"""Rates from a model of time: what each device would take for the whole model, and what a round should take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from fedprune.errors import ConfigError
from fedprune.exchange import PARTS, Lost, Report, Roster
from fedprune.rates import targets
from fedprune.rates.base import Forecast, Offer
from fedprune.rates.times import Observed, Times, estimated
from fedprune.types import FloatArray, IntArray, Memory, Rate, Seconds


@dataclass(frozen=True)
class Learned:
    """Every device gets as much of the model as it can carry in the time under which most is trained per second.

    t_k(b) = sum_p seconds_kp * share_p(b);  b_k(T) = max {b : t_k(b) <= T};  T* = argmax_T mean_k b_k(T)^alpha / D(T)

    seconds_kp, what part p of a full report takes client k, is learned (`Times`) from reports at whatever rate, since the
    server knows what share of a full report a rate costs (`Offer`). So one report places a client, what was taken is given
    back when a device recovers, and a device never heard of gets what the average one would. T* is normally the fastest
    client's time, not when some device cannot reach that at its floor (`targets.equal`). Noise prunes nobody: while times
    differ no more than those of equal devices would, all count as equal.

    With `aim` "beat" everybody keeps the whole model and slow devices report less often: the target is then for a gathering
    that stops at it (`targets.beat`), infinity where waiting for all is no worse. It is None until half of the clients have
    reported, lest the fast half decide alone; orders that are still out are then taken to last as long as the run has.

    Ours; the problem is AdaptCL's (Zhou et al. 2021). Equals fedavg when all devices are equally fast.

    Attributes:
        aim: see above.
        floor: smallest rate; the model's own may be larger.
        alpha: how much a rate is worth, b^alpha.
        slack: of targets that are as good within this share the longest is taken.
        hold: a rate is kept while the new one differs by less than this share.
        drift, noise: see `Times`.
        share: of all clients' reports that are to be in after a beat.
        worth: no beat, if it does not make this many times as many reports per second as waiting for all.
    """

    aim: Literal["equal", "beat"] = "equal"
    floor: Rate = 0.0625
    alpha: float = 1.0
    slack: float = 0.01
    hold: float = 0.02
    drift: float = 0.01
    noise: float = 0.3
    share: float = 0.64
    worth: float = 1.4

    def __post_init__(self) -> None:
        if self.aim not in ("equal", "beat"):
            raise ConfigError(f'aim "{self.aim}"; it is equal (narrower models) or beat (fewer reports)')
        if not 0 < self.floor <= 1:
            raise ConfigError(f"floor is {self.floor}; it must be in (0, 1]")
        if not self.alpha > 0:
            raise ConfigError(f"alpha is {self.alpha}; it must be above 0, and 1 says that half a model is worth half")
        if not 0 <= self.slack < 1 or not 0 <= self.hold < 1:
            raise ConfigError(f"slack {self.slack} and hold {self.hold} must be in [0, 1)")
        if self.drift < 0 or not self.noise > 0:
            raise ConfigError(f"drift {self.drift} must not be negative and noise {self.noise} must be above 0 (0.3 is 30 %)")
        if not 0 < self.share < 1:
            raise ConfigError(f"share is {self.share}; it must be in (0, 1), and 0.4 merges when two reports of five are in")
        if self.worth < 1:
            raise ConfigError(f"worth is {self.worth}; it must be at least 1, which never waits for all")

    def propose(self, memory: Memory, clients: IntArray, roster: Roster, offer: Offer) -> FloatArray:
        """What was learned so far; the whole model before that."""
        if not memory or self.aim == "beat":
            return np.ones(len(clients))
        return np.maximum(memory["rate"][clients], offer.smallest)

    def learn(self, memory: Memory, reports: Sequence[Report], lost: Sequence[Lost], population: int, offer: Offer) -> Memory:
        """Hear, and choose target and rates anew."""
        if not reports and (not lost or not memory):
            return memory
        seen = Observed.of(reports, offer)
        after = self._times.learn(memory or self._empty(population), seen, lost, offer)
        _count(after, seen, len(reports), lost)
        if not np.isfinite(after["level"]).any():
            return memory
        seconds = estimated(after)
        if self.aim == "beat":
            after["target"] = np.array(np.nan if (target := self._beat(after, seconds)) is None else target)
            return after
        lowest = max(self.floor, offer.smallest)
        known = ~np.isnan(after["level"])
        asked = int(np.ceil(after["orders"][2]))
        target = targets.equal(
            seconds[known], offer, lowest=lowest, alpha=self.alpha, slack=self.slack, asked=min(asked, int(known.sum()))
        )
        rate = targets.largest(targets.times(seconds, offer), np.array([target]), offer, lowest)[0]
        rate[rate >= targets.WHOLE] = 1.0
        kept = (np.abs(rate - after["rate"]) < self.hold * after["rate"]) & (rate < 1)
        after["rate"] = np.where(kept, after["rate"], rate)
        after["target"] = np.array(target)
        return after

    def forecast(self, memory: Memory, population: int) -> Forecast | None:
        """The target, and what was learned of every client that was heard."""
        if not memory:
            return Forecast(None, np.full((population, len(PARTS)), np.nan))
        if self._forecasts.get("of") is not memory:  # asked for many times in a round
            seconds = estimated(memory)
            seconds[np.isnan(memory["level"])] = np.nan
            seconds.setflags(write=False)
            target = float(memory["target"])
            self._forecasts.update(of=memory, last=Forecast(None if np.isnan(target) else target, seconds))
        return self._forecasts["last"]

    @cached_property
    def _forecasts(self) -> dict[str, Any]:
        return {}

    @cached_property
    def _times(self) -> Times:
        return Times(self.drift, self.noise)

    def _empty(self, population: int) -> Memory:
        return self._times.empty(population) | {
            "rate": np.ones(population),
            "target": np.array(np.nan),
            "orders": np.zeros(3),  # sent, answered, per round
            "clock": np.array([np.inf, 0.0]),  # first order, now
        }

    def _beat(self, memory: Memory, seconds: FloatArray) -> Seconds | None:
        known = ~np.isnan(memory["level"])
        if 2 * known.sum() < len(known):
            return None
        full, silent = seconds[known].sum(1), int((~known).sum())
        out = min(silent, max(0, int(memory["orders"][0] - memory["orders"][1])))
        lasted = float(memory["clock"][1] - memory["clock"][0])
        waited_for = np.full(out, max(lasted, float(np.exp(memory["common"][0]))))
        return targets.beat(np.concatenate((full, waited_for)), share=self.share, worth=self.worth)


def _count(memory: Memory, seen: Observed, reports: int, lost: Sequence[Lost]) -> None:
    """How many orders were sent, as far as their tickets tell, and how long the run has lasted."""
    sent, answered, each = memory["orders"].tolist()
    now = reports + len(lost)
    last = max([seen.ticket, *(event.order.ticket for event in lost)])
    memory["orders"] = np.array([max(sent, last + 1), answered + now, each + 0.2 * (now - each) if each else now])
    began, ended = memory["clock"].tolist()
    memory["clock"] = np.array([began if np.isfinite(began) else seen.began, max(ended, seen.ended)])
