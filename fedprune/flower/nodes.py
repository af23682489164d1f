"""Flower's nodes seen from the server: who is there, ask them something, hear what they answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fedprune.errors import FleetError
from fedprune.types import Seconds

POLL_SECONDS = 0.2
"""How often the server looks for replies. Flower's own loop looks every 3 s."""
PATIENCE_SECONDS = 3600.0
"""A message that nobody has answered for so long is given up; Flower's own limit is 12 hours."""


@dataclass(frozen=True)
class Answer:
    """What came back for a message: content, or why there is none."""

    message_id: str
    content: RecordDict | None
    error: str = ""

    @classmethod
    def of(cls, reply: Message) -> Answer:
        """What a reply says."""
        asked = reply.metadata.reply_to_message_id
        return cls(asked, None, in_words(reply.error)) if reply.has_error() else cls(asked, reply.content)


class Nodes:
    """A grid with its own poll loop.

    Replies are told apart by the message they answer. The sender's number would not do: errors that the SuperLink reports on
    behalf of a node carry the SuperLink's.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        clock: Callable[[], Seconds] = time.monotonic,
        sleep: Callable[[Seconds], None] = time.sleep,
        poll: Seconds = POLL_SECONDS,
    ) -> None:
        self.grid = grid
        self.clock = clock
        self._sleep = sleep
        self._poll = poll

    def connected(self) -> list[int]:
        """Numbers of the nodes that are online, ascending. They are random, and new for a node that comes back."""
        return sorted(self.grid.get_node_ids())

    def push(
        self, contents: Iterable[tuple[int, RecordDict]], kind: str, *, group: str = "", seconds: Seconds = PATIENCE_SECONDS
    ) -> list[str | None]:
        """Send one message per (node, content); their ids, or None for those that could not be sent.

        Args:
            kind: "train", "evaluate" or "query", with an action after a dot.
            seconds: how long the message is worth being answered; the SuperLink drops it after that.
        """
        # A list: Flower goes through it twice, and of a generator it would send nothing, in silence.
        messages = [Message(content, node, kind, ttl=seconds, group_id=group) for node, content in contents]
        taken = {identifier for identifier in self.grid.push_messages(messages) if identifier}
        ids = [message.metadata.message_id for message in messages]
        return [identifier if identifier in taken else None for identifier in ids]

    def pull(self, ids: Iterable[str]) -> list[Answer]:
        """Answers that have come in; each is given once."""
        wanted = dict.fromkeys(ids)  # in order, not a set: text hashes differently in every process
        if not wanted:
            return []
        answers = []
        for reply in self.grid.pull_messages(wanted):
            identifier = reply.metadata.reply_to_message_id
            if identifier not in wanted:
                continue  # answers something else, or the same once more
            del wanted[identifier]
            answers.append(Answer.of(reply))
        return answers

    def pause(self) -> None:
        """Wait a moment before looking again."""
        self._sleep(self._poll)

    def ask(
        self, contents: Mapping[int, RecordDict], kind: str, *, group: str = "", seconds: Seconds = PATIENCE_SECONDS
    ) -> dict[int, Answer]:
        """Send to several nodes and wait for all; who has not answered in time has an error for an answer."""
        nodes = list(contents)
        ids = self.push([(node, contents[node]) for node in nodes], kind, group=group, seconds=seconds)
        node_of = {identifier: node for node, identifier in zip(nodes, ids, strict=True) if identifier is not None}
        answers = {
            node: Answer("", None, "could not be sent") for node, identifier in zip(nodes, ids, strict=True) if not identifier
        }
        until = self.clock() + seconds
        while node_of and self.clock() < until:
            for answer in self.pull(node_of):
                answers[node_of.pop(answer.message_id)] = answer
            if node_of:
                self.pause()
        return answers | {node: Answer(i, None, f"no answer within {seconds:g} s") for i, node in node_of.items()}

    def wait_for(self, count: int, seconds: Seconds) -> list[int]:
        """The nodes, once there are so many.

        Raises:
            FleetError: fewer after `seconds`.
        """
        until = self.clock() + seconds
        while len(nodes := self.connected()) < count:
            if self.clock() > until:
                raise FleetError(
                    f"{len(nodes)} of {count} nodes are online after {seconds:g} s; start the missing SuperNodes, "
                    "or ask for fewer"
                )
            self.pause()
        return nodes


CODES = {
    0: "unknown", 1: "the client app could not be loaded", 2: "the client raised", 3: "the message expired or was lost",
    4: "the reply expired or was lost", 5: "the node is gone", 6: "a mod refused", 7: "bad app bundle",
    8: "the client process died",
}  # fmt: skip
"""Flower's error codes as of 1.42, in words."""


def in_words(error: Error) -> str:
    """An error reply, for a record."""
    return f"{CODES.get(error.code, f'error {error.code}')}: {error.reason}" if error.reason else str(CODES.get(error.code))


def spoken(answers: Mapping[int, Answer], what: str) -> dict[int, RecordDict]:
    """Contents of answers of which none may be missing.

    Raises:
        FleetError: the first failure.
    """
    for node, answer in answers.items():
        if answer.content is None:
            raise FleetError(f"node {node}, asked for {what}: {answer.error}")
    return {node: answer.content for node, answer in answers.items() if answer.content is not None}


def dealt(count: int, among: Sequence[int]) -> dict[int, list[int]]:
    """Places 0..count-1 dealt out evenly; nodes that get none are left out."""
    hands = {node: list(range(place, count, len(among))) for place, node in enumerate(among)}
    return {node: hand for node, hand in hands.items() if hand}
