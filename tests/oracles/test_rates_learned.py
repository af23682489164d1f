"""`Learned` on simulated times: what it has to reach, in small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from reports import NOTHING, report

from fedprune.errors import ConfigError
from fedprune.exchange import PARTS, Lost, Report, Roster, Split
from fedprune.rates import Learned, Offer, targets
from fedprune.rates.times import quantile, variance
from fedprune.types import Memory

LEVELS = np.linspace(0.0625, 1.0, 33)
OFFER = Offer(LEVELS, np.stack([np.ones(33) if p == "loading" else LEVELS for p in PARTS], axis=-1))
SPLIT = np.array([0.25, 0.05, 0.0, 0.45, 0.25])
NOBODY = Roster(np.array([], int), 0, np.array([]))


def told(client: int, parts: Sequence[float] | np.ndarray, rate: float = 1.0, *, ticket: int = 0, **facts: float) -> Report:
    """A report that took these seconds."""
    plain = report(NOTHING, client=client, rate=rate, ticket=ticket)
    split = Split(**{part: float(s) for part, s in zip(PARTS, parts, strict=True)})
    return replace(plain, cost=replace(plain.cost, seconds=split), finished=split.total, **facts)


def lost(client: int, parts: Sequence[float] | np.ndarray, rate: float = 1.0) -> Lost:
    return Lost(told(client, parts, rate).order, "too late", told(client, parts, rate).cost)


def simulated(
    learner: Learned,
    slowness: np.ndarray,
    rounds: int,
    noise: float = 0.0,
    *,
    changed: Callable[[int], np.ndarray | float] = lambda number: 1.0,
    cohort: int | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, Memory]:
    """Rates (NaN: not asked) and times `[rounds, clients]`, and the memory; 5 % of a report whatever the rate."""
    chance, count = np.random.default_rng(seed), len(slowness)
    memory: Memory = {}
    rates, seconds = np.full((rounds, count), np.nan), np.full((rounds, count), np.nan)
    for number in range(rounds):
        clients = np.sort(chance.permutation(count)[: cohort or count])
        rates[number, clients] = learner.propose(memory, clients, NOBODY, OFFER)
        full = slowness * changed(number) * np.exp(noise * chance.normal(size=count))
        reports = [told(c, full[c] * SPLIT * OFFER.at(rates[number, c]), rates[number, c]) for c in clients]
        seconds[number, clients] = [r.cost.seconds.total for r in reports]
        memory = learner.learn(memory, reports, [], count, OFFER)
    return rates, seconds, memory


def ideal(slowness: np.ndarray, asked: int | None = None) -> np.ndarray:
    """Rates of who knows all speeds."""
    seconds = slowness[:, None] * SPLIT
    target = targets.equal(seconds, OFFER, lowest=0.0625, asked=asked)
    return targets.largest(targets.times(seconds, OFFER), np.array([target]), OFFER, 0.0625)[0]


def test_one_report_at_any_rate_places_a_client():
    """Slowness 1, 2, 8, told at rates 1, .25, .0625: what a full report takes each is known, by part, and so are rates."""
    slowness, learner = np.array([1.0, 2.0, 8.0]), Learned(noise=0.01)
    reports = [told(c, s * SPLIT * OFFER.at(r), r) for c, s, r in zip(range(3), slowness, (1.0, 0.25, 0.0625), strict=True)]
    memory = learner.learn({}, reports, [], 3, OFFER)
    forecast = learner.forecast(memory, 3)
    assert forecast.seconds == pytest.approx(slowness[:, None] * SPLIT, rel=0.01)
    assert learner.propose(memory, np.arange(3), NOBODY, OFFER) == pytest.approx(ideal(slowness), rel=0.05)
    assert forecast.target == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_equal_devices_are_never_pruned_by_noise(noise: float):
    for seed in range(2):
        rates, _, _ = simulated(Learned(), np.ones(10), 120, noise, seed=seed)
        assert (rates == 1).all()


@pytest.mark.parametrize("sigma", [2, 5, 20])
def test_it_is_nearly_as_fast_as_who_knows_all_speeds(sigma: int):
    """10 % of noise: at least 90 % of the bound's speed-up from the second round on, mean rate within 5 %."""
    slowness = np.linspace(1, sigma, 10)
    rates, seconds, _ = simulated(Learned(), slowness, 80, 0.1)
    noise = seconds / (slowness * (0.05 + 0.95 * rates))
    bound = (noise * slowness * (0.05 + 0.95 * ideal(slowness))).max(1)
    assert bound[1:].sum() / seconds.max(1)[1:].sum() > 0.9
    assert rates[1:].mean() == pytest.approx(ideal(slowness).mean(), rel=0.05)
    assert rates[-20:].mean() == pytest.approx(rates[20:40].mean(), rel=0.05), "it drifts"


@pytest.mark.parametrize("factor", [4.0, 0.25])
def test_a_sudden_change_is_followed_in_five_rounds(factor: float):
    """Of the device in the middle, at 3 % of noise; what was taken is given back."""
    slowness, change = np.linspace(1, 5, 10), np.where(np.arange(10) == 5, factor, 1.0)
    rates, _, _ = simulated(Learned(), slowness, 40, 0.03, changed=lambda number: change if number >= 20 else 1.0)
    assert rates[20, 5] == pytest.approx(ideal(slowness)[5], rel=0.1)
    assert rates[25:, 5] == pytest.approx(np.full(15, ideal(slowness * change)[5]), rel=0.1)


def test_a_hiccup_prunes_nobody():
    """Six times as slow in one round, like many others: nothing happens."""
    change = np.where(np.arange(10) == 5, 6.0, 1.0)
    with_one, _, _ = simulated(Learned(), np.linspace(1, 4, 10), 40, 0.1, changed=lambda n: change if n == 20 else 1.0)
    without, _, _ = simulated(Learned(), np.linspace(1, 4, 10), 40, 0.1)
    assert with_one[21:26, 5] == pytest.approx(without[21:26, 5], rel=0.05)


def test_sampled_cohorts_and_who_was_never_asked():
    """10 of 40 a round; after two, half of them were never heard of, and get what the average one would."""
    slowness = np.linspace(1, 10, 40)
    rates, _, memory = simulated(Learned(), slowness, 2, 0.03, cohort=10)
    learner, known = Learned(), ~np.isnan(memory["level"])
    proposed = learner.propose(memory, np.arange(40), NOBODY, OFFER)
    assert 10 < known.sum() < 40 and len(set(proposed[~known])) == 1
    assert proposed[known].min() < proposed[~known][0] < proposed[known].max()
    assert np.isnan(learner.forecast(memory, 40).seconds).any(1).tolist() == (~known).tolist()
    rates, seconds, _ = simulated(Learned(), slowness, 60, 0.1, cohort=10)
    best = np.where(np.isnan(rates), np.nan, ideal(slowness, 10))
    bound = seconds * (0.05 + 0.95 * best) / (0.05 + 0.95 * rates)
    trained = np.nansum(rates[10:]) / np.nanmax(seconds[10:], 1).sum()
    assert trained > 0.95 * np.nansum(best[10:]) / np.nanmax(bound[10:], 1).sum(), "of the model, per second"


def test_the_noise_presumed_is_given_up_slowly():
    """Ten clients spread evenly over 1..2.33, the same every time: noise of .3 may look so twice, not eight times."""
    slowness = np.exp(np.linspace(0, 0.846, 10))
    rates, _, _ = simulated(Learned(), slowness, 9)
    assert (rates[:3] == 1).all() and rates[8] == pytest.approx(ideal(slowness), rel=0.05)


def test_noise_is_estimated():
    for noise in (0.03, 0.1, 0.3):
        assert variance(simulated(Learned(), np.linspace(1, 3, 20), 40, noise)[2]) ** 0.5 == pytest.approx(noise, rel=0.2)


def test_the_spread_of_equals():
    """Wilson and Hilferty: chi^2 with 9 degrees of freedom exceeds 9 * 1.88 with 5 % (tables: 16.92)."""
    assert 9 * quantile(9, 1.645) == pytest.approx(16.92, rel=0.01)


def test_a_report_at_an_older_rate_counts_as_much():
    learner, slowness = Learned(noise=0.01), np.array([1.0, 4.0])
    memory = learner.learn({}, [told(c, slowness[c] * SPLIT) for c in range(2)], [], 2, OFFER)
    stale = told(1, 8 * SPLIT * OFFER.at(0.5), 0.5, staleness=3)
    for _ in range(2):
        memory = learner.learn(memory, [stale, told(0, SPLIT)], [], 2, OFFER)
    assert learner.forecast(memory, 2).seconds.sum(1) == pytest.approx([1.0, 8.0], rel=0.02)


def test_half_the_work_is_half_the_training():
    whole = Learned().learn({}, [told(0, [1, 0, 0, 4, 1])], [], 1, OFFER)
    half = Learned().learn({}, [told(0, [1, 0, 0, 2, 1], work=0.5)], [], 1, OFFER)
    assert half["level"] == pytest.approx(whole["level"]) and half["mix"] == pytest.approx(whole["mix"])


def test_a_part_that_grows_is_found_in_the_mix():
    """A teacher starts to cost: seconds by part follow, at whatever rate they were told."""
    learner, memory = Learned(noise=0.05), {}
    for number in range(16):
        parts = np.array([1.0, 0.2, 3.0 if number > 3 else 0.0, 1.0, 1.0])
        memory = learner.learn(memory, [told(c, parts * OFFER.at(0.5), 0.5) for c in range(2)], [], 2, OFFER)
    assert learner.forecast(memory, 2).seconds[0] == pytest.approx([1.0, 0.2, 3.0, 1.0, 1.0], rel=0.05)


def test_two_reports_of_one_client_in_a_round_are_heard_one_after_another():
    one, learner = told(0, SPLIT), Learned()
    twice = learner.learn({}, [one, one], [], 1, OFFER)
    after = learner.learn(learner.learn({}, [one], [], 1, OFFER), [one], [], 1, OFFER)
    assert twice["level"] == pytest.approx(after["level"]) and twice["noise"][1] == after["noise"][1] == 1
    assert twice["looseness"] == pytest.approx(after["looseness"], rel=0.01)


def test_lost_orders_took_at_least_so_long():
    """Who is always too late is slow, although it never reports; who vanished early is not fast for that."""
    learner = Learned(noise=0.05)
    memory = learner.learn({}, [told(c, SPLIT) for c in range(4)], [lost(4, 20 * SPLIT), lost(5, 0.01 * SPLIT)], 6, OFFER)
    assert np.exp(memory["level"][4]) == pytest.approx(20.0) and np.isnan(memory["level"][5])
    rates = learner.propose(memory, np.arange(6), NOBODY, OFFER)
    assert rates[:4].tolist() == [1, 1, 1, 1] and rates[4] < 0.25
    for _ in range(2):  # one time is a hiccup, two are a change
        memory = learner.learn(memory, [told(c, SPLIT) for c in range(3)], [lost(3, 8 * SPLIT)], 6, OFFER)
    assert np.exp(memory["level"][3]) == pytest.approx(8.0, rel=0.05)
    assert learner.learn({}, [], [lost(0, SPLIT)], 6, OFFER) == {}
    assert learner.learn(memory, [], [lost(0, 0 * SPLIT)], 6, OFFER)["level"][0] == memory["level"][0]


def test_memory_is_arrays_and_is_not_changed_in_place():
    learner = Learned()
    memory = simulated(learner, np.linspace(1, 5, 6), 5, 0.1)[2]
    assert all(isinstance(value, np.ndarray) for value in memory.values())
    kept = {name: value.copy() for name, value in memory.items()}
    learner.learn(memory, [told(c, 9 * SPLIT) for c in range(3)], [lost(4, 90 * SPLIT)], 6, OFFER)
    assert all(np.array_equal(memory[name], kept[name], equal_nan=True) for name in kept)
    assert learner.learn(memory, [], [], 6, OFFER) is memory
    first, before = learner.forecast(memory, 6), learner.forecast(kept, 0)
    later = learner.learn(memory, [told(c, 9 * SPLIT) for c in range(3)], [], 6, OFFER)
    assert not np.array_equal(learner.forecast(later, 6).seconds, first.seconds, equal_nan=True)
    for again in (learner.forecast(memory, 6), Learned().forecast(memory, 0), before):
        assert np.array_equal(again.seconds, first.seconds, equal_nan=True)
    nothing = learner.forecast({}, 6)
    assert nothing.target is None and nothing.seconds.shape == (6, len(PARTS)) and np.isnan(nothing.seconds).all()


def test_a_beat_keeps_the_model_whole_and_waits_for_half_of_the_clients():
    """Orders 0..9; the fast report first. Until five are known there is no target; then the silent count as still at work."""
    learner, slowness, memory = Learned(aim="beat", noise=0.01, share=0.6), np.linspace(1, 10, 10), {}
    seen = []
    for number in range(10):
        late = told(number, slowness[number] * SPLIT, ticket=number)
        memory = learner.learn(memory, [late], [], 10, OFFER)
        seen.append(learner.forecast(memory, 10).target)
    assert learner.propose(memory, np.arange(10), NOBODY, OFFER).tolist() == [1] * 10
    assert seen[:4] == [None] * 4 and seen[-1] == pytest.approx(targets.beat(slowness, share=0.6, worth=1.4), rel=0.02)
    assert learner.forecast(memory, 10).seconds.sum(1) == pytest.approx(slowness, rel=0.02)


def test_the_silent_are_at_least_as_slow_as_the_time_that_has_passed():
    """Five of ten have taken 1 s each, the tenth ticket among them, and 8 s have passed: five others take 8 s or more."""
    learner = Learned(aim="beat", noise=0.01)
    reports = [told(c, SPLIT, ticket=c + 5, waited=7.0) for c in range(5)]
    memory = learner.learn({}, reports, [], 10, OFFER)
    full = np.repeat([1.0, 8.0], 5)
    assert learner.forecast(memory, 10).target == pytest.approx(targets.beat(full, share=0.64, worth=1.4), rel=0.02)
    asked = [told(c, SPLIT, ticket=c, waited=7.0) for c in range(5)]
    assert learner.forecast(learner.learn({}, asked, [], 10, OFFER), 10).target == np.inf, "nobody else was asked"


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"aim": "fast"}, "equal .* or beat"),
        ({"floor": 0.0}, "floor is 0.0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"slack": 1.0}, "slack 1.0"),
        ({"hold": -0.1}, "hold -0.1"),
        ({"drift": -1.0}, "drift -1.0"),
        ({"noise": 0.0}, "noise 0.0"),
        ({"share": 1.0}, "share is 1.0"),
        ({"worth": 0.5}, "worth is 0.5"),
    ],
)
def test_bad_arguments_are_refused(bad: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        Learned(**bad)
