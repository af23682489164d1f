"""AdaptCL-style rates: hand-made reports into `EqualTime`, its interpolation; and the levels of `ByCapability`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from reports import NOTHING, report
from scipy.interpolate import BarycentricInterpolator

from fedprune.errors import ConfigError
from fedprune.exchange import PARTS, Roster
from fedprune.rates import FJORD, ByCapability, EqualTime, Fixed, Offer
from fedprune.rates.newton import newton, retention
from fedprune.types import Memory


def offer(smallest: float) -> Offer:
    """Everything costs its rate."""
    rates = np.array([smallest, 1.0])
    return Offer(rates, np.repeat(rates[:, None], len(PARTS), 1))


OFFER = offer(0.0625)
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
        rate = learner.propose(memory, clients, NOBODY, offer(smallest))
        history.append(rate)
        seconds = speeds * (fixed + (1 - fixed) * rate) * np.exp(noise * chance.normal(size=len(speeds)))
        reports = [report(NOTHING, client=c, rate=rate[c], seconds=seconds[c]) for c in clients]
        memory = learner.learn(memory, reports, [], len(speeds), offer(smallest))
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
        memory = learner.learn(memory, pair, [], 2, OFFER)
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


def test_pruning_is_one_way():
    """A client that was four times as slow only in the beginning does not get its width back."""
    learner, memory = EqualTime(interval=1), {}
    for number in range(8):
        rate = learner.propose(memory, np.arange(2), NOBODY, OFFER)
        slow = 4.0 if number == 0 else 1.0
        pair = [report(NOTHING, client=c, rate=rate[c], seconds=(1, slow)[c] * rate[c]) for c in range(2)]
        memory = learner.learn(memory, pair, [], 2, OFFER)
    assert memory["rate"].tolist() == [1, 0.25]


def test_who_is_held_up_by_the_models_smallest_rate_still_counts():
    """Asked for less than the model has, a client trains the smallest there is, and its times are of that."""
    learner, memory = EqualTime(interval=1, floor=0.0625), {}
    for number in range(4):
        rate = learner.propose(memory, np.arange(2), NOBODY, offer(0.25))
        assert rate.tolist() == ([1, 0.25] if number else [1, 1])
        pair = [report(NOTHING, client=c, rate=rate[c], seconds=(1, 10)[c] * rate[c]) for c in range(2)]
        memory = learner.learn(memory, pair, [], 2, offer(0.25))
    assert memory["count"].tolist() == [4, 3] and memory["phi"].tolist() == [1, 2.5]


@pytest.mark.parametrize(("staleness", "age", "counts"), [(0, 0, True), (2, 2, True), (2, 0, False), (3, 2, False)])
def test_who_was_asked_for_less_counts_if_it_was_asked_in_this_round(staleness: int, age: int, counts: bool):
    """Half fits into its memory, where the whole was proposed. An old copy of the model is no old order."""
    sent = report(NOTHING, client=1, rate=0.5, seconds=2.0, staleness=staleness)
    pair = [report(NOTHING, client=0), replace(sent, order=replace(sent.order, age=age))]
    memory = EqualTime(interval=2).learn({}, pair, [], 2, OFFER)
    assert memory["count"].tolist() == [1, int(counts)] and memory["rate"].tolist() == [1, 0.5 if counts else 1]


def test_newton_by_hand():
    """(1, .4), (2, .6), (4, .8): g[1,2] = .2, g[2,4] = .1, g[1,2,4] = -.1/3; at 1.5: .4 + .2 * .5 + .1/3 * .25 = .50833."""
    times, rates = np.array([[1.0, 2.0, 4.0]]), np.array([[0.4, 0.6, 0.8]])
    assert newton(times, rates, np.array([1.5])) == pytest.approx([0.4 + 0.1 + 0.1 / 12])
    assert newton(times[:, :2], rates[:, :2], np.array([1.5])) == pytest.approx([0.5])


def test_newton_is_the_polynomial_through_the_points():
    """numpy.polyfit and scipy's barycentric form give the same polynomial."""
    chance = np.random.default_rng(0)
    for points in (2, 3):
        times = np.sort(chance.uniform(1, 9, (20, points)), axis=1)
        rates, at = chance.uniform(size=(20, points)), chance.uniform(0, 10, 20)
        found = newton(times, rates, at)
        for row in range(20):
            assert found[row] == pytest.approx(np.polyval(np.polyfit(times[row], rates[row], points - 1), at[row]))
            assert found[row] == pytest.approx(float(BarycentricInterpolator(times[row], rates[row])(at[row])))


def test_retention_takes_the_nearest_points_and_refuses_what_is_not_monotone():
    times = np.array(
        [[1.0, 2.0, 4.0, 90.0], [1.0, 2.0, 4.0, np.nan], [5.0, np.nan, np.nan, np.nan], [1.0, 2.0, np.nan, np.nan]]
    )
    rates = np.array([[0.4, 0.6, 0.8, 1.0], [0.4, 0.7, 0.6, np.nan], [0.4, np.nan, np.nan, np.nan], [0.4, 0.6, np.nan, np.nan]])
    found = retention(times, rates, 1.5, 2)
    assert found[[0, 3]] == pytest.approx([0.4 + 0.1 + 0.1 / 12, 0.5]) and np.isnan(found[[1, 2]]).all()
    assert retention(times, rates, 1.5, 1)[:2] == pytest.approx([0.5, 0.55])


def test_the_second_pruning_interpolates():
    """Time .4 + 1.6 g, target 1. Proportional: g = .5, which takes 1.2. The line through (1.2, .5), (2, 1) is right: .375."""
    history = rounds(EqualTime(interval=1, grid=1000), np.array([1.0, 1.0]), 1)
    assert history.tolist() == [[1, 1]]
    learner, memory, seen = EqualTime(interval=1, grid=1000, tolerance=0.0), {}, []
    for _ in range(3):
        rate = float(learner.propose(memory, np.arange(2), NOBODY, OFFER)[1])
        seen.append(rate)
        pair = [report(NOTHING, client=0), report(NOTHING, client=1, rate=rate, seconds=0.4 + 1.6 * rate)]
        memory = learner.learn(memory, pair, [], 2, OFFER)
    assert seen == [1, 0.5, 0.375]


def test_where_interpolation_hardly_moves_the_proportion_takes_its_place():
    """(50, 1) and (1.2, .2): the line says .2 - .2 * .8 / 48.8 = .197, less than a smallest step; .2 / 1.2 = .166 does not."""
    learner, memory, seen = EqualTime(interval=1, grid=1000), {}, []
    for seconds in (50.0, 1.2, 1.0):
        rate = float(learner.propose(memory, np.arange(2), NOBODY, OFFER)[1])
        seen.append(rate)
        pair = [report(NOTHING, client=0), report(NOTHING, client=1, rate=rate, seconds=seconds)]
        memory = learner.learn(memory, pair, [], 2, OFFER)
    assert seen == [1, 0.2, 0.166]


def test_a_small_gain_prunes_nothing():
    """1.09 asks for 8 % less: too little for a smallest step of 10 %, enough for one of 5 %."""
    for smallest, rate in ((0.1, 1.0), (0.05, 0.91)):
        learner = EqualTime(interval=1, grid=100, smallest_step=smallest)
        assert rounds(learner, np.array([1.0, 1.09]), 9)[-1].tolist() == [1, rate]


def test_a_moving_target_races_to_the_bottom():
    """Equal devices and 3 % of noise: whoever was pruned too far sets the target, and everybody follows it to the floor."""
    moving = rounds(EqualTime(anchor="moving", tolerance=0.0), np.ones(10), 300, noise=0.03)
    assert moving[-1].max() <= 0.125
    assert rounds(EqualTime(tolerance=0.0), np.ones(10), 300, noise=0.03)[-1].mean() > 0.75


def test_a_faster_client_of_a_later_cohort_becomes_the_anchor():
    learner, memory = EqualTime(interval=2), {}
    for cohort in ([1, 2], [1, 2], [0, 2], [0, 1]):
        reports = [report(NOTHING, client=c, seconds=(1.0, 2.0, 4.0)[c]) for c in cohort]
        memory = learner.learn(memory, reports, [], 3, OFFER)
    assert (int(memory["anchor"]), float(memory["target"])) == (0, 1.0)


def test_an_anchor_that_vanishes_is_replaced():
    """Client 0 is never heard again; after ten of its reports are missing, the widest of the others is the reference."""
    learner, memory, speeds = EqualTime(interval=1), {}, (1.0, 2.0, 4.0)
    for number in range(30):
        rate = learner.propose(memory, np.arange(3), NOBODY, OFFER)
        there = range(3) if number < 3 else range(1, 3)
        slower = 1.04 if number > 20 else 1.0
        reports = [report(NOTHING, client=c, rate=rate[c], seconds=slower * speeds[c] * rate[c]) for c in there]
        memory = learner.learn(memory, reports, [], 3, OFFER)
        assert (memory["anchor"] == 0) == (number < 18), number
    assert int(memory["anchor"]) == 1 and float(memory["target"]) == pytest.approx(1.04, rel=0.01)
    assert memory["rate"].tolist() == [1, 0.5, 0.25]


def test_two_reports_of_one_client_in_a_round_are_two_times():
    learner = EqualTime(interval=2)
    both = [report(NOTHING, client=c, seconds=(1.0, 2.0)[c]) for c in (0, 1, 0, 1)]
    assert learner.learn({}, both, [], 2, OFFER)["rate"].tolist() == [1, 0.5]


def test_times_of_an_older_width_do_not_count():
    learner = EqualTime(interval=1)
    memory = learner.learn({}, [report(NOTHING, client=c, seconds=(1, 2)[c]) for c in range(2)], [], 2, OFFER)
    assert memory["rate"].tolist() == [1, 0.5]
    late = report(NOTHING, client=1, rate=1.0, seconds=2.0, staleness=1)
    assert learner.learn(memory, [late], [], 2, OFFER)["rate"].tolist() == [1, 0.5]


def test_memory_is_not_changed_in_place():
    learner = EqualTime(interval=1)
    memory = learner.learn({}, [report(NOTHING, client=c, seconds=(1, 2)[c]) for c in range(2)], [], 2, OFFER)
    kept = {name: value.copy() for name, value in memory.items()}
    learner.learn(memory, [report(NOTHING, client=1, rate=0.5, seconds=5.0)], [], 2, OFFER)
    assert all(np.array_equal(memory[name], kept[name], equal_nan=True) for name in kept)
    assert learner.learn(memory, [], [], 2, OFFER) is memory


def test_levels_by_capability():
    slowness = np.array([1.0, 1.5, 2.0, 3.9, 4.0, 100.0])
    roster = Roster(np.arange(6), 6, slowness)
    assert ByCapability(8).propose({}, np.arange(6), roster, offer(0.01)).tolist() == [1, 0.625, 0.5, 0.25, 0.25, 0.125]
    assert ByCapability(8, powers=True).propose({}, np.arange(6), roster, offer(0.01)).tolist() == [
        1,
        0.5,
        0.5,
        0.25,
        0.25,
        0.125,
    ]
    assert ByCapability(8).propose({}, np.array([5, 0]), roster, offer(0.25)).tolist() == [0.25, 1]


def test_tiers_by_capability():
    """FjORD: the largest p that a device's capability reaches, and the smallest for who reaches none."""
    roster = Roster(np.arange(5), 5, np.array([1.0, 1.25, 1.3, 4.9, 100.0]))
    assert ByCapability(tiers=FJORD).propose({}, np.arange(5), roster, OFFER).tolist() == [1, 0.8, 0.6, 0.2, 0.2]
    assert ByCapability(tiers=FJORD).propose({}, np.arange(5), roster, offer(0.5)).tolist() == [1, 0.8, 0.6, 0.5, 0.5]


def test_a_fixed_rate_of_zero_is_the_smallest():
    assert Fixed(0.0).propose({}, np.arange(2), NOBODY, OFFER).tolist() == [0.125, 0.125]
    assert Fixed(0.0).propose({}, np.arange(2), NOBODY, offer(0.25)).tolist() == [0.25, 0.25]
    assert Fixed(0.5).propose({}, np.arange(2), NOBODY, offer(0.25)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("learner", "bad", "says"),
    [
        (EqualTime, {"interval": 0}, "interval 0"),
        (EqualTime, {"grid": 0}, "grid 0"),
        (EqualTime, {"step": 0.0}, "step 0"),
        (EqualTime, {"floor": 1.5}, "floor 1.5"),
        (EqualTime, {"tolerance": -0.1}, "tolerance -0.1"),
        (EqualTime, {"smallest_step": 1.0}, "smallest_step is 1.0"),
        (EqualTime, {"degree": 3}, "degree is 3"),
        (EqualTime, {"anchor": "fastest"}, "reference"),
        (ByCapability, {"grid": 0}, "grid is 0"),
        (ByCapability, {"tiers": (0.5, 0.2)}, "ascending"),
        (ByCapability, {"tiers": (0.0, 1.0)}, "ascending"),
        (ByCapability, {"tiers": FJORD, "powers": True}, "not both"),
        (Fixed, {"rate": 1.5}, "rate is 1.5"),
    ],
)
def test_bad_arguments_are_refused(learner: type, bad: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        learner(**bad)
