"""Learning rates from times: hand-made reports into `EqualTime`, and the levels of `ByCapability`."""

from __future__ import annotations

import numpy as np
import pytest
from reports import NOTHING, report

from fedprune.exchange import Roster
from fedprune.rates import ByCapability, EqualTime, Fixed, Memory

NOBODY = Roster(np.array([], int), 0, np.array([]))


def rounds(
    learner: EqualTime,
    speeds: np.ndarray,
    number: int,
    *,
    noise: float = 0.0,
    fixed: float = 0.0,
    smallest: float = 0.0625,
) -> np.ndarray:
    """Rates `[rounds, clients]` where a client takes slowness * (fixed + (1 - fixed) * rate) seconds, give or take."""
    chance = np.random.default_rng(4)
    memory: Memory = {}
    clients, history = np.arange(len(speeds)), []
    for _ in range(number):
        rate = learner.propose(memory, clients, NOBODY, smallest)
        history.append(rate)
        seconds = speeds * (fixed + (1 - fixed) * rate) * np.exp(noise * chance.normal(size=len(speeds)))
        reports = [report(NOTHING, client=c, rate=rate[c], seconds=seconds[c]) for c in clients]
        memory = learner.learn(memory, reports, [], len(speeds))
    return np.array(history)


def test_one_proportional_step():
    """Times 1 and 2 at full width, twice: phi* = 1, phi = 2, so the rate goes to 1 * 1/2 after the second time."""
    history = rounds(EqualTime(interval=2), np.array([1.0, 2.0]), 3)
    assert history.tolist() == [[1, 1], [1, 1], [1, 0.5]]


def test_phi_is_the_median_of_the_new_times():
    """Times 2, 9, 2 have the median 2: one hiccup does not prune."""
    learner, memory = EqualTime(interval=3), {}
    for seconds in (2.0, 9.0, 2.0):
        pair = [report(NOTHING, client=0, seconds=1.0), report(NOTHING, client=1, seconds=seconds)]
        memory = learner.learn(memory, pair, [], 2)
    assert memory["rate"].tolist() == [1, 0.5]


def test_the_grid_rounds_down_and_one_step_is_bounded():
    assert rounds(EqualTime(interval=1, grid=8), np.array([1.0, 1.9]), 2)[1].tolist() == [1, 0.5]  # 0.526
    assert rounds(EqualTime(interval=1, step=0.5), np.array([1.0, 10.0]), 2)[1].tolist() == [1, 0.5]
    assert rounds(EqualTime(interval=1, floor=0.25), np.array([1.0, 100.0]), 9)[-1].tolist() == [1, 0.25]


def test_no_step_within_the_tolerance():
    assert rounds(EqualTime(interval=1, tolerance=0.1), np.array([1.0, 1.09]), 20)[-1].tolist() == [1, 1]
    assert rounds(EqualTime(interval=1, tolerance=0.05), np.array([1.0, 1.09]), 20)[-1].tolist() == [1, 0.875]


def test_the_anchor_is_never_pruned():
    history = rounds(EqualTime(), np.array([3.0, 1.0, 2.0]), 100, noise=0.1)
    assert (history[:, 1] == 1).all()


def test_equally_fast_devices_are_hardly_pruned_by_noise():
    """3 % of noise over 300 rounds: no race to the bottom, to which a moving minimum would lead."""
    history = rounds(EqualTime(), np.ones(24), 300, noise=0.03)
    assert history[100:].mean() > 0.95 and history.min() >= 0.8125
    assert history[-50:].mean() == pytest.approx(history[100:150].mean(), abs=0.02), "it drifts"


@pytest.mark.parametrize("fixed", [0.0, 0.05])
def test_a_spread_of_ten_aligns(fixed: float):
    """Slowness 1..10 with noise: in the end nobody takes much longer than the fastest, and nobody is pruned too far."""
    speeds = np.linspace(1, 10, 19)
    history = rounds(EqualTime(grid=64, floor=0.01), speeds, 60, noise=0.03, fixed=fixed, smallest=0.01)
    seconds = speeds * (fixed + (1 - fixed) * history[-1])
    assert (seconds <= 1.15).all() and (seconds >= 0.75).all()
    assert np.corrcoef(history[-1], 1 / speeds)[0, 1] > 0.99


def test_who_was_cut_too_far_recovers():
    """A client that was four times as slow only in the beginning gets its width back."""
    learner, memory = EqualTime(interval=1), {}
    for number in range(8):
        rate = learner.propose(memory, np.arange(2), NOBODY, 0.0625)
        slow = 4.0 if number == 0 else 1.0
        pair = [report(NOTHING, client=c, rate=rate[c], seconds=(1, slow)[c] * rate[c]) for c in range(2)]
        memory = learner.learn(memory, pair, [], 2)
    assert memory["rate"].tolist() == [1, 1]


def test_who_is_held_up_by_the_models_smallest_rate_still_learns():
    """Asked for less than the model has, a client trains the smallest there is; its times count, and it may recover."""
    learner, memory = EqualTime(interval=1, floor=0.0625), {}
    for number in range(8):
        rate = learner.propose(memory, np.arange(2), NOBODY, 0.25)
        slow = 10.0 if number == 0 else 1.0
        pair = [report(NOTHING, client=c, rate=rate[c], seconds=(1, slow)[c] * rate[c]) for c in range(2)]
        memory = learner.learn(memory, pair, [], 2)
        assert learner.propose(memory, np.arange(2), NOBODY, 0.25).min() >= 0.25
    assert memory["rate"].tolist() == [1, 1]


def test_times_of_an_older_width_do_not_count():
    learner = EqualTime(interval=1)
    memory = learner.learn({}, [report(NOTHING, client=c, seconds=(1, 2)[c]) for c in range(2)], [], 2)
    assert memory["rate"].tolist() == [1, 0.5]
    late = report(NOTHING, client=1, rate=1.0, seconds=2.0, staleness=1)
    assert learner.learn(memory, [late], [], 2)["rate"].tolist() == [1, 0.5]


def test_memory_is_not_changed_in_place():
    learner = EqualTime(interval=1)
    memory = learner.learn({}, [report(NOTHING, client=c, seconds=(1, 2)[c]) for c in range(2)], [], 2)
    kept = {name: value.copy() for name, value in memory.items()}
    learner.learn(memory, [report(NOTHING, client=1, rate=0.5, seconds=5.0)], [], 2)
    assert all(np.array_equal(memory[name], kept[name], equal_nan=True) for name in kept)
    assert learner.learn(memory, [], [], 2) is memory


def test_levels_by_capability():
    slowness = np.array([1.0, 1.5, 2.0, 3.9, 4.0, 100.0])
    roster = Roster(np.arange(6), 6, slowness)
    assert ByCapability(8).propose({}, np.arange(6), roster, 0.0).tolist() == [1, 0.625, 0.5, 0.25, 0.25, 0.125]
    assert ByCapability(8, powers=True).propose({}, np.arange(6), roster, 0.0).tolist() == [
        1,
        0.5,
        0.5,
        0.25,
        0.25,
        0.125,
    ]
    assert ByCapability(8).propose({}, np.array([5, 0]), roster, 0.25).tolist() == [0.25, 1]


def test_a_fixed_rate_of_zero_is_the_smallest():
    assert Fixed(0.0).propose({}, np.arange(2), NOBODY, 0.0625).tolist() == [0.125, 0.125]
    assert Fixed(0.0).propose({}, np.arange(2), NOBODY, 0.25).tolist() == [0.25, 0.25]
    assert Fixed(0.5).propose({}, np.arange(2), NOBODY, 0.25).tolist() == [0.5, 0.5]
