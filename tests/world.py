"""A world small enough to look at: 24 users, 40 items, two tastes; strategies and fleets are tried out in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from fedprune.codec import Codec
from fedprune.data import Interactions, Split, leave_one_out
from fedprune.data.interactions import arrange
from fedprune.devices import DeviceTable, FullReport, disturbed, linear
from fedprune.entries.learned import LOGITS
from fedprune.exchange import Order
from fedprune.fleet import SerialFleet, VectorFleet, VirtualFleet
from fedprune.objective import Objective
from fedprune.population import Population
from fedprune.recommenders import Recommender, build
from fedprune.strategy import Round, ServerState, Strategy, one_round
from fedprune.submodel import Submodel
from fedprune.types import IntArray, Tensors

USERS, ITEMS, LATENT = 24, 40, 8
FLEETS: dict[str, Callable[..., VirtualFleet]] = {"serial": SerialFleet, "vector": VectorFleet}
SETTINGS: dict[str, dict] = {
    "mf": {"latent": LATENT},
    "gmf": {"latent": LATENT},
    "mlp": {"latent": LATENT, "hidden": (16, 8)},
    "neumf": {"latent": LATENT, "hidden": (16, 8)},
}


@cache
def split() -> Split:
    """Even users like the first half of the catalogue, odd ones the second; 5 to 15 items in random order."""
    rng = np.random.default_rng(7)
    user, item = [], []
    for number in range(USERS):
        half = np.arange(ITEMS // 2) + (number % 2) * (ITEMS // 2)
        taken = rng.permutation(half)[: 5 + number % 10]
        user += [number] * len(taken)
        item += taken.tolist()
    for number in range(ITEMS):  # so that no item is without a user
        user.append(number // (ITEMS // 2))
        item.append(number)
    return leave_one_out(
        arrange(
            "two tastes",
            np.array(user),
            np.array(item),
            user_ids=[str(u) for u in range(USERS)],
            item_ids=[str(i) for i in range(ITEMS)],
        )
    )


def silos_of_three() -> IntArray:
    """Client of each user."""
    return np.arange(USERS) // 3


def train() -> Interactions:
    return split().train


def recommender(name: str = "mf") -> Recommender:
    return build(name, users=USERS, items=ITEMS, **SETTINGS[name])


@dataclass
class World:
    """A strategy at work on a fleet."""

    strategy: Strategy
    fleet: VirtualFleet
    state: ServerState

    @property
    def population(self) -> Population:
        return self.fleet.population

    @property
    def private(self) -> Tensors:
        """Private rows of all who have finished."""
        self.fleet.settle()
        return self.population.private.values

    def round(self) -> Round:
        self.state, done = one_round(self.strategy, self.state, self.fleet)
        return done

    def rounds(self, number: int) -> list[Round]:
        return [self.round() for _ in range(number)]


def world(
    strategy: Strategy | None = None,
    *,
    model: str = "mf",
    fleet: str = "vector",
    sigma: float = 3.0,
    workload: str = "own",
    noise: float = 0.0,
    availability: float = 1.0,
    dropout: float = 0.0,
    seed: int = 1,
    client_of_user: IntArray | None = None,
    slowness: Sequence[float] | None = None,
) -> World:
    """A fresh world; equal arguments make equal ones."""
    strategy = strategy or Strategy()
    what = strategy.entries.parametrise(recommender(model))
    clients = np.arange(USERS) if client_of_user is None else client_of_user
    population = Population(train(), clients, what.layout, what.initial_private(seed), held_out=split().validation)
    devices = linear(population.clients, sigma, average(what, population), seed=seed)
    if slowness is not None:
        devices = as_slow_as(devices, slowness)
    devices = disturbed(devices, noise=noise, availability=availability, dropout=dropout)
    made = FLEETS[fleet](what, population, devices, workload=workload)
    return World(strategy, made, ServerState(what.initial(seed), what.layout, seed))


def louder(here: World) -> World:
    """With rows and columns of size one, so that scores differ."""
    chance = torch.Generator().manual_seed(8)
    model = {n: torch.randn(t.shape, generator=chance) / 2 for n, t in here.state.model.items()}
    here.state = replace(here.state, model=model)
    for rows in here.population.private.values.values():
        rows.copy_(torch.randn(rows.shape, generator=chance) / 2)
    return here


def as_slow_as(devices: DeviceTable, slowness: Sequence[float]) -> DeviceTable:
    """The same devices dealt these slownesses."""
    wanted = np.asarray(slowness, float)
    by = devices.slowness / wanted
    speeds = {name: getattr(devices, name) * by for name in ("flops", "bytes_down", "bytes_up")}
    return replace(devices, **speeds, slowness=wanted)


def average(what: Recommender, population: Population) -> FullReport:
    """The average client's full report with the default objective."""
    layout = what.layout
    flops = layout.work(layout.full, layout.full).total * population.examples_of_client(Objective()).mean()
    return FullReport(flops, layout.bytes(layout.full, population.items), layout.bytes(layout.full, population.items))


def order(here: World, client: int, ticket: int, *, submodel: Submodel | None = None, **settings: object) -> Order:
    """An order for the whole model, unless another submodel is given."""
    return Order(
        ticket=ticket,
        client=client,
        version=here.state.version,
        rate=1.0,
        submodel=submodel or Submodel.full(here.state.layout),
        objective=Objective(**settings),
        codec=Codec(),
        model=here.state.model,
        seed=here.state.seed,
    )


def same(one: Tensors, other: Tensors) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def unmasked(tensors: Tensors) -> Tensors:
    """Without the tensors that learn others' masks."""
    return {name: tensor for name, tensor in tensors.items() if LOGITS not in name}


def close(one: Tensors, other: Tensors, atol: float = 1e-5) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=atol, rtol=1e-5) for name in one)


def finite(tensors: Tensors) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def copied(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}
