"""Turning orders into updates on one machine: one client after another, or clients of equal width stacked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedprune.axes import Layout
from fedprune.exchange import Order, Updates
from fedprune.population import STACK, Population, Private, private_columns
from fedprune.random import keys
from fedprune.recommenders import Recommender
from fedprune.submodel import extract
from fedprune.training import masks, received, train
from fedprune.types import Tensors


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


Trainer = Callable[[Recommender, Population, Sequence[Order], Sequence[float]], list[Result]]
"""Trains orders (with the share of its work that each gets to) and returns results in the same order."""


Cut = Callable[[Order, Layout], Tensors]
"""Where an order's cut model comes from."""


def cut_here(order: Order, layout: Layout) -> Tensors:
    """Out of the full model, in this process."""
    return extract(order.model, layout, order.submodel)


def cut_already(order: Order, layout: Layout) -> Tensors:
    """By the server: the order holds what its client received."""
    return order.model


def one_by_one(
    recommender: Recommender,
    population: Population,
    orders: Sequence[Order],
    work: Sequence[float],
    cut: Cut = cut_here,
) -> list[Result]:
    """The reference: every client on its own."""
    pairs = zip(orders, work, strict=True)
    return [_train_stack(recommender, population, [order], [share], cut)[0] for order, share in pairs]


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
        groups: dict[tuple[int, bytes, int], list[int]] = {}
        for place, order in enumerate(orders):
            groups.setdefault((id(order.model), order.submodel.held_key, id(order.objective)), []).append(place)
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


def _train_stack(
    recommender: Recommender, population: Population, orders: list[Order], work: list[float], cut: Cut
) -> list[Result]:
    layout, first = recommender.layout, orders[0]
    tickets = [order.ticket for order in orders]
    share = None if all(w == 1.0 for w in work) else work
    examples = population.draw([o.client for o in orders], tickets, first.objective, first.seed, share)
    columns = private_columns(layout, first.submodel)
    private = population.take(examples.users, columns)
    submodels = tuple(order.submodel for order in orders)
    trained = train(
        recommender.score,
        layout,
        received(layout, cut(first, layout), examples),
        private,
        examples,
        first.objective,
        masks(layout, submodels),
        keys(first.seed, "shuffle", tickets) if first.objective.batch is not None else None,
    )
    updates = Updates(submodels, examples.rows, examples.present, trained.update)
    stack = Stack(population, examples.users, examples.real_users, columns, trained.private)
    counts, losses = examples.count.int().tolist(), trained.loss.tolist()
    return [Result(updates, place, counts[place], losses[place], stack) for place in range(len(orders))]
