"""Entries of tensors end to end: float32 ones, int8 ones, and float16 ones, the scales of int8 rows among them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor

from fedprune import precision
from fedprune.flower.wire.entries import with_gaps, without_gaps
from fedprune.flower.wire.fields import need, pieces
from fedprune.types import Tensors

KINDS = {"floats": np.float32, "codes": np.int8, "halves": np.float16}
Precision = Literal["float32", "int8"]


@dataclass(frozen=True)
class Block:
    """What travels of one tensor.

    Attributes:
        extents: its shape without the clients' axis, rows first.
        mask: which entries are there; None: all. One client alone may have one.
        precision: "int8" makes a vector float16.
    """

    extents: tuple[int, ...]
    mask: Tensor | None
    precision: Precision

    @property
    def sizes(self) -> dict[str, int]:
        """Entries per kind of number and client."""
        there = math.prod(self.extents) if self.mask is None else int(self.mask.sum())
        if self.precision == "float32":
            return {"floats": there}
        return {"halves": there} if self._vector else {"codes": there, "halves": self.extents[0]}

    def write(self, values: Tensor, scales: Tensor | None = None) -> Tensors:
        """Per kind `[clients, entries]`.

        Args:
            values: `[clients, *extents]`.
            scales: `[clients, rows]` of an int8 matrix.
        """
        if self.precision == "float32":
            return {"floats": self._close(values)}
        if self._vector:
            return {"halves": self._close(values).half()}
        assert scales is not None, "an int8 matrix has scales"
        return {"codes": self._close(precision.codes(values, scales)), "halves": scales}

    def read(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse: float32 `[clients, *extents]`, memory of its own."""
        if self.precision == "float32":
            return self._open(parts["floats"])
        if self._vector:
            return self._open(parts["halves"].float())
        return precision.decoded(self._open(parts["codes"]), parts["halves"])

    @property
    def _vector(self) -> bool:
        return len(self.extents) == 1

    def _close(self, values: Tensor) -> Tensor:
        return values.flatten(1) if self.mask is None else without_gaps(values[0], self.mask)[None]

    def _open(self, entries: Tensor) -> Tensor:
        if self.mask is None:
            return with_gaps(entries, (len(entries), *self.extents), None)
        return with_gaps(entries[0], self.extents, self.mask)[None]


def asked(name: str, precisions: Iterable[Precision]) -> dict[str, str]:
    """Which arrays there are, by kind; that of float32 entries is called `name`."""
    wanted = set(precisions)
    names = {"floats": name} if "float32" in wanted else {}
    return names | ({"codes": "codes", "halves": "halves"} if "int8" in wanted else {})


def together(written: Sequence[Tensors]) -> Tensors:
    """What the blocks of some clients wrote, client after client; per kind `[entries]`."""
    kinds = dict.fromkeys(kind for part in written for kind in part)
    return {kind: torch.cat([part[kind] for part in written if kind in part], 1).flatten() for kind in kinds}


def laid_out(name: str, precisions: Iterable[Precision], written: Sequence[Tensors]) -> Tensors:
    """The arrays of a message, from what went `together`."""
    result: Tensors = {}
    for kind, called in asked(name, precisions).items():
        parts = [part[kind] for part in written if kind in part]
        result[called] = torch.cat(parts) if parts else torch.from_numpy(np.zeros(0, KINDS[kind]))
    return result


def picked_up(
    arrays: ArrayRecord, name: str, precisions: Iterable[Precision], sizes: Sequence[Mapping[str, int]]
) -> list[Tensors]:
    """The inverse: per part its entries of each kind, all finite.

    Args:
        sizes: entries per part and kind.

    Raises:
        FleetError: an array is missing, was not asked for, or is not what it should be.
    """
    names, result = asked(name, precisions), [{} for _ in sizes]
    for called in {name, "codes", "halves"} - set(names.values()):
        need(called not in arrays, called, "was not asked for")
    for kind, called in names.items():
        parts = pieces(arrays, called, KINDS[kind], [size.get(kind, 0) for size in sizes])
        for into, part in zip(result, parts, strict=True):
            need(kind == "codes" or bool(np.isfinite(part).all()), called, "holds a NaN or an infinite value")
            into[kind] = torch.from_numpy(part)
    return result


def summed(blocks: Iterable[Block], clients: int = 1) -> dict[str, int]:
    """Entries of these blocks, per kind."""
    total: dict[str, int] = {}
    for block in blocks:
        for kind, size in block.sizes.items():
            total[kind] = total.get(kind, 0) + size * clients
    return total


def read_all(blocks: Mapping[str, Block], part: Tensors, clients: int = 1) -> Tensors:
    """Tensors by name `[clients, *extents]`, from what their blocks wrote for these clients and nothing else."""
    lines, at = {kind: entries.reshape(clients, -1) for kind, entries in part.items()}, dict.fromkeys(part, 0)
    result: Tensors = {}
    for name, block in blocks.items():
        own: Tensors = {}
        for kind, size in block.sizes.items():
            own[kind] = lines[kind][:, at[kind] : at[kind] + size]
            at[kind] += size
        result[name] = block.read(own)
    return result
