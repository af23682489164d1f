"""Real devices as a fleet: the five verbs on a clock that only the test moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
from flower_world import clients, flower_world, idle, trained
from world import same

from fedprune.errors import FleetError
from fedprune.exchange import Lost, Report
from fedprune.flower.fleet import POLLING_SECONDS, SLACK_SECONDS
from fedprune.gather import Gather
from fedprune.merge import Merge
from fedprune.strategy import Strategy

POLL = 0.2
near = lambda seconds: pytest.approx(seconds, abs=2 * POLL)  # noqa: E731


# ---- time, and who is at work ----------------------------------------------------------------------------------------


def test_reports_come_in_order_of_arrival_and_time_never_runs_back():
    here = flower_world(takes=[7.0, 3.0, 9.0, 5.0])
    assert here.fleet.now() == 0.0
    here.fleet.send([here.order(client, 10 + client) for client in range(4)])
    assert idle(here) == []
    events = [here.fleet.next() for _ in range(4)]
    assert [event.order.client for event in events] == [1, 3, 0, 2]
    assert [event.finished for event in events] == [near(s) for s in (3.0, 5.0, 7.0, 9.0)]
    assert here.fleet.now() == events[-1].finished and idle(here) == [0, 1, 2, 3]
    assert here.fleet.next() is None and here.fleet.now() == events[-1].finished, "nobody is waited for, so no time passes"


def test_a_deadline_is_honoured_and_reached():
    here = flower_world(takes=[1.0, 30.0])
    here.fleet.send([here.order(0, 0), here.order(1, 1)])
    assert here.fleet.next(before=10.0).order.client == 0
    assert here.fleet.next(before=10.0) is None and here.fleet.now() == near(10.0)
    assert here.fleet.next(before=5.0) is None and here.fleet.now() == near(10.0), "a deadline in the past turned time back"
    assert here.fleet.next().finished == near(30.0)


def test_with_nobody_at_work_nothing_comes():
    here = flower_world()
    assert here.fleet.next() is None and here.fleet.now() == 0.0
    assert here.fleet.next(before=5.0) is None and here.fleet.now() == near(5.0)
    here.fleet.send([])
    assert here.fleet.next() is None and idle(here) == [0, 1, 2, 3]


def test_a_busy_client_cannot_be_sent_another_order():
    here = flower_world(takes=[5.0] * 4)
    order = here.order(3, 0)
    here.fleet.send([order])
    with pytest.raises(FleetError, match="client 3 is still at work; order 1"):
        here.fleet.send([replace(order, ticket=1)])
    with pytest.raises(FleetError, match="client 2 is still at work; order 4"):
        here.fleet.send([replace(order, client=2, ticket=3), replace(order, client=2, ticket=4)])
    assert len(trained(here)) == 1, "a part of what could not be sent was sent"
    here.fleet.next()
    here.fleet.send([replace(order, ticket=2)])


def test_abandoned_clients_are_busy_until_they_answer_and_their_reports_are_not_told():
    here = flower_world(takes=[20.0, 30.0])
    here.fleet.send([here.order(0, 0), here.order(1, 1)])
    assert here.fleet.next(before=5.0) is None
    (lost,) = here.fleet.abandon([0])
    assert lost.reason == "too late" and lost.order.client == 0 and lost.cost.seconds.total == near(5.0)
    assert lost.cost.bytes_down > 0 and lost.cost.bytes_up == 0 and lost.cost.joules is None
    assert idle(here) == [2, 3] and here.fleet.next(before=15.0) is None and idle(here) == [2, 3]
    assert here.fleet.next().order.client == 1, "the abandoned one came earlier, and is not wanted"
    assert idle(here) == [0, 1, 2, 3] and here.fleet.next() is None


def test_who_answers_during_an_evaluation_is_idle_right_after_it():
    here = flower_world(takes=[20.0])
    here.fleet.send([here.order(0, 0)])
    here.fleet.abandon([0])
    with here.fleet.stopped():
        here.clock.sleep(60.0)
    assert idle(here) == [0, 1, 2, 3]


# ---- deadlines -------------------------------------------------------------------------------------------------------


def test_messages_are_worth_as_much_time_as_their_orders():
    here = flower_world(Strategy(gather=Gather(within=12.0)), takes=[1.0] * 4)
    here.round()
    assert {message.metadata.ttl for message in trained(here)} == {12.0}
    assert {message.metadata.group_id for message in trained(here)} == {"0"}
    for gather in (Gather(), Gather(within=12.0, late="keep"), Gather(pace=2.0)):
        here = flower_world(Strategy(gather=gather))
        here.round()
        assert {message.metadata.ttl for message in trained(here)} == {here.fleet.order_seconds}


def test_the_late_are_left_out_and_asked_again_when_they_are_done():
    here = flower_world(Strategy(gather=Gather(within=12.0)), takes=[2.0, 3.0, 4.0, 50.0])
    done = here.round()
    assert clients(done) == [0, 1, 2] and done.ended == near(12.0)
    assert [(lost.order.client, lost.reason) for lost in done.lost] == [(3, "too late")]
    before, done = here.state, here.round()
    assert [order.client for order in done.orders] == [0, 1, 2] == clients(done), "client 3 is still at it"
    assert same(here.state.model, here.merged(before, done.orders))
    while 3 not in [order.client for order in done.orders]:
        assert here.fleet.now() < 70.0
        before, done = here.state, here.round()
    assert done.began >= 50.0, "the SuperLink had thrown the message away, but the device was at work until then"
    assert all(r.order.version == before.version for r in done.reports)


@pytest.mark.parametrize("code", [3, 4])
def test_an_expired_message_leaves_its_client_busy_until_it_answers_a_hello(code: int):
    here = flower_world(Strategy(gather=Gather(within=12.0)), clients=2, takes=[2.0, 100.0])
    here.grid.expired = code
    here.round()
    here.round()
    hellos = [m for m in here.grid.sent if m.metadata.message_type == "query.hello"]
    assert len(hellos) == 3 and hellos[-1].metadata.dst_node_id == 101, "one each to begin with, and one for who was late"
    assert idle(here) == [0]
    order = replace(here.order(0, 99), client=1)
    with pytest.raises(FleetError, match="client 1 is still at work"):
        here.fleet.send([order])
    here.clock.sleep(100.0)
    assert idle(here) == [0, 1]


def test_a_lost_message_that_was_wanted_is_too_late():
    """The SuperLink's clock is a little ahead: it throws the message away before our deadline has passed."""
    here = flower_world(takes=[500.0], clients=1)
    order = replace(here.order(0, 0), expires=10.0)
    here.fleet.send([order])
    event = here.fleet.next(before=10.9)
    assert isinstance(event, Lost) and event.reason == "too late" and "expired" in event.detail and "client 0" in event.detail
    assert here.fleet._pings, "it may still be at work"


def test_enough_reports_are_enough_and_the_rest_is_not_merged_later():
    here = flower_world(Strategy(gather=Gather(count=2)), takes=[3.0, 3.0, 3.0, 30.0])
    before, done = here.state, here.round()
    assert clients(done) == [0, 1], "the third came in the same moment, and is one too many"
    assert sorted((lost.order.client, lost.reason) for lost in done.lost) == [(2, "too late"), (3, "too late")]
    assert same(here.state.model, here.merged(before, [r.order for r in done.reports]))
    told = {event.order.ticket for event in (*done.reports, *done.lost)}
    before, done = here.state, here.round()
    assert [order.client for order in done.orders] == [0, 1, 2] and clients(done) == [0, 1]
    assert not told & {event.order.ticket for event in (*done.reports, *done.lost)}, "told twice"
    assert same(here.state.model, here.merged(before, [r.order for r in done.reports]))


def test_late_reports_are_kept_and_merged_with_their_staleness():
    here = flower_world(
        Strategy(gather=Gather(pace=1.0, late="keep"), merge=Merge(weights="period")), takes=[2.0, 2.0, 2.0, 7.0], clients=4
    )
    staleness = {}
    for _ in range(8):
        for report in here.round().reports:
            staleness.setdefault(report.order.client, []).append(report.staleness)
            assert report.staleness == here.state.version - 1 - report.order.version
    assert set(staleness[0]) == {0} and len(staleness[0]) == 8
    assert set(staleness[3]) == {3} and len(staleness[3]) == 2, "every fourth round, and for four"


@pytest.mark.parametrize("gather", [Gather(), Gather(within=4.0), Gather(count=2), Gather(pace=1.2, late="keep")])
def test_no_order_is_told_twice_and_none_is_forgotten(gather: Gather):
    here = flower_world(Strategy(gather=gather), takes=[2.0, 3.0, 5.0, 11.0])
    rounds = [here.round() for _ in range(6)]
    told = [event.order.ticket for done in rounds for event in (*done.reports, *done.lost)]
    told += [lost.order.ticket for lost in here.fleet.unfinished()]
    asked = [order.ticket for done in rounds for order in done.orders]
    assert sorted(told) == asked
    clock = 0.0
    for done in rounds:
        assert clock <= done.began <= done.ended
        assert all(report.finished <= done.ended for report in done.reports)
        clock = done.ended


# ---- what it cost ----------------------------------------------------------------------------------------------------


def cost(takes: float, **reported: float):
    """Of one order that came back after so long, its device having said that it worked so long."""
    here = flower_world(takes=[takes], clients=1)
    here.devices.reported[0] = {"seconds-training": 1.0} | reported
    here.fleet.send([here.order(0, 0)])
    report = here.fleet.next()
    assert isinstance(report, Report), report
    return report.cost


@pytest.mark.parametrize("polling", [0.0, 1.0, 3.0, 5.5])
def test_polling_is_not_the_network_s_time(polling: float):
    told = cost(1.0 + polling)
    assert told.seconds.training == 1.0 and told.seconds.download == told.seconds.upload == 0.0 and told.source == "measured"


def test_what_neither_work_nor_polling_explains_is_the_network_s():
    told = cost(1.0 + POLLING_SECONDS + 30.0)
    assert told.seconds.download + told.seconds.upload == near(30.0)
    assert told.seconds.download / told.seconds.upload == pytest.approx(told.bytes_down / told.bytes_up)
    assert told.seconds.total == near(31.0)


def test_a_measured_direction_leaves_the_rest_to_the_other():
    told = cost(37.0, **{"seconds-download": 10.0})
    assert (told.seconds.download, told.seconds.upload) == (10.0, near(20.0))
    told = cost(37.0, **{"upload-bytes-per-second": told.bytes_up / 25.0})
    assert (told.seconds.download, told.seconds.upload) == (near(5.0), pytest.approx(25.0, rel=0.05))
    told = cost(37.0, **{"seconds-download": 2.0, "upload-bytes-per-second": told.bytes_up / 3.0})
    # 3 s by its own account; of the 37 s, 6 may be polling, and for the rest nobody but the device can answer.
    assert (told.seconds.download, told.seconds.upload) == (2.0, pytest.approx(28.0, rel=0.05))
    told = cost(37.0, **{"seconds-download": 10.0, "upload-bytes-per-second": told.bytes_up / 6.0})
    assert told.seconds.upload == pytest.approx(6.0, rel=0.05), "it explains more than half; the rest may be others' uploads"


def test_no_part_is_longer_than_the_whole():
    told = cost(5.0, **{"seconds-download": 1e9, "upload-bytes-per-second": 1e-9})
    assert told.seconds.download == near(5.0) and told.seconds.upload == near(5.0)


def test_joules_are_what_the_device_measured_and_unknown_elsewhere():
    told = cost(5.0)
    assert told.joules is None and told.watts_waiting is None
    joules = {"joules-loading": 1.0, "joules-training": 2.0, "joules-teacher": 0.5, "watts-idle": 3.0}
    told = cost(5.0, **joules)
    assert told.joules.training == 2.0 and told.joules.download != told.joules.download and told.watts_waiting == 3.0


def test_bytes_are_those_of_the_messages():
    here = flower_world(takes=[1.0])
    done = here.round()
    assert {report.cost.bytes_down for report in done.reports} != {0}
    for report in done.reports:
        assert report.cost.bytes_down > here.state.layout.bytes(report.order.submodel.widths, 40)
        assert report.cost.bytes_up > here.state.layout.bytes(report.order.submodel.widths, 40)


# ---- the clock stands still ------------------------------------------------------------------------------------------


def test_evaluations_do_not_count():
    here = flower_world(takes=[2.0] * 4)
    here.round()
    now = here.fleet.now()
    with here.fleet.stopped():
        here.clock.sleep(100.0)
        assert here.fleet.now() == now
    assert here.fleet.now() == now
    with pytest.raises(KeyError), here.fleet.stopped():
        here.clock.sleep(100.0)
        raise KeyError
    assert here.fleet.now() == now
    here.fleet.go_on_from(40.0)
    assert here.fleet.now() == 40.0


def test_work_during_an_evaluation_is_believed_and_not_taken_for_the_network_s():
    here = flower_world(takes=[80.0, 2.0], clients=2)
    here.devices.reported = {0: {"seconds-training": 79.0}, 1: {"seconds-training": 1.0}}
    here.fleet.send([here.order(0, 0), here.order(1, 1)])
    with here.fleet.stopped():
        here.clock.sleep(100.0 + SLACK_SECONDS)
    events = [here.fleet.next(), here.fleet.next()]
    assert [type(event) for event in events] == [Report, Report], "honest work was not believed"
    assert [event.cost.seconds.total for event in events] == [79.0, 1.0]


def test_the_unfinished_are_those_still_wanted():
    here = flower_world(Strategy(gather=Gather(count=1, late="keep")), takes=[2.0, 2.0, 30.0, 40.0])
    done = here.round()
    assert clients(done) == [0]
    here.fleet.abandon([3])
    lost = here.fleet.unfinished()
    assert sorted(entry.order.client for entry in lost) == [1, 2] and {entry.reason for entry in lost} == {"unfinished"}
    here.fleet.wait_until_idle(100.0)
    assert here.fleet.now() == near(40.0) and not here.fleet._jobs
