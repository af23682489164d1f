"""Which units make up that much of the model?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from fedprune.axes import Layout
from fedprune.recommenders.base import LOGITS
from fedprune.submodel import Submodel
from fedprune.types import ClientId, Memory, Rate, Tensors, Version


class Pruning(Protocol):
    """Turns a rate into a submodel."""

    def prepare(self, memory: Memory, model: Tensors, layout: Layout) -> Memory:
        """What to remember before a round's carving, given the current model."""
        ...

    def carve(self, memory: Memory, layout: Layout, client: ClientId, version: Version, rate: Rate) -> Submodel:
        """The units that this client holds and trains. Equal decisions may share one object."""
        ...


@dataclass(frozen=True)
class Leading:
    """The first units of every axis: HeteroFL's nested prefixes (Diao et al. 2021, section 3)."""

    def prepare(self, memory: Memory, model: Tensors, layout: Layout) -> Memory:
        """Nothing."""
        return memory

    def carve(self, memory: Memory, layout: Layout, client: ClientId, version: Version, rate: Rate) -> Submodel:
        """0 .. width-1."""
        return _prefix(layout, rate)


@dataclass(frozen=True)
class Whole:
    """All units whatever the rate: for strategies whose rates speak of entries."""

    def prepare(self, memory: Memory, model: Tensors, layout: Layout) -> Memory:
        """Nothing."""
        return memory

    def carve(self, memory: Memory, layout: Layout, client: ClientId, version: Version, rate: Rate) -> Submodel:
        """Everything."""
        return _prefix(layout, 1.0)


@dataclass(frozen=True)
class Given:
    """A submodel that was decided elsewhere, the same for everybody at any rate."""

    submodel: Submodel

    def prepare(self, memory: Memory, model: Tensors, layout: Layout) -> Memory:
        """Nothing."""
        return memory

    def carve(self, memory: Memory, layout: Layout, client: ClientId, version: Version, rate: Rate) -> Submodel:
        """What was given."""
        return self.submodel


@dataclass(frozen=True)
class Window:
    """Hold everything, train a window: `width` neighbouring units from an offset of the client's own, moving each version.

    The client scores with the whole model, so nothing is mis-scored, and different clients cover different units, so none
    is left to the strong alone. It saves upload and a third of the computing at most. Rolling windows are FedRolex' (Alam et
    al. 2022); that theirs are all there is of the model, and the same for everybody in a round, is what loses quality.
    """

    stride: int = 7919
    """A prime far from any width, so that neighbouring clients start far apart."""

    def prepare(self, memory: Memory, model: Tensors, layout: Layout) -> Memory:
        """Nothing."""
        return memory

    def carve(self, memory: Memory, layout: Layout, client: ClientId, version: Version, rate: Rate) -> Submodel:
        """offset, offset+1, ... modulo the axis' size."""
        # Offsets repeat after the widest axis' size when all sizes divide it; keeping them apart costs just cache entries.
        return _window(layout, rate, (self.stride * client + version) % math.lcm(*layout.full.values()))


@dataclass(frozen=True)
class Importance:
    """The most important units by an order that is constant, identical for everybody, and global over all axes' tensors.

    A unit's importance is the squared Euclidean norm of everything it owns in the model at the first round:
    sum over tensors that name its axis, but for those that learn masks. A smaller submodel is then part of every larger one,
    which AdaptCL's successor found essential (FedPAGE, Zhou et al. 2024: "structural similarity between sub-models").

    Differs from the paper: norms instead of batch-norm scales, which these models lack. Equals `Leading` when norms fall
    with the unit's number, as they do after an SVD warm start.
    """

    def prepare(self, memory: Memory, model: Tensors, layout: Layout) -> Memory:
        """The order of units per axis, most important first; computed once."""
        return memory or {axis: np.argsort(-_norms(model, layout, axis), kind="stable") for axis in layout.prunable}

    def carve(self, memory: Memory, layout: Layout, client: ClientId, version: Version, rate: Rate) -> Submodel:
        """The first `width` units of the order."""
        order = tuple((axis, memory[axis].astype(np.int32).tobytes()) for axis in layout.prunable)
        return _first(layout, rate, order)


# Carving is asked per client and round, and answers few different things: equal ones are one object.


@lru_cache(maxsize=1024)
def _prefix(layout: Layout, rate: Rate) -> Submodel:
    return Submodel({axis: np.arange(width) for axis, width in layout.widths(rate).items()})


@lru_cache(maxsize=8192)
def _window(layout: Layout, rate: Rate, offset: int) -> Submodel:
    trained = {
        axis: np.sort((offset + np.arange(width)) % layout.axes[axis].size) for axis, width in layout.widths(rate).items()
    }
    return Submodel(_prefix(layout, 1.0).held, trained)


@lru_cache(maxsize=1024)
def _first(layout: Layout, rate: Rate, order: tuple[tuple[str, bytes], ...]) -> Submodel:
    widths = layout.widths(rate)
    return Submodel({axis: np.sort(np.frombuffer(o, np.int32)[: widths[axis]]).astype(np.int64) for axis, o in order})


def _norms(model: Tensors, layout: Layout, axis: str) -> np.ndarray:
    """Squared norm of everything that belongs to each unit of an axis; float64 `[units]`."""
    size = layout.axes[axis].size
    total = np.zeros(size)
    for name, tensor in model.items():
        if name.endswith(LOGITS):  # they speak of single entries, and start at chance
            continue
        for place, dimension in enumerate(layout.tensors[name]):
            if isinstance(dimension, int) or axis not in dimension:
                continue
            others = [d for d in range(tensor.dim()) if d != place]
            squared = (tensor.double() ** 2).sum(others) if others else tensor.double() ** 2
            start = 0
            for part in dimension:
                width = layout.axes[part].size
                if part == axis:
                    total += squared[start : start + width].cpu().numpy()
                start += width
    return total
