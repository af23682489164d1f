"""What every fleet promises about time, who is at work, and when a client's private rows change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from world import FLEETS, USERS, World, close, copied, finite, order, same, train, world

from fedprune.data import silos
from fedprune.devices import disturbed
from fedprune.errors import FleetError
from fedprune.exchange import Lost, Report
from fedprune.fleet import VirtualFleet
from fedprune.gather import Gather
from fedprune.objective import Objective
from fedprune.strategy import Strategy

every_fleet = pytest.mark.parametrize("fleet", sorted(FLEETS))


def changed(before: dict, here: World) -> set[int]:
    """Users whose private rows differ from `before`."""
    now = here.private
    return {u for u in range(USERS) if any(not torch.equal(now[name][u], before[name][u]) for name in now)}


def arrival_of(here: World, client: int, ticket: int) -> float:
    """When this order would arrive if it were sent now, on a fleet of its own."""
    alone = VirtualFleet(here.fleet.recommender, here.population, here.fleet.devices, trainer=here.fleet._trainer)
    alone.send([order(here, client, ticket)])
    _, (job,) = alone.snapshot()
    return here.fleet.now() + job.arrives


@every_fleet
def test_reports_come_in_order_of_arrival_and_time_never_runs_back(fleet: str):
    here = world(fleet=fleet, noise=0.2, dropout=0.2)
    here.fleet.send([order(here, client, ticket) for ticket, client in enumerate(reversed(range(USERS)))])
    clock, events = here.fleet.now(), []
    while (event := here.fleet.next()) is not None:
        assert here.fleet.now() >= clock
        clock = here.fleet.now()
        if isinstance(event, Report):
            assert event.finished == clock
        events.append(event)
    finished = [event.finished for event in events if isinstance(event, Report)]
    assert finished == sorted(finished) and len(set(finished)) > 5
    assert {event.order.ticket for event in events} == set(range(USERS))
    assert any(isinstance(event, Lost) for event in events)


@every_fleet
def test_the_order_of_arrival_is_that_of_the_devices(fleet: str):
    here = world(fleet=fleet, workload="equal")
    here.fleet.send([order(here, client, client) for client in range(USERS)])
    got = [here.fleet.next().order.client for _ in range(USERS)]
    assert got == np.argsort(here.fleet.devices.slowness, kind="stable").tolist()


@every_fleet
def test_a_deadline_is_honoured_and_reached(fleet: str):
    here = world(fleet=fleet)
    here.fleet.send([order(here, client, client) for client in range(USERS)])
    in_time = []
    while (event := here.fleet.next(before=14.0)) is not None:
        in_time.append(event.finished)
    assert 0 < len(in_time) < USERS and max(in_time) <= 14.0
    assert here.fleet.now() == 14.0
    assert here.fleet.next(before=13.0) is None and here.fleet.now() == 14.0, "a deadline in the past turned time back"
    assert here.fleet.next().finished > 14.0


@every_fleet
def test_who_arrives_at_the_deadline_is_in_time(fleet: str):
    here = world(fleet=fleet)
    due = arrival_of(here, 3, 0)
    here.fleet.send([order(here, 3, 0)])
    assert here.fleet.next(before=due).finished == due


@every_fleet
def test_with_nobody_at_work_nothing_comes(fleet: str):
    here = world(fleet=fleet)
    assert here.fleet.next() is None and here.fleet.now() == 0.0
    assert here.fleet.next(before=5.0) is None and here.fleet.now() == 5.0
    here.fleet.send([])
    assert here.fleet.next() is None and len(here.fleet.idle().clients) == USERS


@every_fleet
def test_a_busy_client_cannot_be_sent_another_order(fleet: str):
    here = world(fleet=fleet)
    here.fleet.send([order(here, 3, 0)])
    assert 3 not in here.fleet.idle().clients
    with pytest.raises(FleetError, match="client 3 is still at work; order 1"):
        here.fleet.send([order(here, 3, 1)])
    here.fleet.next()
    assert 3 in here.fleet.idle().clients
    here.fleet.send([order(here, 3, 2)])


@every_fleet
def test_private_rows_change_when_the_report_arrives_and_not_before(fleet: str):
    here = world(fleet=fleet, workload="equal")
    quick, slow = np.argsort(here.fleet.devices.slowness)[[0, -1]].tolist()
    before = copied(here.private)
    here.fleet.send([order(here, slow, 0), order(here, quick, 1)])
    assert changed(before, here) == set()
    assert here.fleet.next().order.client == quick
    assert changed(before, here) == {quick}, "the slow one was trained ahead, but has not finished"
    assert here.fleet.next(before=here.fleet.now() + 1e-3) is None
    assert changed(before, here) == {quick}
    here.fleet.next()
    assert changed(before, here) == {quick, slow}


@every_fleet
def test_abandoned_clients_work_on_until_they_are_done(fleet: str):
    here = world(fleet=fleet)
    due = arrival_of(here, 3, 0)
    before = copied(here.private)
    here.fleet.send([order(here, 3, 0)])
    (lost,) = here.fleet.abandon([0])
    assert lost.reason == "too late" and lost.order.client == 3 and lost.cost.joules.total > 0
    assert here.fleet.next() is None, "no longer wanted, so it must not be reported"
    assert 3 not in here.fleet.idle().clients, "nothing was cancelled"
    assert here.fleet.next(before=due - 1e-3) is None
    assert 3 not in here.fleet.idle().clients and changed(before, here) == set()
    assert here.fleet.next(before=due) is None
    assert 3 in here.fleet.idle().clients and changed(before, here) == {3}


@every_fleet
def test_abandoned_clients_are_free_when_time_passes_for_others(fleet: str):
    here = world(fleet=fleet, workload="equal")
    quick, slow = np.argsort(here.fleet.devices.slowness)[[0, -1]].tolist()
    before = copied(here.private)
    here.fleet.send([order(here, quick, 0), order(here, slow, 1)])
    here.fleet.abandon([0])
    assert here.fleet.next().order.client == slow
    assert {quick, slow} <= set(here.fleet.idle().clients.tolist())
    assert changed(before, here) == {quick, slow}


@every_fleet
def test_who_vanishes_is_lost_early_and_keeps_its_old_private_rows(fleet: str):
    here = world(fleet=fleet)
    here.fleet.devices = disturbed(here.fleet.devices, dropout=0.999)
    due = arrival_of(here, 3, 0)
    before = copied(here.private)
    here.fleet.send([order(here, 3, 0)])
    event = here.fleet.next()
    assert isinstance(event, Lost) and event.reason == "dropped out"
    assert here.fleet.now() <= due and 3 in here.fleet.idle().clients
    assert changed(before, here) == set()


@every_fleet
def test_a_snapshot_does_not_change_when_the_fleet_goes_on(fleet: str):
    here = world(fleet=fleet)
    here.fleet.send([order(here, client, client) for client in range(3)])
    clock, jobs = here.fleet.snapshot()
    here.fleet.abandon([0, 1])
    while here.fleet.next() is not None:
        pass
    again = world(fleet=fleet)
    again.fleet.restore(clock, jobs)
    again.fleet.abandon([2])
    assert {again.fleet.next().order.ticket for _ in range(2)} == {0, 1}
    thrice = world(fleet=fleet)
    thrice.fleet.restore(clock, jobs)
    assert {thrice.fleet.next().order.ticket for _ in range(3)} == {0, 1, 2} and thrice.fleet.next() is None


@every_fleet
def test_the_device_table_must_fit(fleet: str):
    here, silo = world(), world(client_of_user=np.arange(USERS) // 2)
    with pytest.raises(FleetError, match="24 devices for 12 clients"):
        FLEETS[fleet](here.fleet.recommender, silo.population, here.fleet.devices)


@every_fleet
@pytest.mark.parametrize("gather", [Gather(), Gather(within=12.0), Gather(count=10), Gather(pace=1.2, late="keep")])
def test_no_order_is_reported_and_lost_or_reported_twice(fleet: str, gather: Gather):
    here = world(Strategy(gather=gather), fleet=fleet, noise=0.1, dropout=0.1)
    rounds = here.rounds(8)
    told = [event.order.ticket for done in rounds for event in (*done.reports, *done.lost)]
    assert len(told) == len(set(told))
    clock = 0.0
    for done in rounds:
        assert done.began == clock <= done.ended
        clock = done.ended
        assert all(report.finished <= done.ended for report in done.reports)


@pytest.mark.parametrize("model", ["mf", "neumf"])
@pytest.mark.parametrize("batch", [None, 8])
def test_fleets_agree_on_silos(model: str, batch: int | None):
    owner = silos(train(), 5, by="quantity", seed=3)
    strategy = Strategy(objective=Objective(lr=0.3, batch=batch, epochs=2, private_steps=1, recency=2.0))
    start, serial, vector = (
        world(strategy, model=model, fleet=fleet, client_of_user=owner, noise=0.1) for fleet in ("serial", "serial", "vector")
    )
    serial.rounds(3)
    vector.rounds(3)
    assert close(serial.state.model, vector.state.model) and close(serial.private, vector.private)
    assert finite(serial.state.model) and not same(serial.state.model, start.state.model)
    assert changed(start.private, serial) == set(range(USERS)), "some user of a silo was not trained"
