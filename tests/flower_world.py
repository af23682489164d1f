"""The small world (`world`) behind a Flower grid: devices that train as the reference does, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import Error, Message, MetricRecord, RecordDict
from grid import Clock, ClockGrid
from world import ITEMS, USERS, recommender, split, train

from fedprune.exchange import Cost, Order, Report, Split
from fedprune.fleet.trainer import Result, cut_already, one_by_one
from fedprune.flower import wire
from fedprune.flower.crew import Crew
from fedprune.flower.fleet import FlowerFleet
from fedprune.flower.nodes import Nodes
from fedprune.population import Population
from fedprune.strategy import Round, ServerState, Strategy, one_round
from fedprune.types import Tensors

Tamper = Callable[[RecordDict], "RecordDict | Error | None"]
RUN, SETTINGS = "run-1", "{}"


@dataclass
class Devices:
    """What the nodes do with messages.

    Attributes:
        partition: the client that each node says it is.
        tamper: what becomes of a client's reports.
        reported: figures of a report's metrics instead of the usual ones, per client.
        results: what was trained in truth, by ticket.
    """

    population: Population
    model: str
    partition: dict[int, int]
    tamper: dict[int, Tamper] = field(default_factory=dict)
    greet: dict[int, Tamper] = field(default_factory=dict)
    reported: dict[int, dict[str, float]] = field(default_factory=dict)
    results: dict[int, Result] = field(default_factory=dict)

    def __call__(self, node: int, message: Message) -> RecordDict | Error | None:
        if message.metadata.message_type == "query.hello":
            return self.greet.get(node, lambda content: content)(self.hello(node))
        parcel = wire.read_orders(message.content, recommender(self.model).layout)
        (order,) = parcel.orders
        assert order.client == self.partition[node], "an order went to another client's node"
        (result,) = one_by_one(recommender(self.model), self.population, [order], parcel.work, cut_already)
        result.stack.settle([result.position])
        self.results[order.ticket] = result
        figures = {"seconds-loading": 0.0, "seconds-training": 1.0, "seconds-teacher": 0.0}
        told = wire.gates([result])
        stack = wire.Stacked((order.ticket,), result.updates, (result.examples,), (result.loss,), parcel.work, gates=told)
        figures |= self.reported.get(order.client, {})
        content = wire.write_reply(parcel, [stack], recommender(self.model).layout, figures)
        return self.tamper.get(order.client, lambda content: content)(content)

    def hello(self, node: int) -> RecordDict:
        client = self.partition[node]
        answer = wire.write_numbers(RUN, "", client=client)
        users = self.population.users_of[client % self.population.clients]
        rows = int(self.population.positives_of_client[client % self.population.clients])
        answer["metrics"] = MetricRecord({"users": len(users), "interactions": rows, "items": ITEMS, "flops": 1e9})
        return answer


@dataclass
class FlowerWorld:
    """A strategy at work on a `FlowerFleet`."""

    strategy: Strategy
    fleet: FlowerFleet
    state: ServerState
    grid: ClockGrid
    devices: Devices
    clock: Clock

    def round(self) -> Round:
        self.state, done = one_round(self.strategy, self.state, self.fleet)
        return done

    def order(self, client: int, ticket: int, **changes: object) -> Order:
        """An order for the whole model."""
        submodel = self.strategy.held(self.state, np.array([client]), self.fleet.idle())[0][0]
        order = Order(
            ticket, client, self.state.version, 1.0, submodel, self.strategy.objective, self.strategy.codec,
            self.state.model, self.state.seed, self.strategy.gather.expires,
        )  # fmt: skip
        return replace(order, **changes)

    def merged(self, before: ServerState, orders: Sequence[Order], optimiser: Tensors | None = None) -> Tensors:
        """The model that these orders make of an earlier one, from what was trained, nothing of it having travelled."""
        cost = Cost(Split(0.0, 0.0, 0.0, 0.0), None, 0, 0, 0.0, 0)
        trained = [(order, self.devices.results[order.ticket]) for order in orders]
        reports = [Report(o, r.updates, r.position, r.examples, r.loss, cost, 0.0) for o, r in trained]
        return self.strategy.merge(before.model, before.optimiser, before.layout, reports)[0]


def flower_world(
    strategy: Strategy | None = None,
    *,
    model: str = "mf",
    clients: int = 4,
    nodes: Sequence[int] | None = None,
    takes: Sequence[float] = (),
    seed: int = 1,
    poll: float = 0.2,
    gathered: bool = True,
) -> FlowerWorld:
    """A fresh world of silos; client c is node 100 + c unless `nodes` says otherwise."""
    what, clock = recommender(model), Clock()
    owner, private = np.arange(USERS) % clients, what.initial_private(seed)
    population = Population(train(), owner, what.layout, private, split().validation)
    numbers = list(range(100, 100 + clients)) if nodes is None else list(nodes)
    devices = Devices(population, model, {node: client for client, node in enumerate(numbers)})
    grid = ClockGrid(numbers, devices, clock)
    grid.takes = dict(zip(numbers, takes, strict=False))
    crew = Crew(
        Nodes(grid, clock=clock, sleep=clock.sleep, poll=poll), clients, ITEMS, lambda: wire.write_numbers(RUN, SETTINGS)
    )
    fleet = FlowerFleet(crew, what.layout, RUN, SETTINGS)
    if gathered:
        crew.gather(10.0)
    return FlowerWorld(strategy or Strategy(), fleet, ServerState(what.initial(seed), what.layout, seed), grid, devices, clock)


# ---- what tests ask of it --------------------------------------------------------------------------------------------


def clients(done: Round) -> list[int]:
    return sorted(report.order.client for report in done.reports)


def idle(here: FlowerWorld) -> list[int]:
    return here.fleet.idle().clients.tolist()


def trained(here: FlowerWorld) -> list:
    """Messages with orders."""
    return [message for message in here.grid.sent if message.metadata.message_type == "train"]
