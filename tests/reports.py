"""Orders and reports written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedprune.axes import Layout
from fedprune.codec import Codec
from fedprune.exchange import Cost, Order, Report, Split, Updates
from fedprune.objective import Objective
from fedprune.submodel import Submodel
from fedprune.types import Tensors

NOTHING = Updates((), torch.zeros(0, 0).long(), torch.zeros(0, 0).bool(), {})


def report(
    updates: Updates,
    position: int = 0,
    *,
    ticket: int = 0,
    client: int = 0,
    rate: float = 1.0,
    examples: int = 1,
    seconds: float = 1.0,
    staleness: int = 0,
) -> Report:
    """A report of which only what the caller says matters."""
    submodel = updates.submodels[position] if updates.submodels else Submodel({})
    order = Order(ticket, client, 0, rate, submodel, Objective(), Codec(), {}, 0)
    cost = Cost(Split(0.0, seconds, 0.0, 0.0), None, 0, 0, 0.0, 0)
    return Report(order, updates, position, examples, 0.0, cost, finished=seconds, staleness=staleness, period=1 + staleness)


def alone(
    layout: Layout,
    held: Mapping[str, Sequence[int]],
    rows: Sequence[int],
    tensors: Tensors,
    trained: Mapping[str, Sequence[int]] | None = None,
) -> Updates:
    """One client's update; touched tensors `[rows, ...]`, shared ones at held width."""
    submodel = Submodel.checked(layout, units(held), None if trained is None else units(trained))
    return Updates(
        (submodel,),
        torch.tensor([list(rows)]).long(),
        torch.ones(1, len(rows)).bool(),
        {name: tensor[None] for name, tensor in tensors.items()},
    )


def units(of: Mapping[str, Sequence[int]]) -> dict:
    return {axis: torch.tensor(list(numbers)).long().numpy() for axis, numbers in of.items()}
