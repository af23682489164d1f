"""The ClientApp: what a node does with a message. On a device it is the device's own work; in a simulation a share of it.

Flower imports this file in a fresh process for every message, so what is heavy is imported where it is needed.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from fedprune.flower import resident

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Who this is."""
    return _performed("hello", message, context)


@app.query("warm_start")
def warm_start(message: Message, context: Context) -> Message:
    """This client's part of the federated SVD."""
    return _performed("warm_start", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Work on an order; on several, with private rows that came along, in a simulation."""
    arrays = message.content["arrays"]
    if isinstance(arrays, ArrayRecord) and "private" in arrays:
        from fedprune.flower.shard import serve

        return Message(serve(message.content), reply_to=message)
    return _performed("train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Rank for this client's users."""
    return _performed("evaluate", message, context)


def _performed(action: str, message: Message, context: Context) -> Message:
    wanted = context.node_config.get("resident", True) not in (False, "false")
    waiting = resident.address() if wanted else None
    if waiting is not None:
        try:
            content = resident.hand_over(waiting, action, message.content, context.node_config, since_start())
            return Message(content, reply_to=message)
        except resident.Away:
            pass  # nothing has begun there, so it can be done here
    from fedprune.flower.device import perform

    return Message(perform(action, message.content, context.node_config, since_start()), reply_to=message)


def since_start() -> float:
    """Seconds since this process was started for its one message; 0 where processes serve many (simulation).

    Importing libraries is most of it, and happens before anything of ours runs.
    """
    if "flwr-clientapp" not in Path(sys.argv[0]).name:
        return 0.0
    if not Path("/proc/self/stat").exists():
        return time.process_time()
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    booted = float(Path("/proc/uptime").read_text().split()[0])
    return booted - int(fields[19]) / os.sysconf("SC_CLK_TCK")
