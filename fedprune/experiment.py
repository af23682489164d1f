"""One run from settings to summary: build the parts, go round by round, evaluate, keep the record."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedprune import catalog, recommenders
from fedprune.config import Settings
from fedprune.data import Interactions, Split, leave_one_out, load, one_per_user, silos
from fedprune.devices import DeviceTable, FullReport, disturbed, linear, named, phones
from fedprune.errors import ConfigError
from fedprune.evaluation import average, quality, rank_held_out
from fedprune.exchange import Roster
from fedprune.fleet import SerialFleet, VectorFleet, VirtualFleet
from fedprune.merge import Adam, Average, Merge
from fedprune.objective import Objective
from fedprune.population import Population
from fedprune.recommenders import Recommender
from fedprune.record import RunRecord, ledger_rows, line
from fedprune.report.summary import summarise
from fedprune.serving import listen, own_submodels, scorer
from fedprune.strategy import ServerState, Strategy, one_round
from fedprune.submodel import Submodel
from fedprune.types import IntArray
from fedprune.warmstart import WarmStart

Watcher = Callable[[dict[str, Any]], None]
"""Called with every round's event: progress bars, TensorBoard, whatever a user hangs there."""


@dataclass(frozen=True)
class Experiment:
    """All that a run is made of. `prepare` builds it from settings; tests and notebooks may build their own."""

    settings: Settings
    split: Split
    strategy: Strategy
    recommender: Recommender
    fleet: VirtualFleet
    listeners: Population
    state: ServerState
    client_of_user: IntArray


def read_data(settings: Settings) -> Split:
    """The data of a run, split by time."""
    return leave_one_out(load(settings.data, min_interactions=settings.min_interactions))


def prepare(settings: Settings, split: Split) -> Experiment:
    """Build everything for the strategy that `settings.strategy` names."""
    base, (settings, arguments) = settings, settings.of(settings.strategy)
    train, seed = split.train, settings.seed
    objective = objective_of(settings)
    server = Adam(settings.server_lr) if settings.server == "adam" else Average(settings.server_lr)
    strategy = catalog.trained_with(
        catalog.build(settings.strategy, **arguments), objective, Merge(optimiser=server), rows=settings.rows
    )
    recommender = recommender_of(settings, train)
    start = WarmStart(settings.warm_start, popularity_bias=settings.popularity_bias)
    model, private = start(recommender, train, recommender.initial(seed), recommender.initial_private(seed), seed)
    if settings.silos is None:
        client_of_user = one_per_user(train.users)
    else:
        client_of_user = silos(train, settings.silos, settings.silos_by, seed, settings.silos_alpha)
    population = Population(train, client_of_user, recommender.layout, private)
    devices = devices_of(base, population, recommender_of(base, train), objective_of(base))
    make = VectorFleet if settings.fleet == "vector" else SerialFleet
    fleet = make(recommender, population, devices, workload=settings.workload)
    state = ServerState(model, recommender.layout, seed)
    return Experiment(settings, split, strategy, recommender, fleet, population.copy(), state, client_of_user)


def objective_of(settings: Settings) -> Objective:
    """What clients minimise, before the strategy adds its own terms."""
    return Objective(
        negatives=settings.negatives,
        epochs=settings.epochs,
        batch=settings.batch,
        lr=settings.lr,
        lr_private=settings.lr_private,
        decay_private=settings.decay_private,
        private_steps=settings.private_steps,
        recency=settings.recency_weight if settings.recency else 0.0,
        horizon=settings.recency_horizon,
    )


def recommender_of(settings: Settings, train: Interactions) -> Recommender:
    """The recommender for this catalogue and population."""
    extra = {"hidden": settings.hidden} if settings.recommender in ("mlp", "neumf") else {}
    return recommenders.build(
        settings.recommender,
        users=train.users,
        items=train.items,
        latent=settings.latent,
        scale=settings.scale,
        **extra,
    )


def devices_of(settings: Settings, population: Population, recommender: Recommender, objective: Objective) -> DeviceTable:
    """The clients' devices. A linear fleet is sized by what an average client's full report costs.

    Settings are those before a strategy's own table: who does less work finds the same devices, and is faster on them.
    """
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
    return disturbed(table, noise=settings.noise, availability=settings.availability, dropout=settings.dropout)


def run(settings: Settings, folder: Path, *, split: Split | None = None, watch: Watcher | None = None) -> dict[str, Any]:
    """Run one strategy once, or go on with it, or say what it came to if it is finished.

    Returns:
        The summary (`report.summary.summarise`).

    Raises:
        FedpruneError: bad settings or data, or a folder that holds another run.
    """
    settings = settings.only(settings.strategy)
    split = read_data(settings) if split is None else split
    record = RunRecord(folder / settings.identity() / f"seed{settings.seed}")
    record.begin({"settings": settings.model_dump(), "versions": _versions(), "data": fingerprint(split)})
    if record.finished is not None:
        return record.finished
    experiment = prepare(settings, split)
    settings = experiment.settings
    state, fleet, progress = experiment.state, experiment.fleet, {"best": None, "flat": 0, "asked": []}
    resumed = record.resume(state, fleet, experiment.listeners, experiment.strategy)
    if resumed is not None:
        state, progress = resumed
    else:
        event = warm_start_event(experiment)
        if settings.virtual_seconds is not None and event["ended"] >= settings.virtual_seconds:
            raise ConfigError(
                f"the warm start takes {event['ended']:,.0f} virtual seconds, virtual_seconds is "
                f"{settings.virtual_seconds:,.0f}; raise it, or lower warm_start"
            )
        fleet.advance(event["ended"])
        event["evaluation"] = evaluate(experiment, state)
        record.add(event)
        progress["best"] = event["evaluation"]["validation"]["ndcg10_expected"]
        record.keep_model(state.model)
    asked = set(progress["asked"])
    while not _over(settings, state, fleet, progress):
        state, happened = one_round(experiment.strategy, state, fleet)
        asked |= {order.client for order in happened.orders}
        if _over(settings, state, fleet, progress):
            happened = replace(happened, lost=(*happened.lost, *fleet.unfinished()))
        event = line(happened)
        if _due(settings, state.version, happened.began, happened.ended) or _over(settings, state, fleet, progress):
            silent = [c for c in range(fleet.population.clients) if c not in asked]
            event["evaluation"] = evaluate(experiment, state, silent)
            value = event["evaluation"]["validation"]["ndcg10_expected"]
            if value > progress["best"]:
                progress |= {"best": value, "flat": 0}
                record.keep_model(state.model)
            else:
                progress["flat"] += 1
        record.add(event, ledger_rows(happened))
        if state.version % settings.checkpoint == 0:
            record.checkpoint(state, fleet, experiment.listeners, progress | {"asked": sorted(asked)})
        if watch is not None:
            watch(event)
    record.checkpoint(state, fleet, experiment.listeners, progress | {"asked": sorted(asked)})
    summary = summarise(record.events(), settings.model_dump(), ceiling=heterogeneity(experiment))
    summary = {"identity": record.folder.parent.name} | summary
    record.finish(summary)
    return summary


def evaluate(experiment: Experiment, state: ServerState, silent: list[int] | None = None) -> dict[str, dict[str, float]]:
    """Validation and test quality, each user scored by its own device's submodel, and by the whole model (`_global`).

    Test is computed beside validation so that a record is complete; a summary reads it at the round that validation chose.

    Args:
        silent: clients that have never had an order; they fit private rows to the model for serving (`serving.listen`), in
            a copy of their own, so that evaluating changes nothing of the training.
    """
    settings, fleet, recommender, split = (
        experiment.settings,
        experiment.fleet,
        experiment.recommender,
        experiment.split,
    )
    fleet.settle()
    if silent and settings.listen_steps:
        listen(
            recommender, experiment.listeners, state.model, silent, experiment.strategy.objective,
            steps=settings.listen_steps, seed=settings.seed, version=state.version,
        )  # fmt: skip
    slow = slow_users(experiment)
    listening = np.isin(experiment.client_of_user, silent or [])
    private = {
        name: torch.where(
            torch.from_numpy(listening).reshape(-1, *[1] * (rows.dim() - 1)), experiment.listeners.private.values[name], rows
        )
        for name, rows in fleet.population.private.values.items()
    }
    own = own_submodels(experiment.client_of_user, submodels_of(experiment, state))
    result: dict[str, dict[str, float]] = {}
    scorers = {"": scorer(recommender, state.model, private, own)}
    if len({s.held_key for s in own}) > 1 or own[0].held_key != Submodel.full(recommender.layout).held_key:
        scorers["_global"] = scorer(recommender, state.model, private)
    for name, seen, held_out in (
        ("validation", split.train, split.validation),
        ("test", split.seen_before_test(), split.test),
    ):
        result[name] = {}
        for suffix, score in scorers.items():
            per_user = quality(rank_held_out(score, seen, held_out))
            result[name] |= {key + suffix: value for key, value in average(per_user).items()}
            if slow[per_user.user].any():
                result[name] |= {f"{key}_slow{suffix}": value for key, value in average(per_user, slow).items()}
        if "_global" not in scorers:
            result[name] |= {f"{key}_global": value for key, value in result[name].items()}
    return result


def submodels_of(experiment: Experiment, state: ServerState) -> list[Submodel]:
    """What each client's device holds now."""
    strategy, layout, fleet = experiment.strategy, state.layout, experiment.fleet
    everybody = np.arange(fleet.population.clients)
    roster = Roster(everybody, len(everybody), fleet.devices.slowness)
    rates = strategy.rates.propose(state.rates, everybody, roster, layout.smallest_rate)
    pruning = strategy.pruning.prepare(state.pruning, state.model, layout)
    return [strategy.pruning.carve(pruning, layout, client, state.version, rate) for client, rate in enumerate(rates.tolist())]


def slow_users(experiment: Experiment) -> np.ndarray:
    """Users of the slowest quarter of all devices (ties with the limit included); bool `[users]`."""
    slowness = experiment.fleet.devices.slowness
    return (slowness >= np.quantile(slowness, 0.75))[experiment.client_of_user]


def heterogeneity(experiment: Experiment) -> dict[str, float]:
    """How unequal the devices are: slowest over fastest, mean shortfall H = 1 - mean(1/s), and the loss-free ceiling.

    `ceiling` is mean(1/s) * max(s): how much faster than waiting for all it goes at most if no work is left out.
    """
    slowness = experiment.fleet.devices.slowness
    return {
        "slowest_over_fastest": float(slowness.max()),
        "mean_shortfall": float(1 - (1 / slowness).mean()),
        "ceiling": float((1 / slowness).mean() * slowness.max()),
    }


def warm_start_event(experiment: Experiment) -> dict[str, Any]:
    """What the federated SVD costs before the first round: everybody waits for the slowest in each iteration.

    An iteration moves the embeddings down and up once and multiplies a client's own rows by them twice.
    """
    settings, population, devices = experiment.settings, experiment.fleet.population, experiment.fleet.devices
    layout, times = experiment.recommender.layout, settings.warm_start
    latent = sum(layout.row_entries(n, layout.full) for n in layout.named("touched") if len(layout.tensors[n]) == 2)
    rows = population.positives_of_client.astype(float)
    if settings.workload == "equal":
        rows = np.full_like(rows, rows.mean())
    moved = times * 4.0 * latent * (rows if settings.rows == "touched" else np.full_like(rows, population.items))
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


def _over(settings: Settings, state: ServerState, fleet: VirtualFleet, progress: dict[str, Any]) -> bool:
    late = settings.virtual_seconds is not None and fleet.now() >= settings.virtual_seconds
    flat = settings.patience is not None and progress["flat"] >= settings.patience
    return late or flat or state.version >= settings.rounds


def _due(settings: Settings, version: int, began: float, ended: float) -> bool:
    """Whether a round has passed one of the evenly spaced points of evaluation."""
    if settings.virtual_seconds is None:
        step = settings.rounds / settings.evaluations
        return int(version / step) > int((version - 1) / step)
    step = settings.virtual_seconds / settings.evaluations
    return int(ended / step) > int(began / step)


def _versions() -> dict[str, str]:
    return {
        "fedprune": importlib.metadata.version("fedprune"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
