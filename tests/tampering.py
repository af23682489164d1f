"""What a broken or hostile device may do to its report before it sends it."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from flower_world import Tamper
from flwr.app import Array, RecordDict


def array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Tamper:
    """Another array in this one's place."""

    def tamper(content: RecordDict) -> RecordDict:
        values = content["arrays"][name].numpy().copy()
        content["arrays"][name] = Array(np.ascontiguousarray(change(values)))
        return content

    return tamper


def entry(name: str, value: float, at: int = 3) -> Tamper:
    """One entry of an array changed."""

    def change(values: np.ndarray) -> np.ndarray:
        values[at] = value
        return values

    return array(name, change)


def figure(name: str, value: Any) -> Tamper:
    """A metric set, past Flower's own type checks."""

    def tamper(content: RecordDict) -> RecordDict:
        content["metrics"].__dict__["_data"][name] = value
        return content

    return tamper


def setting(name: str, value: Any) -> Tamper:
    """A config entry set."""

    def tamper(content: RecordDict) -> RecordDict:
        old = content["config"][name]
        content["config"].__dict__["_data"][name] = value(old) if callable(value) else value
        return content

    return tamper


def without(record: str, name: str) -> Tamper:
    """An entry left out."""

    def tamper(content: RecordDict) -> RecordDict:
        del content[record][name]
        return content

    return tamper


def instead(name: str, record: Any) -> Tamper:
    """Another record under this name; None leaves it out."""

    def tamper(content: RecordDict) -> RecordDict:
        if record is None:
            del content[name]
        else:
            content[name] = record
        return content

    return tamper


def data(name: str, make: Callable[[bytes], bytes], stype: str = "numpy.ndarray") -> Tamper:
    """Other bytes under an array's honest label."""

    def tamper(content: RecordDict) -> RecordDict:
        old = content["arrays"][name]
        content["arrays"][name] = Array(old.dtype, old.shape, stype, make(old.data))
        return content

    return tamper


def extra(name: str) -> Tamper:
    """An array that was not asked for."""

    def tamper(content: RecordDict) -> RecordDict:
        content["arrays"][name] = Array(np.ones(5, np.float32))
        return content

    return tamper


def npy(header: str) -> bytes:
    """An array file with this header and hardly any data."""
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)


def pickled(_: bytes) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([print, {"a": 1}], dtype=object), allow_pickle=True)
    return file.getvalue()


def zipped(old: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("update.npy", old)
    return file.getvalue()


def untouched(content: RecordDict) -> RecordDict:
    """Says it trained one row less than its update changes."""
    packed = content["arrays"]["present"].numpy()
    flags = np.unpackbits(packed)
    flags[np.flatnonzero(flags)[1]] = 0
    content["arrays"]["present"] = Array(np.packbits(flags))
    return content


def repeated(values: np.ndarray) -> np.ndarray:
    values[1] = values[0]
    return values
