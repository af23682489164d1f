"""A simulated fleet as tensors and JSON, and back: private rows, the clock, and orders on their way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from fedprune import distill
from fedprune.codec import Codec
from fedprune.exchange import Cost, Order, Split
from fedprune.fleet import VirtualFleet
from fedprune.fleet.virtual import Job
from fedprune.objective import Objective
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
    told: dict[tuple[Objective, Codec], int] = {}
    for job in jobs:
        order = job.order
        told.setdefault((order.objective, order.codec), len(told))
        if (version := order.version - order.age) != state.version:
            tensors |= {f"version.{version}/{n}": t for n, t in order.model.items()}
        if order.rest is not None:
            tensors |= {f"version.{order.base}/{n}": t for n, t in order.rest.items()}
        if order.submodel.key not in submodels:
            number = submodels[order.submodel.key] = len(submodels)
            for kind in ("held", "trained", "entries"):
                units = getattr(order.submodel, kind)
                tensors |= {f"submodel.{number}.{kind}/{a}": torch.from_numpy(u.copy()) for a, u in units.items()}
    entries = [
        _to_json(job, submodels[job.order.submodel.key]) | {"told": told[job.order.objective, job.order.codec]} for job in jobs
    ]
    written = [{"objective": asdict(objective), "codec": asdict(codec)} for objective, codec in told]
    return Snapshot(tensors, {"clock": clock, "jobs": entries, "told": written})


def restore(kept: Snapshot, state: ServerState, fleet: VirtualFleet, listeners: Population, strategy: Strategy) -> None:
    """Put a fresh fleet where the kept one was; `state` is the server's of the same checkpoint."""

    def group(prefix: str) -> Tensors:
        return {name[len(prefix) + 1 :]: t for name, t in kept.tensors.items() if name.startswith(prefix + "/")}

    for whose, population in (("private", fleet.population), ("listeners", listeners)):
        for part in MOMENTS:
            getattr(population.private, part).update(group(f"{whose}.{part}"))
        population.private.steps.copy_(kept.tensors[f"{whose}.steps"])
    models: dict[int, Tensors] = {state.version: state.model}
    told = [(objective_of(entry["objective"]), Codec(**entry["codec"])) for entry in kept.about["told"]]
    submodels: dict[int, Submodel] = {}
    jobs = []
    for entry in kept.about["jobs"]:
        number, versions = entry["submodel"], {entry["version"] - entry["age"], entry["rest"]} - {None}
        if number not in submodels:
            held, trained, entries = (
                {a: t.numpy() for a, t in group(f"submodel.{number}.{k}").items()} for k in ("held", "trained", "entries")
            )
            submodels[number] = replace(
                Submodel.checked(state.layout, held, trained, entries), through=bool(entries) and strategy.entries.through
            )
        models |= {version: group(f"version.{version}") for version in versions - set(models)}
        jobs.append(_from_json(entry, submodels[number], models, strategy, state.seed, told))
    fleet.restore(kept.about["clock"], jobs)


def objective_of(values: Mapping[str, Any]) -> Objective:
    """An objective from its JSON."""
    taught = values["distillation"]
    distillation = None if taught is None else distill.from_settings(taught)
    return Objective(**{**values, "betas": tuple(values["betas"]), "distillation": distillation})


def _to_json(job: Job, submodel: int) -> dict[str, Any]:
    order, cost = job.order, job.cost
    return {
        "ticket": order.ticket,
        "client": order.client,
        "version": order.version,
        "rate": order.rate,
        "submodel": submodel,
        "refill": order.refill,
        "age": order.age,
        "rest": None if order.rest is None else order.base,
        "cached": order.cached,
        "arrives": job.arrives,
        "work": job.work,
        "vanishes": job.vanishes,
        "wanted": job.wanted,
        "seconds": asdict(cost.seconds),
        "joules": None if cost.joules is None else asdict(cost.joules),
        "cost": [cost.bytes_down, cost.bytes_up, cost.flops, cost.parameters, cost.watts_waiting, cost.source],
    }


def _from_json(
    entry: dict[str, Any],
    submodel: Submodel,
    models: Mapping[int, Tensors],
    strategy: Strategy,
    seed: int,
    told: Sequence[tuple[Objective, Codec]],
) -> Job:
    objective, codec = told[entry["told"]]
    order = Order(
        entry["ticket"], entry["client"], entry["version"], entry["rate"], submodel, objective, codec,
        models[entry["version"] - entry["age"]], seed, strategy.gather.expires, entry["refill"], entry["age"],
        None if entry["rest"] is None else models[entry["rest"]], entry["cached"],
    )  # fmt: skip
    joules = None if entry["joules"] is None else Split(**entry["joules"])
    cost = Cost(Split(**entry["seconds"]), joules, *entry["cost"])
    return Job(order, entry["arrives"], cost, entry["work"], entry["vanishes"], entry["wanted"])
