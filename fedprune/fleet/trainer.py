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
from fedprune.population import STACK, Examples, Lister, Population, Private, private_columns
from fedprune.precision import Rounded, nearest, stochastic
from fedprune.random import keys
from fedprune.recommenders import Recommender
from fedprune.submodel import Submodel, extract
from fedprune.teaching import Teacher, gates
from fedprune.thinning import thinned
from fedprune.training import entry_masks, masks, narrower, received, train
from fedprune.types import IntArray, Tensors, Ticket


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
"""What an order's client receives: the units that it holds, or the whole model where that is to teach (`teaches`)."""


Watch = Callable[[], AbstractContextManager[object]]
"""Entered whenever the teacher is at work, for whoever measures its time apart from the training's."""


CUTS = 8
"""Cuts that are remembered: one for each of the usual rates."""


def cut_here(order: Order, layout: Layout) -> Tensors:
    """Cut in this process, and rounded as on its way."""
    cut = order.model if teaches(order.objective) else extract(order.model, layout, order.submodel.units)
    return nearest(layout, cut).tensors if order.codec.precision == "int8" else cut


def cut_already(order: Order, layout: Layout) -> Tensors:
    """Cut by the server: the order holds what its client received."""
    return order.model


def once_each(cut: Cut) -> Cut:
    """The same for all orders to which the same goes, for as long as somebody holds on to their models."""
    known: dict[tuple, Tensors] = {}

    def remembered(order: Order, layout: Layout) -> Tensors:
        what = b"" if teaches(order.objective) else order.submodel.units_key
        key = id(order.model), what, order.codec.precision
        if key not in known:
            if len(known) == CUTS:
                del known[next(iter(known))]
            known[key] = cut(order, layout)
        return known[key]

    return remembered


def one_by_one(
    recommender: Recommender,
    population: Population,
    orders: Sequence[Order],
    work: Sequence[float],
    cut: Cut = cut_here,
    watch: Watch = nullcontext,
) -> list[Result]:
    """The reference: every client on its own."""
    cut, pairs = once_each(cut), zip(orders, work, strict=True)
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
            what = order.submodel
            alike = id(order.model), id(order.rest), order.version, what.units_key, what.through, order.objective, order.codec
            groups.setdefault(alike, []).append(place)
        results: list[Result | None] = [None] * len(orders)
        cut = once_each(self.cut)
        for places in groups.values():
            clients = [orders[place].client for place in places]
            for members in population.stacks(clients, orders[places[0]].objective, self.examples):
                stack = [places[member] for member in members]
                own, shares = [orders[p] for p in stack], [work[p] for p in stack]
                trained = _train_stack(recommender, population, own, shares, cut)
                for place, result in zip(stack, trained, strict=True):
                    results[place] = result
        return [result for result in results if result is not None]


def teaches(objective: Objective) -> bool:
    """Whether the whole model goes to the client, as a teacher of the submodel that is cut out of it there."""
    return objective.distillation is not None and objective.distillation.teacher in ("local", "sent")


def _teacher(recommender: Recommender, population: Population, order: Order, arrived: Tensors) -> Teacher | None:
    """A whole model that teaches; None without one (the client's past self is known when its cut is).

    Args:
        arrived: what the order's client received.

    Raises:
        FleetError: the teacher should be one from elsewhere, and there is none.
    """
    full = Submodel.full(recommender.layout)
    if teaches(order.objective):
        return Teacher(recommender, arrived, population.private.values, full)
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
    arrived = cut(first, layout)
    whole = extract(arrived, layout, first.submodel.units) if teaches(objective) else arrived
    teacher, distillation = _teacher(recommender, population, first, arrived), objective.distillation
    lister = _watched(teacher.lister(distillation.top), watch) if teacher and distillation and distillation.top else None
    examples = population.draw([o.client for o in orders], tickets, objective, first.seed, share, lister)
    columns = private_columns(layout, first.submodel)
    private = population.take(examples.users, columns)
    entries = entry_masks(layout, submodels, examples.rows)
    model, trainable = received(layout, whole, examples, entries), masks(layout, submodels, entries)
    if first.rest is not None:  # what is not trained is from the client's cache
        kept = received(layout, cut(replace(first, model=first.rest), layout), examples, entries)
        model = {n: torch.where(trainable[n].bool(), t, kept[n]) if n in trainable else t for n, t in model.items()}
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
        trainable,
        keys(first.seed, "shuffle", tickets) if objective.batch is not None else None,
        seen=entries if first.submodel.through else {},
        chance={} if chance is None else chance(first.version, keys(first.seed, "chance", tickets), examples.rows, model),
        narrow=narrower(layout, first.submodel, objective.narrower) if objective.nested else {},
    )
    sent = _sent(layout, first, examples, trained.update, tickets)
    updates = Updates(submodels, examples.rows, examples.present, sent.tensors, sent.scales)
    stack = Stack(population, examples.users, examples.real_users, columns, trained.private)
    counts, losses = examples.count.int().tolist(), trained.loss.tolist()
    judged = [None] * len(orders) if gate is None else gate.tolist()
    return [Result(updates, place, counts[place], losses[place], stack, judged[place]) for place in range(len(orders))]


def _sent(layout: Layout, order: Order, examples: Examples, update: Tensors, tickets: list[Ticket]) -> Rounded:
    """Updates as they arrive, by the codec that a stack's orders share; rows that are not drawn stay there, as zeros."""
    codec, rows = order.codec, examples.rows
    if codec.sampled < 1:
        update = thinned(layout, update, rows, examples.present, codec.sampled, order.seed, tickets)
    if codec.precision == "int8":
        return stochastic(layout, update, rows, order.seed, tickets)
    return Rounded(update, {})
