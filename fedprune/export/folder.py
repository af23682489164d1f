"""From a run's folder to a folder with its model as devices would keep it.

<out>/
    compact.safetensors  read by `export.load`
    compact.onnx         if asked for
    export.json          which run, what is held, and what the dense and the exported model cost
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from fedprune import energy
from fedprune.config import Settings, validated
from fedprune.entries import Personal
from fedprune.errors import ConfigError, FedpruneError, RecordError
from fedprune.experiment import plain_recommender, recommender_of, strategy_of
from fedprune.export import portable
from fedprune.export.measuring import measure_all
from fedprune.export.model import Compact, compact
from fedprune.recommenders import Recommender
from fedprune.record import Kept, RunRecord
from fedprune.simulation import fingerprint, read_data
from fedprune.strategy import ServerState
from fedprune.submodel import Submodel
from fedprune.types import ClientId, Rate, Tensors

FILES = ("compact.safetensors", "compact.onnx", "export.json")
USERS = 32
"""Whom latency is measured with."""


def export(
    run: Path, out: Path, *, width: Rate = 1.0, client: ClientId | None = None, with_onnx: bool = False, meter: str = "auto"
) -> dict[str, Any]:
    """Write the best model of a run, finished or not, as a client holds it at a rate; returns what export.json says.

    An earlier export in the same folder is replaced whole.

    Args:
        run: the folder of one run, where run.json and model.safetensors are.
        width: the rate; 1 is the full width, with the masks of entries at that rate.
        client: whose masks, where each client has its own.
        meter: see `energy.find`.

    Raises:
        FedpruneError: not a run, no model in it yet, a rate below the model's floor, nothing to write ONNX with, a folder
            that cannot be written. Nothing is left behind then.
    """
    if with_onnx:
        portable.require()
    record, settings = RunRecord(run), _settings(run)
    kept = record.kept_model()
    own, exported, users = _cut(settings, record.about.get("data", ""), kept, width, client)
    dense = compact(own, {n: kept.model[n] for n in own.layout.named("shared", "touched")}, Submodel.full(own.layout))
    counter = energy.find(meter)
    try:
        seconds = 0.1 if counter is None else 2.0
        figures = measure_all({"dense": dense, "exported": exported}, _rows(dense), counter, at_least=seconds)
    finally:
        if counter is not None:
            counter.close()
    result = {
        "run": str(run),
        "strategy": settings.strategy,
        "seed": settings.seed,
        "version": kept.version,
        "rate": width,
        "client": client,
        "recommender": own.name,
        "users": users,
        "items": exported.items,
        "item_ids": bool(exported.item_ids),
        "held": {axis: units.tolist() for axis, units in exported.held.items()},
        "meter": None if counter is None else counter.source,
        **figures,
    }
    return result | {"files": _write(exported, result, out, with_onnx)}


def _settings(run: Path) -> Settings:
    try:
        return validated(RunRecord(run).settings())
    except RecordError as error:
        inside = [str(path.parent) for pattern in ("*/run.json", "*/*/run.json") for path in sorted(run.glob(pattern))]
        here = f"; there is {', '.join(inside[:3])}{', ...' if len(inside) > 3 else ''}" if inside else ""
        raise RecordError(f"{error}{here}") from None


def _cut(
    settings: Settings, data: str, kept: Kept, rate: Rate, client: ClientId | None
) -> tuple[Recommender, Compact, int | None]:
    """The plain recommender, the exported model, and how many users there were if that is known."""
    own, arguments = settings.of(settings.strategy)
    touched = plain_recommender(own, 1, 1).layout.named("touched")[0]
    if touched not in kept.model:
        raise RecordError(f'the run\'s model has no tensor "{touched}"; its model.safetensors is of another recommender')
    items = kept.model[touched].shape[0]
    users, item_ids = _catalogue(settings, data, items)
    strategy, recommender = strategy_of(own, arguments), recommender_of(own, users or 1, items)
    recommender.layout.widths(rate)  # refuses a rate that no client would get
    if isinstance(strategy.entries, Personal) and client is None:
        raise ConfigError(f"in {settings.strategy} every client has masks of its own; say whose to export with --client NUMBER")
    if client is not None and not 0 <= client < (users or client + 1):
        raise ConfigError(f"client {client} is not in 0..{(users or 0) - 1}")
    state = ServerState(kept.model, recommender.layout, own.seed, kept.version, pruning=kept.pruning, entries=kept.entries)
    state = strategy.begun(state)  # the model may be from before the first round
    submodel = strategy.carve(state, client or 0, rate)
    exported = compact(recommender, state.model, submodel, strategy.entries, item_ids)
    return plain_recommender(own, users or 1, items), exported, users


def _catalogue(settings: Settings, data: str, items: int) -> tuple[int | None, tuple[str, ...]]:
    """Users and item ids, where the run's own data can be read here; on real devices they cannot."""
    try:
        split = read_data(settings)
    except (FedpruneError, OSError):
        return None, ()
    same = fingerprint(split) == data and split.train.items == items
    return (split.train.users, split.train.item_ids) if same else (None, ())


def _rows(model: Compact) -> Tensors:
    """Private rows of nobody, to measure with: the run's own are on the devices."""
    layout, chance = model.recommender.layout, torch.Generator().manual_seed(0)
    return {name: torch.randn(USERS, *layout.shape(name)[1:], generator=chance) for name in layout.named("private")}


def _write(model: Compact, result: dict[str, Any], out: Path, with_onnx: bool) -> list[str]:
    """Everything in a folder beside it first, so that what fails leaves nothing half-written."""
    try:
        home = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
        if not home.is_dir():
            raise RecordError(f"{home} is a file; name another folder to --out")
        with tempfile.TemporaryDirectory(prefix=".export-", dir=home) as staged:
            model.save(Path(staged) / FILES[0])
            if with_onnx:
                portable.to_onnx(model, Path(staged) / FILES[1])
            written = [name for name in FILES if with_onnx or name != FILES[1]]
            result = result | {"files": [str(out / name) for name in written]}
            (Path(staged) / FILES[2]).write_text(json.dumps(result, indent=1))
            out.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                if name in written:
                    os.replace(Path(staged) / name, out / name)
                else:
                    (out / name).unlink(missing_ok=True)  # of an earlier export, so of another model
    except OSError as error:
        raise RecordError(f"cannot write into {out} ({error.strerror or error}); name another --out") from None
    return result["files"]
