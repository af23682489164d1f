"""From settings to a table row, with files on the way: a second call goes on where the first was stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from fedprune.compress.bench import Bench, Fitted, Recipe, Task, Watch
from fedprune.config import Settings, validated
from fedprune.data import Split
from fedprune.devices import DEVICES
from fedprune.energy import find
from fedprune.entries import All
from fedprune.errors import ConfigError, RecordError, unknown
from fedprune.experiment import digest, strategy_of
from fedprune.export import Compact, compact, measure_all
from fedprune.record import RunRecord, save, write
from fedprune.simulation import fingerprint, read_data
from fedprune.submodel import Submodel
from fedprune.types import Tensors

DEFAULTS = MappingProxyType({"latent": 64, "negatives": 3, "server_lr": 0.02})
"""Settings that differ when nothing else is said: a model wide enough to have something to prune."""


def compress(
    settings: Settings,
    method: str,
    keep: float,
    out: Path,
    *,
    split: Split | None = None,
    run: Path | None = None,
    recipe: Recipe | None = None,
    device: str = "raspberry-pi-4",
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train or take a dense model, prune it, and measure both.

    Ranking and rating are two models of the same architecture, compressed alike: ranking quality is the implicit one's, MSE
    and MAE the ratings' (None without ratings). Files and latency are the implicit one's.

    Args:
        keep: share of the dense model's parameters that is left.
        out: trained models are kept here, under a name that follows from settings, recipe and seed.
        run: a finished run's folder: its model is the dense one (of the implicit task).
        device: joules per 1,000 recommendations are modelled on it where no meter is: FLOPs of dense kernels, which
            multiply masked entries too, over the device's speed, times its watts.

    Returns:
        "dense" and "pruned", each with parameters, flops, flops_dense, file_bytes, latency_ms, kernel, joules, mse, mae and the
        figures of `evaluation.average`; and how they were come by.

    Raises:
        FedpruneError: bad settings, data, method or share; a run whose model these settings do not describe.
    """
    split, recipe = split or read_data(settings), recipe or Recipe()
    taken = None if run is None else _whole(run)
    if device not in DEVICES:
        raise ConfigError(unknown("device", device, DEVICES))
    folder = out / _name(settings, recipe, taken) / f"seed{settings.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{method}-{keep:.4g}.compact.safetensors"
    pair: dict[str, dict[str, Any]] = {"dense": {"mse": None, "mae": None}, "pruned": {"mse": None, "mae": None}}
    tasks: tuple[Task, ...] = ("implicit", "ratings") if split.train.rating is not None else ("implicit",)
    for task in tasks:
        bench = Bench.of(settings, split, task, recipe, watch)
        model = taken if task == "implicit" else None
        dense = _kept(folder / f"{task}-dense.safetensors", bench, partial(bench.dense, model))
        pruned = _kept(folder / f"{task}-{method}-{keep:.4g}.safetensors", bench, partial(bench.student, method, keep, dense))
        for name, fitted in (("dense", dense), ("pruned", pruned)):
            pair[name] |= fitted.test
        if task == "implicit":
            ids = split.train.item_ids
            small = {
                name: compact(bench.simulation.recommender, fitted.model, fitted.submodel, item_ids=ids)
                for name, fitted in (("dense", dense), ("pruned", pruned))
            }
            for name, figures in _measured(small, dense.private, device).items():
                pair[name] |= figures
            small["pruned"].save(file)
    result: dict[str, Any] = {
        "method": method, "keep": keep, "data": settings.data, "users": split.train.users, "items": split.train.items,
        "seed": settings.seed, "run": None if run is None else str(run), "file": str(file), **pair,
    }  # fmt: skip
    write(folder / f"{method}-{keep:.4g}.json", json.dumps(result, indent=1))
    return result


def _measured(models: dict[str, Compact], private: Tensors, device: str) -> dict[str, dict[str, Any]]:
    counter = find("auto")
    try:
        every = measure_all(models, {n: t[:64] for n, t in private.items()}, counter)
    finally:
        if counter is not None:
            counter.close()
    for figures in every.values():
        figures["joules_source"] = "measured"
        if figures["joules"] is None:
            kind = DEVICES[device]
            figures["joules"] = 1_000 * figures["flops_dense"] / kind.flops * kind.watts_training
            figures["joules_source"] = f"modelled on a {device}"
    return every


def _whole(run: Path) -> Tensors:
    """A run's best model.

    Raises:
        RecordError: there is none.
        ConfigError: what it recommends with are masks of it, and pruned entries would come to life again.
    """
    record = RunRecord(run)
    settings = validated(record.settings())
    if not isinstance(strategy_of(*settings.of(settings.strategy)).entries, All):
        raise ConfigError(f"{run} was trained inside masks of entries already; `fedprune export` writes it without the rest")
    return record.kept_model().model


def _name(settings: Settings, recipe: Recipe, given: Tensors | None) -> str:
    """Names a folder by what decides its models' values, seed aside."""
    decided = {name: value for name, value in settings.changed().items() if name != "seed"}
    text = json.dumps([decided, asdict(recipe), None if given is None else digest(given)], sort_keys=True)
    return f"compress-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def _kept(path: Path, bench: Bench, make: Callable[[], Fitted]) -> Fitted:
    """A model from a file, or made and written to it.

    Raises:
        RecordError: the file is about other data.
    """
    data = fingerprint(bench.split)
    if not path.exists():
        fitted = make()
        tensors = {f"model/{n}": t for n, t in fitted.model.items()} | {f"private/{n}": t for n, t in fitted.private.items()}
        for place, part in enumerate(fitted.early or ()):
            tensors |= {f"early{place}/{n}": t for n, t in part.items()}
        tensors |= {f"held/{axis}": torch.from_numpy(np.array(own)) for axis, own in fitted.submodel.held.items()}
        tensors |= {f"entries/{n}": torch.from_numpy(np.array(m)) for n, m in fitted.submodel.entries.items()}
        about = {"data": data, "validation": fitted.validation, "test": fitted.test}
        save(path, tensors, {"fedprune": json.dumps(about)})
        return fitted
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["fedprune"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if about["data"] != data:
        raise RecordError(
            f"{path} is of other data than {bench.simulation.settings.data} now has; name another --out, or delete it"
        )

    def group(prefix: str) -> Tensors:
        return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + "/")}

    held, entries = ({n: t.numpy() for n, t in group(part).items()} for part in ("held", "entries"))
    submodel = Submodel.checked(bench.layout, held, None, entries)
    early = (group("early0"), group("early1")) if group("early0") else None
    return Fitted(group("model"), group("private"), submodel, about["validation"], about["test"], early)
