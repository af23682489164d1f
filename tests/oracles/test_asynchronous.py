"""Rounds that nobody waits for: schedules written by hand, the weights that make up for them, and the strategies of that kind.

In these worlds a device of slowness s takes 10 s seconds for a report, whoever has it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from world import USERS, World, same, world

from fedprune.catalog import build, trained_with
from fedprune.errors import ConfigError
from fedprune.exchange import PARTS, Lost, Order, Report, Roster
from fedprune.gather import Gather
from fedprune.merge import Adam, Average, Merge
from fedprune.objective import Objective
from fedprune.rates import Fixed, Forecast, Learned
from fedprune.selection import KeepBusy, Uniform
from fedprune.spending import Mix
from fedprune.strategy import Round, Strategy
from fedprune.types import Memory

MIXED = [1.0, 2.5, 4.0] * 8


def at_work(slowness: Sequence[float], cohort: int | None = None, *, noise: float = 0.0, **gather: Any) -> World:
    """Everybody, or a cohort, is asked for whole models, and reports count by their periods."""
    strategy = Strategy(selector=Uniform(cohort), gather=Gather(**gather), merge=Merge(weights="period"))
    return world(strategy, workload="equal", slowness=slowness, noise=noise)


def weights(here: World, rounds: Sequence[Round]) -> dict[int, list[tuple[int, float]]]:
    """Of each client: in which rounds, from 1, it reported, and with which weight."""
    result = defaultdict(list)
    for number, done in enumerate(rounds, start=1):
        for report in done.reports:
            weight = here.strategy.merge.weight(report, here.state.layout, "item_embedding")
            result[report.order.client].append((number, weight))
    return dict(result)


# ---- asked again in the middle of a round ------------------------------------------------------------------------------

BY_HAND = {
    0: {1.0: [(n, 1) for n in range(1, 13)], 2.5: [(3, 3), (6, 3), (9, 3), (12, 3)], 4.0: [(4, 4), (8, 4), (12, 4)]},
    1: {
        1.0: [(n, 1) for n in range(1, 13)],
        2.5: [(3, 3), (5, 2), (8, 3), (10, 2), (12, 2)],  # done after 25, 50, 75, 100 and 125 seconds
        4.0: [(4, 4), (8, 4), (12, 4)],
    },
}
"""By refill and slowness: (round, weight), with rounds of 10.5 seconds."""


@pytest.mark.parametrize("refill", [0, 1])
def test_a_schedule_by_hand(refill: int):
    here = at_work(MIXED, within=10.5, late="keep", refill=refill)
    rounds = here.rounds(12)
    last = 126.0 if refill else 125.5  # when nobody is left at work
    assert [done.ended for done in rounds] == pytest.approx([*(10.5 * n for n in range(1, 12)), last])
    for client, got in weights(here, rounds).items():
        assert got == BY_HAND[refill][MIXED[client]], client


@pytest.mark.parametrize("refill", [0, 1, 3])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_every_client_weighs_the_same_over_time(refill: int, noise: float):
    """Weights add up to the number of merges, to the last report; who reports twice in a round counts once more."""
    here = at_work(MIXED, within=10.5, late="keep", refill=refill, noise=noise)
    by_client = weights(here, here.rounds(40))
    assert len(by_client) == USERS
    for client, got in by_client.items():
        twice = len(got) - len({number for number, _ in got})
        last = got[-1][0]
        assert sum(weight for _, weight in got) == last + twice, client
        assert last > 40 - 7 and (noise or not twice)


def test_a_cohorts_reports_make_up_for_not_being_chosen():
    """Of n who are free, 6 are chosen: each counts n/6 - 1 more, since it was not chosen so often, on average."""
    here = at_work(MIXED, 6, within=10.5, late="keep")
    rounds = here.rounds(240)
    at_work_now = 0
    for done in rounds:
        free = USERS - at_work_now
        waits = {round(report.period - math.ceil(10 * MIXED[report.order.client] / 10.5), 9) for report in done.reports}
        assert waits <= {round(max(0, free - 6) / min(free, 6), 9)}
        at_work_now += len(done.orders) - len(done.reports)
    total, merge = dict.fromkeys(MIXED, 0.0), here.strategy.merge
    for done in rounds:
        for report in done.reports:
            slowness = MIXED[report.order.client]
            weight = merge.weight(report, here.state.layout, "item_bias")
            assert weight == report.period > math.ceil(10 * slowness / 10.5)
            total[slowness] += weight / 8 / 240
    assert total == pytest.approx(dict.fromkeys(MIXED, 1.0), abs=0.08)
    alone = {s: sum(math.ceil(s / 1.05) for d in rounds for r in d.reports if MIXED[r.order.client] == s) for s in total}
    assert alone[4.0] > 1.5 * alone[1.0], "without their waiting the slow ones would have weighed more: the test says nothing"


LATE = [10.5, 10.7, 10.9, 35.0] + [1.0] * 20
"""Done after 105, 107, 109 and 350 seconds, and 10."""


def test_the_waiting_of_who_is_asked_again_ends_there():
    here = at_work(LATE, within=100.0, late="keep", refill=2)
    first, second, third = here.rounds(3)
    assert not [order for order in first.orders if order.refill] and first.ended == pytest.approx(100.0)
    again = [(order.ticket, order.client) for order in second.orders if order.refill]
    assert again == [(44, 0), (45, 1), (46, 2)], "after the second report of the round 0 and 1 were free, after the fourth 2"
    assert [order.ticket for order in second.orders] == list(range(24, 47))
    waited = {report.order.client: report.waited for report in second.reports}
    assert [waited.pop(client) for client in range(3)] == pytest.approx([2.0, 0.0, 1.0])
    assert list(waited.values()) == pytest.approx([90.0] * 20), "who had its order of this round waits for the next"
    late = {report.order.client: report for report in third.reports if report.order.refill}
    assert {client: report.finished for client, report in late.items()} == pytest.approx({0: 212.0, 1: 214.0, 2: 219.0})
    assert {(report.period, report.staleness) for report in late.values()} == {(1, 1)}
    plain = at_work(LATE, within=100.0, late="keep")
    waited = {report.order.client: report.waited for report in plain.rounds(2)[1].reports}
    assert [waited[client] for client in range(3)] == pytest.approx([95.0, 93.0, 91.0])


@pytest.mark.parametrize(("refill", "asked"), [(0, 0), (1, 19), (2, 9), (9, 9)])
def test_it_asks_again_after_a_tenth_of_the_orders_at_the_latest(refill: int, asked: int):
    """20 reports to 24 orders, a tenth of which are 2; the twentieth ends the round, and the next one asks."""
    here, calls = at_work([1 + number / 10 for number in range(USERS)]), []

    def again(lost: Sequence[Lost]) -> list[Order]:
        calls.append(here.fleet.now())
        return []

    orders = orders_of(here)
    here.fleet.send(orders)
    reports, _ = Gather(count=20, late="keep", refill=refill)(here.fleet, orders, again=again)
    each = min(refill, 2) or 1
    assert len(reports) == 20 and calls == ([report.finished for report in reports[each - 1 : 19 : each]] if refill else [])
    assert len(calls) == asked


def orders_of(here: World) -> list[Order]:
    """Whole models for all."""
    strategy, state = here.strategy, here.state
    return [
        Order(n, n, 0, 1.0, strategy.carve(state, n, 1.0), strategy.told, strategy.codec, state.model, 1) for n in range(USERS)
    ]


@pytest.mark.parametrize(
    "strategy",
    [
        Strategy(gather=Gather(within=9.0, late="keep", refill=1)),
        Strategy(gather=Gather(pace=1.3, late="keep", refill=3)),
        Strategy(selector=Uniform(5), gather=Gather(within=12.0, late="keep", refill=2)),
        Strategy(selector=KeepBusy(9), gather=Gather(count=4, late="keep", refill=1)),
        replace(build("fedprune"), gather=replace(build("fedprune").gather, refill=2)),
    ],
    ids=["within", "pace", "cohort", "count", "fedprune"],
)
def test_tickets_are_consecutive_and_nobody_gets_two_orders_of_one_version(strategy: Strategy):
    here = world(strategy, sigma=5.0, noise=0.2, dropout=0.1)
    rounds = here.rounds(12)
    orders = [order for done in rounds for order in done.orders]
    assert [order.ticket for order in orders] == list(range(len(orders))) and here.state.ticket == len(orders)
    assert len({(order.client, order.version) for order in orders}) == len(orders)
    assert all(order.version == done.version for done in rounds for order in done.orders)
    assert any(order.refill for order in orders)
    for done in rounds:
        refills = [order.refill for order in done.orders]
        assert refills == sorted(refills), "those of the round's beginning stand first"
    told = [event.order.ticket for done in rounds for event in (*done.reports, *done.lost)]
    at_work = [event.order.ticket for event in here.fleet.unfinished()]
    assert sorted([*told, *at_work]) == list(range(len(orders))), "every order is reported, lost or under way, and once"
    clock = 0.0
    for done in rounds:
        assert done.began == clock < done.ended
        clock = done.ended
        assert all(0 <= report.waited <= done.ended - report.finished + 1e-9 for report in done.reports)


# ---- when a round is over ----------------------------------------------------------------------------------------------


def test_who_keeps_late_reports_stops_listening_when_nobody_is_at_work():
    quick = at_work([1.0] * USERS, within=100.0, late="keep")
    done = quick.round()
    assert done.ended == pytest.approx(10.0) and len(done.reports) == USERS
    one_slow = at_work([1.0] * 23 + [15.0], within=100.0, late="keep")
    first, second = one_slow.rounds(2)
    assert (first.ended, len(first.reports)) == (100.0, 23)
    assert (second.ended, len(second.reports)) == (pytest.approx(150.0), 24), "the slow one was the last at work"


NEVER_FREE = Strategy(gather=Gather(within=1.0, late="keep"))
"""All are asked in the first round, which ends before anybody has reported; then nobody can be asked."""


@pytest.mark.parametrize(
    ("count", "ended", "reports"),
    [(None, 10.0, 1), (3, 12.0, 3), (24, 33.0, 24), (25, 33.0, 24)],
    ids=["nobody counts", "3", "all", "more than there are"],
)
def test_where_nobody_can_be_asked_it_waits_for_so_many_reports(count: int | None, ended: float, reports: int):
    """Slowness 1, 1.1, 1.2, ...: one report a second. When all have reported there is nobody to wait for."""
    here = world(NEVER_FREE, workload="equal", slowness=[1 + number / 10 for number in range(USERS)])
    assert not here.round().reports
    here.strategy = replace(NEVER_FREE, gather=Gather(count=count, late="keep"))
    done = here.round()
    assert not done.orders and done.began == 1.0
    assert (done.ended, len(done.reports)) == (pytest.approx(ended), reports)


@pytest.mark.parametrize(
    ("target", "ended", "reports"),
    [(None, 15.0, 8), (22.0, 22.0, 8), (26.0, 26.0, 16), (math.inf, 40.0, 24)],
    ids=["unknown", "short", "longer", "wait for all"],
)
def test_the_beat_is_the_learners_as_soon_as_it_knows_one(target: float | None, ended: float, reports: int):
    here = at_work(MIXED, pace=1.5, count=20, late="keep", beat=True)
    orders = orders_of(here)
    here.fleet.send(orders)
    got, lost = here.strategy.gather(here.fleet, orders, target)
    assert (here.fleet.now(), len(got), lost) == (pytest.approx(ended), reports, [])


def test_without_a_beat_a_known_target_says_nothing():
    here = at_work(MIXED, pace=1.5, late="keep")
    here.strategy = replace(here.strategy, rates=Knows(26.0))
    assert here.strategy.target(here.state) is None, "nobody has reported yet"
    assert here.rounds(2)[1].ended == pytest.approx(30.0) and here.strategy.target(here.state) == 26.0


@dataclass(frozen=True)
class Knows(Fixed):
    """A learner that says what it is told to, once it has heard anybody."""

    target: float | None = None

    def __init__(self, target: float | None = None) -> None:
        object.__setattr__(self, "rate", 1.0)
        object.__setattr__(self, "target", target)

    def learn(self, memory: Memory, reports: Sequence[Report], lost: Sequence[Lost], *_: object) -> Memory:
        return {"heard": np.ones(1)} if reports else memory

    def forecast(self, memory: Memory, population: int) -> Forecast | None:
        return Forecast(self.target, np.ones((population, len(PARTS)))) if memory else None


def test_beats_and_refills_go_together():
    here = at_work(MIXED, pace=1.05, late="keep", beat=True, refill=1)
    here.strategy = replace(here.strategy, rates=Knows(26.0))
    first, second = here.rounds(2)
    assert first.ended == pytest.approx(10.5) and second.ended == pytest.approx(36.5)
    assert {MIXED[order.client] for order in second.orders if order.refill} == {2.5}
    assert len(second.orders) == 16


def test_a_refill_needs_late_reports():
    with pytest.raises(ConfigError, match='refill needs late = "keep"'):
        Gather(refill=1)
    with pytest.raises(ConfigError, match="refill is -1; it must not be negative"):
        Gather(refill=-1, late="keep")


# ---- as many at work as there should be --------------------------------------------------------------------------------


def roster(idle: Sequence[int], busy: int) -> Roster:
    return Roster(np.array(idle, np.int64), USERS, np.ones(USERS), busy=busy)


@pytest.mark.parametrize(("busy", "chosen"), [(0, 4), (1, 4), (3, 2), (5, 0), (9, 0)])
def test_keep_busy_fills_up(busy: int, chosen: int):
    """Five are to be at work, and four are free."""
    got = KeepBusy(5).choose({}, roster([2, 3, 7, 11], busy), np.random.default_rng(busy))
    assert len(got) == chosen and (np.diff(got) > 0).all() and set(got.tolist()) <= {2, 3, 7, 11} and got.dtype == np.int64


def test_keep_busy_without_a_number_takes_all_and_draws_all_alike():
    rng = np.random.default_rng(3)
    assert KeepBusy().choose({}, roster([2, 3, 7], 20), rng).tolist() == [2, 3, 7]
    assert KeepBusy(5).choose({}, roster([], 2), rng).tolist() == []
    drawn = np.concatenate([KeepBusy(6).choose({}, roster(range(8), 4), rng) for _ in range(400)])
    counts = np.bincount(drawn, minlength=8)
    assert counts.sum() == 800 and counts.min() > 60 and counts.max() < 140, "100 each, on average"
    with pytest.raises(ConfigError, match="concurrency is 0; it must be at least 1, or left out for everybody"):
        KeepBusy(0)


def test_so_many_are_at_work_all_the_time():
    here = world(build("fedbuff", buffer=4, cohort=9), sigma=4.0, noise=0.1)
    for done in here.rounds(15):
        assert len(here.fleet.unfinished()) in (8, 9), "9, or 8 and one that has just reported"
        assert len(done.reports) == 4
    asked = {order.client for order in done.orders}
    assert asked <= set(range(USERS))


def test_the_buffer_is_full_however_slow_the_devices_are():
    """Reports of 1000 seconds and more, at work all the time; and one device fifty times as fast as the others."""
    slow = world(build("fedbuff", buffer=5), workload="equal", slowness=[100 + number for number in range(USERS)])
    one_quick = world(build("fedbuff", buffer=5), workload="equal", slowness=[1.0] + [50 + n / 10 for n in range(23)])
    for here in (slow, one_quick):
        assert [len(done.reports) for done in here.rounds(12)] == [5] * 12


def test_who_reports_twice_in_a_round_waits_from_the_second_time():
    """Asked in the round before, done and asked again in this one, done again, and idle until it ends."""
    slowness = [1.0] * 4 + [3.0] * 4 + [9.0 + number for number in range(16)]
    here, twice = at_work(slowness, count=8, late="keep", refill=1), []
    for done in here.rounds(12):
        for sent in done.reports:
            if sent.order.refill and sent.order.version == done.version and sent.finished < done.ended:
                twice.append((sent.waited, done.ended - sent.finished))
    assert twice, "the test says nothing"
    assert [waited for waited, _ in twice] == pytest.approx([until for _, until in twice])


# ---- strategies of that kind -------------------------------------------------------------------------------------------


def test_an_experiment_leaves_a_strategy_what_it_names_itself():
    given = Merge(optimiser=Adam(0.5))
    ours = build("fedprune", server_lr=0.02, refresh=4)
    trained = trained_with(ours, Objective(negatives=7, lr_private=0.3), given, rows="touched")
    assert trained.merge == replace(ours.merge, optimiser=Adam(0.02)) and trained.spending is ours.spending
    assert (trained.codec.refresh, trained.codec.rows) == (4, "touched")
    assert trained.gather == ours.gather and trained.selector == ours.selector and trained.rates == ours.rates
    plan = trained.spending.plan(1.0, 1.0, None, trained.told, trained.codec)
    assert (plan.objective.negatives, plan.objective.lr_private) == (3, 0.08), "what it names goes before the experiment's"
    open_to = trained_with(build("fedprune", server_lr=None, negatives=None, lr_private=None), Objective(negatives=7), given)
    assert open_to.merge.optimiser == Adam(0.5) and open_to.merge.weights == "period"
    assert open_to.spending.plan(1.0, 1.0, None, open_to.told, open_to.codec).objective.negatives == 7
    mixing = trained_with(build("fedasync", mixing=0.3), Objective(), given).merge
    assert mixing == Merge(discount=0.5, mixing=True, optimiser=Average(0.3))


def tuned(name: str, **settings: Any) -> Strategy:
    return trained_with(build(name, **settings), Objective(), Merge())


@pytest.mark.parametrize("fleet", ["serial", "vector"])
@pytest.mark.parametrize("share", [0.37, 0.8])
def test_fedprune_on_equal_devices_is_fedavg_tuned(fleet: str, share: float):
    """It learns that there is nobody to be faster than, and waits for all; its longer strides are for nobody."""
    where = {"fleet": fleet, "sigma": 1.0, "workload": "equal"}
    here = world(tuned("fedprune", server_lr=0.015, share=share, stride=0.9), **where)
    rival = world(tuned("fedavg_tuned", server_lr=0.015), **where)
    for done, other in zip(here.rounds(5), rival.rounds(5), strict=True):
        assert len(done.reports) == len(other.reports) == USERS
        assert not any(order.refill for order in done.orders)
    assert same(here.state.model, rival.state.model) and same(here.private, rival.private)
    assert same(here.state.optimiser, rival.state.optimiser) and here.fleet.now() == rival.fleet.now()


def test_who_waits_for_all_asks_nobody_again():
    """Seven of 24 equal devices, as soon as their times are known: an order a round for each of the cohort, and no more."""
    here = world(tuned("fedprune", cohort=7), sigma=1.0, workload="equal")
    for done in here.rounds(8)[2:]:
        assert len(done.orders) == len(done.reports) == 7 and here.strategy.target(here.state) == math.inf


def test_fedprune_hears_all_and_waits_for_nobody():
    """Speeds tenfold apart: as many reports in less than half the time, from everybody, and the loss falls as well."""
    here, rival = (world(tuned(name), sigma=10.0) for name in ("fedprune", "fedavg_tuned"))
    slow, quick = rival.rounds(8), here.rounds(40)
    assert 0 < (here.strategy.target(here.state) or 0.0) < 15.0, "no beat is known"

    def pace(rounds: list[Round]) -> float:
        return rounds[-1].ended / sum(len(done.reports) for done in rounds)

    assert 2 * pace(quick) < pace(slow)
    assert {report.order.client for done in quick for report in done.reports} == set(range(USERS))

    def loss(rounds: list[Round]) -> float:
        return float(np.mean([report.loss for done in rounds for report in done.reports]))

    assert loss(quick[-8:]) < 0.9 * loss(quick[:8])
    in_time = [done for done in quick if done.ended <= slow[-1].ended]
    assert loss(in_time[-3:]) < loss(slow[-3:]), "after as many seconds"


def test_fedprune_asks_nobody_for_less_than_the_whole_model():
    here = world(tuned("fedprune"), sigma=10.0)
    for done in here.rounds(6):
        assert {order.rate for order in done.orders} == {1.0} and not any(o.submodel.is_window for o in done.orders)
    assert isinstance(here.strategy.rates, Learned) and here.strategy.rates.aim == "beat"
    assert isinstance(here.strategy.spending, Mix) and here.strategy.spending.width == 0.0
    far = [order.objective.lr_private for done in here.rounds(2) for order in done.orders]
    assert min(far) == 0.08 < max(far) < 0.08 * 10**0.4, "slow devices' private rows go further, and not as far as all that"
