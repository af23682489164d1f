"""A run on simulated devices in virtual time: build population, devices and fleet from settings; evaluate centrally."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedprune import snapshot
from fedprune.codec import Codec, fitting
from fedprune.config import Settings
from fedprune.data import Interactions, Split, leave_one_out, load, one_per_user, silos
from fedprune.devices import DeviceTable, FullReport, disturbed, limited, linear, named, phones
from fedprune.errors import ConfigError
from fedprune.evaluation import average, quality, rank_held_out
from fedprune.exchange import Lost, Roster
from fedprune.experiment import (
    Watcher,
    conduct,
    objective_of,
    open_record,
    plain_recommender,
    recommender_of,
    spread,
    strategy_of,
)
from fedprune.fleet import SerialFleet, VectorFleet, VirtualFleet
from fedprune.fleet.trainer import Trainer
from fedprune.objective import Objective
from fedprune.population import Population
from fedprune.recommenders import Recommender
from fedprune.record import Snapshot
from fedprune.serving import listen, own_submodels, scorer
from fedprune.strategy import ServerState, Strategy
from fedprune.submodel import Submodel
from fedprune.types import BoolArray, FloatArray, IntArray
from fedprune.warmstart import WarmStart


@dataclass(frozen=True)
class Simulation:
    """All that a simulated run is made of. `prepare` builds it from settings; tests and notebooks may build their own.

    Attributes:
        listeners: clients that are never asked keep their private rows here, apart from those that train.
        state: the server after the warm start, before the first round.
    """

    settings: Settings
    split: Split
    strategy: Strategy
    recommender: Recommender
    fleet: VirtualFleet
    listeners: Population
    state: ServerState
    client_of_user: IntArray

    @property
    def clients(self) -> int:
        """How many there are in all."""
        return self.fleet.population.clients

    def begin(self) -> tuple[ServerState, dict[str, Any]]:
        """Let the time of the warm start pass (`prepare` has done its work)."""
        event = warm_start_event(self)
        self.fleet.advance(event["ended"])
        return self.state, event

    def resume(self, state: ServerState, kept: Snapshot) -> None:
        """Put the fleet where a checkpoint left it."""
        snapshot.restore(kept, state, self.fleet, self.listeners, self.strategy)

    def snapshot(self, state: ServerState) -> Snapshot:
        """The fleet's part of a checkpoint."""
        return snapshot.snapshot(state, self.fleet, self.listeners)

    def unfinished(self) -> list[Lost]:
        """Wanted orders still on their way, with what they have cost so far."""
        return self.fleet.unfinished()

    def heterogeneity(self) -> dict[str, float]:
        """How unequally long clients take for a report of the full model, without timing noise or a teacher.

        That is the device table where everybody is charged for the average client's work. With `workload = "own"` each has
        its own examples, so that clients differ by their data too, as their reports do.
        """
        if self.fleet.workload == "equal":
            return spread(self.fleet.devices.slowness)
        seconds = self._full_seconds()
        return spread(seconds / seconds.min())

    def evaluate(self, state: ServerState, silent: Sequence[int] = (), final: bool = False) -> dict[str, dict[str, float]]:
        """Quality in the middle of the simulation, from everybody's private rows.

        Args:
            silent: they fit private rows to the model for serving (`serving.listen`), in a copy of their own, so that
                evaluating changes nothing of the training.
            final: makes no difference here.
        """
        settings, recommender, split = self.settings, self.recommender, self.split
        self.fleet.settle()
        state = self.strategy.begun(state)
        held, rounded = self._held(state)
        if silent and settings.listen_steps:
            listen(
                recommender, self.listeners, state.model, silent, self.strategy.served,
                steps=settings.listen_steps, seed=settings.seed, version=state.version,
                submodels=[held[client] for client in silent], rounded=rounded[list(silent)],
            )  # fmt: skip
        groups = {"slow": self._slow_users()}
        if self.fleet.devices.capacity is not None:
            groups["limited"] = (self.fleet.devices.capacity < 1)[self.client_of_user]
        listening = torch.from_numpy(np.isin(self.client_of_user, np.array(silent, int)))
        private = {
            name: torch.where(listening.reshape(-1, *[1] * (rows.dim() - 1)), self.listeners.private.values[name], rows)
            for name, rows in self.fleet.population.private.values.items()
        }
        own = own_submodels(self.client_of_user, held)
        result: dict[str, dict[str, float]] = {}
        scorers = {"": scorer(recommender, state.model, private, own, rounded[self.client_of_user])}
        if rounded.any() or len({s.held_key for s in own}) > 1 or own[0].held_key != Submodel.full(recommender.layout).held_key:
            scorers["_global"] = scorer(recommender, state.model, private)
        for name, seen, held_out in (
            ("validation", split.train, split.validation),
            ("test", split.seen_before_test(), split.test),
        ):
            result[name] = {}
            for suffix, score in scorers.items():
                per_user = quality(rank_held_out(score, seen, held_out))
                result[name] |= {key + suffix: value for key, value in average(per_user).items()}
                for group, users in groups.items():
                    if users[per_user.user].any():
                        own_figures = average(per_user, users)
                        result[name] |= {f"{key}_{group}{suffix}": value for key, value in own_figures.items()}
            if "_global" not in scorers:
                result[name] |= {f"{key}_global": value for key, value in result[name].items()}
        return result

    def _held(self, state: ServerState) -> tuple[list[Submodel], BoolArray]:
        """What each client's device holds now, and who keeps it as int8."""
        everybody, devices = np.arange(self.clients), self.fleet.devices
        return self.strategy.held(state, everybody, Roster(everybody, self.clients, devices.slowness, devices.capacity))

    def _full_seconds(self) -> FloatArray:
        """What a report of the full model takes each client, of its own data."""
        objective, codec = replace(self.strategy.objective, distillation=None), Codec(rows=self.settings.rows)
        everybody, full = np.arange(self.clients), Submodel.full(self.recommender.layout)
        loads = [self.fleet.workload_of(client, full, objective, codec) for client in everybody.tolist()]
        flops, down, up = (np.array([getattr(load, name) for load in loads], float) for name in ("training", "down", "up"))
        costs = replace(self.fleet.devices, noise=0.0).costs(
            everybody, everybody.tolist(), flops, down, up, [load.parameters for load in loads]
        )
        return np.array([cost.seconds.total for cost in costs])

    def _slow_users(self) -> np.ndarray:
        """Users of the slowest quarter of all devices (ties with the limit included); bool `[users]`."""
        slowness = self.fleet.devices.slowness
        return (slowness >= np.quantile(slowness, 0.75))[self.client_of_user]


def read_data(settings: Settings) -> Split:
    """The data of a run, split by time."""
    return leave_one_out(load(settings.data, min_interactions=settings.min_interactions))


def clients_of(settings: Settings, train: Interactions) -> IntArray:
    """Client of each user, int64 `[users]`."""
    if settings.silos is None:
        return one_per_user(train.users)
    return silos(train, settings.silos, settings.silos_by, settings.seed, settings.silos_alpha)


def prepare(settings: Settings, split: Split, trainer: Trainer | None = None) -> Simulation:
    """Build everything for the strategy that `settings.strategy` names.

    Args:
        trainer: who trains the orders; None: this process, as `settings.fleet` says.
    """
    base, (settings, arguments) = settings, settings.of(settings.strategy)
    train, seed = split.train, settings.seed
    recommender = recommender_of(settings, train.users, train.items)
    plain = plain_recommender(settings, train.users, train.items)
    start = WarmStart(settings.warm_start, popularity_bias=settings.popularity_bias)
    model, private = start(plain, train, recommender.initial(seed), recommender.initial_private(seed), seed)
    client_of_user = clients_of(settings, train)
    population = Population(train, client_of_user, recommender.layout, private, split.validation)
    devices = devices_of(base, population, plain_recommender(base, train.users, train.items), objective_of(base))
    if trainer is None:
        make = VectorFleet if settings.fleet == "vector" else SerialFleet
        fleet = make(recommender, population, devices, workload=settings.workload)
    else:
        fleet = VirtualFleet(recommender, population, devices, trainer=trainer, workload=settings.workload)
    state = ServerState(model, recommender.layout, seed)
    strategy = strategy_of(settings, arguments)
    check_memory(strategy, state, devices)
    return Simulation(settings, split, strategy, recommender, fleet, population.copy(), state, client_of_user)


def check_memory(strategy: Strategy, state: ServerState, devices: DeviceTable) -> None:
    """See that no device is given more of the model than its memory holds.

    Raises:
        ConfigError: the strategy gives everybody the whole model, or no model is as small.
    """
    if devices.capacity is None:
        return
    layout, rate, client = state.layout, float(devices.capacity.min()), int(devices.capacity.argmin())
    if rate < layout.smallest_rate:
        raise ConfigError(f"memory_rate is {rate:g}; the smallest rate for this model is {layout.smallest_rate:g}")
    begun, everybody = strategy.begun(state), np.arange(devices.clients)
    roster = Roster(everybody, devices.clients, devices.slowness, devices.capacity)
    precision = strategy.planned(begun, np.array([client]), roster)[1][0].codec.precision
    fits = fitting(layout, rate, precision)
    held, room = strategy.carve(begun, client, fits).widths, layout.widths(fits)
    for axis, most in room.items():
        if held[axis] > most:
            raise ConfigError(
                f"strategy {strategy.name} has devices hold {held[axis]} of {layout.axes[axis].size} units of "
                f'"{axis}", and memory_rate {rate:g} leaves room for {most} as {precision}: windows and masks do not make a '
                "model smaller; take one that cuts units off, as heterofl, adaptcl and fedprune do, or set memory_limited to 0"
            )
    taught = strategy.objective.distillation
    if taught is not None and taught.teacher == "local" and fits < 1:
        raise ConfigError(
            f'strategy {strategy.name} has the whole model teach on the device (teacher "local"), and memory_rate {rate:g} '
            f'leaves no room for it; set distillation.teacher to "sent" or "past", or memory_limited to 0'
        )


def devices_of(settings: Settings, population: Population, recommender: Recommender, objective: Objective) -> DeviceTable:
    """The clients' devices. A linear fleet is sized by what an average client's full report costs.

    Settings are those before a strategy's own table: who does less work finds the same devices, and is faster on them.
    """
    objective = replace(objective, distillation=None)
    layout, examples = recommender.layout, float(population.examples_of_client(objective).mean())
    rows = float(population.rows_of_client(objective).mean()) if settings.rows == "touched" else population.items
    size = layout.bytes(layout.full, round(rows))
    average_report = FullReport(examples * layout.work(layout.full, layout.full).total * objective.epochs, size, size)
    clients = population.clients
    match settings.devices:
        case "linear":
            table = linear(
                clients, settings.sigma, average_report, device_class=settings.device_class,
                report_seconds=settings.report_seconds, seed=settings.seed,
            )  # fmt: skip
        case "phones":
            table = phones(clients, average_report, seed=settings.seed)
        case "named":
            table = named(settings.mix, clients, average_report, seed=settings.seed)
    table = limited(table, settings.memory_limited, settings.memory_rate, who=settings.memory_who, seed=settings.seed)
    return disturbed(table, noise=settings.noise, availability=settings.availability, dropout=settings.dropout)


def run(
    settings: Settings,
    folder: Path,
    *,
    split: Split | None = None,
    watch: Watcher | None = None,
    trainer: Trainer | None = None,
) -> dict[str, Any]:
    """Run one strategy once, or go on with it, or say what it came to if it is finished.

    Returns:
        The summary (`report.summary.summarise`).

    Raises:
        FedpruneError: bad settings or data, or a folder that holds another run.
    """
    settings = settings.only(settings.strategy)
    split = read_data(settings) if split is None else split
    record = open_record(settings, folder, fingerprint(split))
    return record.finished or conduct(prepare(settings, split, trainer), record, watch)


def warm_start_event(experiment: Simulation) -> dict[str, Any]:
    """What the federated SVD costs before the first round: everybody waits for the slowest in each iteration.

    An iteration moves the embeddings down and up once and multiplies a client's own rows by them twice.
    """
    settings, population, devices = experiment.settings, experiment.fleet.population, experiment.fleet.devices
    layout = plain_recommender(settings, len(population.client_of_user), population.items).layout
    times = settings.warm_start
    latent = sum(layout.row_entries(n, layout.full) for n in layout.named("touched") if len(layout.tensors[n]) == 2)
    rows = population.positives_of_client.astype(float)
    if settings.workload == "equal":
        rows = np.full_like(rows, rows.mean())
    shared = np.minimum(rows, population.items)  # a silo's users share rows
    moved = times * 4.0 * latent * (shared if settings.rows == "touched" else np.full_like(rows, population.items))
    flops = times * 4.0 * latent * rows
    parts = {"download": moved / devices.bytes_down, "training": flops / devices.flops, "teacher": np.zeros_like(rows)}
    parts["upload"] = moved / devices.bytes_up
    own = sum(parts.values())
    ended = float(np.max(own))
    parts["waiting"] = ended - own
    radio, idle = devices.watts_radio, devices.watts_idle
    watts = {"download": radio, "training": devices.watts_training, "teacher": idle, "upload": radio, "waiting": idle}
    return {
        "version": -1,
        "began": 0.0,
        "ended": ended,
        "flops": float(flops.sum()),
        "bytes_down": int(moved.sum()),
        "bytes_up": int(moved.sum()),
        "seconds": {part: float(seconds.sum()) for part, seconds in parts.items()},
        "joules": {part: float((seconds * watts[part]).sum()) for part, seconds in parts.items()},
        "source": "modelled",
    }


def fingerprint(split: Split) -> str:
    """Tells one data set from another: a digest of who took what, and of what is held out."""
    digest = hashlib.blake2b(digest_size=8)
    for array in (split.train.user, split.train.item, split.validation, split.test):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
