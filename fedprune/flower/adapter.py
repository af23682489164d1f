"""For people who hold Flower's `strategy.start(grid=...)`: our strategies as one of Flower's.

    @app.main()
    def main(grid, context):
        strategy = FlowerStrategy(Settings(data="ml-100k", silos=4, strategy="heterofl"))
        result = strategy.start(grid, strategy.initial_arrays(grid), num_rounds=10)
        save(result.arrays.to_torch_state_dict(), "model.pt")

Flower's loop waits for everybody or for a time limit, so what does not wait (`skip`) is refused; `deployment.deploy` runs it.
Nothing is recorded or resumed either: Flower keeps the results. The ClientApp is `fedprune.flower.client_app:app`.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedprune.config import Settings
from fedprune.errors import ConfigError, FleetError
from fedprune.exchange import Lost, Order, Report
from fedprune.flower.deployment import Deployment, catalogue_of, mean_quality
from fedprune.flower.fleet import Job
from fedprune.flower.nodes import Answer, Nodes
from fedprune.strategy import ServerState, arrival, ask, learn, prepared
from fedprune.types import Seconds, Tensors

log = logging.getLogger(__name__)


class FlowerStrategy(Strategy):
    """One of our synchronous strategies, asked for its two halves of a round by Flower's loop.

    Args:
        settings: as for `fedprune run`; `silos` says how many devices there are.
        wait_seconds: how long `initial_arrays` waits for them.

    Raises:
        ConfigError: the strategy keeps late reports, or `silos` is not set.
    """

    def __init__(self, settings: Settings, *, wait_seconds: Seconds = 300.0) -> None:
        self.settings = settings.only(settings.strategy)
        self.wait_seconds = wait_seconds
        if self.settings.silos is None:
            raise ConfigError("silos is not set; on Flower's nodes it says how many clients there are (one each)")
        self._deployment: Deployment | None = None
        self._state: ServerState | None = None
        self._sent: list[tuple[Message, Job]] = []
        self._orders: list[Order] = []

    def initial_arrays(self, grid: Grid) -> ArrayRecord:
        """The model to start from: waits for all clients, and does the warm start with them."""
        self._state, _ = self._on(grid).begin()
        return _arrays(self._state.model)

    def summary(self) -> None:
        """Say what will run."""
        log.info("fedprune %s on %s clients", self.settings.strategy, self.settings.silos)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """Orders to everybody whom the strategy asks; `config` is not used, the settings say it all."""
        deployment = self._on(grid)
        state = replace(self._state or deployment.state, model=_tensors(arrays, deployment.state.model))
        self._state, self._sent = prepared(deployment.strategy, state), []
        self._orders = ask(deployment.strategy, self._state, deployment.fleet.idle())
        for order in self._orders:
            job, content = deployment.fleet.letter(order)
            node = deployment.crew.node_of(order.client)
            assert node is not None
            seconds = order.expires or deployment.fleet.order_seconds
            self._sent.append((Message(content, node, "train", ttl=seconds, group_id=str(server_round)), job))
        return [message for message, _ in self._sent]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge what came back; what is wrong with a reply is logged, and the others are merged."""
        deployment, state = self._deployment, self._state
        assert deployment is not None and state is not None
        answers = {answer.message_id: answer for answer in map(Answer.of, replies)}
        reports: list[Report] = []
        lost: list[Lost] = []
        for message, job in self._sent:
            answer = answers.get(message.metadata.message_id)
            if answer is None:
                lost.append(deployment.fleet.given_up(job, "too late"))
                continue
            event = deployment.fleet.report(job, answer, polled=False)
            if isinstance(event, Lost):
                log.warning("%s", event.detail)
                lost.append(event)
            else:
                reports.append(arrival(event, state.version, event.finished))
        self._state = learn(deployment.strategy, state, self._orders, reports, lost, deployment.clients)
        examples = [report.examples for report in reports]
        figures: dict[str, Any] = {"num-examples": sum(examples), "reports": len(reports), "lost": len(lost)}
        if reports:
            figures["loss"] = float(np.average([report.loss for report in reports], weights=examples))
            figures["mean-rate"] = float(np.mean([report.order.rate for report in reports]))
        return _arrays(self._state.model), MetricRecord(figures)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """Every client ranks for its own users with the submodel that it would serve them with."""
        deployment = self._on(grid)
        assert self._state is not None
        contents = deployment.questions(replace(self._state, model=_tensors(arrays, self._state.model)))
        return [Message(content, node, "evaluate", group_id=str(server_round)) for node, content in contents.items()]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Means over users of what `deployment.Deployment.evaluate` measures, `validation-` and `test-`."""
        deployment = self._deployment
        assert deployment is not None
        said = list(deployment.said((reply.metadata.src_node_id, Answer.of(reply)) for reply in replies).values())
        figures: dict[str, Any] = {}
        for split in ("validation", "test"):
            figures |= {f"{split}-{name}": value for name, value in mean_quality(said, split).items()}
        return MetricRecord(figures) if figures else None

    def _on(self, grid: Grid) -> Deployment:
        if self._deployment is None:
            name = f"{self.settings.strategy}-{uuid.uuid4().hex[:12]}"
            deployment = Deployment.of(self.settings, Nodes(grid), name, catalogue_of(self.settings), self.wait_seconds)
            if deployment.strategy.gather.late == "keep":
                raise ConfigError(
                    f"{self.settings.strategy} does not wait for late reports, and Flower's loop does; "
                    "run it with fedprune.flower.deployment.deploy, or `flwr run`"
                )
            self._deployment = deployment
        return self._deployment


def _arrays(model: Tensors) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in model.items()})


def _tensors(arrays: ArrayRecord, like: Tensors) -> Tensors:
    """The full model out of Flower's arrays.

    Raises:
        FleetError: other tensors or shapes than the recommender's.
    """
    model = dict(arrays.to_torch_state_dict())
    for name, tensor in like.items():
        if name not in model or model[name].shape != tensor.shape:
            raise FleetError(
                f'initial arrays lack "{name}" of shape {tuple(tensor.shape)}; take them from initial_arrays(grid)'
            )
    return {name: model[name] for name in like}
