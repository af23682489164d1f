"""Flower's private parts, all that we need of them, in one place; last checked on 1.41.0 and 1.42.0.

What is used and why: object ids and frames (`get_all_nested_objects`), for exact byte counts; `TaskIdentity`, which every
Message reads, for grids in this process; the SuperNode's connection, to time its transfers, which no public hook shows;
the simulation's grid, to tell a simulation from a deployment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, Literal

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity


def wire_bytes(content: RecordDict) -> int:
    """Bytes of a message's content as Flower sends them, its framing included; equal objects travel once.

    HTTP headers, TLS and TCP come on top of it.
    """
    return sum(len(part.deflate()) for part in get_all_nested_objects(content).values())


def is_simulated(grid: Grid) -> bool:
    """Whether a grid is that of Flower's simulation, whose nodes are processes of this machine or a Ray cluster."""
    return type(grid).__name__ == "InMemoryGrid"


def identify(run_id: int, node_id: int = 1, task_id: int = 1) -> None:
    """Say who this process is, for a grid that lives in it; Flower's own processes do so themselves."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, task_id


def number(message: Message) -> str:
    """Give a message the id that its reply will name, as Flower's grids do, and return it."""
    message.metadata.__dict__["_message_id"] = message.object_id
    return message.metadata.message_id


Note = Callable[[Literal["download", "upload"], float, float, int], None]
"""Called with "download" or "upload", when it began (Unix time), the seconds it took, and its bytes."""


@contextmanager
def timed_transfers(note: Note) -> Iterator[None]:
    """While this lasts, a SuperNode started in this process tells how long its messages take to travel.

    A message travels as a header and one HTTP request per object. A download is all objects of one order, from the header's
    arrival until the SuperNode confirms them; an upload all of a reply, from its header until the last object. Waiting for
    orders or for the client's process is in neither.
    """
    from flwr.supernode import start_client_internal as internal

    original = internal._init_connection

    @contextmanager
    def timed(*arguments: Any, **named: Any) -> Iterator[Any]:
        with original(*arguments, **named) as connection:
            node, receive, send, get_run, get_fab, pull_object, push_object, confirm = connection
            began = 0.0
            moved = 0
            lock = Lock()  # objects are pulled and pushed by several threads

            def timed_receive() -> Any:
                nonlocal began, moved
                received = receive()
                began, moved = time.time(), 0
                return received

            def timed_pull(run_id: int, object_id: str) -> bytes:
                nonlocal moved
                content = pull_object(run_id, object_id)
                with lock:
                    moved += len(content)
                return content

            def timed_confirm(run_id: int, message_id: str) -> None:
                note("download", began, time.time() - began, moved)
                confirm(run_id, message_id)

            def timed_send(message: Message, tree: Any, runtime: float) -> Any:
                nonlocal began, moved
                began, moved = time.time(), 0
                return send(message, tree, runtime)

            def timed_push(run_id: int, session_id: str, object_id: str, content: bytes) -> None:
                nonlocal moved
                push_object(run_id, session_id, object_id, content)
                with lock:
                    moved += len(content)
                    # Nothing tells which object is the last, so each says how far the upload is; the last word counts.
                    note("upload", began, time.time() - began, moved)

            yield node, timed_receive, timed_send, get_run, get_fab, timed_pull, timed_push, timed_confirm

    internal._init_connection = timed  # type: ignore[assignment]
    try:
        yield
    finally:
        internal._init_connection = original
