"""A real device: its own data, its own private rows, its own stopwatch. What leaves it is in `wire`, and nothing else."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import MetricRecord, RecordDict

from fedprune import energy
from fedprune.config import Settings
from fedprune.data import Split
from fedprune.errors import ConfigError, FedpruneError, FleetError
from fedprune.evaluation import average, quality, rank_held_out
from fedprune.exchange import Order
from fedprune.fleet.trainer import Watch, cut_already, one_by_one
from fedprune.flower import wire
from fedprune.flower.store import Store, home, rows_of
from fedprune.flower.transfers import POLLING_SECONDS, last_transfers
from fedprune.flower.world import own_world, shared_world
from fedprune.population import Population
from fedprune.recommenders import Recommender
from fedprune.serving import cut_scorer, listen
from fedprune.types import IntArray, Seconds, Tensors, Ticket
from fedprune.warmstart import Gathered
from fedprune.workload import Workload, workload

log = logging.getLogger(__name__)
PADDING_BYTES = 131_072
"""Sent along with a device's first answer, so that its upload speed is known before its first report."""


@dataclass(frozen=True)
class Device:
    """One client of a run on this machine.

    Attributes:
        client: its number in the run (`partition-id` of the SuperNode's --node-config).
        split: this device's own interactions; or, without a `data` file of its own, a public data set of which the device
            trains on its share alone.
        population: with the initial private rows, until `_recall` puts the stored ones there.
    """

    settings: Settings
    run: str
    client: int
    node_config: Mapping[str, Any]
    split: Split
    recommender: Recommender
    population: Population
    local: int
    store: Store

    @classmethod
    def of(cls, content: RecordDict, node_config: Mapping[str, Any]) -> Device:
        """The device that a message is for.

        Raises:
            FleetError: the node says no `partition-id`, or has not been told the catalogue yet.
            DataError: its own file cannot be read.
        """
        client = node_config.get("partition-id")
        if type(client) is not int or client < 0:
            raise FleetError(
                f"partition-id is {client!r}; start the SuperNode with --node-config 'partition-id=0' (or 1, 2 ...)"
            )
        run, text = wire.read_config(content, "run", str), wire.read_config(content, "settings", str)
        if not re.fullmatch(r"[\w-]{1,80}", run):
            raise FleetError(f'run "{run[:80]}" cannot be the name of a folder')
        own = str(Path(str(node_config["data"])).expanduser()) if "data" in node_config else None
        store = Store(home(node_config) / run, client)
        if own is None:
            world = shared_world(text)
        else:
            if items := wire.read_option(content, "items", str, ""):
                store.note(items=items)
            elif not (items := store.facts().get("items", "")):
                raise FleetError(
                    "this device has its own data and does not know the catalogue yet; the server's hello tells it"
                )
            world = own_world(text, own, items)
        population = world.population.copy()  # the process may serve other runs and clients
        local = 0 if own else client
        if local >= population.clients:
            raise FleetError(f"partition-id is {client}; this run has clients 0 to {population.clients - 1}")
        users = population.users_of[local]
        store = replace(store, users=tuple(world.split.train.user_ids[user] for user in users))
        return cls(world.settings, run, client, node_config, world.split, world.recommender, population, local, store)

    @property
    def users(self) -> IntArray:
        """Whose data is here, in the population's numbers."""
        return self.population.users_of[self.local]

    @cached_property
    def meter(self) -> energy.Meter | None:
        """What measures this device's joules, if anything can; `meter` in --node-config chooses."""
        return _meter(str(self.node_config.get("meter", "auto")))

    def _recall(self, ticket: Ticket | None = None) -> Tensors:
        """Put the stored private rows into the population; a copy of them.

        Args:
            ticket: about to be worked on.
        """
        self.store.load(self.population, self.users, ticket)
        return rows_of(self.population, self.users)

    # ---- what a device can be asked for ------------------------------------------------------------------------------

    def hello(self, content: RecordDict) -> RecordDict:
        """Who this is: how many users and interactions, how fast, and what it draws at rest."""
        facts = self.store.facts()
        if "probe-flops" not in facts:
            facts["probe-flops"] = probe()
            if self.meter is not None:
                try:
                    facts["watts-idle"] = energy.idle_watts(self.meter)
                except ConfigError as error:  # a counter that stands still must not keep the device out
                    log.warning("power at rest stays unknown: %s", error)
            self.store.note(**facts)
        train = self.split.train
        rows = sum(len(train.items_of(int(user))) for user in self.users)
        answer = wire.write_numbers(self.run, "", arrays={"padding": _noise(PADDING_BYTES)}, client=self.client)
        figures = {"users": len(self.users), "interactions": rows, "items": train.items, "flops": facts["probe-flops"]}
        if "slowness" in self.node_config:
            figures["slowness"] = _number(self.node_config, "slowness", least=1.0)
        answer["metrics"] = MetricRecord(figures)
        return answer

    def warm_start(self, content: RecordDict) -> RecordDict:
        """This device's part of the federated SVD (`warmstart.Crowd`)."""
        step, train = wire.read_config(content, "step", str), self.split.train
        mine = train.part(np.isin(train.user, self.users))
        shape = (train.items,)
        if step == "counts":
            # A run begins here, also one that was stopped before its first checkpoint: from the initial rows.
            fresh = self.recommender.initial_private(self.settings.seed)
            blank = Population(train, self.population.client_of_user, self.recommender.layout, fresh)
            self.store.keep(rows_of(blank, self.users), blank, self.users, -1)
            crowd = Gathered(mine, 0.0, {})
            return wire.write_numbers(self.run, "", arrays={"counts": crowd.counts()})
        norm, rank = wire.read_config(content, "norm", float), wire.read_config(content, "rank", int)
        counts = wire.read_array(content, "counts", shape, np.float64)
        basis = wire.read_array(content, "basis", (train.items, rank), np.float64)
        crowd = Gathered(mine, norm, {}, counts)
        if step == "spread":
            return wire.write_numbers(self.run, "", arrays={"sum": crowd.spread(basis)})
        name = wire.read_config(content, "tensor", str)
        before = self._recall()
        crowd.place(name, basis)
        at = torch.from_numpy(self.users)
        self.population.private.values[name][at] = crowd.private[name][at]
        self.store.keep(before, self.population, self.users, -1)
        return wire.write_numbers(self.run, "")

    def train(self, content: RecordDict, starting: Seconds = 0.0) -> RecordDict:
        """Work on the order, keep the private rows, report the update and what it cost.

        Args:
            starting: seconds that went by before.
        """
        spans = energy.Spans(self.meter)
        with spans("loading"):
            parcel = wire.read_orders(content, self.recommender.layout)
            if len(parcel.orders) != 1 or parcel.orders[0].client != self.client:
                raise FleetError(f"client {self.client} got orders for {[order.client for order in parcel.orders]}")
            order = replace(parcel.orders[0], client=self.local)
            before = self._recall(order.ticket)
        load = self._load(order)
        work = self._work(order, load, starting)
        with _trained(spans) as lesson:
            (result,) = one_by_one(self.recommender, self.population, [order], [work], cut_already, lesson)
            result.stack.settle([result.position])
        self.store.keep(before, self.population, self.users, order.ticket)
        self.store.note(flops=load.training * work / max(spans.of("training").seconds, 1e-6))
        stack = wire.Stacked(
            (order.ticket,), result.updates, (result.examples,), (result.loss,), (work,), gates=wire.gates([result])
        )
        return wire.write_reply(parcel, [stack], self.recommender.layout, self._measured(spans, starting))

    def evaluate(self, content: RecordDict) -> RecordDict:
        """Quality for this device's users, by the model it would serve them with."""
        (order,) = wire.read_orders(content, self.recommender.layout).orders
        self._recall()
        steps = wire.read_option(content, "listen", int, 0)
        if steps:
            ears = replace(self.store, kind="listening")
            ears.load(self.population, self.users)
            before = rows_of(self.population, self.users)
            listen(
                self.recommender, self.population, order.model, [self.local], order.objective, steps=steps, seed=order.seed,
                version=order.version, submodels=[order.submodel],
            )  # fmt: skip
            ears.keep(before, self.population, self.users, -1)
        score = cut_scorer(self.recommender, order.model, order.submodel, self.population.private.values)
        figures: dict[str, Any] = {}
        for name, seen, held_out in (
            ("validation", self.split.train, self.split.validation),
            ("test", self.split.seen_before_test(), self.split.test),
        ):
            own = np.full_like(held_out, -1)
            own[self.users] = held_out[self.users]
            figures[f"{name}-users"] = int((own >= 0).sum())
            if (own >= 0).any():
                measured = average(quality(rank_held_out(score, seen, own)))
                figures |= {f"{name}-{key}": value for key, value in measured.items()}
        answer = wire.write_numbers(self.run, "")
        answer["metrics"] = MetricRecord({"num-examples": figures["test-users"]} | figures)
        return answer

    # ---- its stopwatch -----------------------------------------------------------------------------------------------

    def _load(self, order: Order) -> Workload:
        """Of the whole order."""
        population, objective = self.population, order.objective
        return workload(
            self.recommender.layout, order.submodel, objective, order.codec, rows=population.items, items=population.items,
            examples=float(population.examples_of_client(objective)[self.local]),
            listed=int(population.listed_of_client(objective)[self.local]),
        )  # fmt: skip

    def _work(self, order: Order, load: Workload, elapsed: Seconds) -> float:
        """Share of the examples that fits before the order's time limit, by the speed of the last order."""
        until, facts = order.objective.until, self.store.facts()
        if until is None or "flops" not in facts:
            return 1.0
        network = sum(transfer.seconds for transfer in last_transfers().values())
        left = until - elapsed - network - POLLING_SECONDS  # or whoever needs the limit would always be too late
        return float(np.clip((left * facts["flops"] - load.teacher) / load.training, 0.05, 1.0))

    def _measured(self, spans: energy.Spans, starting: Seconds) -> dict[str, Any]:
        """Seconds and raw joules by part, as far as this device can tell."""
        loading, training, teacher = (spans.of(part) for part in ("loading", "training", "teacher"))
        figures: dict[str, Any] = {
            "seconds-loading": loading.seconds + starting,
            "seconds-training": training.seconds,
            "seconds-teacher": teacher.seconds,
        }
        known = dict(self.store.facts()) | dict(self.node_config)
        if "watts-idle" in known:
            figures["watts-idle"] = _number(known, "watts-idle", least=0.0)
        if loading.joules is not None and training.joules is not None and teacher.joules is not None:
            # Before this program could read the meter, the device drew at least what it draws at rest.
            unseen = starting * figures.get("watts-idle", 0.0)
            figures |= {"joules-loading": loading.joules + unseen}
            figures |= {"joules-training": training.joules, "joules-teacher": teacher.joules}
        moved = last_transfers()
        if "download" in moved:
            figures["seconds-download"] = moved["download"].seconds
        if "upload" in moved and moved["upload"].seconds > 0:
            figures["upload-bytes-per-second"] = moved["upload"].bytes / moved["upload"].seconds
        return figures


@contextmanager
def _trained(spans: energy.Spans) -> Iterator[Watch]:
    """Accounts what happens inside to the training, but to the teacher what happens inside of what this gives."""
    with ExitStack() as training:
        training.enter_context(spans("training"))

        @contextmanager
        def lesson() -> Iterator[None]:
            training.close()
            with spans("teacher"):
                yield
            training.enter_context(spans("training"))

        yield lesson


def perform(action: str, content: RecordDict, node_config: Mapping[str, Any], starting: Seconds) -> RecordDict:
    """What a node does with a message.

    Args:
        action: "hello", "warm_start", "train" or "evaluate".
        starting: seconds that the process took to get here.
    """
    torch.set_num_threads(1)  # the tensors are small, and sums keep their order
    began = time.perf_counter()
    download = last_transfers().get("download")
    if download is not None:
        # The process may have been started while its order was still coming: that time is the download's.
        starting -= min(starting, max(0.0, download.began + download.seconds - (time.time() - starting)))
    try:
        device = Device.of(content, node_config)
        if action == "train":
            return device.train(content, starting + time.perf_counter() - began)
        return {"hello": device.hello, "warm_start": device.warm_start, "evaluate": device.evaluate}[action](content)
    except FedpruneError:
        raise
    except OSError as error:  # a disk that is full or not ours; its words name a file, and no data
        log.exception("%s failed", action)
        raise FleetError(f"{type(error).__name__}: {error}") from None
    except Exception as error:
        # Words of other errors may quote a user's data, and errors are sent to the server.
        log.exception("%s failed", action)
        raise FleetError(f"{type(error).__name__}; the device's log says more") from None


@lru_cache(maxsize=1)
def _meter(name: str) -> energy.Meter | None:
    return energy.find(name)


def _number(config: Mapping[str, Any], name: str, least: float) -> float:
    """A number of the node's configuration.

    Raises:
        ConfigError: it is none, or too small.
    """
    value = config[name]
    if type(value) not in (int, float) or not least <= value < math.inf:
        raise ConfigError(f"{name} is {value!r} in --node-config; it must be a number, {least:g} or more")
    return float(value)


def probe(seconds: Seconds = 0.3) -> float:
    """Floating-point operations per second of this device in a small matrix product, as a first guess of its speed."""
    a = torch.ones(256, 256)
    began, times = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        torch.mm(a, a)
        times += 1
    return 2.0 * 256**3 * times / passed


def _noise(size: int) -> torch.Tensor:
    """Bytes that no link can compress, and that nobody else sends: Flower uploads equal objects only once."""
    return torch.from_numpy(np.random.default_rng().integers(0, 256, size, dtype=np.uint8))
