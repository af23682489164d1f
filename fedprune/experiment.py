"""One run from settings to summary: go round by round, evaluate, keep the record. Simulated or on real devices alike."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fedprune import catalog, distill, entries, recommenders
from fedprune.config import Settings
from fedprune.errors import ConfigError
from fedprune.exchange import Fleet, Lost
from fedprune.merge import Adam, Average, Merge
from fedprune.objective import Objective
from fedprune.recommenders import Recommender
from fedprune.record import RunRecord, Snapshot, ledger_rows, line
from fedprune.report.summary import SAME_TICKET, summarise, ticket_of
from fedprune.strategy import ServerState, Strategy, one_round
from fedprune.types import Tensors

Watcher = Callable[[dict[str, Any]], None]
"""Called with every round's event: progress bars, TensorBoard, whatever a user hangs there."""


class Experiment(Protocol):
    """What a run needs beyond the five verbs of a fleet: a beginning, evaluation, and a part in checkpoints.

    `simulation.Simulation` is one on virtual time, `flower.deployment.Deployment` one on real devices.
    """

    @property
    def settings(self) -> Settings:
        """Of this strategy, its table applied."""
        ...

    @property
    def strategy(self) -> Strategy:
        """The nine answers."""
        ...

    @property
    def state(self) -> ServerState:
        """The server before the first round."""
        ...

    @property
    def fleet(self) -> Fleet:
        """Who does the work."""
        ...

    @property
    def clients(self) -> int:
        """How many there are in all."""
        ...

    def begin(self) -> tuple[ServerState, dict[str, Any]]:
        """Do what comes before the first round (a warm start); the server after it, and the event that says what it cost."""
        ...

    def resume(self, state: ServerState, kept: Snapshot) -> None:
        """Put the fleet where a checkpoint left it."""
        ...

    def snapshot(self, state: ServerState) -> Snapshot:
        """The fleet's part of a checkpoint."""
        ...

    def evaluate(self, state: ServerState, silent: Sequence[int] = (), final: bool = False) -> dict[str, dict[str, float]]:
        """Validation and test quality, each user scored by its own device's submodel, and by the whole model (`_global`).

        Test is computed beside validation so that a record is complete; a summary reads it at the round that validation chose.

        Args:
            silent: clients that have never had an order.
            final: nothing follows, so the busy may be waited for.

        Returns:
            Empty if there was nobody to ask; a simulation always has somebody.
        """
        ...

    def unfinished(self) -> list[Lost]:
        """Wanted orders still on their way, for the books of a run that ends here."""
        ...

    def heterogeneity(self) -> dict[str, float]:
        """How unequally long clients take for a report of the full model (`spread`)."""
        ...


def open_record(settings: Settings, folder: Path, data: str) -> RunRecord:
    """The folder of one run, `<folder>/<identity>/seed<n>`; `data` is the fingerprint of what it is about.

    A run also gets a name of its own, by which devices know it again after the server was restarted.

    Raises:
        RecordError: the folder holds a run on other data.
    """
    record = RunRecord(folder / settings.identity() / f"seed{settings.seed}")
    name = f"{settings.strategy}-{uuid.uuid4().hex[:12]}"
    record.begin({"name": name, "settings": settings.model_dump(), "versions": _versions(), "data": data})
    return record


def conduct(experiment: Experiment, record: RunRecord, watch: Watcher | None = None) -> dict[str, Any]:
    """All rounds of a run, or those that are left; returns the summary (`report.summary.summarise`)."""
    settings, fleet = experiment.settings, experiment.fleet
    kept = record.resume(experiment.state)
    if kept is None:
        progress: dict[str, Any] = {"best": None, "flat": 0, "asked": []}
        state, event = experiment.begin()
        if settings.virtual_seconds is not None and event["ended"] >= settings.virtual_seconds:
            raise ConfigError(
                f"the warm start takes {event['ended']:,.0f} virtual seconds, virtual_seconds is "
                f"{settings.virtual_seconds:,.0f}; raise it, or lower warm_start"
            )
        _evaluated(event, experiment.evaluate(state), progress)
        record.add(event)
        record.keep_model(state)
    else:
        state, snapshot, progress = kept
        experiment.resume(state, snapshot)
    asked = set(progress["asked"])
    over = _over(settings, state, fleet, progress)
    while not over:
        state, happened = one_round(experiment.strategy, state, fleet)
        asked |= {order.client for order in happened.orders}
        over = _over(settings, state, fleet, progress)  # asked once: on a wall clock the answer changes
        if over:
            happened = replace(happened, lost=(*happened.lost, *experiment.unfinished()))
        event = line(happened) | {"model": digest(state.model)}
        if over or _due(settings, state.version, happened.began, happened.ended):
            silent = [c for c in range(experiment.clients) if c not in asked]
            if _evaluated(event, experiment.evaluate(state, silent, over), progress):
                record.keep_model(state)
        record.add(event, ledger_rows(happened))
        if state.version % settings.checkpoint == 0:
            record.checkpoint(state, experiment.snapshot(state), progress | {"asked": sorted(asked)})
        if watch is not None:
            watch(event)
        over = over or _over(settings, state, fleet, progress)  # an evaluation may have been the last to be patient with
    record.checkpoint(state, experiment.snapshot(state), progress | {"asked": sorted(asked)})
    unequal = experiment.heterogeneity() | settled(record, state.version, experiment.clients)
    summary = summarise(record.events(), settings.model_dump(), unequal)
    summary = {"identity": record.folder.parent.name} | summary
    record.finish(summary)
    return summary


def _evaluated(event: dict[str, Any], evaluation: dict[str, dict[str, float]], progress: dict[str, Any]) -> bool:
    """Note an evaluation, if there was anybody to evaluate; whether it is the best so far."""
    if not evaluation:
        return False
    event["evaluation"] = evaluation
    ticket, smallest = ticket_of(event), progress.get("ticket", 1.0)
    if ticket > smallest + SAME_TICKET:
        return False
    if ticket < smallest - SAME_TICKET:  # what larger ones reached does not count
        progress |= {"best": None, "flat": 0, "ticket": ticket}
    value = evaluation["validation"]["ndcg10_expected"]
    better = progress["best"] is None or value > progress["best"]
    progress |= {"best": value, "flat": 0} if better else {"flat": progress["flat"] + 1}
    return better


# ---- parts that settings name ----------------------------------------------------------------------------------------


def strategy_of(settings: Settings, arguments: dict[str, Any]) -> Strategy:
    """The catalog's row, trained and merged as the settings say."""
    server = Adam(settings.server_lr) if settings.server == "adam" else Average(settings.server_lr)
    row = catalog.build(settings.strategy, **arguments)
    own = entries.from_settings(settings.entries) if settings.entries else None
    return catalog.trained_with(row, objective_of(settings), Merge(optimiser=server), rows=settings.rows, entries=own)


def objective_of(settings: Settings) -> Objective:
    """What clients minimise, before the strategy adds its own terms."""
    taught = distill.from_settings(settings.distillation) if settings.distillation else None
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
        sparse=settings.sparse,
        sparse_by=settings.sparse_by,
        nested=settings.nested,
        distillation=taught if taught is not None and taught.active else None,
    )


def recommender_of(settings: Settings, users: int, items: int) -> Recommender:
    """The recommender for a population and a catalogue of this size, with the tensors that learn its masks, if any do."""
    arguments = settings.of(settings.strategy)[1]
    return strategy_of(settings, arguments).entries.parametrise(plain_recommender(settings, users, items))


def plain_recommender(settings: Settings, users: int, items: int) -> Recommender:
    """The same without these: what devices are sized by and a warm start fills."""
    extra = {"hidden": settings.hidden} if settings.recommender in ("mlp", "neumf") else {}
    return recommenders.build(
        settings.recommender, users=users, items=items, latent=settings.latent, scale=settings.scale, **extra
    )


def digest(model: Tensors) -> str:
    """Tells one model from another, to the last bit; every round's is in the record, so that runs can be compared."""
    hashed = hashlib.blake2b(digest_size=8)
    for name in sorted(model):
        hashed.update(model[name].contiguous().numpy().tobytes())
    return hashed.hexdigest()


def spread(slowness: np.ndarray) -> dict[str, float]:
    """How unequal clients are: slowest over fastest, mean shortfall H = 1 - mean(1/s), variation, and the loss-free ceiling.

    `variation` is the standard deviation over the mean; `ceiling` is mean(1/s) * max(s): how much faster than waiting for
    all it goes at most if no work is left out.

    Args:
        slowness: `[clients]`, each one's time relative to the fastest one's.
    """
    return {
        "slowest_over_fastest": float(slowness.max()),
        "mean_shortfall": float(1 - (1 / slowness).mean()),
        "variation": float(slowness.std() / slowness.mean()),
        "ceiling": float((1 / slowness).mean() * slowness.max()),
    }


def settled(record: RunRecord, rounds: int, clients: int) -> dict[str, float | None]:
    """`spread` of what clients' reports came to take (keys with `_after`), and the share of the clients that it is about.

    A client's time is the median of its reports that were merged in the last quarter of the rounds, waiting left out. Who has
    none there is not judged: an earlier one may be of another rate.
    """
    seconds = record.report_seconds(rounds - math.ceil(rounds / 4))
    found = spread(seconds / seconds.min()) if len(seconds) else dict.fromkeys(spread(np.ones(1)))
    return {f"{name}_after": value for name, value in found.items()} | {"clients_after": len(seconds) / clients}


def _over(settings: Settings, state: ServerState, fleet: Fleet, progress: dict[str, Any]) -> bool:
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
