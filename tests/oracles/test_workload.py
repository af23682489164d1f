"""What teachers, narrower selves and masks cost, by pencil, and where a run's books show it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from world import ITEMS, LATENT, USERS, order, recommender, silos_of_three, train, world

from fedprune.codec import Codec, sizes
from fedprune.data import silos
from fedprune.distill import Distillation
from fedprune.exchange import Report
from fedprune.objective import Objective
from fedprune.pruning import Leading
from fedprune.rates import EqualTime
from fedprune.record import ledger_rows, line
from fedprune.strategy import Strategy
from fedprune.submodel import Submodel
from fedprune.workload import Workload, workload

LAYOUT = recommender("mf").layout
HALF = Leading().carve({}, LAYOUT, 0, 0, 0.5)
"""4 of 8 units: a row is 4 + 1 entries, an example 2 * 4 + 1 = 9 FLOPs forward and as many twice backward."""
ROW, FULL_ROW = 4 * 5, 4 * 9


def load(submodel: Submodel = HALF, rows: int = ITEMS, listed: int = 0, **objective: Any) -> Workload:
    return workload(LAYOUT, submodel, Objective(**objective), Codec(), examples=30.0, listed=listed, rows=rows, items=ITEMS)


def test_a_plain_order():
    assert load() == Workload(30 * 27, 0.0, 40 * ROW, 40 * ROW, 40 * 5)
    assert load(rows=7) == Workload(30 * 27, 0.0, 7 * ROW, 7 * ROW, 7 * 5)
    assert load(epochs=3, private_steps=2).training == 30 * 3 * (27 + 2 * 18)


@pytest.mark.parametrize(
    ("teacher", "flops", "down"),
    [
        ("local", (30 + 10 + 2 * 40) * 17, 40 * FULL_ROW),  # two users' catalogues, and every example once
        ("sent", 0, 40 * ROW + 4 * 40 + 4 * 10),  # a score per example, and the items on the lists
        ("given", (30 + 10 + 2 * 40) * 17, 40 * ROW),
    ],
)
def test_a_teacher_with_lists(teacher: Any, flops: float, down: int):
    """Two users with lists of five: ten further examples."""
    got = load(listed=10, distillation=Distillation(teacher, 0.5, top=5), epochs=2)
    assert got == Workload(2 * 40 * 27, flops, down, 40 * ROW, 40 * 5)


@pytest.mark.parametrize(("teacher", "flops"), [("local", 30 * 17), ("past", 30 * 9), ("sent", 0), ("given", 30 * 17)])
def test_a_teacher_without_lists_scores_each_example_once(teacher: Any, flops: float):
    assert load(distillation=Distillation(teacher, 0.5), epochs=2).teacher == flops


def test_who_lists_items_needs_the_whole_table():
    """However few rows of it are trained; without lists the teacher needs no more than the student."""
    given = {"rows": 7, "listed": 10}
    assert load(**given, distillation=Distillation("local", 0.5, top=5)).down == 40 * FULL_ROW
    assert load(**given, distillation=Distillation("local", 0.5, top=5)).up == 7 * ROW
    assert load(rows=7, distillation=Distillation("local", 0.5)).down == 7 * FULL_ROW
    for teacher in ("sent", "given"):
        assert load(**given, distillation=Distillation(teacher, 0.5, top=5)).down < 40 * ROW
    here = world()
    objective = Objective(negatives=1, distillation=Distillation("local", 0.5, top=2))
    here.fleet.send([replace(order(here, 0, 0), codec=Codec("touched"), objective=objective)])
    cost = here.fleet.next().cost
    touched = here.population.examples_of_client(objective)[0] + 2
    assert touched < ITEMS and (cost.bytes_down, cost.bytes_up) == (ITEMS * FULL_ROW, touched * FULL_ROW)


@pytest.mark.parametrize("silo", [False, True])
def test_a_gate_is_one_more_pass_and_one_row_per_user(silo: bool):
    assert load(gate=True).training == 30 * (27 + 9) and load(gate=True, epochs=2).training == 30 * (2 * 27 + 9)
    assert replace(load(gate=True), training=load().training) == load()
    population = world(**({"client_of_user": np.arange(USERS) // 2} if silo else {})).population
    plain, judged = (population.rows_of_client(Objective(negatives=1, gate=gate)) for gate in (False, True))
    users = np.array([len(users) for users in population.users_of])
    assert judged.tolist() == np.minimum(plain + users, ITEMS).tolist() and (judged > plain).any()


@pytest.mark.parametrize("teacher", ["local", "sent"])
def test_equal_work_is_the_same_for_everybody(teacher: Any):
    """Also the list, of the average client's users, whoever of two silos of unequal size is asked first."""
    owner = silos(train(), 5, by="quantity", seed=3)
    objective, costs = Objective(distillation=Distillation(teacher, 0.5, top=5)), []
    for clients in (range(5), reversed(range(5))):
        here = world(client_of_user=owner, workload="equal")
        orders = [replace(order(here, client, client), objective=objective) for client in clients]
        here.fleet.send([replace(o, codec=Codec("touched")) for o in orders])
        reports = [here.fleet.next() for _ in orders]
        costs += [(r.cost.flops, r.cost.bytes_down, r.cost.bytes_up) for r in reports if isinstance(r, Report)]
    population = here.population
    assert len({len(users) for users in population.users_of}) > 1
    expected = workload(
        LAYOUT, Submodel.full(LAYOUT), objective, Codec(), examples=population.examples_of_client(objective).mean(),
        listed=round(5 * USERS / 5), rows=round(population.rows_of_client(objective).mean()), items=ITEMS,
    )  # fmt: skip
    assert len(costs) == 10 and set(costs) == {(expected.training + expected.teacher, expected.down, expected.up)}


def test_a_narrower_self_is_one_more_pass_at_its_width():
    assert load(nested=0.5, epochs=2).training == 30 * 2 * (27 + 3 * (2 * 2 + 1))
    assert load(nested=0.5, narrower=0.1).training == 30 * (27 + 3 * (2 * 1 + 1)), "at least one unit"
    assert load(nested=0.5).down == load().down and load(nested=0.5).up == load().up


def test_masks_travel_as_bits_and_save_no_time():
    """Half of the held entries of 40 rows of 4 units, 80 of 160: 160 bits down."""
    there = np.tile([True, False], (ITEMS, LATENT // 2))
    masked = Submodel(HALF.held, HALF.trained, {"item_embedding": there})
    assert load(masked) == Workload(30 * 27, 0.0, 4 * (80 + 40) + 20, 4 * (80 + 40), 80 + 40)
    through = Submodel(HALF.held, HALF.trained, {"item_embedding": there}, through=True)
    assert load(through) == Workload(30 * 27, 0.0, 4 * (80 + 40) + 20, 40 * ROW, 80 + 40)
    assert sizes(LAYOUT, masked, 10).down == 4 * (20 + 10) + 5, "ten rows, of average density"
    taught = load(masked, distillation=Distillation("local", 0.5))
    assert taught.down == 40 * FULL_ROW + 20, "the whole model teaches, and the mask says what of it is the student's"


def by_client(distillation: Distillation | None, **settings: Any) -> tuple[dict[int, Report], Any]:
    here = world(Strategy(pruning=Leading(), rates=HalfRate(), objective=Objective(distillation=distillation)), **settings)
    done = here.round()
    return {report.order.client: report for report in done.reports}, (here, done)


class HalfRate:
    """Everybody at half width."""

    def propose(self, memory, clients, roster, offer):
        return np.full(len(clients), 0.5)

    def learn(self, memory, reports, lost, population, offer):
        return memory

    def forecast(self, memory, population):
        return None


@pytest.mark.parametrize("silo", [False, True])
def test_the_ledger_of_a_teacher_on_the_device(silo: bool):
    owner = {"client_of_user": silos_of_three()} if silo else {}
    taught, (here, done) = by_client(Distillation("local", 0.5, top=5), **owner)
    plain, _ = by_client(None, **owner)
    devices, population = here.fleet.devices, here.population
    for client, report in taught.items():
        users, cost = len(population.users_of[client]), report.cost
        scored = plain[client].examples + 5 * users + ITEMS * users
        assert cost.seconds.teacher == pytest.approx(scored * 17 / devices.flops[client])
        assert cost.joules.teacher == pytest.approx(cost.seconds.teacher * devices.watts_training[client])
        assert cost.seconds.training == pytest.approx((plain[client].examples + 5 * users) * 27 / devices.flops[client])
        assert (cost.bytes_down, cost.bytes_up) == (ITEMS * FULL_ROW, ITEMS * ROW)
        assert plain[client].cost.bytes_down == ITEMS * ROW and plain[client].cost.seconds.teacher == 0
    rows = ledger_rows(done)
    assert (
        rows["seconds_teacher"] == [report.cost.seconds.teacher for report in done.reports] and min(rows["joules_teacher"]) > 0
    )
    event = line(done)
    assert event["seconds"]["teacher"] == pytest.approx(sum(rows["seconds_teacher"]))
    assert event["bytes_down"] == len(taught) * ITEMS * FULL_ROW


def test_lessons_that_are_sent_cost_bytes_and_no_time():
    sent, (here, _) = by_client(Distillation("sent", 0.5, top=5))
    plain, _ = by_client(None)
    for client, report in sent.items():
        more = report.cost.bytes_down - plain[client].cost.bytes_down
        assert more == 4 * (plain[client].examples + 5) + 4 * 5
        assert report.cost.seconds.teacher == 0 and report.cost.joules.teacher == 0
        assert report.cost.seconds.download == pytest.approx(report.cost.bytes_down / here.fleet.devices.bytes_down[client])


def test_rates_are_learned_from_times_with_the_teacher_in_them():
    """EqualTime's first target is the fastest client's whole order, so a slow teacher makes it longer."""
    targets = []
    for distillation in (None, Distillation("local", 0.5, top=5)):
        strategy = Strategy(rates=EqualTime(interval=1), pruning=Leading(), objective=Objective(distillation=distillation))
        here = world(strategy)
        done = here.round()
        seconds = [report.cost.seconds for report in done.reports]
        targets.append(float(here.state.rates["target"]))
        assert targets[-1] == min(s.total for s in seconds)
        for report in done.reports:  # one step by the ratio of times, at most by a fifth of it
            ideal = np.clip(targets[-1] / report.cost.seconds.total, 0.2, 1.0)
            assert abs(here.state.rates["rate"][report.order.client] - ideal) <= 1 / 16 + 1e-6 or ideal > 0.95
    assert targets[1] > 1.3 * targets[0]
