"""Nodes that come and go, and what they say of themselves."""

from __future__ import annotations

import pytest
from flower_world import clients, flower_world, idle, trained
from flwr.app import Error, RecordDict
from world import same

from fedprune.errors import FleetError
from fedprune.exchange import Lost, Report
from fedprune.flower.crew import AGAIN_SECONDS

near = lambda seconds: pytest.approx(seconds, abs=0.4)  # noqa: E731


def _told(content: RecordDict, record: str, **values: float) -> RecordDict:
    for name, value in values.items():
        content[record][name] = value
    return content


def test_a_vanished_node_is_a_failure_when_the_superlink_notices():
    here = flower_world(takes=[2.0, 30.0, 2.0, 2.0])
    here.fleet.send([here.order(client, client) for client in range(4)])
    here.clock.sleep(5.0)
    here.grid.leave(101)
    events = [here.fleet.next() for _ in range(4)]
    assert [type(event) for event in events] == [Report] * 3 + [Lost]
    assert events[-1].reason == "failed" and "the node is gone" in events[-1].detail and "client 1" in events[-1].detail
    assert here.fleet.now() == near(65.0) and idle(here) == [0, 2, 3]


def test_who_never_answers_is_given_up():
    here = flower_world(clients=1)
    here.fleet.order_seconds = 50.0
    here.devices.tamper[0] = lambda content: None
    here.fleet.send([here.order(0, 0)])
    event = here.fleet.next()
    assert event.reason == "failed" and "no answer within 50 s" in event.detail and idle(here) == [0]


def test_a_node_that_comes_back_under_another_number_is_the_same_client():
    here = flower_world(takes=[2.0] * 4)
    here.round()
    here.grid.leave(101)
    here.clock.sleep(61.0)
    assert clients(here.round()) == [0, 2, 3]
    here.grid.nodes.append(555)
    here.devices.partition[555] = 1
    before, done = here.state, here.round()
    assert clients(done) == [0, 1, 2, 3] and here.fleet.crew.node_of(1) == 555
    assert same(here.state.model, here.merged(before, done.orders))


def test_a_node_that_comes_back_before_it_was_missed_is_taken_in_later():
    here = flower_world(takes=[2.0] * 4)
    here.grid.leave(101)
    here.grid.nodes.append(555)
    here.devices.partition[555] = 1
    assert idle(here) == [0, 1, 2, 3] and "which node 101 is" in here.fleet.crew.refused[555]
    here.clock.sleep(AGAIN_SECONDS + 1.0)
    assert idle(here) == [0, 1, 2, 3] and here.fleet.crew.node_of(1) == 555 and not here.fleet.crew.refused


def test_two_nodes_cannot_be_the_same_client():
    here = flower_world()
    here.grid.nodes.append(555)
    here.devices.partition[555] = 1
    for _ in range(3):
        done = here.round()
        assert clients(done) == [0, 1, 2, 3]
        here.clock.sleep(AGAIN_SECONDS)
    assert here.fleet.crew.node_of(1) == 101 and "partition-ids must differ" in here.fleet.crew.refused[555]
    assert {message.metadata.dst_node_id for message in trained(here)} == {100, 101, 102, 103}


@pytest.mark.parametrize(
    ("greet", "why"),
    [
        (lambda content: Error(2, "FleetError: the SuperNode has no partition-id"), "no partition-id"),
        (lambda content: RecordDict(), 'field "config" is missing'),
        (lambda content: _told(content, "config", client=17), "client 17; this run has 0 to 3"),
        (lambda content: _told(content, "config", client=-1), "client -1"),
        (lambda content: _told(content, "config", format=99), 'field "format"'),
        (lambda content: _told(content, "metrics", items=41), "41 items, the server's has 40"),
        (lambda content: _told(content, "metrics", flops=0.0), "what cannot be"),
        (lambda content: _told(content, "metrics", flops=float("nan")), 'field "flops"'),
        (lambda content: _told(content, "metrics", users=0), "what cannot be"),
        (lambda content: _told(content, "metrics", slowness=0.5), "what cannot be"),
    ],
)
def test_a_node_that_does_not_say_who_it_is_is_left_out_and_named(greet, why: str):
    here = flower_world()
    here.grid.nodes.append(555)
    here.devices.partition[555] = 1
    here.devices.greet[555] = greet
    assert clients(here.round()) == [0, 1, 2, 3]
    assert why in here.fleet.crew.refused[555]
    here.grid.leave(101)
    here.clock.sleep(121.0)
    del here.devices.greet[555]
    assert idle(here) == [0, 1, 2, 3], "it has been set right, and is asked again"


def test_who_is_missing_at_the_start_is_named():
    here = flower_world()
    here.fleet.crew.clients = 6
    with pytest.raises(FleetError, match=r"4 of 6 clients are there after 30 s, missing: \[4, 5\].*partition-id"):
        here.fleet.crew.gather(30.0)


def test_a_newcomer_in_the_middle_of_a_run_takes_part():
    here = flower_world(takes=[2.0] * 4, gathered=False)  # as after a restart of the server
    late = here.grid.nodes.pop()
    assert clients(here.round()) == [0, 1, 2]
    here.grid.nodes.append(late)
    before, done = here.state, here.round()
    assert clients(done) == [0, 1, 2, 3] and same(here.state.model, here.merged(before, done.orders))


def test_with_nobody_there_the_server_waits_until_somebody_is():
    here = flower_world(takes=[2.0] * 4)
    for node in list(here.grid.nodes):
        here.grid.left[node] = here.clock() - 61.0
    sleep, came = here.clock.sleep, []

    def sleeping(seconds: float) -> None:
        sleep(seconds)
        if here.fleet.now() > 500.0 and not came:
            came.append(here.fleet.now())
            here.grid.left.clear()

    here.fleet.crew.nodes._sleep = sleeping
    done = here.round()
    assert clients(done) == [0, 1, 2, 3] and done.began == 0.0 and done.ended > 500.0
    assert clients(here.round()) == [0, 1, 2, 3]


def test_what_cannot_be_sent_is_lost_and_the_others_go_on():
    here = flower_world(takes=[2.0] * 4)
    here.grid.refusing.add(102)
    before, done = here.state, here.round()
    assert clients(done) == [0, 1, 3]
    assert [(lost.order.client, lost.reason) for lost in done.lost] == [(2, "failed")] and "could not be sent" in done.lost[
        0
    ].detail
    assert same(here.state.model, here.merged(before, [r.order for r in done.reports]))
    here.grid.refusing.clear()
    assert clients(here.round()) == [0, 1, 2, 3]
