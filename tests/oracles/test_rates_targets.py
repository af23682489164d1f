"""Targets of a round against brute force and hand arithmetic."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import brentq

from fedprune.exchange import PARTS
from fedprune.rates import Offer, targets

RATES = np.linspace(0.1, 1.0, 10)
SPLIT = np.array([0.3, 0.1, 0.0, 0.4, 0.2])
OFFER = Offer(RATES, np.stack([np.ones(10) if p == "loading" else RATES for p in PARTS], axis=-1))
LINEAR = Offer(RATES, np.repeat(RATES[:, None], len(PARTS), 1))


def test_the_largest_rate_that_fits():
    """4 s, .4 of them whatever the rate: 2.2 s take .4 + 3.6 b = 2.2, so b = .5; 1 s takes 1/6; .5 s less than the lowest."""
    taken = targets.times(4 * SPLIT[None], OFFER)
    assert taken[0] == pytest.approx(0.4 + 3.6 * RATES)
    found = targets.largest(taken, np.array([2.2, 1.0, 0.5, 4.0, 9.0]), OFFER, 0.1)[:, 0]
    assert found == pytest.approx([0.5, 1 / 6, 0.1, 1.0, 1.0])
    assert targets.largest(taken, np.array([1.0]), OFFER, 0.3)[0] == pytest.approx([0.3])
    alone = Offer(np.ones(1), np.ones((1, len(PARTS))))
    assert targets.largest(targets.times(SPLIT[None], alone), np.array([0.5]), alone, 0.1).tolist() == [[1.0]]


def value(slowness: np.ndarray, target: float, offer: Offer, asked: int) -> float:
    """What the target is the argmax of; the slowest of every possible cohort."""
    seconds = slowness[:, None] * SPLIT
    rates = targets.largest(targets.times(seconds, offer), np.array([target]), offer, 0.1)[0]
    least = (seconds * offer.at(np.array([0.1]))[0]).sum(1)
    lasts = np.mean([max(target, *least[list(cohort)]) for cohort in combinations(range(len(slowness)), asked)])
    return float(rates.mean() / lasts)


@pytest.mark.parametrize("offer", [OFFER, LINEAR])
@pytest.mark.parametrize("slowness", [[1, 1, 1], [1, 2, 4, 8], [1, 1.1, 9, 9.5, 10], [1, 30], [1, 1, 1, 1, 40], [5, 6, 7]])
@pytest.mark.parametrize("all_asked", [True, False])
def test_the_target_is_as_good_as_any(slowness: list, offer: Offer, all_asked: bool):
    speeds, asked = np.array(slowness, float), len(slowness) if all_asked else 2
    found = targets.equal(speeds[:, None] * SPLIT, offer, lowest=0.1, slack=0.0, asked=asked)
    best = max(value(speeds, t, offer, asked) for t in np.geomspace(0.5 * speeds.min(), speeds.max(), 800))
    assert value(speeds, found, offer, asked) >= best * (1 - 1e-9)


def test_normally_the_target_is_the_fastest_clients_time():
    slowness = np.linspace(1, 8, 6)
    assert targets.equal(slowness[:, None] * SPLIT, LINEAR, lowest=0.1, slack=0.0) == pytest.approx(1.0)


def test_who_cannot_reach_it_at_the_floor_sets_the_target():
    """30 times as slow takes 3 at a rate of .1: the others may as well train three times as long."""
    slowness = np.array([1.0, 2.0, 4.0, 30.0])
    assert targets.equal(slowness[:, None] * SPLIT, LINEAR, lowest=0.1, slack=0.0) == pytest.approx(3.0)


def test_of_equally_good_targets_the_longest():
    """Nearly equal devices: being as fast as the very fastest gains less than a hundredth, and costs all others width."""
    slowness = np.linspace(1.0, 1.04, 9)
    tight = targets.equal(slowness[:, None] * SPLIT, LINEAR, lowest=0.1, slack=0.0)
    loose = targets.equal(slowness[:, None] * SPLIT, LINEAR, lowest=0.1, slack=0.01)
    assert tight == pytest.approx(1.0) and loose >= 1.02
    assert value(slowness, loose, LINEAR, 9) >= 0.99 * value(slowness, tight, LINEAR, 9)


def test_what_a_rate_is_worth_moves_the_target():
    """Slowness 1, 2: T = 1 trains 1.5 per second and T = 2 one. Where only whole models count (b^9), T = 2 is as good."""
    seconds = np.array([1.0, 2.0])[:, None] * SPLIT
    assert targets.equal(seconds, LINEAR, lowest=0.1, alpha=1.0, slack=0.0) == pytest.approx(1.0)
    seconds = np.repeat([1.0, 1.2], (1, 9))[:, None] * SPLIT
    assert targets.equal(seconds, LINEAR, lowest=0.1, alpha=9.0, slack=0.0) == pytest.approx(1.2)


def test_the_chance_of_being_the_slowest_of_a_cohort():
    """Of 4, 2 are asked: the slowest is among 3 of the 6 pairs, the next is the slowest of 2, the third of 1."""
    seconds, chance = targets._slowest(np.array([2.0, 4.0, 1.0, 3.0]), 2)
    assert seconds.tolist() == [4, 3, 2] and chance == pytest.approx([3 / 6, 2 / 6, 1 / 6])
    assert targets._slowest(np.array([2.0, 4.0]), 2)[0].tolist() == [4]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.64, 0.9, 0.999])
def test_the_beat_solves_its_equation(share: float):
    full = np.random.default_rng(0).uniform(1, 9, 17)
    target = targets.beat(full, share=share, worth=1.0)
    assert target == pytest.approx(brentq(lambda t: np.minimum(1, t / full).mean() - share, 1e-3, 10.0))


def test_no_beat_that_gains_little():
    """Slowness 1, 3 at a share of 2/3: T = 1, since (1 + 1/3) / 2 = 2/3. Clients report 2/3 times a second, not 1/3: 2."""
    full = np.array([3.0, 1.0])
    assert targets.beat(full, share=2 / 3, worth=1.99) == pytest.approx(1.0)
    assert targets.beat(full, share=2 / 3, worth=2.01) == np.inf
    assert targets.beat(np.ones(5), share=0.64, worth=1.4) == np.inf, "equal devices gain nothing"
