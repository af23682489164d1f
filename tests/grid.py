"""A Flower grid inside the test: messages are answered by a function, at once or when the test lets them."""

from __future__ import annotations

import itertools
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
        self._count = itertools.count()

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
        replies = []
        for identifier in list(message_ids):
            if identifier not in self._waiting:
                continue
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
