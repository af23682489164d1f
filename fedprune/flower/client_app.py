"""The ClientApp: what a node does with a message. On a device it is the device's own code; in a simulation a share of it."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from fedprune.flower.device import Device
from fedprune.flower.shard import serve

app = ClientApp()


def _device(message: Message, context: Context) -> Device:
    torch.set_num_threads(1)  # the tensors are small, and sums keep their order
    return Device.of(message.content, context.node_config)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Who this is."""
    return Message(_device(message, context).hello(message.content), reply_to=message)


@app.query("warm_start")
def warm_start(message: Message, context: Context) -> Message:
    """This client's part of the federated SVD."""
    return Message(_device(message, context).warm_start(message.content), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Work on an order; on several, with private rows that came along, in a simulation."""
    arrays = message.content["arrays"]
    if isinstance(arrays, ArrayRecord) and "private" in arrays:
        torch.set_num_threads(1)
        return Message(serve(message.content), reply_to=message)
    return Message(_device(message, context).train(message.content), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Rank for this client's users."""
    return Message(_device(message, context).evaluate(message.content), reply_to=message)
