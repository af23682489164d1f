"""Fields of a Flower message, read with distrust: whatever is wrong is an error that names the field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedprune.errors import FleetError
from fedprune.types import FloatArray

FORMAT = 3
"""Raised whenever a message's meaning changes; both sides refuse another one."""
ROOM = 4096
"""Bytes that an array's own header may take."""


def need(fact: bool, name: str, otherwise: str) -> None:
    """Raise a FleetError about a field unless a fact holds."""
    if not fact:
        raise FleetError(f'field "{name}" {otherwise}')


def speaks(config: ConfigRecord) -> None:
    """Refuse a message of another format."""
    found = value_of(config, "format", int)
    need(found == FORMAT, "format", f"is {found}, this side speaks {FORMAT}; install the same fedprune on server and devices")


def part_of(content: RecordDict, name: str, kind: type) -> Any:
    """One of a message's records."""
    need(name in content, name, "is missing")
    need(isinstance(content[name], kind), name, f"is a {type(content[name]).__name__}, not a {kind.__name__}")
    return content[name]


def value_of(record: Mapping[str, Any], name: str, kind: type) -> Any:
    """One number or text, of exactly this type (a whole number passes for a float)."""
    need(name in record, name, "is missing")
    value = record[name]
    fits = type(value) is kind or (kind is float and type(value) is int)
    need(fits, name, f"is a {type(value).__name__}, not a {kind.__name__}")
    return kind(value)


def list_of(record: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """A list that is not empty, of this type alone."""
    need(name in record, name, "is missing")
    values = record[name]
    need(isinstance(values, list) and len(values) > 0, name, "is no list, or empty")
    need(all(type(v) is kind for v in values), name, f"must hold {kind.__name__}s only")
    return list(values)


def flat(arrays: ArrayRecord, name: str, kind: type, size: int | None = None) -> np.ndarray:
    """A flat array, the receiver's own: changing it changes nobody else's."""
    need(name in arrays, name, "is missing")
    array, wanted = arrays[name], np.dtype(kind)
    if size is not None:
        need(len(array.data) <= size * wanted.itemsize + ROOM, name, f"has {len(array.data)} bytes for {size} entries")
    try:
        values = array.numpy()
    except Exception as error:  # a stranger's bytes: NumPy's reader lets errors of tokenizer, parser and zip through
        raise FleetError(f'field "{name}" cannot be read: {error}') from None
    need(isinstance(values, np.ndarray), name, "is no array file")
    need(values.dtype == wanted, name, f"holds {values.dtype}, not {wanted}")
    need(values.ndim == 1, name, f"has shape {values.shape}, it must be flat")
    need(size is None or len(values) == size, name, f"has {len(values)} entries, not {size}")
    return values


def pieces(arrays: ArrayRecord, name: str, kind: type, sizes: Sequence[int]) -> list[np.ndarray]:
    """A flat array cut into pieces of these sizes, which must use it up."""
    return np.split(flat(arrays, name, kind, sum(sizes)), np.cumsum(sizes)[:-1])


def arrays_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as Flower's arrays."""
    return ArrayRecord({name: Array(np.ascontiguousarray(tensor.numpy())) for name, tensor in tensors.items()})


# ---- messages that are no orders (warm start, evaluation) ------------------------------------------------------------


def write_numbers(
    run: str, settings: str, *, arrays: Mapping[str, FloatArray | Tensor] | None = None, **config: Any
) -> RecordDict:
    """Content of some arrays under their names, and some settings."""
    content = RecordDict({"config": ConfigRecord({"format": FORMAT, "run": run, "settings": settings, **config})})
    content["arrays"] = arrays_of({name: torch.as_tensor(array).flatten() for name, array in (arrays or {}).items()})
    return content


def read_array(content: RecordDict, name: str, shape: Sequence[int], kind: type = np.float32) -> np.ndarray:
    """One array of a message, checked for kind, size and finite values.

    Raises:
        FleetError: which field is wrong, and how.
    """
    values = flat(part_of(content, "arrays", ArrayRecord), name, kind, math.prod(shape))
    need(bool(np.isfinite(values).all()), name, "holds a NaN or an infinite value")
    return values.reshape(tuple(shape))


def read_config(content: RecordDict, name: str, kind: type) -> Any:
    """One setting of a message.

    Raises:
        FleetError: it is missing, or of another type, or the message is of another format.
    """
    config = part_of(content, "config", ConfigRecord)
    speaks(config)
    return value_of(config, name, kind)


def read_option(content: RecordDict, name: str, kind: type, otherwise: Any) -> Any:
    """One setting of a message, if it is there."""
    return read_config(content, name, kind) if name in part_of(content, "config", ConfigRecord) else otherwise


def read_metric(content: RecordDict, name: str, kind: type = float) -> Any:
    """One figure of a message, finite.

    Raises:
        FleetError: it is missing, of another type, or not finite.
    """
    value = value_of(part_of(content, "metrics", MetricRecord), name, kind)
    need(math.isfinite(value), name, f"is {value}")
    return value
