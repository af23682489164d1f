"""What a mask of entries answers to, and the neutral one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch

from fedprune.axes import Layout
from fedprune.exchange import Report
from fedprune.recommenders import Recommender
from fedprune.submodel import Submodel
from fedprune.types import BoolArray, ClientId, Memory, Rate, Tensors, Version

Mean = Callable[[], Tensors]
"""The mean update of a round's reports, computed when asked for."""


class Entries(Protocol):
    """Turns a model into masks. `Memory` is arrays alone, so that a checkpoint can hold it."""

    @property
    def through(self) -> bool:
        """Whether clients report gradients of masked entries too (`Submodel.through`)."""
        ...

    @property
    def gate(self) -> bool:
        """Whether clients report how well the received model does on their own held-out items (`Objective.gate`)."""
        ...

    def parametrise(self, recommender: Recommender) -> Recommender:
        """The recommender with the tensors that learn a mask, if masks are learned like weights."""
        ...

    def prepare(self, memory: Memory, model: Tensors, layout: Layout, version: Version) -> tuple[Memory, Tensors]:
        """What to remember before a round, and the model to go on from: another one where a ticket is rewound."""
        ...

    def mask(self, memory: Memory, layout: Layout, client: ClientId, rate: Rate) -> Mapping[str, BoolArray]:
        """This client's entries, per masked tensor in the full model's shape. Equal decisions should share arrays."""
        ...

    def learn(self, memory: Memory, model: Tensors, layout: Layout, reports: Sequence[Report], mean: Mean) -> Memory:
        """What to remember of a round's reports; `model` is the one that they trained on if they are not stale."""
        ...

    def facts(self, memory: Memory) -> dict[str, float]:
        """What a round's record should say of the masks.

        "kept" is the share of the maskable entries that is there, where it is the same at all rates. "ticket" is that share
        where it shrinks on the way to the final one: only rounds with equal tickets can be compared.
        """
        ...


@dataclass(frozen=True)
class All:
    """Every entry of every unit that is held: what all published strategies without tickets do."""

    through = False
    gate = False

    def parametrise(self, recommender: Recommender) -> Recommender:
        """As it is."""
        return recommender

    def prepare(self, memory: Memory, model: Tensors, layout: Layout, version: Version) -> tuple[Memory, Tensors]:
        """Nothing."""
        return memory, model

    def mask(self, memory: Memory, layout: Layout, client: ClientId, rate: Rate) -> Mapping[str, BoolArray]:
        """None."""
        return {}

    def learn(self, memory: Memory, model: Tensors, layout: Layout, reports: Sequence[Report], mean: Mean) -> Memory:
        """Nothing."""
        return memory

    def facts(self, memory: Memory) -> dict[str, float]:
        """None."""
        return {}


def joined(submodel: Submodel, entries: Mapping[str, BoolArray], through: bool = False) -> Submodel:
    """The units of one decision with the entries of another; equal arguments give the same object."""
    if not entries:
        return submodel
    return _joined(submodel, tuple((name, Same(array)) for name, array in entries.items()), through)


class Same:
    """An array as a key of a cache: it equals itself alone, and lives as long as the cache needs it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.array is self.array

    def __hash__(self) -> int:
        return id(self.array)


@lru_cache(maxsize=1024)
def _joined(submodel: Submodel, entries: tuple[tuple[str, Same], ...], through: bool) -> Submodel:
    return replace(submodel, entries={name: same.array for name, same in entries}, through=through)


def maskable(layout: Layout) -> list[str]:
    """Tensors that travel and have at least two dimensions: embeddings and weight matrices. Biases stay whole."""
    return [name for name in layout.named("shared", "touched") if len(layout.tensors[name]) > 1]


def largest(magnitude: np.ndarray, keep: float, among: BoolArray | None = None) -> BoolArray:
    """The `keep` largest of all entries of a tensor (rounded, at least one), out of those `among` which the choice is.

    Of equal ones the first come first.
    """
    count = min(max(1, round(keep * magnitude.size)), magnitude.size if among is None else int(among.sum()))
    flat = (magnitude if among is None else np.where(among, magnitude, -1.0)).ravel()
    if not count:
        return np.zeros(magnitude.shape, bool)
    limit = np.partition(flat, flat.size - count)[flat.size - count]
    mask = flat > limit
    ties = np.flatnonzero(flat == limit)
    mask[ties[: count - int(mask.sum())]] = True
    return mask.reshape(magnitude.shape)


def magnitudes(model: Tensors, names: Sequence[str]) -> dict[str, np.ndarray]:
    """|w| per tensor, float32."""
    return {name: torch.abs(model[name]).cpu().numpy().copy() for name in names}


def group(memory: Memory, prefix: str) -> dict[str, np.ndarray]:
    """The arrays that a memory keeps under `prefix/`."""
    return {name.removeprefix(prefix + "/"): array for name, array in memory.items() if name.startswith(prefix + "/")}


def kept(masks: Mapping[str, BoolArray]) -> float:
    """Share of the maskable entries that is there; 1.0 without masks."""
    return sum(int(m.sum()) for m in masks.values()) / sum(m.size for m in masks.values()) if masks else 1.0
