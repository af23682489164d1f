"""A simulated fleet as tensors and JSON, and back: private rows, the clock, and orders on their way."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from fedprune.exchange import Cost, Order, Split
from fedprune.fleet import VirtualFleet
from fedprune.fleet.virtual import Job
from fedprune.population import MOMENTS, Population
from fedprune.record import Snapshot
from fedprune.strategy import ServerState, Strategy
from fedprune.submodel import Submodel
from fedprune.types import Tensors


def snapshot(state: ServerState, fleet: VirtualFleet, listeners: Population) -> Snapshot:
    """All that decides how the fleet goes on."""
    clock, jobs = fleet.snapshot()
    tensors: Tensors = {}
    for whose, population in (("private", fleet.population), ("listeners", listeners)):
        for part in MOMENTS:
            tensors |= {f"{whose}.{part}/{n}": t for n, t in getattr(population.private, part).items()}
        tensors[f"{whose}.steps"] = population.private.steps
    submodels: dict[bytes, int] = {}
    for job in jobs:
        order = job.order
        if order.version != state.version:
            tensors |= {f"version.{order.version}/{n}": t for n, t in order.model.items()}
        if order.submodel.key not in submodels:
            number = submodels[order.submodel.key] = len(submodels)
            for kind in ("held", "trained", "entries"):
                units = getattr(order.submodel, kind)
                tensors |= {f"submodel.{number}.{kind}/{a}": torch.from_numpy(u.copy()) for a, u in units.items()}
    return Snapshot(tensors, {"clock": clock, "jobs": [_to_json(job, submodels[job.order.submodel.key]) for job in jobs]})


def restore(kept: Snapshot, state: ServerState, fleet: VirtualFleet, listeners: Population, strategy: Strategy) -> None:
    """Put a fresh fleet where the kept one was; `state` is the server's of the same checkpoint."""

    def group(prefix: str) -> Tensors:
        return {name[len(prefix) + 1 :]: t for name, t in kept.tensors.items() if name.startswith(prefix + "/")}

    for whose, population in (("private", fleet.population), ("listeners", listeners)):
        for part in MOMENTS:
            getattr(population.private, part).update(group(f"{whose}.{part}"))
        population.private.steps.copy_(kept.tensors[f"{whose}.steps"])
    models = {state.version: state.model}
    submodels: dict[int, Submodel] = {}
    jobs = []
    for entry in kept.about["jobs"]:
        number, version = entry["submodel"], entry["version"]
        if number not in submodels:
            held, trained, entries = (
                {a: t.numpy() for a, t in group(f"submodel.{number}.{k}").items()} for k in ("held", "trained", "entries")
            )
            submodels[number] = replace(
                Submodel.checked(state.layout, held, trained, entries), through=bool(entries) and strategy.entries.through
            )
        if version not in models:
            models[version] = group(f"version.{version}")
        jobs.append(_from_json(entry, submodels[number], models[version], strategy, state.seed))
    fleet.restore(kept.about["clock"], jobs)


def _to_json(job: Job, submodel: int) -> dict[str, Any]:
    order, cost = job.order, job.cost
    return {
        "ticket": order.ticket,
        "client": order.client,
        "version": order.version,
        "rate": order.rate,
        "submodel": submodel,
        "arrives": job.arrives,
        "work": job.work,
        "vanishes": job.vanishes,
        "wanted": job.wanted,
        "seconds": asdict(cost.seconds),
        "joules": None if cost.joules is None else asdict(cost.joules),
        "rest": [cost.bytes_down, cost.bytes_up, cost.flops, cost.parameters, cost.watts_waiting, cost.source],
    }


def _from_json(entry: dict[str, Any], submodel: Submodel, model: Tensors, strategy: Strategy, seed: int) -> Job:
    order = Order(
        entry["ticket"], entry["client"], entry["version"], entry["rate"], submodel,
        strategy.told, strategy.codec.rows, model, seed, strategy.gather.expires,
    )  # fmt: skip
    joules = None if entry["joules"] is None else Split(**entry["joules"])
    cost = Cost(Split(**entry["seconds"]), joules, *entry["rest"])
    return Job(order, entry["arrives"], cost, entry["work"], entry["vanishes"], entry["wanted"])
