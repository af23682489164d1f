"""What a full report takes each client: learned from reports at any rates, whatever the noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from fedprune.exchange import PARTS, Lost, Report
from fedprune.rates.base import Offer
from fedprune.types import BoolArray, FloatArray, IntArray, Memory, Seconds

STRANGE = 3.0
"""Standard deviations beyond which a time is not believed until the next one confirms it."""
FEW, CAUTIOUS = 3.0, 20.0
"""Times that the noise presumed beforehand counts for: where clients are compared, more."""
FORGET = 50.0
"""Times after which that has faded to 1/e."""
MANY = 400.0
"""Times after which older ones are forgotten where noise is estimated."""
QUIET = 0.003
"""Noise is never taken to be less."""
ENTER, LEAVE = 4.0, 1.0
"""Standard normal quantiles: clients count as different if times of equal ones would look so different with the chance that a
normal number exceeds ENTER, and as equal again below LEAVE."""
BLEND = 0.3
"""Weight of a new report in a client's mix of parts."""


@dataclass(frozen=True)
class Observed:
    """A round's reports as arrays.

    Attributes:
        clients: whose, `[reports]`.
        full: seconds of a full report by part, `[reports, parts]`.
        ticket: the last one.
        began, ended: when the first of these orders was sent, and when the last of these reports was merged.
    """

    clients: IntArray
    full: FloatArray
    ticket: int
    began: Seconds
    ended: Seconds

    @staticmethod
    def of(reports: Sequence[Report], offer: Offer) -> Observed:
        """Each part divided by the share of it that the order's rate leaves, training also by the work that was done."""
        count = len(reports)
        if not count:
            return Observed(np.zeros(0, np.int64), np.zeros((0, len(PARTS))), -1, np.inf, 0.0)
        rows = (
            (o.ticket, o.client, o.rate, r.work, r.finished, r.waited, s.download, s.loading, s.teacher, s.training, s.upload)
            for r in reports
            for o, s in ((r.order, r.cost.seconds),)
        )
        table = np.fromiter(chain.from_iterable(rows), float, count * (6 + len(PARTS))).reshape(count, -1)
        ticket, client, rate, work, finished, waited = table[:, :6].T
        seconds, shares = table[:, 6:], offer.at(rate)
        shares[:, PARTS.index("training")] *= work
        full = seconds / np.where(shares > 0, shares, 1.0)
        total = full.sum(1)
        good = np.isfinite(total) & (total > 0)
        began, ended = (finished - seconds.sum(1)).min(), (finished + waited).max()
        return Observed(client[good].astype(np.int64), full[good], int(ticket.max()), float(began), float(ended))


@dataclass(frozen=True)
class Times:
    """A local level model per client on the log scale, with what clients have in common estimated from all of them.

    y = log of a full report's seconds:  y_kt = x_kt + e,  e ~ N(0, s^2);  x_kt = x_k,t-1 + N(0, drift^2);  x_k ~ N(m, tau^2)

    x_k is filtered (Kalman 1960) with a gain that follows from how often the client was heard; s is estimated from the
    innovations of all clients together, m and tau from the spread of the x_k beyond what s explains (empirical Bayes; Efron
    & Morris 1973). While the spread could be chance, tau is 0: all are equal. One factor mostly hits a whole order, so what
    share of a report each part takes is far less noisy than its time, and smoothed apart.

    A time more than three standard deviations off changes nothing, unless the client's next one agrees: then the device has
    changed, and only the two count. Constants are ours.

    Memory: `level` x_k, NaN where never heard; `looseness` Var(x_k) / s^2; `mix` `[clients, parts]`; `doubt`, the last
    innovation if it was not believed, else NaN; `noise` (sum of squares, times, s^2 presumed); `common` (m, tau^2, 1 if
    clients differ).

    Attributes:
        drift: standard deviation of what a device changes from round to round.
        noise: s presumed before times of one client can be compared. Rather too much: who takes noise for difference prunes.
    """

    drift: float = 0.01
    noise: float = 0.3

    def empty(self, population: int) -> Memory:
        """Nothing heard."""
        return {
            "level": np.full(population, np.nan),
            "looseness": np.ones(population),
            "mix": np.zeros((population, len(PARTS))),
            "doubt": np.full(population, np.nan),
            "noise": np.array([0.0, 0.0, self.noise**2]),
            "common": np.zeros(3),
        }

    def learn(self, memory: Memory, seen: Observed, lost: Sequence[Lost], offer: Offer) -> Memory:
        """One round later. Lost orders count as at least so slow."""
        after = {name: value.copy() for name, value in memory.items()}
        after["looseness"] += self.drift**2 / variance(memory)
        clients, full = seen.clients, seen.full
        while len(clients):  # twice in one round is rare
            _, first = np.unique(clients, return_index=True)
            self._hear(after, clients[first], full[first])
            clients, full = np.delete(clients, first), np.delete(full, first, 0)
        for event in lost:
            self._at_least(after, event, offer)
        _pool(after)
        return after

    def _hear(self, memory: Memory, clients: IntArray, full: FloatArray) -> None:
        total = full.sum(1)
        y, mix = np.log(total), full / total[:, None]
        new = np.isnan(memory["level"][clients])
        if new.any():
            fresh = clients[new]
            memory["level"][fresh], memory["looseness"][fresh], memory["mix"][fresh] = y[new], 1.0, mix[new]
            clients, y, mix = clients[~new], y[~new], mix[~new]
        if not len(clients):
            return
        jumped = self._filter(memory, clients, y - memory["level"][clients], measured=True)
        weight = np.where(jumped, 1.0, BLEND)[:, None]
        memory["mix"][clients] += weight * (mix - memory["mix"][clients])

    def _filter(self, memory: Memory, clients: IntArray, innovation: FloatArray, *, measured: bool) -> BoolArray:
        """Returns who has changed suddenly."""
        s2, loose, doubt = variance(memory), memory["looseness"][clients], memory["doubt"][clients]
        size = s2 * (1 + loose)
        strange = innovation**2 > STRANGE**2 * size
        jumped = strange & (np.abs(innovation - doubt) <= STRANGE * np.sqrt(2 * s2) + 0.1)  # NaN: no
        gain = np.where(strange, 0.0, loose / (1 + loose))
        memory["level"][clients] += np.where(jumped, (innovation + np.nan_to_num(doubt)) / 2, gain * innovation)
        memory["looseness"][clients] = np.where(jumped, 0.5, (1 - gain) * loose)
        memory["doubt"][clients] = np.where(strange & ~jumped, innovation, np.nan)
        if measured:
            squares = np.minimum(innovation**2, STRANGE**2 * size)[~jumped] / (1 + loose[~jumped])
            memory["noise"][:2] += squares.sum(), len(squares)
            memory["noise"][:2] *= min(1.0, max(MANY, 2 * len(clients)) / max(float(memory["noise"][1]), 1.0))
        return jumped

    def _at_least(self, memory: Memory, lost: Lost, offer: Offer) -> None:
        """What came to nothing took at least what was spent on it; believed like any time, if it is strangely long."""
        client, spent = lost.order.client, lost.cost.seconds.total
        known = ~np.isnan(memory["level"])
        if not spent > 0 or not known.any():
            return
        mine = known[client]
        mix = memory["mix"][client] if mine else memory["mix"][known].mean(0)
        bound = np.log(spent / (mix * offer.at(np.array([lost.order.rate]))[0]).sum())
        innovation = bound - (memory["level"][client] if mine else np.mean(memory["level"][known]))
        if not mine and innovation > 0:
            memory["level"][client], memory["looseness"][client], memory["mix"][client] = bound, 1.0, mix
        elif mine and innovation > STRANGE * np.sqrt(variance(memory) * (1 + memory["looseness"][client])):
            self._filter(memory, np.array([client]), np.array([innovation]), measured=False)


def variance(memory: Memory, presumed: float = FEW) -> float:
    """s^2, where what was presumed counts for so many times in the beginning."""
    squares, count, before = memory["noise"].tolist()
    presumed *= math.exp(-count / FORGET)
    return max((squares + presumed * before) / (count + presumed), QUIET**2)


def _pool(memory: Memory) -> None:
    """m, tau^2, and whether clients differ."""
    known = ~np.isnan(memory["level"])
    count = int(known.sum())
    if count == 0:
        return
    level, loose = memory["level"][known], float(memory["looseness"][known].mean())
    middle, tau2, differ = float(level.mean()), 0.0, False
    if count > 1:
        spread = float(((level - middle) ** 2).sum()) / (count - 1)
        limit = quantile(count - 1, LEAVE if memory["common"][2] else ENTER)
        differ = spread > limit * loose * variance(memory, CAUTIOUS)
        tau2 = max(spread - loose * variance(memory), 0.0) if differ else 0.0
    memory["common"] = np.array([middle, tau2, differ])


def quantile(freedom: int, normal: float) -> float:
    """chi^2 / freedom where a normal number has `normal` (Wilson & Hilferty 1931)."""
    part = 2 / (9 * freedom)
    return (1 - part + normal * part**0.5) ** 3


def estimated(memory: Memory) -> FloatArray:
    """`[clients, parts]` seconds of a full report, drawn towards what all have in common; who was never heard is average."""
    level, (middle, tau2, _) = memory["level"], memory["common"]
    known = ~np.isnan(level)
    doubtful = variance(memory) * memory["looseness"]
    trust = tau2 / (tau2 + doubtful)
    total = np.exp(np.where(known, middle + trust * (level - middle), middle))
    mix = memory["mix"]
    if not known.all():
        mix = np.where(known[:, None], mix, mix[known].mean(0))
    return total[:, None] * mix
