"""A federated algorithm is nine answers; `one_round` asks them. Read this file first.

A round under stragglers: choose clients, decide how much of the model each of them gets, cut that much out of it, send it,
wait as long as it makes sense, merge what came back, and learn from it. Every published strategy answers the same nine
questions differently, so a strategy is a frozen value, and the catalog is a list of such values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from fedprune.axes import Layout
from fedprune.codec import Codec, fitting
from fedprune.entries import All, Entries, joined
from fedprune.exchange import Fleet, Lost, Order, Report, Roster
from fedprune.gather import Gather
from fedprune.merge import Merge
from fedprune.objective import Objective
from fedprune.pruning import Leading, Pruning
from fedprune.random import stream
from fedprune.rates import Fixed, Offer, RateLearner
from fedprune.selection import Selector, Uniform
from fedprune.spending import Plan, Spending, Width
from fedprune.submodel import Submodel
from fedprune.types import BoolArray, ClientId, FloatArray, IntArray, Memory, Rate, Seconds, Tensors, Ticket, Version
from fedprune.workload import shares

LEVELS = 33
"""Rates that an offer is computed at; between them it is linear."""


@dataclass(frozen=True)
class Strategy:
    """The nine answers. The defaults are FedAvg: everybody, everything, and wait."""

    name: str = "fedavg"
    selector: Selector = field(default_factory=Uniform)  #      who trains next?
    rates: RateLearner = field(default_factory=Fixed)  #        how much of the model does each get?
    spending: Spending = field(default_factory=Width)  #        what is that share of the time spent on?
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

    def held(self, state: ServerState, clients: IntArray, roster: Roster) -> tuple[list[Submodel], BoolArray]:
        """What each of these clients' devices would hold if it were asked now, and who for want of memory keeps it as int8;
        users are served with that."""
        state = self.begun(state)
        _, plans = self.planned(state, clients, roster)
        submodels = [self.carve(state, client, plan.rate) for client, plan in zip(clients.tolist(), plans, strict=True)]
        return submodels, tight(roster, clients) & np.array([plan.codec.precision == "int8" for plan in plans], bool)

    def planned(self, state: ServerState, clients: IntArray, roster: Roster) -> tuple[FloatArray, list[Plan]]:
        """These clients' budgets, and what they are spent on; nobody gets more of the model than fits into its memory, where
        it stays as it has travelled."""
        budgets = self.rates.propose(state.rates, clients, roster, self.offer(state))
        periods, seconds = self._periods(state, clients, roster, budgets), state.spending.get("seconds")
        each = zip(clients.tolist(), budgets.tolist(), periods.tolist(), tight(roster, clients).tolist(), strict=True)
        plans = [
            self.spending.plan(budget, period, None if seconds is None else seconds[client], self.told, self.codec, short)
            for client, budget, period, short in each
        ]
        if roster.capacity is not None:
            rooms = np.maximum(roster.capacity[clients], state.layout.smallest_rate).tolist()
            fits = [fitting(state.layout, room, p.codec.precision) for room, p in zip(rooms, plans, strict=True)]
            plans = [p if p.rate <= most else replace(p, rate=most) for p, most in zip(plans, fits, strict=True)]
            budgets = np.minimum(budgets, fits)  # what the learner will hear the time of
        return budgets, plans

    def _periods(self, state: ServerState, clients: IntArray, roster: Roster, budgets: FloatArray) -> FloatArray:
        """How much seldomer than the fastest each will report, as far as the rate learner knows; at least 1.

        Who is drawn from many waits for it as long as anybody else: idle over busy times the mean time at work (Little's law).
        """
        forecast = self.rates.forecast(state.rates, roster.population)
        if forecast is None or forecast.target is None or not len(clients):
            return np.ones(len(clients))
        own = (forecast.seconds[clients] * self.offer(state).at(budgets)).sum(1)
        at_work = np.nan_to_num(np.maximum(own / forecast.target, 1.0), nan=1.0)
        idle, busy = max(0, len(roster.clients) - len(clients)), roster.busy + len(clients)
        drawn = idle / busy * forecast.mean_period
        return (at_work + drawn) / (1 + drawn)

    def offer(self, state: ServerState) -> Offer:
        """What there is to choose from, and what it costs; units alone, since masks of entries save no time."""
        if state.layout not in self._offers:
            smallest = state.layout.smallest_rate
            rates = np.linspace(smallest, 1.0, LEVELS) if smallest < 1 else np.ones(1)
            plans = [self.spending.plan(rate, 1.0, None, self.told, self.codec) for rate in rates.tolist()]
            memory = self.begun(state).pruning
            submodels = [self.pruning.carve(memory, state.layout, 0, 0, plan.rate) for plan in plans]
            self._offers[state.layout] = Offer(rates, shares(state.layout, plans, submodels))
        return self._offers[state.layout]

    @cached_property
    def _offers(self) -> dict[Layout, Offer]:
        return {}

    @cached_property
    def served(self) -> Objective:
        """What users of clients that are never asked fit their private rows to."""
        return self.spending.plan(1.0, 1.0, None, self.objective, self.codec).objective

    def target(self, state: ServerState) -> Seconds | None:
        """After how long a round should be over, if the rate learner knows that."""
        forecast = self.rates.forecast(state.rates, 0) if state.rates else None
        return None if forecast is None else forecast.target

    def begun(self, state: ServerState) -> ServerState:
        """The server with its first masks drawn, if nothing was ever asked."""
        return state if state.pruning or state.entries else prepared(self, state)

    def carve(self, state: ServerState, client: ClientId, rate: Rate) -> Submodel:
        """What a client gets at a rate: its units, and the entries of these that are there."""
        units = self.pruning.carve(state.pruning, state.layout, client, state.version, rate)
        return joined(units, self.entries.mask(state.entries, state.layout, client, rate), self.entries.through)


@dataclass(frozen=True)
class ServerState:
    """Everything the server knows between two rounds: the model, and what each part of the strategy remembers.

    Attributes:
        cached: of which version each client has a copy, where downloads are cached (`Codec.refresh`).
        base: the model of that version.
    """

    model: Tensors
    layout: Layout
    seed: int
    version: Version = 0
    ticket: Ticket = 0
    optimiser: Tensors = field(default_factory=dict)
    selection: Memory = field(default_factory=dict)
    rates: Memory = field(default_factory=dict)
    spending: Memory = field(default_factory=dict)
    pruning: Memory = field(default_factory=dict)
    entries: Memory = field(default_factory=dict)
    cached: Memory = field(default_factory=dict)
    base: Tensors = field(default_factory=dict)

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
    spared = len(roster.clients) - len(orders)
    refill = Refill(strategy, state, fleet, orders, np.isin(np.arange(roster.population), [order.client for order in orders]))
    arrived, lost = strategy.gather(fleet, orders, strategy.target(state), refill)
    spared /= max(1, len(orders))
    reports = [arrival(report, state.version, refill.until(report), spared) for report in arrived]

    after = learn(strategy, state, orders, reports, lost, roster.population)
    facts = strategy.entries.facts(after.entries)
    return after, Round(state.version, began, fleet.now(), tuple(orders), tuple(reports), tuple(lost), facts)


def prepared(strategy: Strategy, state: ServerState) -> ServerState:
    """The server with this round's masks drawn; a ticket that is rewound brings back an earlier model."""
    pruning = strategy.pruning.prepare(state.pruning, state.model, state.layout)
    entries, model = strategy.entries.prepare(state.entries, state.model, state.layout, state.version)
    optimiser = state.optimiser if model is state.model else {}  # its moments are of another model
    fresh = strategy.codec.refresh > 1 and state.version % strategy.codec.refresh == 0
    base = model if fresh else state.base
    return replace(state, pruning=pruning, entries=entries, model=model, optimiser=optimiser, base=base)


def ask(strategy: Strategy, state: ServerState, roster: Roster, before: int = 0) -> list[Order]:
    """The first half of a round: who is to train what.

    Args:
        before: orders that this round has sent already, to whom it found idle then.
    """
    rng = state.chance(f"choose {before}" if before else "choose")
    clients = strategy.selector.choose(state.selection, roster, rng)
    budgets, plans = strategy.planned(state, clients, roster)
    orders = [
        Order(
            ticket=state.ticket + before + number,
            client=client,
            version=state.version,
            rate=budget,
            submodel=strategy.carve(state, client, plan.rate),
            objective=plan.objective,
            codec=plan.codec,
            model=state.model,
            seed=state.seed,
            expires=strategy.gather.expires,
            refill=before > 0,
        )
        for number, (client, budget, plan) in enumerate(zip(clients.tolist(), budgets.tolist(), plans, strict=True))
    ]
    return [from_cache(order, state) for order in orders] if state.base else orders


def from_cache(order: Order, state: ServerState) -> Order:
    """The same order for a client that works with an earlier version, as far as it does not train a window of it."""
    has = bool(state.cached and state.cached["version"][order.client] == order.base)
    if order.submodel.is_window:
        return replace(order, rest=state.base, cached=has)
    return replace(order, model=state.base, age=order.version - order.base, cached=has)


@dataclass
class Refill:
    """Orders in the middle of a round, for who has become free; nobody trains on one version twice.

    Attributes:
        orders: of this round; new ones are added.
        asked: `[population]`; whose they are.
        sent: when each of the new ones was, by client.
    """

    strategy: Strategy
    state: ServerState
    fleet: Fleet
    orders: list[Order]
    asked: BoolArray
    sent: dict[ClientId, Seconds] = field(default_factory=dict)

    def __call__(self, lost: Sequence[Lost]) -> list[Order]:
        """Ask again, `lost` being who has vanished in this round so far."""
        roster = self.fleet.idle()
        fresh = ~self.asked[roster.clients]
        if not fresh.any():
            return []
        state = replace(self.state, cached=copies(self.state.cached, [], lost, roster.population))
        new = ask(self.strategy, state, replace(roster, clients=roster.clients[fresh]), len(self.orders))
        self.fleet.send(new)
        self.orders.extend(new)
        self.asked[[order.client for order in new]] = True
        self.sent |= {order.client: self.fleet.now() for order in new}
        return new

    def until(self, report: Report) -> Seconds:
        """When a report's client got its next order, or now."""
        asked = report.order.version < self.state.version  # who had one of this round was not asked again
        return self.sent.get(report.order.client, self.fleet.now()) if asked else self.fleet.now()


def learn(
    strategy: Strategy, state: ServerState, orders: list[Order], reports: list[Report], lost: list[Lost], population: int
) -> ServerState:
    """The second half: the next model, and what the parts make of the reports."""
    model, optimiser = strategy.merge(state.model, state.optimiser, state.layout, reports, population)

    def mean() -> Tensors:
        return {name: update for name, (update, _) in strategy.merge.means(state.model, state.layout, reports).items()}

    return replace(
        state,
        model=model,
        version=state.version + 1,
        ticket=state.ticket + len(orders),
        optimiser=optimiser,
        selection=strategy.selector.learn(state.selection, reports, lost),
        rates=strategy.rates.learn(state.rates, reports, lost, population, strategy.offer(state)),
        spending=strategy.spending.learn(state.spending, reports, population),
        entries=strategy.entries.learn(state.entries, state.model, state.layout, reports, mean),
        cached=copies(state.cached, orders, lost, population),
    )


def copies(cached: Memory, orders: Sequence[Order], lost: Sequence[Lost], population: int) -> Memory:
    """Of which version each client has a copy after a round, where downloads are cached; who vanished has none."""
    if all(order.codec.refresh == 1 for order in orders) and (orders or not cached):
        return cached
    version = cached["version"].copy() if cached else np.full(population, -1)
    gone = {event.order.ticket: event.order.client for event in lost if event.reason != "too late"}
    version[list(gone.values())] = -1
    for order in orders:
        if order.ticket not in gone:
            version[order.client] = order.base
    return {"version": version}


def tight(roster: Roster, clients: IntArray) -> BoolArray:
    """Whose memory cannot hold the full model as float32."""
    return np.zeros(len(clients), bool) if roster.capacity is None else roster.capacity[clients] < 1


def arrival(report: Report, version: Version, busy: Seconds, spared: float = 0.0) -> Report:
    """A report with what only the merge knows: how stale it is, and how long its client has waited for the others.

    Args:
        busy: when the client got its next order, or the round's end.
        spared: clients that could have been asked when the round began and were not, per client that was.
    """
    since = version - report.order.version
    period = max(1, since + (not report.order.refill)) + spared
    return replace(report, staleness=since + report.order.age, period=period, waited=max(0.0, busy - report.finished))
