"""Virtual time on Flower's nodes: the simulator keeps clock, devices and private rows; nodes do the training.

In virtual time the order of arrival comes from the device table, so a simulated fleet needs from Flower only that somebody
trains. Private rows travel with an order and back: the simulator stands for the devices, so its checkpoint holds everything
and a resumed run is the same run. (Flower's simulation too keeps the nodes' state with the server and sends it along.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from flwr.app import RecordDict
from torch import Tensor

from fedprune.axes import Layout
from fedprune.config import Settings
from fedprune.errors import ConfigError, FleetError
from fedprune.exchange import Order
from fedprune.fleet.trainer import Result, Stack, Stacked, cut_already, one_by_one
from fedprune.flower import wire
from fedprune.flower.nodes import Nodes, dealt, spoken
from fedprune.flower.world import shared_world
from fedprune.population import MOMENTS, Population, Private, private_columns
from fedprune.recommenders import Recommender
from fedprune.submodel import Submodel
from fedprune.types import Tensors


@dataclass(frozen=True)
class OnNodes:
    """A trainer of a `VirtualFleet` that deals the orders out to Flower's nodes.

    With `settings.fleet` "serial" a node trains one client after another, so the run equals SerialFleet's bit for bit.
    """

    nodes: Nodes
    settings: Settings
    run: str = "simulation"

    def __call__(
        self, recommender: Recommender, population: Population, orders: Sequence[Order], work: Sequence[float]
    ) -> list[Result]:
        """Send, wait for all, put the results in order.

        Raises:
            FleetError: a node failed; in a simulation nobody else's data would do instead.
            ConfigError: nodes know no teacher from elsewhere.
        """
        for order in orders:
            if order.rest is not None:
                raise ConfigError(
                    "windows over a cached rest are not sent to Flower's nodes; set refresh to 1, or run it with `fedprune run`"
                )
            if order.objective.distillation is not None and order.objective.distillation.teacher == "given":
                raise ConfigError(
                    'teacher "given" is a model from elsewhere, and Flower\'s nodes have none; run it with `fedprune run`, or '
                    'take the teacher "local", "sent" or "past"'
                )
        layout, settings = recommender.layout, self.settings.to_json()
        hands = dealt(len(orders), self.nodes.wait_for(1, 60.0))
        contents = {
            node: wire.write_orders(
                [orders[place] for place in hand], layout, run=self.run, settings=settings,
                work=[work[place] for place in hand],
                private=torch.cat([_rows(population, orders[place].client) for place in hand]),
            )
            for node, hand in hands.items()
        }  # fmt: skip
        replies = spoken(self.nodes.ask(contents, "train", group=str(orders[0].version)), "training")
        results: dict[int, Result] = {}
        for node, hand in hands.items():
            asked = [orders[place] for place in hand]
            sizes = {o.ticket: _users(population, o.client) * _entries(layout, o.submodel) for o in asked}
            clients = {order.ticket: order.client for order in asked}
            try:
                stacks = wire.read_reply(replies[node], asked, layout, self.run, sizes)
            except FleetError as error:
                raise FleetError(f"node {node} answered training with nonsense: {error}") from None
            for stack in stacks:
                kept = _stack(population, stack, [clients[ticket] for ticket in stack.tickets])
                for place, ticket in enumerate(stack.tickets):
                    gate = None if stack.gates is None else stack.gates[place]
                    results[ticket] = Result(stack.updates, place, stack.examples[place], stack.losses[place], kept, gate)
        return [results[order.ticket] for order in orders]


def serve(content: RecordDict) -> RecordDict:
    """A node's side: train the orders with the rows that came along, and send both back."""
    torch.set_num_threads(1)  # the tensors are small, and sums keep their order
    world = shared_world(wire.read_config(content, "settings", str))
    recommender, layout = world.recommender, world.recommender.layout
    population = world.population.copy()  # the process may serve other runs
    parcel = wire.read_orders(content, layout)
    assert parcel.private is not None
    _put(population, [order.client for order in parcel.orders], parcel.private)
    if Settings.from_json(parcel.settings).fleet == "vector":
        results = Stacked(cut=cut_already)(recommender, population, parcel.orders, parcel.work)
    else:
        results = one_by_one(recommender, population, parcel.orders, parcel.work, cut_already)
    stacks: dict[int, list[int]] = {}
    for place, result in enumerate(results):
        stacks.setdefault(id(result.updates), []).append(place)
    written = []
    for places in stacks.values():
        places.sort(key=lambda place: results[place].position)
        own = [results[place] for place in places]
        written.append(
            wire.Stacked(
                tuple(parcel.orders[place].ticket for place in places),
                own[0].updates,
                tuple(result.examples for result in own),
                tuple(result.loss for result in own),
                tuple(parcel.work[place] for place in places),
                _trained(own[0].stack),
                wire.gates(own),
            )
        )
    return wire.write_reply(parcel, written, layout)


# ---- private rows as one flat tensor: per user its values, first and second moments of every tensor, and its steps ------


def _users(population: Population, client: int) -> int:
    return len(population.users_of[client])


def _entries(layout: Layout, submodel: Submodel) -> int:
    """Per user."""
    return 3 * sum(layout.row_entries(name, submodel.widths) for name in layout.named("private")) + 1


def _rows(population: Population, client: int) -> Tensor:
    users = torch.from_numpy(population.users_of[client])
    private = population.private
    parts = [tensor[users].flatten(1) for moment in MOMENTS for tensor in getattr(private, moment).values()]
    return torch.cat([*parts, private.steps[users][:, None]], 1).flatten()


def _put(population: Population, clients: Sequence[int], rows: Tensor) -> None:
    users = torch.cat([torch.from_numpy(population.users_of[client]) for client in clients])
    table, at = rows.reshape(len(users), -1), 0
    for moment in MOMENTS:
        for tensor in getattr(population.private, moment).values():
            size = tensor[0].numel()
            tensor[users] = table[:, at : at + size].reshape(len(users), *tensor.shape[1:])
            at += size
    population.private.steps[users] = table[:, at]


def _trained(stack: Stack) -> Tensor:
    """Trained rows at held columns, of the users that are no padding, client after client."""
    parts = [tensor[stack.real].flatten(1) for moment in MOMENTS for tensor in getattr(stack.trained, moment).values()]
    return torch.cat([*parts, stack.trained.steps[stack.real][:, None]], 1).flatten()


def _stack(population: Population, stack: wire.Stacked, clients: Sequence[int]) -> Stack:
    """The inverse of `_trained`."""
    assert stack.private is not None
    layout, submodel = population.layout, stack.updates.submodels[0]
    groups = [torch.from_numpy(population.users_of[client]) for client in clients]
    most = max(len(group) for group in groups)
    users = torch.stack([torch.cat([group, group[:1].expand(most - len(group))]) for group in groups])
    real = torch.arange(most) < torch.tensor([len(group) for group in groups])[:, None]
    table, at = stack.private.reshape(int(real.sum()), -1), 0
    moments: dict[str, Tensors] = {}
    for moment in MOMENTS:
        moments[moment] = {}
        for name in layout.named("private"):
            shape = [layout.extent(d, submodel.widths) for d in layout.tensors[name][1:]]
            size = layout.row_entries(name, submodel.widths)
            moments[moment][name] = torch.zeros(*real.shape, *shape)
            moments[moment][name][real] = table[:, at : at + size].reshape(-1, *shape)
            at += size
    steps = torch.zeros(real.shape)
    steps[real] = table[:, at]
    return Stack(population, users, real, private_columns(layout, submodel), Private(**moments, steps=steps))
