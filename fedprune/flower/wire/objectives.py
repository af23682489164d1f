"""An objective as config entries: "objective.lr", "objective.distillation.weight" and so on."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import Any

from flwr.app import ConfigRecord

from fedprune import distill
from fedprune.distill import Distillation
from fedprune.errors import ConfigError, FleetError
from fedprune.flower.wire.fields import list_of, need, value_of
from fedprune.objective import Objective

TAUGHT = "objective.distillation"
KINDS: dict[str, type] = {f"objective.{entry.name}": type(entry.default) for entry in fields(Objective)}
KINDS |= {f"{TAUGHT}.{entry.name}": type(entry.default) for entry in fields(Distillation)}
KINDS |= {"objective.batch": int, "objective.until": float}
del KINDS[TAUGHT]


def write_objective(objective: Objective) -> dict[str, Any]:
    """Every term that is not None, also those at their defaults: another version's may be others."""
    return _terms("objective", objective)


def _terms(prefix: str, values: Objective | Distillation) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for entry in fields(values):
        name, value = f"{prefix}.{entry.name}", getattr(values, entry.name)
        if is_dataclass(value):
            result |= _terms(name, value)  # type: ignore[arg-type]
        elif value is not None:
            result[name] = list(value) if isinstance(value, tuple) else value
    return result


def read_objective(config: ConfigRecord) -> Objective:
    """What a message asks for.

    Raises:
        FleetError: a term that this version does not know, of another type, or out of range.
    """
    own: dict[str, Any] = {}
    taught: dict[str, Any] = {}
    for key in config:
        if key.startswith("objective."):
            need(key in KINDS, key, "is not a term of the objective that this version knows")
            into = taught if key.startswith(f"{TAUGHT}.") else own
            into[key.rpartition(".")[2]] = _value(config, key, KINDS[key])
    field = TAUGHT
    try:
        if taught:
            own["distillation"] = distill.from_settings(taught)
        field = "objective"
        return Objective(**own)
    except ConfigError as error:
        raise FleetError(f'field "{field}": {error}') from None


def _value(config: ConfigRecord, key: str, kind: type) -> Any:
    if kind is tuple:
        values = tuple(list_of(config, key, float))
        need(len(values) == 2, key, f"has {len(values)} entries, not 2")
        return values
    value = value_of(config, key, kind)
    need(kind is not float or math.isfinite(value), key, f"is {value}")
    return value
