"""Turning orders into updates on one machine: one client after another, or clients of equal width stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedprune.axes import Layout
from fedprune.errors import FleetError
from fedprune.exchange import Order, Updates
from fedprune.objective import Objective
from fedprune.population import STACK, Lister, Population, Private, private_columns
from fedprune.random import keys
from fedprune.recommenders import Recommender
from fedprune.submodel import Submodel, extract
from fedprune.teaching import Teacher, gates
from fedprune.training import entry_masks, masks, narrower, received, train
from fedprune.types import IntArray, Tensors


@dataclass(frozen=True)
class Stack:
    """Private rows of a trained stack, to be written back for each of its clients when that client has finished."""

    population: Population
    users: Tensor
    real: Tensor
    columns: dict[str, tuple[Tensor, ...]]
    trained: Private

    def settle(self, places: list[int]) -> None:
        """Write back the rows of these clients."""
        real = self.real
        if len(places) < len(real):
            real = torch.zeros_like(real)
            real[places] = self.real[places]
        self.population.put(self.users, self.columns, self.trained, real)


@dataclass(frozen=True)
class Result:
    """A trained order, before it has arrived: the private rows take effect when it does."""

    updates: Updates
    position: int
    examples: int
    loss: float
    stack: Stack
    gate: float | None = None


Trainer = Callable[[Recommender, Population, Sequence[Order], Sequence[float]], list[Result]]
"""Trains orders (with the share of its work that each gets to) and returns results in the same order."""


Cut = Callable[[Order, Layout], Tensors]
"""Where an order's cut model comes from."""


Watch = Callable[[], AbstractContextManager[object]]
"""Entered whenever the teacher is at work, for whoever measures its time apart from the training's."""


def cut_here(order: Order, layout: Layout) -> Tensors:
    """Out of the full model, in this process."""
    return extract(order.model, layout, order.submodel.units)


def cut_already(order: Order, layout: Layout) -> Tensors:
    """By the server: the order holds what its client received, which is the whole model where that is to teach."""
    return cut_here(order, layout) if teaches(order.objective) else order.model


def one_by_one(
    recommender: Recommender,
    population: Population,
    orders: Sequence[Order],
    work: Sequence[float],
    cut: Cut = cut_here,
    watch: Watch = nullcontext,
) -> list[Result]:
    """The reference: every client on its own."""
    pairs = zip(orders, work, strict=True)
    return [_train_stack(recommender, population, [order], [share], cut, watch)[0] for order, share in pairs]


@dataclass(frozen=True)
class Stacked:
    """Clients that hold the same units of the same version train together; the arithmetic per client is unchanged.

    Attributes:
        examples: a stack grows until it has about so many padded examples; the working set should stay in the cache.
    """

    examples: int = STACK
    cut: Cut = cut_here

    def __call__(
        self, recommender: Recommender, population: Population, orders: Sequence[Order], work: Sequence[float]
    ) -> list[Result]:
        """Group by what is held, sort by examples (little padding then), cut into stacks."""
        groups: dict[tuple, list[int]] = {}
        for place, order in enumerate(orders):
            alike = id(order.model), order.version, order.submodel.units_key, order.submodel.through, id(order.objective)
            groups.setdefault(alike, []).append(place)
        results: list[Result | None] = [None] * len(orders)
        for places in groups.values():
            clients = [orders[place].client for place in places]
            for members in population.stacks(clients, orders[places[0]].objective, self.examples):
                stack = [places[member] for member in members]
                own, shares = [orders[p] for p in stack], [work[p] for p in stack]
                trained = _train_stack(recommender, population, own, shares, self.cut)
                for place, result in zip(stack, trained, strict=True):
                    results[place] = result
        return [result for result in results if result is not None]


def teaches(objective: Objective) -> bool:
    """Whether the whole model goes to the client, as a teacher of the submodel that is cut out of it there."""
    return objective.distillation is not None and objective.distillation.teacher in ("local", "sent")


def _teacher(recommender: Recommender, population: Population, order: Order) -> Teacher | None:
    """A whole model that teaches; None without one (the client's past self is known when its cut is).

    Raises:
        FleetError: the teacher should be one from elsewhere, and there is none.
    """
    full = Submodel.full(recommender.layout)
    if teaches(order.objective):
        return Teacher(recommender, order.model, population.private.values, full)
    if order.objective.distillation is None or order.objective.distillation.teacher != "given":
        return None
    if population.teacher is None:
        raise FleetError('teacher "given": nobody gave one; it is for compressing a model that is trained already')
    return Teacher(recommender, *population.teacher, full)


def _watched(lister: Lister, watch: Watch) -> Lister:
    def listed(users: IntArray, barred: Tensor) -> tuple[Tensor, Tensor]:
        with watch():
            return lister(users, barred)

    return listed


def _train_stack(
    recommender: Recommender,
    population: Population,
    orders: list[Order],
    work: list[float],
    cut: Cut,
    watch: Watch = nullcontext,
) -> list[Result]:
    layout, first = recommender.layout, orders[0]
    objective, tickets = first.objective, [order.ticket for order in orders]
    submodels = tuple(order.submodel for order in orders)
    share = None if all(w == 1.0 for w in work) else work
    teacher, distillation = _teacher(recommender, population, first), objective.distillation
    lister = _watched(teacher.lister(distillation.top), watch) if teacher and distillation and distillation.top else None
    examples = population.draw([o.client for o in orders], tickets, objective, first.seed, share, lister)
    columns = private_columns(layout, first.submodel)
    private = population.take(examples.users, columns)
    whole = cut(first, layout)
    entries = entry_masks(layout, submodels, examples.rows)
    model = received(layout, whole, examples, entries)
    if distillation is not None:
        teacher = teacher or Teacher(recommender, whole, population.private.values, first.submodel, entries)
        with watch():
            examples = replace(examples, lesson=teacher.lesson(distillation, examples))
    gate = gates(recommender, population, submodels, whole, model, private.values, examples) if objective.gate else None
    chance = recommender.chance
    trained = train(
        recommender,
        model,
        private,
        examples,
        objective,
        masks(layout, submodels, entries),
        keys(first.seed, "shuffle", tickets) if objective.batch is not None else None,
        seen=entries if first.submodel.through else {},
        chance={} if chance is None else chance(first.version, keys(first.seed, "chance", tickets), examples.rows, model),
        narrow=narrower(layout, first.submodel, objective.narrower) if objective.nested else {},
    )
    updates = Updates(submodels, examples.rows, examples.present, trained.update)
    stack = Stack(population, examples.users, examples.real_users, columns, trained.private)
    counts, losses = examples.count.int().tolist(), trained.loss.tolist()
    judged = [None] * len(orders) if gate is None else gate.tolist()
    return [Result(updates, place, counts[place], losses[place], stack, judged[place]) for place in range(len(orders))]
