"""What every strategy promises: whatever happens to the clients, the run goes on, repeats, and resumes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
from world import USERS, World, close, copied, finite, same, unmasked, world

from fedprune.catalog import CATALOG, build, trained_with
from fedprune.devices import disturbed
from fedprune.merge import Adam, Merge, ServerOptimiser
from fedprune.objective import Objective
from fedprune.population import Private
from fedprune.rates import FJORD, Bandit, ByCapability, Learned
from fedprune.selection import KeepBusy, Uniform
from fedprune.strategy import Strategy, prepared


@dataclass(frozen=True)
class Row:
    """A strategy of the catalog with settings that make it do what it is for in this world."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.settings.items())])

    def strategy(self, **objective: Any) -> Strategy:
        """With small steps, so that two orders of summation stay close."""
        return trained_with(build(self.name, **self.settings), Objective(lr=0.3, **objective), Merge())


ROWS = [
    Row("fedavg"),
    Row("fedavg", {"cohort": 7}),
    Row("drop_weak"),
    Row("smallest"),
    Row("skip"),
    Row("skip", {"pace": 1.5}),
    Row("fedavg_tuned"),
    Row("fedbuff", {"buffer": 5}),
    Row("fedbuff", {"buffer": 4, "cohort": 7, "refill": 2}),
    Row("fedasync"),
    Row("fedasync", {"cohort": 12}),
    Row("deadline", {"within": 15.0}),
    Row("fedprox", {"within": 15.0}),
    Row("heterofl"),
    Row("window"),
    Row("window", {"refresh": 3}),
    Row("adaptcl"),
    Row("adaptcl", {"interval": 1, "cohort": 9}),
    Row("adaptcl", {"degree": 2, "moving": True, "workers": True}),
    Row("learned_width"),
    Row("learned_width", {"damp": 1.0, "cohort": 9}),
    Row("fedmp"),
    Row("fjord"),
    Row("fedprune", {"precision": "float32"}),
    Row("fedprune", {"cohort": 9, "refresh": 3, "share": 0.6, "damp": 1.0}),
    Row("sp_sad"),
    Row("lth_sad", {"every": 2, "rewind": 1}),
    Row("ss_sad", {"every": 2, "rewind": 1}),
    Row("dpf"),
    Row("dpf", {"keep": 0.4, "every": 1, "through": True}),
    Row("dpp", {"over": 4}),
    Row("lotteryfl", {"above": 0.2}),
    Row("sub_fedavg", {"above": 0.2}),
    Row("hermes", {"above": 0.2}),
    Row("prunefl", {"every": 2}),
]
every_strategy = pytest.mark.parametrize("row", ROWS, ids=str)


def test_the_table_is_complete():
    assert {row.name for row in ROWS} == set(CATALOG), "a strategy of the catalog is missing here; add a row"


@every_strategy
@pytest.mark.parametrize("model", ["mf", "neumf"])
def test_runs_and_repeats_bit_for_bit(row: Row, model: str):
    first, second = (world(row.strategy(), model=model, noise=0.1) for _ in range(2))
    start = first.state.model
    rounds = first.rounds(4)
    second.rounds(4)
    assert finite(first.state.model) and finite(first.private)
    assert not same(first.state.model, start), "four rounds taught it nothing"
    assert first.state.version == 4 and sum(len(done.orders) for done in rounds) == first.state.ticket
    assert same(first.state.model, second.state.model) and same(first.private, second.private)
    assert first.fleet.now() == second.fleet.now()


def test_another_seed_is_another_run():
    first, second = world(seed=1), world(seed=2)
    second.state = replace(second.state, model=first.state.model)
    first.round()
    second.round()
    assert not close(first.state.model, second.state.model)


SIZES = [("mf", None), ("mf", 8), ("neumf", None)]
TRIED = {"lth_sad", "ss_sad", "dpf", "dpp", "lotteryfl", "sub_fedavg", "hermes", "prunefl"}
"""Differ from others by their entries alone, whose fleets test_every_entries.py compares."""


@pytest.mark.parametrize(
    ("row", "model", "batch"), [(r, *size) for r in ROWS for size in (SIZES[1:2] if r.name in TRIED else SIZES)], ids=str
)
def test_all_fleets_agree(row: Row, model: str, batch: int | None):
    serial, vector = (world(row.strategy(batch=batch), model=model, fleet=name, noise=0.1) for name in ("serial", "vector"))
    for one, other in zip(serial.rounds(4), vector.rounds(4), strict=True):
        assert [(r.order.ticket, r.finished, r.examples) for r in one.reports] == [
            (r.order.ticket, r.finished, r.examples) for r in other.reports
        ]
    # Relations are cosines: of rows of two small numbers they magnify rounding.
    atol = 1e-4 if row.name in ("sp_sad", "ss_sad") else 1e-5
    assert close(serial.state.model, vector.state.model, atol)
    assert close(serial.private, vector.private)
    assert serial.fleet.now() == vector.fleet.now()


@every_strategy
def test_survives_clients_that_vanish(row: Row):
    here = world(row.strategy(), dropout=0.4)
    rounds = here.rounds(6)
    lost = [event for done in rounds for event in done.lost if event.reason == "dropped out"]
    merged = [report for done in rounds for report in done.reports]
    assert lost and merged
    assert not {event.order.ticket for event in lost} & {report.order.ticket for report in merged}
    assert finite(here.state.model)
    asked_again = {order.client for done in rounds[1:] for order in done.orders}
    assert asked_again & {event.order.client for event in rounds[0].lost}, "who vanished once is never asked again"


@every_strategy
def test_lives_with_gaps_in_availability(row: Row):
    here = world(row.strategy(), availability=0.5)
    rounds = here.rounds(6)
    assert all(done.ended > done.began for done in rounds)
    assert any(done.reports for done in rounds) and finite(here.state.model)
    assert {len(done.orders) for done in rounds} != {24}, "nobody was ever unreachable"


@every_strategy
def test_an_empty_round_passes_and_the_next_goes_on(row: Row):
    here = world(row.strategy())
    usual = here.fleet.devices
    here.fleet.devices = disturbed(usual, availability=1e-9)
    before = prepared(here.strategy, here.state).model
    empty = here.round()
    assert not empty.orders and not empty.reports and empty.ended > empty.began
    assert same(here.state.model, before)
    here.fleet.devices = usual
    assert here.round().reports and not same(here.state.model, before)


@every_strategy
def test_the_clock_moves_when_everybody_misses_the_deadline(row: Row):
    strategy = row.strategy()
    here = world(replace(strategy, gather=replace(strategy.gather, within=1e-3)))
    before = prepared(here.strategy, here.state).model
    rounds = here.rounds(6)
    assert rounds[0].orders and not rounds[0].reports and rounds[0].ended == 1e-3
    assert all(done.ended > done.began for done in rounds)
    assert sum(len(done.orders) for done in rounds[1:]), "nobody was ever idle again"
    if strategy.gather.late == "drop":
        assert all(event.reason == "too late" for event in rounds[0].lost) and len(rounds[0].lost) == len(rounds[0].orders)
        assert same(here.state.model, before)
    else:
        assert any(done.reports for done in rounds), "late reports were to be kept"


def test_partial_work_meets_the_deadline_it_is_cut_for():
    """To a bit: who does as much as fits must not be late by a rounding error."""
    here = world(build("fedprox", within=20.0), noise=0.05)
    rounds = here.rounds(8)
    work = [report.work for done in rounds for report in done.reports]
    assert sum(share < 1 for share in work) > 40 and min(work) > 0.05
    assert not [event for done in rounds for event in done.lost]


def resumed(row: Row, saved: World, fleet: str) -> World:
    """A new process: nothing but the server's state, the snapshot and the private rows."""
    here = world(row.strategy(), fleet=fleet, noise=0.1, dropout=0.1)
    clock, jobs = saved.fleet.snapshot()
    kept = saved.population.private
    here.population.private = Private(copied(kept.values), copied(kept.first), copied(kept.second), kept.steps.clone())
    here.fleet.restore(clock, [replace(job) for job in jobs])
    here.state = replace(saved.state, model=copied(saved.state.model), optimiser=copied(saved.state.optimiser))
    return here


@every_strategy
@pytest.mark.parametrize("fleet", ["serial", "vector"])
def test_resumes_bit_for_bit(row: Row, fleet: str):
    whole = world(row.strategy(), fleet=fleet, noise=0.1, dropout=0.1)
    whole.rounds(3)
    after = resumed(row, whole, fleet)
    expected, got = whole.rounds(3), after.rounds(3)
    assert [[r.order.ticket for r in done.reports] for done in got] == [
        [r.order.ticket for r in done.reports] for done in expected
    ]
    assert same(after.state.model, whole.state.model) and same(after.private, whole.private)
    assert after.fleet.now() == whole.fleet.now()


LIMITS = [
    (Row("deadline", {"within": float("inf")}), {}),
    (Row("fedprox", {"within": float("inf"), "mu": 0.0}), {}),
    (Row("smallest", {"rate": 1.0}), {}),
    (Row("drop_weak", {"share": 1.0}), {}),
    (Row("heterofl"), {"sigma": 1.0}),
    (Row("window"), {"sigma": 1.0}),
    (Row("adaptcl"), {"sigma": 1.0, "workload": "equal"}),
    (Row("adaptcl", {"degree": 2, "moving": True, "workers": True}), {"sigma": 1.0, "workload": "equal"}),
    (Row("learned_width"), {"sigma": 1.0, "workload": "equal"}),
    (Row("fedmp", {"floor": 1.0}), {}),
    (Row("fjord"), {"sigma": 1.0, "workload": "equal"}),
    (Row("skip"), {"sigma": 1.0, "workload": "equal"}),
    (Row("fedavg_tuned", {"negatives": None, "precision": "float32", "lr_private": None, "server_lr": None}), {}),
    (
        Row("fedprune", {"negatives": None, "precision": "float32", "lr_private": None, "server_lr": None}),
        {"sigma": 1.0, "workload": "equal"},
    ),
    (Row("fedbuff", {"buffer": USERS}), {"sigma": 1.0, "workload": "equal"}),
    (Row("sp_sad", {"rate": 1.0, "taught": False}), {}),
    (Row("lth_sad", {"keep": 1.0, "every": 1, "rewind": 1, "taught": False}), {}),
    (Row("ss_sad", {"keep": 1.0, "every": 1, "rate": 1.0, "taught": False}), {}),
    (Row("dpf", {"keep": 1.0}), {}),
    (Row("dpp", {"keep": 1.0}), {}),
    (Row("lotteryfl", {"keep": 1.0, "above": 0.0}), {}),
    (Row("sub_fedavg", {"keep": 1.0, "above": 0.0}), {}),
    (Row("hermes", {"keep": 1.0, "above": 0.0}), {}),
    (Row("prunefl", {"every": 4}), {}),
]


@cache
def after_three(row: str, fleet: str, optimiser: ServerOptimiser | None, over: Any = None, **where: Any) -> World:
    """Three rounds of a row of the table (fedavg's are compared with many)."""
    merge = Merge(optimiser=optimiser) if optimiser else Merge()
    chosen = next((r for r, _ in LIMITS if str(r) == row), Row("fedavg"))
    strategy = trained_with(build(chosen.name, **chosen.settings), Objective(), merge)
    here = world(replace(strategy, merge=replace(strategy.merge, over=over or strategy.merge.over)), fleet=fleet, **where)
    here.rounds(3)
    return here


@pytest.mark.parametrize("optimiser", [None, Adam()], ids=["average", "adam"])
@pytest.mark.parametrize("fleet", ["serial", "vector"])
@pytest.mark.parametrize(("row", "where"), LIMITS, ids=str)
def test_equals_fedavg_at_its_neutral_setting(row: Row, where: dict, fleet: str, optimiser: ServerOptimiser | None):
    """Over the cohort an item's row is divided also by those who did not take it, so it is a FedAvg that does so too."""
    here = after_three(str(row), fleet, optimiser, **where)
    rival = after_three("fedavg", fleet, optimiser, over=here.strategy.merge.over, **where)
    assert same(unmasked(here.state.model), rival.state.model)
    assert same(here.private, rival.private)
    assert same(unmasked(here.state.optimiser), rival.state.optimiser)


def test_the_limits_table_is_complete():
    assert {row.name for row, _ in LIMITS} == set(CATALOG) - {"fedavg", "fedasync"}, "a strategy has no limit; add one"


@pytest.mark.parametrize("fleet", ["serial", "vector"])
def test_asynchronous_with_one_client_at_work_and_mixing_1_is_fedavg_with_one_client_a_round(fleet: str):
    here, rival = (
        world(trained_with(build(name, **own), Objective(), Merge()), fleet=fleet)
        for name, own in (("fedasync", {"mixing": 1.0, "cohort": 1}), ("fedavg", {"cohort": 1}))
    )
    here.rounds(5)
    rival.rounds(5)
    assert same(here.state.model, rival.state.model) and same(here.private, rival.private)


def test_settings_reach_the_parts_they_are_of():
    own = build("adaptcl", degree=2, moving=True, workers=True)
    assert (own.rates.degree, own.rates.anchor, own.merge.over) == (2, "moving", "cohort")
    assert build("adaptcl").rates.anchor == "reference" and build("adaptcl").merge == Merge()
    assert build("fedprune", damp=2.0).merge.damp == build("learned_width", damp=2.0).merge.damp == 2.0
    assert build("learned_width", floor=0.25).rates == Learned(floor=0.25)
    assert build("fedmp", width=0.25, explore=0.1, floor=0.5).rates == Bandit(width=0.25, explore=0.1, floor=0.5)
    assert build("fedmp").merge == Merge(over="cohort") and build("fjord").rates == ByCapability(tiers=FJORD)
    assert build("fedbuff", cohort=7).selector == build("fedasync", cohort=7).selector == KeepBusy(7)
    for name in ("learned_width", "fedmp", "fjord"):
        assert build(name, cohort=7).selector == Uniform(7)


@pytest.mark.parametrize("row", [Row("smallest", {"rate": 0.5}), Row("drop_weak", {"share": 0.5}), Row("fjord")], ids=str)
def test_away_from_its_neutral_setting_it_is_not_fedavg(row: Row):
    here, rival = world(row.strategy()), world(Row("fedavg").strategy())
    here.round()
    rival.round()
    assert not close(here.state.model, rival.state.model)
