"""A Flower grid inside the test: messages are answered by a function, at once or when the test lets them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fedprune.flower.compat import identify, number

Client = Callable[[int, Message], RecordDict | Error | None]
"""Called with the node's number and the message; None never answers."""


class HereGrid(Grid):
    """Answers each message as soon as it is pulled, `late` pulls after it was sent."""

    def __init__(self, nodes: Iterable[int], client: Client) -> None:
        identify(run_id=7)
        self.nodes = list(nodes)
        self.client = client
        self.sent: list[Message] = []
        self.late: dict[int, int] = {}
        self.again: list[Message] = []
        self._waiting: dict[str, tuple[Message, int]] = {}

    def set_run(self, run) -> None:
        pass

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *arguments, **named) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            ids.append(number(message))
            self.sent.append(message)
            self._waiting[ids[-1]] = (message, self.late.get(message.metadata.dst_node_id, 0))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies, asked = [], set(message_ids)
        for identifier in [sent for sent in self._waiting if sent in asked]:  # in the order of sending
            message, left = self._waiting.pop(identifier)
            if left > 0:
                self._waiting[identifier] = (message, left - 1)
                continue
            answer = self.client(message.metadata.dst_node_id, message)
            if answer is not None:
                replies.append(Message(answer, reply_to=message))
        extra, self.again = self.again, []
        return replies + extra

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(list(messages)))


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self, time: float = 1000.0) -> None:
        self.time = time

    def __call__(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


class ClockGrid(HereGrid):
    """Nodes that take their time on a test's clock, one message after another, behind a SuperLink that lets messages expire.

    Attributes:
        takes: seconds that a node spends on an order; other messages take none.
        refusing: nodes to which nothing can be sent.
        expired: the code of the error for a message that was not answered in time.
        left: when nodes went away; what they owe is an error `heartbeat` seconds later.
    """

    heartbeat = 60.0
    expired = 3

    def __init__(self, nodes: Iterable[int], client: Client, clock: Clock) -> None:
        super().__init__(nodes, client)
        self.clock = clock
        self.takes: dict[int, float] = {}
        self.refusing: set[int] = set()
        self.left: dict[int, float] = {}
        self._free: dict[int, float] = {}
        self._due: dict[str, tuple[Message, float, float]] = {}

    def leave(self, node: int) -> None:
        self.left[node] = self.clock()

    def get_node_ids(self) -> list[int]:
        return [node for node in self.nodes if self.clock() < self.left.get(node, float("inf")) + self.heartbeat]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            identifier, node, now = number(message), message.metadata.dst_node_id, self.clock()
            if node in self.refusing:
                ids.append("")
                continue
            ids.append(identifier)
            self.sent.append(message)
            begins, expires = max(now, self._free.get(node, now)), now + message.metadata.ttl
            done = begins + (self.takes.get(node, 0.0) if message.metadata.message_type == "train" else 0.0)
            if begins <= expires:
                self._free[node] = done
            self._due[identifier] = (message, done, expires)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies, asked, now = [], set(message_ids), self.clock()
        for identifier in [sent for sent in self._due if sent in asked]:
            message, done, expires = self._due[identifier]
            left = self.left.get(message.metadata.dst_node_id, float("inf"))
            answer: RecordDict | Error | None = None
            if done <= min(now, expires) and done < left:
                answer = self.client(message.metadata.dst_node_id, message)
                if answer is None:
                    del self._due[identifier]  # it stays silent
                    continue
            elif now >= left + self.heartbeat:
                answer = Error(5, "no heartbeat")
            elif now > expires:
                answer = Error(self.expired)
            else:
                continue
            del self._due[identifier]
            replies.append(Message(answer, reply_to=message))
            if isinstance(answer, Error) and answer.code in (3, 4, 5):
                replies[-1].metadata.__dict__["_src_node_id"] = 1  # the SuperLink says so, not the node
        extra, self.again = self.again, []
        return replies + extra
