"""What each user would be shown: the scorer that evaluation ranks with, at the whole model or at each device's own submodel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fedprune.axes import Layout
from fedprune.objective import Objective
from fedprune.population import STACK, Population, private_columns
from fedprune.precision import nearest
from fedprune.ranking import Scorer
from fedprune.recommenders import Recommender
from fedprune.submodel import Submodel, extract, positions
from fedprune.training import received, train
from fedprune.types import BoolArray, IntArray, Tensors


def scorer(
    recommender: Recommender,
    model: Tensors,
    private: Tensors,
    submodels: Sequence[Submodel] | None = None,
    rounded: BoolArray | None = None,
) -> Scorer:
    """Scores of the whole catalogue for a chunk of users.

    Args:
        model: the full model.
        private: rows of the whole population.
        submodels: what each *user's* device holds; None scores everybody with the full model.
        rounded: which *users'* devices keep it as int8 (`precision.nearest`); None: nobody's.
    """
    layout = recommender.layout
    full = Submodel.full(layout)

    def score(users: IntArray) -> Tensor:
        held = [full] * len(users) if submodels is None else [submodels[u] for u in users]
        as_int8 = np.zeros(len(users), bool) if rounded is None else rounded[users]
        result = torch.empty(len(users), next(model[n].shape[0] for n in layout.named("touched")))
        for places, submodel, cut in _alike(layout, model, held, as_int8):
            result[places] = cut_scorer(recommender, cut, submodel, private)(users[places])
        return result

    return score


def cut_scorer(recommender: Recommender, cut: Tensors, submodel: Submodel, private: Tensors) -> Scorer:
    """Scores by a model that is cut already, for users whose rows are whole."""
    layout = recommender.layout

    def score(users: IntArray) -> Tensor:
        tensors = {name: tensor[None] for name, tensor in cut.items()}
        for name, rows in private.items():
            own = rows[torch.from_numpy(users)]
            for axis, dimension in enumerate(layout.tensors[name][1:], start=1):
                own = own.index_select(axis, positions(layout, dimension, submodel.held))
            tensors[name] = own[:, None]
        with torch.no_grad():
            return recommender.score(tensors)

    return score


def listen(
    recommender: Recommender,
    population: Population,
    model: Tensors,
    clients: Sequence[int],
    objective: Objective,
    *,
    steps: int,
    seed: int,
    version: int,
    submodels: Sequence[Submodel] | None = None,
    rounded: BoolArray | None = None,
) -> None:
    """Clients that never get an order fit their private rows to the served model, or they could be shown nothing.

    `steps` Adam steps with the rest of the model frozen and fresh negatives, continuing from where they were. They upload
    nothing, nobody waits for them, and their time is not in the ledger: it is part of serving.

    Args:
        model: the full one, or one that is cut along the only submodel already.
        submodels: what each of these clients is served with, in their order; None: the model as it is.
        rounded: which of them keep it as int8; None: nobody. Says nothing without submodels.
    """
    layout = recommender.layout
    if submodels is None:
        groups = [([*range(len(clients))], Submodel.full(layout), model)]
    else:
        groups = _alike(layout, model, submodels, np.zeros(len(clients), bool) if rounded is None else rounded)
    for places, submodel, cut in groups:
        alike, columns = [clients[place] for place in places], private_columns(layout, submodel)
        for stack in population.stacks(alike, objective, STACK):
            part = [alike[place] for place in stack]
            tickets = [(version + 1) * population.clients + c for c in part]
            examples = population.draw(part, tickets, objective, seed ^ 0x5EED)
            frozen, private = received(layout, cut, examples), population.take(examples.users, columns)
            for _ in range(steps):
                private = train(recommender, frozen, private, examples, objective, frozen=True).private
            population.put(examples.users, columns, private, examples.real_users)


def _alike(
    layout: Layout, model: Tensors, held: Sequence[Submodel], rounded: BoolArray
) -> Iterator[tuple[list[int], Submodel, Tensors]]:
    """Places that hold the same, what that is, and that much of a model."""
    groups: dict[tuple[bytes, bool], list[int]] = {}
    for place, (submodel, as_int8) in enumerate(zip(held, rounded.tolist(), strict=True)):
        groups.setdefault((submodel.held_key, as_int8), []).append(place)
    for (_, as_int8), places in groups.items():
        cut = extract(model, layout, held[places[0]])
        yield places, held[places[0]], nearest(layout, cut).tensors if as_int8 else cut


def own_submodels(client_of_user: IntArray, submodels: Sequence[Submodel]) -> list[Submodel]:
    """Each user's device's submodel, from each client's."""
    return [submodels[client] for client in np.asarray(client_of_user)]
