"""A teacher's lists weigh the same however a client's examples are cut into steps, and whoever it shares a device with."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from world import ITEMS, USERS, World, close, finite, louder, order, world

from fedprune.distill import Distillation
from fedprune.exchange import Report
from fedprune.objective import Objective
from fedprune.population import private_columns
from fedprune.random import keys
from fedprune.submodel import Submodel
from fedprune.teaching import Teacher
from fedprune.training import received, train
from fedprune.types import Tensors

RANKING = Distillation("local", top=6, ranking=0.7, decay=3.0)
STILL = {"lr_private": 1e-12}


def asked(here: World, client: int, objective: Objective, ticket: int = 0) -> Report:
    here.fleet.send([replace(order(here, client, ticket), objective=objective)])
    report = here.fleet.next()
    assert isinstance(report, Report)
    return report


def table(report: Report, name: str) -> torch.Tensor:
    """An update of item rows, as a table of the whole catalogue; every row of a stack names another item."""
    stack, place = report.updates, report.position
    real = stack.present[place]
    result = torch.zeros(ITEMS, *stack.tensors[name].shape[2:])
    return result.index_add(0, stack.rows[place][real], stack.tensors[name][place][real])


@pytest.mark.parametrize("silo", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_minibatches_add_up_to_the_full_batch(silo: bool, weight: float):
    """So small a step that all gradients are taken at the same place."""
    owner = np.arange(USERS) // 2 if silo else None
    taught = replace(RANKING, weight=weight)
    updates = {}
    for batch in (None, 1, 4, 7):
        here = louder(world(client_of_user=owner))
        report = asked(here, 3, Objective(lr=1e-5, batch=batch, negatives=1, distillation=taught, **STILL))
        updates[batch] = {name: table(report, name) / 1e-5 for name in ("item_embedding", "item_bias")}
        assert updates[batch]["item_embedding"].any(1).sum() > 12
    for batch in (1, 4, 7):
        assert close(updates[batch], updates[None], atol=2e-3)
    unranked = Objective(lr=1e-5, negatives=1, distillation=replace(taught, ranking=0.0), **STILL)
    silent = asked(louder(world(client_of_user=owner)), 3, unranked)
    assert (table(silent, "item_bias") / 1e-5 - updates[None]["item_bias"]).abs().max() > 0.1, "the lists count"


@pytest.mark.parametrize("model", ["mf", "neumf"])
def test_a_silo_learns_what_its_users_would_learn_alone(model: str):
    """Ticket and user decide the negatives, so one step of users 4 and 9 of one silo is the sum of their own two."""
    objective = Objective(lr=0.1, negatives=1, distillation=RANKING)
    owner = np.arange(USERS) % 5 + 1
    owner[[4, 9]] = 0
    together = asked(louder(world(model=model, client_of_user=owner)), 0, objective, ticket=7)
    alone = [asked(louder(world(model=model)), user, objective, ticket=7) for user in (4, 9)]
    assert together.examples == sum(report.examples for report in alone)
    touched = [name for name in together.updates.tensors if name.startswith("item")]
    assert len(touched) == {"mf": 2, "neumf": 3}[model]
    for name in touched:
        torch.testing.assert_close(table(together, name), sum(table(report, name) for report in alone), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fleet", ["serial", "vector"])
def test_a_step_of_nothing_but_listed_items_is_a_step(fleet: str):
    """Losses are numbers, and the private optimiser counts every example, listed or not."""
    here = louder(world(fleet=fleet))
    objective = Objective(lr=0.1, batch=1, negatives=1, distillation=Distillation("local", 0.5, top=12))
    here.fleet.send([replace(order(here, client, client), objective=objective) for client in range(USERS)])
    reports: dict[int, Report] = {}
    while (report := here.fleet.next()) is not None:
        assert isinstance(report, Report)
        reports[report.order.client] = report
    losses = [reports[client].loss for client in range(USERS)]
    assert all(math.isfinite(loss) and loss >= 0 for loss in losses)
    assert 0.0 in losses and max(losses) > 0, "some began with a listed item, which has no loss of its own"
    assert finite(here.private)
    for client, report in reports.items():
        assert here.population.private.steps[client] == report.examples + min(12, ITEMS - report.examples)


def two_steps(seed: int, **objective: Any) -> tuple[Tensors, Tensors, torch.Tensor, list[float]]:
    """One example and one listed item, a step each, in an order that follows from the seed; the teacher has nothing to say."""
    here = louder(world())
    what, taught = here.fleet.recommender, Distillation("local", top=1)
    full = Submodel.full(what.layout)
    teacher = Teacher(what, here.state.model, here.private, full)
    drawn = here.population.draw([5], [0], Objective(negatives=1), 1, lister=teacher.lister(1))
    assert drawn.rank is not None
    own, listed = 0, int(drawn.rank[0].argmax())
    picked = {n: getattr(drawn, n)[:, [own, listed]] for n in ("rows", "present", "label", "weight", "age", "rank")}
    examples = replace(drawn, **picked)
    examples = replace(examples, lesson=teacher.lesson(taught, examples))
    private = here.population.take(examples.users, private_columns(what.layout, full))
    done = train(
        what, received(what.layout, here.state.model, examples), private, examples,
        Objective(lr=0.5, batch=1, distillation=taught, **objective), key=keys(seed, "shuffle", [0]),
    )  # fmt: skip
    moved = {name: done.private.values[name] - private.values[name] for name in private.values}
    return done.update, moved, done.private.steps, done.loss.tolist()


def test_listed_items_pull_back_and_go_on():
    """Whose own example comes first is pulled back by its listed item's step, by lr * mu of the way; the other not yet."""
    seen: Counter[str] = Counter()
    first = next(two_steps(seed, **STILL) for seed in range(50) if two_steps(seed, **STILL)[3][0] > 0)[0]
    for seed in range(8):
        update, _, steps, (loss,) = two_steps(seed, proximal=0.4, **STILL)
        factor = 1.0 if loss == 0.0 else 1 - 0.5 * 0.4
        seen["listed first" if loss == 0.0 else "listed last"] += 1
        for name, expected in first.items():
            torch.testing.assert_close(update[name], factor * expected, atol=1e-6, rtol=1e-4)
        assert first["item_embedding"][0, 0].any() and not first["item_embedding"][0, 1].any()
        assert steps.flatten().tolist() == [2.0]
    assert len(seen) == 2
    moved = {loss[0] == 0.0: moved for _, moved, _, loss in (two_steps(seed) for seed in range(8))}
    for rows in moved.values():
        assert rows["user_embedding"].abs().max() > 0.02, "more than one step of Adam at .02"
