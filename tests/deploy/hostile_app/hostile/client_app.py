"""A ClientApp that works as fedprune's does, but whose node with `hostile=true` spoils its reports, each in another way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flwr.app import Array, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedprune.flower import client_app as honest

app = ClientApp()
app.query("hello")(honest.hello)
app.query("warm_start")(honest.warm_start)
app.evaluate()(honest.evaluate)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train, then lie."""
    answer = honest.train(message, context)
    version = int(message.content["config"]["server-round"])
    if context.node_config.get("hostile", False) and version < len(LIES):
        LIES[version](answer.content)
    return answer


def other_ticket(content: RecordDict) -> None:
    content["config"]["tickets"] = [ticket + 1 for ticket in content["config"]["tickets"]]


def other_version(content: RecordDict) -> None:
    content["config"]["server-round"] += 1


def update(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[RecordDict], None]:
    def lie(content: RecordDict) -> None:
        content["arrays"]["update"] = Array(np.ascontiguousarray(change(content["arrays"]["update"].numpy().copy())))

    return lie


def entry(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[np.flatnonzero(values)[0]] = value
        return values

    return change


LIES: list[Callable[[RecordDict], None]] = [
    other_ticket,
    other_version,
    update(lambda values: values[:-1]),
    update(entry(np.nan)),
    update(entry(np.inf)),
    update(entry(1e6)),
]
"""By version of the model; honest from then on."""
