"""A federated algorithm is eight answers; `one_round` asks them. Read this file first.

A round under stragglers: choose clients, decide how much of the model each of them gets, cut that much out of it, send it,
wait as long as it makes sense, merge what came back, and learn from it. Every published strategy answers the same eight
questions differently, so a strategy is a frozen value, and the catalog is a list of such values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from fedprune.axes import Layout
from fedprune.codec import Codec
from fedprune.entries import All, Entries, joined
from fedprune.exchange import Fleet, Lost, Order, Report, Roster
from fedprune.gather import Gather
from fedprune.merge import Merge
from fedprune.objective import Objective
from fedprune.pruning import Leading, Pruning
from fedprune.random import stream
from fedprune.rates import Fixed, RateLearner
from fedprune.selection import Selector, Uniform
from fedprune.submodel import Submodel
from fedprune.types import ClientId, IntArray, Memory, Rate, Seconds, Tensors, Ticket, Version


@dataclass(frozen=True)
class Strategy:
    """The eight answers. The defaults are FedAvg: everybody, everything, and wait."""

    name: str = "fedavg"
    selector: Selector = field(default_factory=Uniform)  #      who trains next?
    rates: RateLearner = field(default_factory=Fixed)  #        how much of the model does each get?
    pruning: Pruning = field(default_factory=Leading)  #        which units make up that much?
    entries: Entries = field(default_factory=All)  #            which of their entries are there?
    objective: Objective = field(default_factory=Objective)  #  what does a client minimise?
    codec: Codec = field(default_factory=Codec)  #              how does an update travel?
    gather: Gather = field(default_factory=Gather)  #           when does the server stop waiting?
    merge: Merge = field(default_factory=Merge)  #              how do reports become the next model?

    @cached_property
    def told(self) -> Objective:
        """The objective as orders carry it: with the gate that the choice of entries needs."""
        return replace(self.objective, gate=True) if self.entries.gate else self.objective

    def submodels(self, state: ServerState, clients: IntArray, roster: Roster) -> list[Submodel]:
        """What each of these clients' devices would hold if it were asked now; users are served with that."""
        rates = self.rates.propose(state.rates, clients, roster, state.layout.smallest_rate).tolist()
        state = self.begun(state)
        return [self.carve(state, client, rate) for client, rate in zip(clients.tolist(), rates, strict=True)]

    def begun(self, state: ServerState) -> ServerState:
        """The server with its first masks drawn, if nothing was ever asked."""
        return state if state.pruning or state.entries else prepared(self, state)

    def carve(self, state: ServerState, client: ClientId, rate: Rate) -> Submodel:
        """What a client gets at a rate: its units, and the entries of these that are there."""
        units = self.pruning.carve(state.pruning, state.layout, client, state.version, rate)
        return joined(units, self.entries.mask(state.entries, state.layout, client, rate), self.entries.through)


@dataclass(frozen=True)
class ServerState:
    """Everything the server knows between two rounds: the model, and what each part of the strategy remembers."""

    model: Tensors
    layout: Layout
    seed: int
    version: Version = 0
    ticket: Ticket = 0
    optimiser: Tensors = field(default_factory=dict)
    selection: Memory = field(default_factory=dict)
    rates: Memory = field(default_factory=dict)
    pruning: Memory = field(default_factory=dict)
    entries: Memory = field(default_factory=dict)

    def chance(self, purpose: str) -> np.random.Generator:
        """Random numbers of this version, for one purpose."""
        return stream(self.seed, purpose, self.version)


@dataclass(frozen=True)
class Round:
    """What happened between two versions.

    Attributes:
        version: of the model that it began with.
        began, ended: on the fleet's clock.
        reports: those merged, with their waiting time charged.
        lost: orders that came to nothing, with what they cost.
        facts: what there is to say of the masks.
    """

    version: Version
    began: Seconds
    ended: Seconds
    orders: tuple[Order, ...]
    reports: tuple[Report, ...]
    lost: tuple[Lost, ...]
    facts: Mapping[str, float] = field(default_factory=dict)


def one_round(strategy: Strategy, state: ServerState, fleet: Fleet) -> tuple[ServerState, Round]:
    """Choose, size, cut, send, wait, merge, learn: every strategy in the catalog is this function."""
    began, roster = fleet.now(), fleet.idle()
    state = prepared(strategy, state)
    orders = ask(strategy, state, roster)

    fleet.send(orders)
    arrived, lost = strategy.gather(fleet, orders)
    reports = [arrival(report, state.version, fleet.now()) for report in arrived]

    after = learn(strategy, state, orders, reports, lost, roster.population)
    facts = strategy.entries.facts(after.entries)
    return after, Round(state.version, began, fleet.now(), tuple(orders), tuple(reports), tuple(lost), facts)


def prepared(strategy: Strategy, state: ServerState) -> ServerState:
    """The server with this round's masks drawn; a ticket that is rewound brings back an earlier model."""
    pruning = strategy.pruning.prepare(state.pruning, state.model, state.layout)
    entries, model = strategy.entries.prepare(state.entries, state.model, state.layout, state.version)
    optimiser = state.optimiser if model is state.model else {}  # its moments are of another model
    return replace(state, pruning=pruning, entries=entries, model=model, optimiser=optimiser)


def ask(strategy: Strategy, state: ServerState, roster: Roster) -> list[Order]:
    """The first half of a round: who is to train what."""
    clients = strategy.selector.choose(state.selection, roster, state.chance("choose")).tolist()
    rates = strategy.rates.propose(state.rates, np.array(clients, int), roster, state.layout.smallest_rate).tolist()
    return [
        Order(
            ticket=state.ticket + number,
            client=client,
            version=state.version,
            rate=rate,
            submodel=strategy.carve(state, client, rate),
            objective=strategy.told,
            rows=strategy.codec.rows,
            model=state.model,
            seed=state.seed,
            expires=strategy.gather.expires,
        )
        for number, (client, rate) in enumerate(zip(clients, rates, strict=True))
    ]


def learn(
    strategy: Strategy, state: ServerState, orders: list[Order], reports: list[Report], lost: list[Lost], population: int
) -> ServerState:
    """The second half: the next model, and what the parts make of the reports."""
    model, optimiser = strategy.merge(state.model, state.optimiser, state.layout, reports)

    def mean() -> Tensors:
        return {name: update for name, (update, _) in strategy.merge.means(state.model, state.layout, reports).items()}

    return replace(
        state,
        model=model,
        version=state.version + 1,
        ticket=state.ticket + len(orders),
        optimiser=optimiser,
        selection=strategy.selector.learn(state.selection, reports, lost),
        rates=strategy.rates.learn(state.rates, reports, lost, population),
        entries=strategy.entries.learn(state.entries, state.model, state.layout, reports, mean),
    )


def arrival(report: Report, version: Version, merged: Seconds) -> Report:
    """A report with what only the merge knows: how stale it is, and how long its client has waited for the others."""
    return replace(report, staleness=version - report.order.version, waited=max(0.0, merged - report.finished))
