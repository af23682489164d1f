"""Objective and codec as config entries: "objective.lr", "objective.distillation.weight", "codec.rows" and so on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from flwr.app import ConfigRecord

from fedprune import distill
from fedprune.codec import Codec
from fedprune.distill import Distillation
from fedprune.errors import ConfigError, FleetError
from fedprune.flower.wire.fields import list_of, need, value_of
from fedprune.objective import Objective

TAUGHT = "objective.distillation"
KINDS: dict[str, type] = {f"objective.{entry.name}": type(entry.default) for entry in fields(Objective)}
KINDS |= {f"{TAUGHT}.{entry.name}": type(entry.default) for entry in fields(Distillation)}
KINDS |= {"objective.batch": int, "objective.until": float}
del KINDS[TAUGHT]
CODEC: dict[str, type] = {f"codec.{entry.name}": type(entry.default) for entry in fields(Codec)}


def write_plan(objective: Objective, codec: Codec, number: int = 0) -> dict[str, Any]:
    """Every term that is not None, also those at their defaults: another version's may be others.

    Args:
        number: of the plan in its message; those of all but the first begin with it, as in "1.objective.lr".
    """
    terms = _terms("objective", objective) | _terms("codec", codec)
    return {_prefix(number) + name: value for name, value in terms.items()}


def read_plan(config: ConfigRecord, number: int = 0) -> tuple[Objective, Codec]:
    """What a message asks for.

    Raises:
        FleetError: a term that this version does not know, of another type, or out of range.
    """
    prefix = _prefix(number)
    terms = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
    try:
        return _read_objective(terms), _read_codec(terms)
    except FleetError as error:
        if not number:
            raise
        raise FleetError(f"plan {number}: {error}") from None


def _prefix(number: int) -> str:
    return f"{number}." if number else ""


def _terms(prefix: str, values: Objective | Distillation | Codec) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for entry in fields(values):
        name, value = f"{prefix}.{entry.name}", getattr(values, entry.name)
        if is_dataclass(value):
            result |= _terms(name, value)  # type: ignore[arg-type]
        elif value is not None:
            result[name] = list(value) if isinstance(value, tuple) else value
    return result


def _read_objective(config: Mapping[str, Any]) -> Objective:
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


def _read_codec(config: Mapping[str, Any]) -> Codec:
    """All of it: a device that took one side's default for the other's would misread the arrays."""
    for key in config:
        need(not key.startswith("codec.") or key in CODEC, key, "is not a term of the codec that this version knows")
    terms = {entry.name: _value(config, f"codec.{entry.name}", CODEC[f"codec.{entry.name}"]) for entry in fields(Codec)}
    try:
        return Codec(**terms)
    except ConfigError as error:
        raise FleetError(f'field "codec": {error}') from None


def _value(config: Mapping[str, Any], key: str, kind: type) -> Any:
    if kind is tuple:
        values = tuple(list_of(config, key, float))
        need(len(values) == 2, key, f"has {len(values)} entries, not 2")
        return values
    value = value_of(config, key, kind)
    need(kind is not float or math.isfinite(value), key, f"is {value}")
    return value
