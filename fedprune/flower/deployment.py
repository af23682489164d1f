"""A run on real devices: the warm start, evaluation and checkpoints of an experiment whose data is elsewhere."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from fedprune.codec import Codec
from fedprune.config import Settings
from fedprune.data import load
from fedprune.distill import Distillation
from fedprune.errors import ConfigError, FleetError
from fedprune.exchange import Lost, Order
from fedprune.experiment import Watcher, conduct, open_record, plain_recommender, recommender_of, spread, strategy_of
from fedprune.flower import wire
from fedprune.flower.compat import wire_bytes
from fedprune.flower.crew import Crew
from fedprune.flower.fleet import FlowerFleet
from fedprune.flower.nodes import PATIENCE_SECONDS, Answer, Nodes, spoken
from fedprune.recommenders import Recommender
from fedprune.record import Snapshot
from fedprune.strategy import ServerState, Strategy
from fedprune.types import ClientId, FloatArray, Seconds
from fedprune.warmstart import WarmStart

log = logging.getLogger(__name__)
FINISH_SECONDS = 180.0
"""How long the last evaluation waits for devices that are still at work."""


def deploy(
    settings: Settings,
    folder: Path,
    grid: Grid,
    *,
    wait_seconds: Seconds = 300.0,
    order_seconds: Seconds = PATIENCE_SECONDS,
    watch: Watcher | None = None,
    nodes: Nodes | None = None,
) -> dict[str, Any]:
    """Run one strategy on the devices behind a grid, or go on with it where the server was stopped.

    Args:
        wait_seconds: how long to wait for all devices before the first round.
        order_seconds: an order that nobody has answered for so long is lost.

    Returns:
        The summary (`report.summary.summarise`); its `virtual_seconds` are the wall clock's.

    Raises:
        FedpruneError: bad settings, or devices are missing.
    """
    settings = settings.only(settings.strategy)
    if settings.silos is None:
        raise ConfigError("silos is not set; on real devices it says how many there are (one SuperNode each)")
    _possible(*settings.of(settings.strategy))
    catalogue = catalogue_of(settings)
    digest = hashlib.blake2b("\n".join(catalogue).encode(), digest_size=8).hexdigest()
    record = open_record(settings, folder, f"{digest} on {settings.silos} devices")
    if record.finished is not None:
        return record.finished
    deployment = Deployment.of(settings, nodes or Nodes(grid), record.about["name"], catalogue, wait_seconds)
    deployment.fleet.order_seconds = order_seconds
    return conduct(deployment, record, watch)


def catalogue_of(settings: Settings) -> list[str]:
    """Ids of all items, in the order of their numbers: of `settings.catalogue`, or of the public data set.

    Raises:
        ConfigError: the file is missing, or holds fewer than two items or one twice.
    """
    if settings.catalogue is None:
        return list(load(settings.data, min_interactions=settings.min_interactions).item_ids)
    path = Path(settings.catalogue).expanduser()
    if not path.is_file():
        raise ConfigError(f"no catalogue {path}; it is a text file with one item id per line")
    items = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if len(items) < 2 or len(set(items)) < len(items):
        raise ConfigError(f"{path} lists {len(items)} items, {len(set(items))} of them different; each once, and at least 2")
    return items


@dataclass
class Deployment:
    """An `experiment.Experiment` on real devices. Private rows and held-out items never leave them."""

    settings: Settings
    strategy: Strategy
    recommender: Recommender
    crew: Crew
    fleet: FlowerFleet
    state: ServerState
    run: str
    wait_seconds: Seconds
    _moved: dict[str, int] = field(default_factory=lambda: {"bytes_down": 0, "bytes_up": 0})

    @classmethod
    def of(
        cls, settings: Settings, nodes: Nodes, run: str, catalogue: Sequence[str], wait_seconds: Seconds = 300.0
    ) -> Deployment:
        """Build the server's side; nobody is asked yet.

        Raises:
            ConfigError: the strategy is none for real devices.
        """
        own, arguments = settings.of(settings.strategy)
        strategy = _possible(own, arguments)
        clients = own.silos or 1
        recommender = recommender_of(own, clients, len(catalogue))
        text, items = settings.to_json(), "\n".join(catalogue)
        crew = Crew(nodes, clients, len(catalogue), lambda: wire.write_numbers(run, text, items=items))
        fleet = FlowerFleet(crew, recommender.layout, run, text)
        state = ServerState(recommender.initial(own.seed), recommender.layout, own.seed)
        return cls(own, strategy, recommender, crew, fleet, state, run, wait_seconds)

    @property
    def clients(self) -> int:
        """How many there are to be."""
        return self.crew.clients

    def begin(self) -> tuple[ServerState, dict[str, Any]]:
        """Wait for everybody, then the federated SVD, one exchange per iteration."""
        self.crew.gather(self.wait_seconds)
        self.fleet.go_on_from(0.0)
        start = WarmStart(self.settings.warm_start, popularity_bias=self.settings.popularity_bias)
        plain = plain_recommender(self.settings, self.clients, self.crew.items)
        model = start.start(plain, Apart(self, start.norm), self.state.model, self.settings.seed)
        ended = self.fleet.now()
        self.state = ServerState(model, self.state.layout, self.state.seed)
        seconds = dict.fromkeys(("download", "loading", "training", "teacher", "upload"), 0.0)
        event = {"version": -1, "began": 0.0, "ended": ended, "flops": 0.0, **self._moved, "joules": None, "source": "measured"}
        return self.state, event | {"seconds": seconds | {"waiting": ended * self.clients}}

    def resume(self, state: ServerState, kept: Snapshot) -> None:
        """Set the clock; orders that were on their way are lost with the server that sent them.

        Who is online is waited for, or the first round would be that of the first to answer; who is not is not.
        """
        self.fleet.full_seconds |= {int(client): seconds for client, seconds in kept.about["full_seconds"].items()}
        self.crew.settle(set(self.fleet.full_seconds))
        self.fleet.go_on_from(kept.about["clock"])

    def snapshot(self, state: ServerState) -> Snapshot:
        """The clock, and how long everybody's first report took. Private rows are on the devices."""
        return Snapshot({}, {"clock": self.fleet.now(), "full_seconds": self.fleet.full_seconds})

    def unfinished(self) -> list[Lost]:
        """Wanted orders still on their way."""
        return self.fleet.unfinished()

    def heterogeneity(self) -> dict[str, float]:
        """By how long each client's first report took, scaled to the full model."""
        seconds = np.array(list(self.fleet.full_seconds.values()) or [1.0])
        return spread(seconds / seconds.min())

    def evaluate(self, state: ServerState, silent: Sequence[int] = (), final: bool = False) -> dict[str, dict[str, float]]:
        """Every device ranks for its own users, with the submodel it would serve them with, and says how well.

        Devices at work are left out, unless it is the last evaluation; the clock stands still meanwhile. The whole model is
        not sent to who cannot hold it, so there are no `_global` figures. What is sent is exact, whatever the codec.
        """
        with self.fleet.stopped():
            if final:
                self.fleet.wait_until_idle(FINISH_SECONDS)
            contents, until = self.questions(state, silent), self.crew.nodes.clock() + FINISH_SECONDS
            while not contents and self.crew.nodes.clock() < until:  # everybody is at work
                self.crew.nodes.pause()
                contents = self.questions(state, silent)
            answers = self.crew.nodes.ask(contents, "evaluate", group=str(state.version), seconds=FINISH_SECONDS)
        for node, answer in answers.items():
            client = self.crew.client_of(node)
            if client is not None and answer.message_id and answer.error.startswith("no answer"):
                self.fleet.expect(answer.message_id, client)
        said = self.said(answers.items())
        averaged = {name: self._averaged(said, name) for name in ("validation", "test")}
        return averaged if all(averaged.values()) else {}

    def questions(self, state: ServerState, silent: Sequence[ClientId] = ()) -> dict[int, RecordDict]:
        """What idle clients are asked for an evaluation, by node: each with the submodel it would serve its users with."""
        roster, contents, state = self.fleet.idle(), {}, self.strategy.begun(state)
        objective = replace(self.strategy.served, distillation=None)  # nobody is taught, so the cut is all they need
        submodels, _ = self.strategy.held(state, roster.clients, roster)  # as float32: memory_limited is refused here
        for client, submodel in zip(roster.clients.tolist(), submodels, strict=True):
            node = self.crew.node_of(client)
            assert node is not None
            order = Order(
                0, client, state.version, 1.0, submodel, objective, Codec(), state.model, state.seed,
            )  # fmt: skip
            contents[node] = wire.write_orders([order], state.layout, run=self.run, settings=self.fleet.settings)
            if client in silent and self.settings.listen_steps:
                config = contents[node]["config"]
                assert isinstance(config, ConfigRecord)
                config["listen"] = self.settings.listen_steps
        return contents

    def said(self, answers: Iterable[tuple[int, Answer]]) -> dict[ClientId, dict[str, float]]:
        """Quality by client, from what nodes answered to `questions`; who gave none that can be is logged."""
        said: dict[ClientId, dict[str, float]] = {}
        for node, answer in answers:
            client = self.crew.client_of(node)
            try:
                if client is None or answer.content is None:
                    raise FleetError(answer.error or "nobody has said who it is")
                said[client] = quality_of(answer.content, self.crew.facts[client].users)
            except FleetError as error:
                log.warning("client %s is not in the evaluation: %s", client, error)
        return said

    def _averaged(self, said: Mapping[ClientId, Mapping[str, float]], split: str) -> dict[str, float]:
        """Means over all evaluated users, and over those of the slowest quarter of the devices."""
        seconds = self.fleet.full_seconds
        limit = float(np.quantile(list(seconds.values()), 0.75)) if seconds else 0.0
        slow = [figures for client, figures in said.items() if seconds.get(client, 0.0) >= limit]
        result = mean_quality(list(said.values()), split)
        if not result:
            log.warning("no device could be evaluated on %s; %s answered, none has a held-out item", split, len(said))
            return {}
        return result | {f"{name}_slow": value for name, value in mean_quality(slow, split).items()}

    def ask_everybody(self, action: str, content: Callable[[ClientId], RecordDict], what: str) -> dict[ClientId, RecordDict]:
        """Ask all clients, and count the bytes.

        Raises:
            FleetError: one does not answer.
        """
        nodes = {self.crew.node_of(client) or 0: client for client in range(self.clients)}
        contents = {node: content(client) for node, client in nodes.items()}
        answers = spoken(self.crew.nodes.ask(contents, action, seconds=self.wait_seconds), what)
        self._moved["bytes_down"] += sum(map(wire_bytes, contents.values()))
        self._moved["bytes_up"] += sum(map(wire_bytes, answers.values()))
        return {nodes[node]: answer for node, answer in answers.items()}


def _possible(settings: Settings, arguments: dict[str, Any]) -> Strategy:
    """The strategy, if real devices can carry it out.

    Raises:
        ConfigError: its teacher knows what only simulations know, it caches downloads, or their memory is to be limited.
    """
    strategy = strategy_of(settings, arguments)
    if settings.memory_limited:
        raise ConfigError(
            "memory_limited is for simulated devices: real ones do not say yet how much they hold; set it to 0, or simulate it "
            "with `fedprune run`"
        )
    if strategy.codec.refresh > 1:
        raise ConfigError(
            f"refresh {strategy.codec.refresh} caches downloads, which devices do not do yet; set it to 1, or simulate it with "
            "`fedprune run`"
        )
    match strategy.objective.distillation:
        case Distillation(teacher="sent"):
            raise ConfigError(
                'teacher "sent" scores with private rows, and on real devices these never reach the server; take the teacher '
                '"local", which scores on the device, or "past"'
            )
        case Distillation(teacher="given"):
            raise ConfigError(
                'teacher "given" is a model from elsewhere, and devices have none; take the teacher "local" or "past", or '
                "simulate it with `fedprune run`"
            )
    return strategy


FIGURES = [f"{name}_{protocol}" for protocol in ("full", "expected", "draw") for name in ("hr10", "ndcg10")]


def quality_of(content: RecordDict, users: int) -> dict[str, float]:
    """What a device says of its users' ranking quality, `validation-` and `test-`.

    Args:
        users: as many as it said it has.

    Raises:
        FleetError: a figure is missing or cannot be.
    """
    result: dict[str, float] = {}
    for split in ("validation", "test"):
        count = wire.read_metric(content, f"{split}-users", int)
        if not 0 <= count <= users:
            raise FleetError(f'field "{split}-users" is {count}; it has {users}')
        result[f"{split}-users"] = count
        for figure in FIGURES if count else ():
            value = result[f"{split}-{figure}"] = wire.read_metric(content, f"{split}-{figure}")
            if not 0 <= value <= 1:
                raise FleetError(f'field "{split}-{figure}" is {value}; it must be in 0 .. 1')
    return result


def mean_quality(said: Sequence[Mapping[str, float]], split: str) -> dict[str, float]:
    """Means over users; empty without any."""
    total = sum(figures[f"{split}-users"] for figures in said)
    if not total:
        return {}
    counted = [figures for figures in said if figures[f"{split}-users"]]
    means = {f: sum(own[f"{split}-{f}"] * own[f"{split}-users"] for own in counted) / total for f in FIGURES}
    return means | {"users": total}


@dataclass
class Apart:
    """A `warmstart.Crowd` whose interactions are on the devices."""

    deployment: Deployment
    norm: float
    _counts: FloatArray | None = None

    @property
    def users(self) -> int:
        """As they said when they were first asked."""
        return sum(facts.users for facts in self.deployment.crew.facts.values())

    def counts(self) -> FloatArray:
        """Interactions per item."""
        if self._counts is None:
            self._counts = self._sum("counts", "counts", ())
        return self._counts

    def spread(self, basis: FloatArray) -> FloatArray:
        """X^T X Q, one exchange."""
        return self._sum("spread", "sum", basis.shape[1:], basis=basis)

    def place(self, name: str, projection: FloatArray) -> None:
        """One exchange; nothing comes back."""
        self._sum("place", None, (), basis=projection, tensor=name)

    def _sum(
        self, step: str, wanted: str | None, shape: tuple[int, ...], basis: FloatArray | None = None, **config: str
    ) -> FloatArray:
        log.info("warm start: %s", step)
        run, settings, items = self.deployment.run, self.deployment.fleet.settings, self.deployment.crew.items
        arrays = {} if basis is None else {"basis": basis, "counts": self.counts()}
        rank = 0 if basis is None else basis.shape[1]

        def content(client: ClientId) -> RecordDict:
            return wire.write_numbers(run, settings, arrays=arrays, step=step, norm=self.norm, rank=rank, **config)

        answers = self.deployment.ask_everybody("query.warm_start", content, f"the warm start ({step})")
        total = np.zeros((items, *shape))
        for client in sorted(answers) if wanted is not None else ():  # in order: float addition does not commute
            part = wire.read_array(answers[client], str(wanted), (items, *shape), np.float64)
            self._credible(client, step, part)
            total += part
        return total

    def _credible(self, client: ClientId, step: str, part: FloatArray) -> None:
        """A client's sum cannot exceed what its interactions make possible.

        Raises:
            FleetError: it does; the run ends, since nobody can start without everybody's part.
        """
        facts = self.deployment.crew.facts[client]
        if step == "counts" and (part.min() < 0 or part.max() > facts.users or part.sum() > facts.interactions):
            raise FleetError(f"client {client}'s item counts do not fit its {facts.interactions} interactions; leave it out")
        # Rows of X have norm 1 at most, and Q has orthonormal columns: |X^T X Q| is at most the number of rows.
        if step == "spread" and float(np.linalg.norm(part)) > facts.users * np.sqrt(max(1, part.shape[-1])):
            raise FleetError(f"client {client}'s part of the warm start is larger than any can be; leave it out")


def say(event: dict[str, Any]) -> str:
    """A round in one line, for whoever watches."""
    words = f"round {event['version'] + 1}: {event['ended']:.1f} s, {event['asked']} asked, {event['reports']} reports"
    if event.get("fastest_update") is not None:
        words += f", updates took {event['fastest_update']:.1f} to {event['slowest_update']:.1f} s"
    if "evaluation" in event:
        words += f", validation NDCG@10 (1+99) {event['evaluation']['validation']['ndcg10_expected']:.4f}"
    return "; ".join([words, *event.get("refused", [])])
