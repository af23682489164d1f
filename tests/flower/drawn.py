"""Submodels, orders and updates drawn at random, for messages to carry."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as some
from reports import report
from world import ITEMS, SETTINGS, recommender

from fedprune.axes import Layout
from fedprune.codec import Codec
from fedprune.exchange import Order, Updates
from fedprune.fleet.trainer import cut_here
from fedprune.merge import Merge
from fedprune.objective import Objective
from fedprune.precision import stochastic
from fedprune.recommenders import Recommender
from fedprune.submodel import Submodel, extract, mask, there
from fedprune.thinning import thinned

QUICK = settings(max_examples=40, deadline=None)


@cache
def what(model: str) -> Recommender:
    return recommender(model)


def random_units(rng: np.random.Generator, among: np.ndarray) -> np.ndarray:
    return np.sort(rng.choice(among, rng.integers(1, len(among) + 1), replace=False)).astype(np.int64)


def random_submodel(rng: np.random.Generator, model: str, held: Submodel | None = None) -> Submodel:
    """Full, leading, or any units; all held ones trained, or a part of them."""
    layout = what(model).layout
    match rng.integers(4):
        case 0:
            units = Submodel.full(layout).held
        case 1:
            units = {name: np.arange(width) for name, width in layout.widths(float(rng.choice([0.25, 0.5, 0.75]))).items()}
        case _:
            units = {name: random_units(rng, np.arange(axis.size)) for name, axis in layout.prunable.items()}
    units = units if held is None else held.held
    trained = {} if rng.integers(2) else {name: random_units(rng, own) for name, own in units.items()}
    through = bool(rng.integers(2)) if held is None else held.through
    return (
        Submodel(units, trained, random_masks(rng, layout), through) if through or rng.integers(2) else Submodel(units, trained)
    )


def random_masks(rng: np.random.Generator, layout: Layout) -> dict[str, np.ndarray]:
    """Of some tensors, True outside of the held units too: the wire does not carry that, and nobody may need it."""
    names = layout.named("shared", "touched")
    some = rng.permutation(names)[: rng.integers(1, len(names) + 1)].tolist()
    return {name: rng.random(layout.shape(name)) < rng.choice([0.0, 0.1, 0.5, 1.0]) for name in some}


def alike(layout: Layout, one: Submodel, other: Submodel) -> bool:
    """Equal as far as the held units go."""
    if one.units != other.units or one.through != other.through or one.entries.keys() != other.entries.keys():
        return False
    return all(torch.equal(there(layout, one, name), there(layout, other, name)) for name in one.entries)


def order_of(
    rng: np.random.Generator, model: str, ticket: int, submodel: Submodel, rows: str, at: dict, **codec: object
) -> Order:
    objective = Objective(lr=0.1 + float(rng.random()), batch=[None, 7][rng.integers(2)], until=[None, 2.5][rng.integers(2)])
    return Order(
        ticket, int(rng.integers(24)), int(rng.integers(9)), float(rng.choice([0.25, 0.3, 1.0])), submodel, objective,
        Codec(rows, **codec), at, int(rng.integers(2**31)), [None, 12.5][rng.integers(2)],
    )  # fmt: skip


def random_updates(rng: np.random.Generator, model: str, submodels: tuple[Submodel, ...]) -> Updates:
    """Zero where not trained and where padded, as training leaves it."""
    layout, clients = what(model).layout, len(submodels)
    width = int(rng.integers(1, ITEMS + 1))
    counts = np.append(rng.integers(1, width + 1, clients - 1), width)
    rows, present = torch.zeros(clients, width, dtype=torch.long), torch.zeros(clients, width, dtype=torch.bool)
    for client, count in enumerate(counts):
        rows[client, :count] = torch.from_numpy(rng.choice(ITEMS, count, replace=False))
        present[client, :count] = True
    tensors = {}
    for name in layout.named("shared", "touched"):
        touched = layout.kind(name) == "touched"
        dimensions = layout.tensors[name][1 if touched else 0 :]
        shape = [layout.extent(d, submodels[0].widths) for d in dimensions]
        values = torch.from_numpy(rng.normal(size=(clients, *([width] if touched else []), *shape))).float()
        if touched:
            values *= present.reshape(clients, width, *[1] * len(shape))
        for client, submodel in enumerate(submodels):
            for place, dimension in enumerate(dimensions, start=1 if touched else 0):
                trained = extract({"m": mask(layout, dimension, submodel.trained)}, _line(layout, dimension), submodel)["m"]
                values[client] *= trained.reshape(-1, *[1] * (values.dim() - 2 - place))
            present_here = None if submodel.through else there(layout, submodel, name)
            if present_here is not None:
                values[client] *= present_here[rows[client]] if touched else present_here
        tensors[name] = values
    return Updates(submodels, rows, present, tensors)


def sent(updates: Updates, order: Order, layout: Layout) -> Updates:
    """As an order's codec lets them arrive."""
    codec, tickets = order.codec, [order.ticket + place for place in range(len(updates.submodels))]
    tensors = dict(updates.tensors)
    if codec.sampled < 1:
        tensors = thinned(layout, tensors, updates.rows, updates.present, codec.sampled, order.seed, tickets)
    if codec.precision == "float32":
        return replace(updates, tensors=tensors)
    rounded = stochastic(layout, tensors, updates.rows, order.seed, tickets)
    return replace(updates, tensors=rounded.tensors, scales=rounded.scales)


def arrives(order: Order, layout: Layout) -> dict:
    """What an order's client receives."""
    cut = cut_here(order, layout)
    masks = {name: there(layout, order.submodel, name) for name in cut}
    return {name: tensor if masks[name] is None else tensor * masks[name] for name, tensor in cut.items()}


def _line(layout, dimension):
    """A layout of one tensor with this one dimension."""
    return replace(layout, tensors={"m": (dimension,)})


def merged(model: str, start: dict, orders: list[Order], stacks: list[Updates], weights: str) -> dict:
    numbered = iter(orders)
    told = []
    for updates in stacks:
        for place in range(len(updates.submodels)):
            told.append(replace(report(updates, place, examples=3 + place), order=next(numbered)))
    return Merge(weights=weights)(start, {}, what(model).layout, told)[0]


some_seed = some.integers(0, 2**31)
some_model = some.sampled_from(sorted(SETTINGS))
some_rows = some.sampled_from(["table", "touched"])
some_precision = some.sampled_from(["float32", "int8"])
