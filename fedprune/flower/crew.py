"""Which client is which node: nodes are asked when they appear, and found again when they come back under another number."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from flwr.app import RecordDict

from fedprune.errors import FleetError
from fedprune.flower import wire
from fedprune.flower.nodes import Answer, Nodes
from fedprune.types import ClientId, FloatArray, Seconds

HELLO_SECONDS = 120.0
AGAIN_SECONDS = 60.0
"""A node that was refused is asked again after so long: it may have been slow to start, or have come back under another
number before the SuperLink, which waits for a minute, knew that it had been away."""
BOAST = 20.0
"""No device is believed to be more than so many times as fast as the median one."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Facts:
    """What a client says of itself when it is first asked.

    Attributes:
        flops: floating-point operations per second in a small probe, or in its last order.
        slowness: as declared in its node's configuration; None: not declared.
    """

    client: ClientId
    users: int
    interactions: int
    flops: float
    slowness: float | None


@dataclass
class Crew:
    """The clients of a run, as far as their nodes have said who they are.

    Attributes:
        clients: how many there are to be; they are numbered 0 to clients - 1 (`partition-id`).
        items: size of the catalogue, which all must share.
        greeting: the question that every node answers first.
        refused: nodes that did not answer as they should, and why.
    """

    nodes: Nodes
    clients: int
    items: int
    greeting: Callable[[], RecordDict]
    facts: dict[ClientId, Facts] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    _node: dict[ClientId, int] = field(default_factory=dict)
    _asked: dict[str, tuple[int, Seconds]] = field(default_factory=dict)
    _again: dict[int, Seconds] = field(default_factory=dict)

    def enrol(self) -> None:
        """Ask nodes that are new, and take in who has answered; does not wait."""
        online, now = self.nodes.connected(), self.nodes.clock()
        resting = [node for node, until in self._again.items() if now < until]
        known = {*self._node.values(), *resting, *(node for node, _ in self._asked.values())}
        new = [node for node in online if node not in known]
        pairs = [(node, self.greeting()) for node in new]
        if pairs:
            for node, message in zip(new, self.nodes.push(pairs, "query.hello", seconds=HELLO_SECONDS), strict=True):
                if message is not None:
                    self._asked[message] = (node, self.nodes.clock())
        for answer in self.nodes.pull(self._asked):
            node, _ = self._asked.pop(answer.message_id)
            self._welcome(node, answer, set(online))
        for message, (_, since) in list(self._asked.items()):
            if self.nodes.clock() - since > HELLO_SECONDS:
                del self._asked[message]  # it is asked again while it is online

    def gather(self, seconds: Seconds) -> None:
        """Wait until all clients have said who they are.

        Raises:
            FleetError: some have not after so long; who, and what the others said.
        """
        until = self.nodes.clock() + seconds
        while len(self._node) < self.clients:
            self.enrol()
            if self.nodes.clock() > until:
                missing = sorted(set(range(self.clients)) - set(self._node))
                why = "".join(f"; node {node}: {reason}" for node, reason in self.refused.items())
                raise FleetError(
                    f"{len(self._node)} of {self.clients} clients are there after {seconds:g} s, missing: {missing}{why}. "
                    "Start their SuperNodes with --node-config 'partition-id=N', or set silos to how many there are."
                )
            self.nodes.pause()

    def settle(self, known: set[ClientId], seconds: Seconds = HELLO_SECONDS) -> None:
        """Wait until clients that took part before have said who they are, and everybody else who is online; no longer."""
        until = self.nodes.clock() + seconds
        while self.nodes.clock() < until:
            self.enrol()
            online = set(self.nodes.connected())
            if online and online <= {*self._node.values(), *self.refused} and known <= set(self._node):
                return
            self.nodes.pause()

    def present(self) -> list[ClientId]:
        """Clients whose node is online, ascending."""
        online = set(self.nodes.connected())
        return sorted(client for client, node in self._node.items() if node in online)

    def node_of(self, client: ClientId) -> int | None:
        """Where a client is, if it has ever been there."""
        return self._node.get(client)

    def client_of(self, node: int) -> ClientId | None:
        """Who a node is, if it has said so."""
        return next((client for client, own in self._node.items() if own == node), None)

    def slowness(self) -> FloatArray:
        """`[clients]`: as declared, or by the speed of the probe; for strategies that presume to know. 1 for the unknown."""
        result = np.ones(self.clients)
        flops = [facts.flops for facts in self.facts.values()] or [1.0]
        fastest = min(max(flops), BOAST * float(np.median(flops)))
        for client, facts in self.facts.items():
            result[client] = facts.slowness or max(1.0, fastest / facts.flops)
        return result / result.min()

    def _welcome(self, node: int, answer: Answer, online: set[int]) -> None:
        try:
            if answer.content is None:
                raise FleetError(answer.error)
            content = answer.content
            client = wire.read_config(content, "client", int)
            items = wire.read_metric(content, "items", int)
            facts = Facts(
                client,
                wire.read_metric(content, "users", int),
                wire.read_metric(content, "interactions", int),
                wire.read_metric(content, "flops"),
                wire.read_metric(content, "slowness") if "slowness" in content["metrics"] else None,
            )
            if not 0 <= client < self.clients:
                raise FleetError(f"says it is client {client}; this run has 0 to {self.clients - 1}")
            if items != self.items:
                raise FleetError(f"has a catalogue of {items} items, the server's has {self.items}; data must be of one kind")
            possible = 1 <= facts.users <= facts.interactions <= facts.users * items
            if not possible or facts.flops <= 0 or (facts.slowness or 1.0) < 1:
                raise FleetError(f"says what cannot be: {facts}")
            other = self._node.get(client)
            if other is not None and other != node and other in online:
                raise FleetError(f"says it is client {client}, which node {other} is; partition-ids must differ")
        except FleetError as error:
            self.refused[node] = str(error)
            self._again[node] = self.nodes.clock() + AGAIN_SECONDS
            log.warning("node %s is left out: %s", node, error)
            return
        self.refused.pop(node, None)
        self._node[client] = node
        self.facts[client] = facts
        log.info("client %s is node %s", client, node)
