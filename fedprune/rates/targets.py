"""After how long should a round be over, and who can do how much until then?"""

from __future__ import annotations

import numpy as np

from fedprune.rates.base import Offer
from fedprune.types import FloatArray, Rate, Seconds

PLACES = 120
"""Clients that stand for all when a target is chosen: so many quantiles of their times."""
CANDIDATES = 16
"""Targets that are compared, besides the time of the slowest at its lowest rate."""
LONGER = 1 + np.array([0.0, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1])
WHOLE = 0.95
"""Above this a client gets the whole model: the rest is not worth another width."""


def times(seconds: FloatArray, offer: Offer) -> FloatArray:
    """`[clients, levels]` of clients whose full reports take `seconds` `[clients, parts]`; never shorter for more."""
    return np.einsum("kp,lp->kl", seconds, np.maximum.accumulate(offer.shares, axis=0))


def largest(taken: FloatArray, targets: FloatArray, offer: Offer, lowest: Rate) -> FloatArray:
    """The largest rate that takes no longer than a target, `[targets, clients]`; linear between levels.

    b_k(T) = max {b : t_k(b) <= T}, but at least `lowest`.

    Args:
        taken: `[clients, levels]` from `times`.
        targets: `[targets]`.
    """
    levels = len(offer.rates)
    if levels == 1:
        return np.full((len(targets), len(taken)), float(offer.rates[0]))
    reached = (taken[None] <= targets[:, None, None]).sum(2)  # levels that fit
    below = np.clip(reached - 1, 0, levels - 2)
    client = np.arange(len(taken))[None]
    low, high = taken[client, below], taken[client, below + 1]
    part = np.clip((targets[:, None] - low) / np.maximum(high - low, 1e-300), 0.0, 1.0)
    rates = offer.rates[below] + part * (offer.rates[below + 1] - offer.rates[below])
    return np.maximum(rates, lowest)


def equal(
    seconds: FloatArray, offer: Offer, *, lowest: Rate, alpha: float = 1.0, slack: float = 0.01, asked: int | None = None
) -> Seconds:
    """The target under which most of the model is trained per second.

    T* = argmax_T mean_k b_k(T)^alpha / D(T), where a round lasts D(T) = T, or as long as the slowest of those asked needs at
    its lowest rate. Of targets that are as good within `slack` it is the longest: where devices are nearly equal, nothing is
    to be gained by being faster than half of them. Normally that is about the fastest client's time.

    Args:
        seconds: `[clients, parts]` of a full report.
        asked: how many of these clients a round asks, drawn at random; None: all. Then D is the expected duration.
    """
    order = np.argsort(seconds.sum(1))
    places = np.linspace(0, len(order) - 1, min(PLACES, len(order))).round().astype(int)
    taken = times(seconds[order[places]], offer)
    whole = taken[:, -1]
    share = (offer.at(np.array([lowest]))[0] * seconds).sum(1)
    least, chance = _slowest(share, len(share) if asked is None else asked)
    apart = np.linspace(0, 1, CANDIDATES) ** 2  # close to each other among the fast
    kinks = whole if len(whole) <= CANDIDATES else whole[(apart * (len(whole) - 1)).round().astype(int)]
    candidates = np.append(kinks, np.clip(least[0], whole[0], whole[-1]))

    def good(targets: FloatArray) -> FloatArray:
        lasts = (np.maximum(targets[:, None], least[None]) * chance).sum(1)
        return (largest(taken, targets, offer, lowest) ** alpha).mean(1) / lasts

    value = good(candidates)
    enough = (1 - slack) * value.max()
    near = candidates[value >= enough].max() * LONGER
    return float(near[good(near) >= enough * (1 - 1e-12)].max())


def _slowest(seconds: FloatArray, asked: int) -> tuple[FloatArray, FloatArray]:
    """Times from the slowest on, and with which chance each is the slowest of `asked` clients drawn without replacement."""
    descending = np.sort(seconds)[::-1]
    if asked >= len(seconds):
        return descending[:1], np.ones(1)
    drawn = np.minimum(1.0, asked / (len(seconds) - np.arange(len(seconds) - asked + 1)))
    spared = np.append(1.0, np.cumprod(1 - drawn)[:-1])
    return descending[: len(drawn)], spared * drawn


def beat(full: FloatArray, *, share: float, worth: float) -> Seconds:
    """The beat at which slow devices report less often, with the whole model: after it, and after its multiples, they are in.

    T solves mean_k min(1, T / t_k) = share: so much of all reports is in after a beat, on average. Infinity if that gains less
    than `worth` times over waiting for all: max_k t_k * mean_k 1 / max(T, t_k).

    Args:
        full: `[clients]`, seconds of a full report.
    """
    ascending = np.sort(full)
    rest = np.append(np.cumsum((1 / ascending)[::-1])[::-1][1:], 0.0)  # of those slower than each
    done = np.arange(1, len(full) + 1)
    reports = (done + ascending * rest) / len(full)  # per client, were the beat each one's time
    place = int(np.searchsorted(reports, share))
    if place >= len(full):
        return np.inf
    slower, faster = (rest[place - 1], done[place - 1]) if place else (float((1 / ascending).sum()), 0)
    target = float(min((share * len(full) - faster) / slower, ascending[place])) if slower > 0 else float(ascending[place])
    gain = ascending[-1] * float((1 / np.maximum(target, ascending)).mean())
    return target if gain >= worth else np.inf
