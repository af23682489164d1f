"""What a submodel costs, by pencil: FLOPs and bytes of one network, seconds and joules of two devices."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
from world import order, world

from fedprune.codec import Codec
from fedprune.devices import DEVICES, DeviceTable, FullReport, disturbed, linear, named, phones
from fedprune.distill import Distillation
from fedprune.errors import ConfigError
from fedprune.exchange import PARTS, Cost, Lost, Split
from fedprune.objective import Objective
from fedprune.pruning import Leading
from fedprune.recommenders import neumf

NET = neumf(users=5, items=10, latent=4, hidden=(6, 2)).layout


@pytest.mark.parametrize(
    ("rate", "forward", "shared", "per_row"),
    [
        # item rows 2*4 + 2*4 + 1; hidden1 2*6*8 + 6; hidden2 2*2*6 + 2; output 2*(4+2)
        (1.0, 17 + 102 + 26 + 12, 48 + 6 + 12 + 2 + 6, 4 + 4 + 1),
        # item rows 2*2 + 2*2 + 1; hidden1 2*3*4 + 3; hidden2 2*1*3 + 1; output 2*(2+1)
        (0.5, 9 + 27 + 7 + 6, 12 + 3 + 3 + 1 + 3, 2 + 2 + 1),
    ],
)
def test_work_and_bytes_of_a_network(rate: float, forward: float, shared: int, per_row: int):
    widths = NET.widths(rate)
    work = NET.work(widths, widths)
    assert (work.forward, work.backward_inputs, work.backward_weights) == (forward,) * 3
    assert work.total == 3 * forward
    assert NET.parameters(widths, rows=10) == shared + 10 * per_row
    assert NET.bytes(widths, rows=7) == 4 * (shared + 7 * per_row)


def test_a_window_saves_the_weight_gradient_alone():
    work = NET.work(NET.full, NET.widths(0.5))
    assert (work.forward, work.backward_inputs, work.backward_weights) == (157, 157, 49)


def table(**settings: float) -> DeviceTable:
    two = np.array([1.0, 2.0])
    return DeviceTable(
        "two", 100 * two, 10 * two, 5 * two, 1.0 * two, 3.0 * two, 2.0 * two, slowness=np.array([2.0, 1.0]), **settings
    )


def test_seconds_and_joules_of_a_device():
    clients = np.array([1, 0])
    costs = table().costs(clients, [0, 1], np.array([400.0, 400.0]), np.array([40.0, 40.0]), np.array([20.0, 20.0]), [7, 8])
    fast, slow = costs
    assert (slow.seconds.download, slow.seconds.training, slow.seconds.teacher, slow.seconds.upload) == (4, 4, 0, 4)
    assert (slow.joules.download, slow.joules.training, slow.joules.upload) == (8, 12, 8)
    assert (fast.seconds.download, fast.seconds.training, fast.seconds.upload) == (2, 2, 2)
    assert (fast.joules.download, fast.joules.training, fast.joules.upload) == (8, 12, 8)
    assert (fast.bytes_down, fast.bytes_up, fast.flops, fast.parameters) == (40, 20, 400.0, 7)
    assert (slow.watts_waiting, fast.watts_waiting, fast.source) == (1.0, 2.0, "modelled")
    assert slow.seconds.total == 12 and slow.joules.total == 28


def test_noise_is_lognormal_and_multiplies_the_whole_order():
    many = 4000
    ones = np.ones(many)
    costs = table(noise=0.3).costs(np.zeros(many, int), range(many), 400 * ones, 40 * ones, 20 * ones, [1] * many)
    factor = np.array([cost.seconds.total / 12 for cost in costs])
    assert np.log(factor).mean() == pytest.approx(0.0, abs=0.02) and np.log(factor).std() == pytest.approx(0.3, abs=0.015)
    assert all(cost.seconds.download == pytest.approx(cost.seconds.training) for cost in costs[:50])


def test_dropout_and_availability_happen_as_often_as_they_say():
    many = 4000
    unlucky = table(dropout=0.25).drops_out(range(many))
    shares = np.array([share for share in unlucky if share is not None])
    assert len(shares) / many == pytest.approx(0.25, abs=0.03)
    assert shares.min() >= 0 and shares.max() < 1 and shares.mean() == pytest.approx(0.5, abs=0.03)
    there = disturbed(table(), availability=0.3)
    online = [len(there.reachable(np.arange(100), 60.0 * slot)) for slot in range(40)]
    assert np.mean(online) == pytest.approx(30, abs=2.5)
    assert there.reachable(np.arange(100), 61.0).tolist() == there.reachable(np.arange(100), 119.0).tolist()


def test_the_linear_table_spreads_slowness_evenly():
    devices = linear(10, 10.0, FullReport(3000.0, 800.0, 400.0), device_class="balanced", report_seconds=20.0)
    assert sorted(devices.slowness) == pytest.approx(np.arange(1, 11))
    fastest, slowest = int(devices.slowness.argmin()), int(devices.slowness.argmax())
    both = np.array([fastest, slowest])
    fast, slow = devices.costs(both, [0, 1], np.full(2, 3000.0), np.full(2, 800.0), np.full(2, 400.0), [1, 1])
    assert (fast.seconds.download, fast.seconds.training, fast.seconds.upload) == pytest.approx((5, 10, 5))
    assert slow.seconds.total == pytest.approx(200)


def test_named_devices_come_in_the_proportions_of_the_mix():
    average = FullReport(1e9, 1e6, 1e6)
    devices = named({"raspberry-pi-4": 3, "jetson-nano": 1}, 40, average)
    assert (devices.flops == DEVICES["raspberry-pi-4"].flops).sum() == 30
    assert devices.slowness.min() == 1.0
    pi, jetson = (DEVICES[n] for n in ("raspberry-pi-4", "jetson-nano"))
    seconds = [1e9 / d.flops + 1e6 / d.bytes_down + 1e6 / d.bytes_up for d in (pi, jetson)]
    assert devices.slowness.max() == pytest.approx(seconds[0] / seconds[1])
    with pytest.raises(ConfigError, match="unknown device"):
        named({"raspberry": 1}, 4, average)


def test_phones_follow_the_digitised_table():
    shape = json.loads((resources.files("fedprune") / "phones.json").read_text())
    devices = phones(4000, FullReport(1e9, 1e6, 1e6))
    milliseconds = 0.6e9 / devices.flops * 1e3
    assert np.median(milliseconds) == pytest.approx(np.interp(0.5, shape["p"], shape["computation_ms"]), rel=0.15)
    assert devices.slowness.min() == 1.0


def test_an_order_costs_what_its_submodel_and_its_examples_cost():
    here = world(fleet="serial")
    layout, devices, population = here.state.layout, here.fleet.devices, here.population
    for ticket, rate in enumerate((1.0, 0.5)):
        submodel = Leading().carve({}, layout, 0, 0, rate)
        here.fleet.send([order(here, 6, ticket, submodel=submodel, epochs=2, private_steps=3)])
        cost = here.fleet.next().cost
        widths = layout.widths(rate)
        positives = len(here.population.positives[population.starts[6] : population.starts[7]])
        examples = positives + min(4 * positives, 40 - positives)
        forward = 2 * 8 * rate + 1
        assert cost.flops == 2 * examples * (3 * forward + 3 * 2 * forward)
        assert cost.bytes_down == cost.bytes_up == 4 * 40 * (widths["latent"] + 1)
        assert cost.seconds.training == pytest.approx(cost.flops / devices.flops[6])
        assert cost.seconds.upload == pytest.approx(cost.bytes_up / devices.bytes_up[6])


def test_touched_rows_cost_only_themselves():
    here = world(fleet="serial")
    here.fleet.send([replace(order(here, 6, 0), codec=Codec("touched"))])
    cost = here.fleet.next().cost
    assert cost.bytes_up == 4 * 9 * here.population.rows_of_client(Objective())[6]


@pytest.mark.parametrize(
    ("after", "spent", "flops"),
    [
        (4.0, (4, 0, 0, 0, 0), 0.0),
        (12.0, (10, 2, 0, 0, 0), 0.0),
        (25.0, (10, 5, 10, 0, 0), 10 / 60),  # in the teacher's part: nothing is trained yet
        (35.0, (10, 5, 20, 0, 0), 20 / 60),
        (55.0, (10, 5, 20, 20, 0), 40 / 60),
        (79.0, (10, 5, 20, 40, 4), 1.0),
        (90.0, (10, 5, 20, 40, 8), 1.0),
    ],
)
def test_who_vanishes_has_done_what_comes_first(after: float, spent: tuple[float, ...], flops: float):
    """Download, loading, the teacher, training, upload; 60 of the 83 seconds compute."""
    assert PARTS == ("download", "loading", "teacher", "training", "upload")
    seconds = Split(10.0, 40.0, 20.0, 8.0, 5.0)
    joules = Split(*(3 * getattr(seconds, part) for part in ("download", "training", "teacher", "upload", "loading")))
    cut = Cost(seconds, joules, 1000, 800, 6e9, 7).cut_off(after)
    assert tuple(getattr(cut.seconds, part) for part in PARTS) == pytest.approx(spent)
    assert cut.joules is not None
    assert tuple(getattr(cut.joules, part) for part in PARTS) == pytest.approx(tuple(3 * value for value in spent))
    assert cut.flops == pytest.approx(6e9 * flops)
    assert cut.bytes_down == pytest.approx(1000 * spent[0] / 10) and cut.bytes_up == pytest.approx(800 * spent[4] / 8)


def test_who_vanishes_while_the_teacher_talks_has_not_trained():
    here = world(dropout=0.999)
    objective = Objective(distillation=Distillation("local", 0.5, top=5))
    orders = [replace(order(here, client, client), objective=objective) for client in range(here.population.clients)]
    whole = world()
    for fleet in (here.fleet, whole.fleet):
        fleet.send(orders)
    full = {event.order.client: event.cost for event in iter(whole.fleet.next, None)}
    kinds = set()
    for event in iter(here.fleet.next, None):
        assert isinstance(event, Lost)
        spent, asked = event.cost, full[event.order.client]
        kinds.add((spent.seconds.teacher > 0, spent.seconds.training > 0))
        computed = spent.seconds.teacher + spent.seconds.training
        assert spent.flops == pytest.approx(computed * here.fleet.devices.flops[event.order.client])
        assert not spent.seconds.training or spent.seconds.teacher == asked.seconds.teacher
    assert kinds >= {(True, False), (True, True)}


def test_impossible_tables_are_refused():
    for settings in ({"availability": 0.0}, {"dropout": 1.0}, {"noise": 3.0}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            table(**settings)
    with pytest.raises(ConfigError, match="at least 1"):
        linear(3, 0.5, FullReport(1, 1, 1))
    with pytest.raises(ConfigError, match="unknown device class"):
        linear(3, 2.0, FullReport(1, 1, 1), device_class="bound")
