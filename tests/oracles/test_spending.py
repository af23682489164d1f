"""What a budget is spent on, number by number: exponents, negatives and what they weigh, strides, and what travels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from reports import NOTHING, report
from world import ITEMS, LATENT, same, world

from fedprune.codec import Codec
from fedprune.distill import Distillation
from fedprune.errors import ConfigError
from fedprune.exchange import PARTS, Report, Roster, Split
from fedprune.merge import Merge
from fedprune.objective import Objective
from fedprune.pruning import Leading
from fedprune.rates import Fixed, Forecast
from fedprune.spending import Mix, Plan, Spending, Width
from fedprune.strategy import Strategy
from fedprune.types import FloatArray, Memory
from fedprune.workload import shares

OBJECTIVE, CODEC = Objective(negatives=8, lr_private=0.02), Codec()


def plan(spending: Spending, budget: float = 1.0, period: float = 1.0, seconds: Any = None, **codec: Any) -> Plan:
    return spending.plan(budget, period, seconds, OBJECTIVE, replace(CODEC, **codec))


def parts(**seconds: float) -> FloatArray:
    return np.array([seconds.get(part, 0.0) for part in PARTS])


# ---- width, examples, and how often ------------------------------------------------------------------------------------


def test_width_is_the_rate_and_nothing_else():
    for spending in (Width(), Mix(width=1.0)):
        got = plan(spending, 0.3)
        assert got.rate == 0.3 and got.objective == OBJECTIVE and got.codec == CODEC
    assert plan(Width(), 0.3, 7.0, parts(upload=1.0)).codec == CODEC


def test_exponents_share_the_budget():
    """0.25^0.5 = 0.5 of the width and, of 8 negatives, 8 * 0.25^0.5 = 4; the rest of the budget is fewer reports."""
    assert plan(Mix(width=0.5, examples=0.5), 0.25) == Plan(0.5, replace(OBJECTIVE, negatives=4), CODEC)
    assert plan(Mix(width=0.0), 0.01) == Plan(1.0, OBJECTIVE, CODEC)
    assert plan(Mix(examples=1.0), 0.25).objective.negatives == 2 and plan(Mix(examples=1.0), 0.25).rate == 1.0


@pytest.mark.parametrize(
    ("named", "budget", "negatives"),
    [(None, 0.33, 3), (None, 0.3, 2), (None, 0.01, 1), (3, 1.0, 3), (3, 0.5, 2), (20, 0.5, 10)],
)
def test_negatives_are_rounded_and_at_least_one(named: int | None, budget: float, negatives: int):
    """8 * 0.33 = 2.6, 8 * 0.3 = 2.4, 8 * 0.01 = 0.1; 3 * 0.5 is rounded to the even 2."""
    assert plan(Mix(examples=1.0, negatives=named), budget).objective.negatives == negatives


def test_fewer_negatives_weigh_more_if_they_are_to():
    assert plan(Mix(examples=1.0), 0.25).objective.weight_negatives == 1.0
    weighed = Mix(examples=1.0, weigh=True)
    for budget in (1.0, 0.6, 0.25, 0.01):
        told = plan(weighed, budget).objective
        assert told.negatives * told.weight_negatives == pytest.approx(8)
    assert plan(Mix(negatives=16, weigh=True)).objective.weight_negatives == 0.5
    assert plan(weighed).objective == OBJECTIVE, "at the whole budget it is the experiment's"


def test_the_stride_makes_up_for_long_periods_in_steps_of_a_fifth():
    """lr p^stride with p one of 1, 1.2, 1.44, ...: the power of 1.2 that is nearest on the log scale."""
    assert plan(Mix(stride=0.5), 1.0, 1.0).objective == OBJECTIVE
    for period, level in ((1.0, 1.0), (1.09, 1.0), (1.1, 1.2), (1.3, 1.2), (1.32, 1.44), (2.0, 1.2**4), (10.0, 1.2**13)):
        got = plan(Mix(stride=0.5), 1.0, period).objective.lr_private
        assert got == pytest.approx(0.02 * math.sqrt(level), rel=1e-12), period
        assert plan(Mix(stride=0.0), 1.0, period).objective.lr_private == 0.02
        assert plan(Mix(stride=1.0, lr_private=0.5), 1.0, period).objective.lr_private == pytest.approx(0.5 * level)
    assert plan(Mix(stride=1.0), 1.0, 0.25).objective.lr_private == 0.02, "nobody reports more often than every round"


def test_teachers_are_for_those_who_can_afford_them():
    taught = Objective(distillation=Distillation("local", 0.5))
    for budget, teacher in ((0.5, True), (0.49, False)):
        got = Mix(taught=0.5).plan(budget, 1.0, None, taught, CODEC).objective
        assert (got.distillation is not None) is teacher and replace(got, distillation=taught.distillation) == taught
    assert Mix().plan(0.01, 1.0, None, taught, CODEC).objective == taught


def test_equal_plans_are_one_object():
    """Clients with the same objective are trained together."""
    mixed = Mix(width=0.5, examples=0.5, stride=0.5, precision="auto")
    assert plan(mixed, 0.5, 2.0) is plan(Mix(width=0.5, examples=0.5, stride=0.5, precision="auto"), 0.5, 2.05)
    assert plan(mixed, 0.5, 2.0) is not plan(mixed, 0.5, 4.0)
    assert plan(Width(), 0.3) is plan(Mix(width=1.0), 0.3)


# ---- what travels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "precision"),
    [
        (None, "int8"),
        (parts(training=float("nan"), upload=0.0), "int8"),
        (parts(training=9.0, download=0.5, upload=0.5), "int8"),
        (parts(training=9.1, download=0.5, upload=0.4), "float32"),
        (parts(training=4.0, teacher=4.0, loading=1.1, upload=0.9), "float32"),
    ],
    ids=["unknown", "half known", "a tenth", "less", "teacher and loading are no moving"],
)
def test_precision_by_what_a_device_spends_its_time_on(seconds: FloatArray | None, precision: str):
    assert plan(Mix(precision="auto", worth=0.1), seconds=seconds).codec == Codec(precision=precision)
    for fixed in ("int8", "float32"):
        assert plan(Mix(precision=fixed, worth=0.1), seconds=seconds).codec.precision == fixed


def test_half_the_rows_go_up_where_the_upload_takes_most():
    most, half = parts(training=4.0, upload=4.1), parts(training=4.0, upload=4.0)
    auto = Mix(sampled="auto")
    assert plan(auto, seconds=most, rows="touched").codec.sampled == 0.5
    assert plan(auto, seconds=half, rows="touched").codec.sampled == 1.0
    assert plan(auto, seconds=None, rows="touched").codec.sampled == 1.0
    assert plan(auto, seconds=most).codec.sampled == 1.0, "all rows travel: there is nothing to draw among"
    assert plan(Mix(sampled=0.25), seconds=half, rows="touched").codec.sampled == 0.25
    with pytest.raises(ConfigError, match=r"sampled 0.25 draws among the touched rows"):
        plan(Mix(sampled=0.25))


def test_where_memory_is_tight_auto_is_int8_and_all_else_as_it_is():
    auto, computing = Mix(precision="auto", sampled="auto"), parts(training=9.0, upload=0.1)
    for seconds, sampled in ((computing, 1.0), (parts(training=1.0, upload=9.0), 0.5), (None, 1.0)):
        got = auto.plan(1.0, 1.0, seconds, OBJECTIVE, replace(CODEC, rows="touched"), tight=True).codec
        assert (got.precision, got.sampled) == ("int8", sampled)
    assert plan(auto, seconds=computing).codec.precision == "float32"
    for fixed in (Mix(precision="float32"), Mix(), Width()):
        assert fixed.plan(1.0, 1.0, None, OBJECTIVE, CODEC, tight=True).codec.precision == "float32"


def test_the_rest_of_the_wire_is_the_strategys():
    assert plan(Mix(precision="int8"), refresh=5, rows="touched").codec == Codec("touched", "int8", refresh=5)
    own = {"rows": "touched", "precision": "int8", "sampled": 0.5}
    assert plan(Mix(), **own).codec == Codec("touched", "int8", sampled=0.5), "what is left out is not undone"
    assert plan(Mix(precision="float32", sampled=1), **own).codec == Codec("touched", "float32", sampled=1.0)
    assert Mix().learn({}, [report(NOTHING)], 3) == {}, "nothing to choose, nothing to remember"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"width": -0.1}, "width -0.1 and examples 0.0 are exponents of one budget: neither may be negative"),
        ({"width": 0.7, "examples": 0.4}, "width 0.7 and examples 0.4 .* nor both together above 1"),
        ({"negatives": 0}, "negatives is 0; it must be at least 1, or left out"),
        ({"lr_private": 0.0}, "lr_private is 0.0; it must be above 0, or left out"),
        ({"stride": 1.5}, r"stride 1.5, worth 0.02 and taught 0.0 must be in \[0, 1\]"),
        ({"worth": -1.0}, r"worth -1.0 .* must be in \[0, 1\]"),
        ({"taught": 2.0}, r"taught 2.0 must be in \[0, 1\]"),
        ({"precision": "int4"}, 'precision "int4"; it is float32, int8 or auto'),
        ({"sampled": 0.0}, r'sampled "0.0"; it is a share in \(0, 1\] or auto'),
        ({"sampled": 1.5}, r'sampled "1.5"; it is a share'),
        ({"sampled": "half"}, r'sampled "half"; it is a share'),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_are_told(settings: dict, text: str):
    with pytest.raises(ConfigError, match=text):
        Mix(**settings)


# ---- from learned times and known memories to plans --------------------------------------------------------------------


@dataclass(frozen=True)
class Foreseen:
    """A learner that says what it is told to."""

    rate: float
    target: float | None
    seconds: tuple[tuple[float, ...], ...]

    def propose(self, memory: Memory, clients: Any, roster: Roster, offer: Any) -> FloatArray:
        return np.full(len(clients), self.rate)

    def learn(self, memory: Memory, reports: Sequence[Report], *_: Any) -> Memory:
        return memory

    def forecast(self, memory: Memory, population: int) -> Forecast:
        return Forecast(self.target, np.array(self.seconds))


NAN = (float("nan"),) * len(PARTS)
QUICK, SLOW = tuple(parts(training=10.0)), tuple(parts(download=10.0, training=10.0, upload=10.0))


def planned(
    spending: Spending, target: float | None, rate: float = 1.0, capacity: Any = None, idle: int = 3, busy: int = 0
) -> tuple[FloatArray, list[Plan]]:
    strategy = Strategy(rates=Foreseen(rate, target, (QUICK, SLOW, NAN, QUICK)), spending=spending, objective=OBJECTIVE)
    here = world(strategy)
    clients = np.array([0, 1, 2])
    here.state = replace(here.state, spending={"seconds": np.array((QUICK, SLOW, NAN, QUICK))})
    return strategy.planned(here.state, clients, Roster(np.arange(idle), 4, np.ones(4), capacity, busy))


@pytest.mark.parametrize(
    ("target", "levels"), [(None, (1, 1)), (12.0, (1, 1.2**5)), (5.0, (1.2**4, 1.2**10)), (math.inf, (1, 1))]
)
def test_periods_follow_from_the_forecast(target: float | None, levels: tuple[float, float]):
    """Reports of 10 and of 30 seconds, and a client never heard of: 30 / 12 = 2.5 and 1.2^5 = 2.49."""
    budgets, plans = planned(Mix(stride=1.0, precision="auto"), target)
    got = [plan.objective.lr_private / 0.02 for plan in plans]
    assert got == pytest.approx([*levels, 1.0]) and budgets.tolist() == [1.0] * 3
    assert [plan.codec.precision for plan in plans] == ["float32", "int8", "int8"]


def test_who_is_drawn_from_many_waits_as_long_as_anybody_else():
    """One of four idle clients is not drawn while five are at work, for 5/3 targets on average, so that all wait 1/3 of one
    in between: who takes three targets reports (3 + 1/3) / (1 + 1/3) = 2.5 times as seldom as who takes one."""
    _, plans = planned(Mix(stride=1.0), 10.0, idle=4, busy=2)
    got = [plan.objective.lr_private / 0.02 for plan in plans]
    assert got == pytest.approx([1.0, 1.2**5, 1.0])


def test_what_a_report_takes_as_float32_is_remembered_whichever_way_it_travelled():
    """As int8 .27 of a second each way is one as float32; smoothed by .3; a choice is not undone by its own effect."""
    mix, memory = Mix(precision="auto"), {}
    for precision, way in (("int8", 0.27), ("float32", 1.0), ("int8", 0.27)):
        sent = report(NOTHING, client=1)
        order = replace(sent.order, codec=Codec(precision=precision))
        cost = replace(sent.cost, seconds=Split(way, 10.0, 0.0, way))
        memory = mix.learn(memory, [replace(sent, order=order, cost=cost)], 3)
        assert memory["seconds"][1] == pytest.approx(parts(download=1.0, training=10.0, upload=1.0))
        assert np.isnan(memory["seconds"][[0, 2]]).all()
    later = replace(report(NOTHING, client=1), cost=replace(sent.cost, seconds=Split(2.0, 10.0, 0.0, 1.0)))
    assert mix.learn(memory, [later], 3)["seconds"][1] == pytest.approx(parts(download=1.3, training=10.0, upload=1.0))
    assert Mix(precision="int8").learn({}, [later], 3) == {}, "who does not choose remembers nothing"


def test_narrower_models_have_shorter_periods():
    """At half the width half the bytes and half the training: 15 of 30 seconds."""
    _, plans = planned(Mix(width=1.0, stride=1.0), 6.0, rate=0.5)
    half = Strategy(spending=Mix(width=1.0), objective=OBJECTIVE).offer(world().state).at(np.array([0.5]))[0]
    own = float((half * np.array(SLOW)).sum())
    assert 14.0 < own < 17.0
    assert plans[1].objective.lr_private / 0.02 == pytest.approx(1.2 ** round(math.log(own / 6.0, 1.2)))


def test_nobody_gets_more_than_fits_into_its_memory():
    capacity = np.array([0.5, 1.0, 0.25, 0.01])
    budgets, plans = planned(Width(), None, capacity=capacity)
    assert budgets.tolist() == [0.5, 1.0, 0.25] == [plan.rate for plan in plans]
    budgets, plans = planned(Width(), None, rate=0.4, capacity=capacity)
    assert budgets.tolist() == [0.4, 0.4, 0.25] == [plan.rate for plan in plans]
    whole, plans = planned(Mix(width=0.0, negatives=2), None, capacity=capacity)
    assert [plan.rate for plan in plans] == [0.5, 1.0, 0.25] and {plan.objective.negatives for plan in plans} == {2}
    assert whole.tolist() == [0.5, 1.0, 0.25]
    here = world(Strategy(spending=Mix(width=0.0)))
    tiny = Roster(np.arange(4), 4, np.ones(4), np.full(4, 0.01))
    _, (smallest,) = here.strategy.planned(here.state, np.array([3]), tiny)
    assert smallest.rate == 1 / LATENT, "the smallest there is, if nothing fits"


# ---- what a budget buys ------------------------------------------------------------------------------------------------

DOWN, LOADING, TEACHER, TRAINING, UP = range(len(PARTS))


def offered(spending: Spending, model: str, **settings: Any) -> tuple[FloatArray, FloatArray]:
    offer = Strategy(spending=spending, objective=Objective(**settings)).offer(world(model=model).state)
    assert (np.diff(offer.rates) > 0).all() and offer.rates[0] == 1 / LATENT and offer.rates[-1] == 1.0
    assert offer.shares.shape == (len(offer.rates), len(PARTS))
    assert offer.shares[-1].tolist() == [1, 1, 1 if "distillation" in settings else 0, 1, 1]
    assert (offer.shares[:, LOADING] == 1).all()
    return offer.rates, offer.shares


def test_a_narrower_mf_costs_in_proportion():
    """A row has width entries and a bias, so (1 + 8b)/9 of the bytes: to half a unit of 8, which is a 16th."""
    rates, costs = offered(Width(), "mf")
    width = np.round(rates * LATENT)
    np.testing.assert_allclose(costs[:, DOWN], (1 + width) / 9, rtol=1e-12)
    np.testing.assert_allclose(costs[:, UP], (1 + width) / 9, rtol=1e-12)
    np.testing.assert_allclose(costs[:, TRAINING], (1 + 2 * width) / 17, rtol=1e-12)
    assert np.abs(costs[:, [DOWN, TRAINING, UP]] - rates[:, None]).max() < 1 / 16 + 1 / 9


def test_a_narrower_neumf_costs_less_than_in_proportion():
    """Its weight matrices shrink both ways."""
    rates, costs = offered(Width(), "neumf")
    inner = (rates > 0.2) & (rates < 0.9)
    assert (costs[inner, TRAINING] < rates[inner]).all() and (costs[inner, DOWN] < rates[inner]).all()
    middle = int(np.abs(rates - 0.5).argmin())
    assert costs[middle, TRAINING] == pytest.approx(0.25, abs=0.04) and 0.25 < costs[middle, DOWN] < 0.45
    assert (np.diff(costs[:, [DOWN, TRAINING, UP]], axis=0) >= 0).all()


@pytest.mark.parametrize("model", ["mf", "neumf"])
def test_a_whole_model_costs_the_same_at_any_budget(model: str):
    _, costs = offered(Mix(width=0.0, negatives=3, precision="auto"), model)
    assert (costs == costs[-1]).all()


def test_fewer_examples_save_training_alone():
    """(1 + 8b) of 9 examples, in whole negatives; touched rows are fewer too."""
    rates, costs = offered(Mix(examples=1.0), "mf", negatives=8)
    np.testing.assert_allclose(costs[:, TRAINING], (1 + np.maximum(1, np.round(8 * rates))) / 9, rtol=1e-12)
    assert (costs[:, [DOWN, UP]] == 1).all()


def test_a_teacher_has_a_share_of_its_own():
    """The whole model teaches a narrower one: it costs its device the same FLOPs and bytes down at any rate."""
    _, costs = offered(Width(), "mf", distillation=Distillation("local", 0.5))
    assert (costs[:, [DOWN, TEACHER]] == 1).all() and costs[0, TRAINING] < 0.2 and costs[0, UP] == pytest.approx(2 / 9)


def test_shares_by_pencil():
    """100 positives; 4 negatives make 500 examples, more than there are items, and 1 makes 200 of 1000 items."""
    layout = world().state.layout
    half = Leading().carve({}, layout, 0, 0, 0.5)
    plans = [Plan(0.5, Objective(negatives=1), Codec("touched", "int8")), Plan(1.0, Objective(), Codec("touched"))]
    got = shares(layout, plans, [half, Leading().carve({}, layout, 0, 0, 1.0)])
    bytes_of_half = ITEMS * (4 + 2 + 2)  # int8 entries, their row's scale, and the bias as float16
    assert got[0] == pytest.approx([bytes_of_half / (ITEMS * 36), 1, 0, (200 * 9) / (500 * 17), bytes_of_half / (ITEMS * 36)])
    assert got[1].tolist() == [1, 1, 0, 1, 1]


# ---- neutral settings ----------------------------------------------------------------------------------------------------


def test_mixes_at_their_neutral_settings_are_fedavg_to_a_bit():
    """And with the settings that they are for they are not."""
    plain = world(Strategy(objective=Objective(lr=0.3)))
    plain.rounds(2)
    for spending, alike in ((Mix(), True), (Mix(width=1.0, stride=1.0), True), (Mix(negatives=2, weigh=True), False)):
        here = world(Strategy(spending=spending, objective=Objective(lr=0.3), rates=Fixed(1.0), merge=Merge()))
        here.rounds(2)
        assert same(here.state.model, plain.state.model) is alike and same(here.private, plain.private) is alike
