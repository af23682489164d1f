"""What one client gets of the model: pure data, and the two functions that cut a model along it and put it back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedprune.axes import Dimension, Layout, Widths
from fedprune.errors import LayoutError
from fedprune.types import IntArray, Tensors


@dataclass(frozen=True, eq=False)
class Submodel:
    """The units of every prunable axis that a client holds, and which of them it trains: a whole pruning decision.

    Held units are sent (or cached) and used in the forward pass; trained ones, a subset, are updated and reported.
    Held = trained is the classical submodel; held > trained is a window into a model that is otherwise read only.

    Attributes:
        held: axis -> unit numbers in the full model, ascending, int64.
        trained: likewise; the same as `held` if not given.
    """

    held: Mapping[str, IntArray]
    trained: Mapping[str, IntArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.trained:
            object.__setattr__(self, "trained", self.held)

    @classmethod
    def full(cls, layout: Layout) -> Submodel:
        """Everything held and trained."""
        return cls({name: np.arange(axis.size) for name, axis in layout.prunable.items()})

    @classmethod
    def checked(cls, layout: Layout, held: Mapping[str, IntArray], trained: Mapping[str, IntArray] | None = None) -> Submodel:
        """A submodel that fits the layout.

        Raises:
            LayoutError: an axis is missing, units are out of range, unsorted, below the floor, or trained but not held.
        """
        for name, axis in layout.prunable.items():
            if name not in held:
                raise LayoutError(f'submodel says nothing of axis "{name}"')
            units = np.asarray(held[name])
            if len(units) < axis.floor:
                raise LayoutError(f'submodel holds {len(units)} units of "{name}", below its floor {axis.floor}')
            if units[0] < 0 or units[-1] >= axis.size or (np.diff(units) <= 0).any():
                raise LayoutError(f'units of "{name}" must ascend within 0..{axis.size - 1}; got {units.tolist()}')
            if trained is not None and not np.isin(trained[name], units).all():
                raise LayoutError(f'submodel trains units of "{name}" that it does not hold')
        return cls(held, trained or {})

    @cached_property
    def widths(self) -> Widths:
        """Held units per axis."""
        return {axis: len(units) for axis, units in self.held.items()}

    @cached_property
    def trained_widths(self) -> Widths:
        """Trained units per axis."""
        return {axis: len(units) for axis, units in self.trained.items()}

    @cached_property
    def held_key(self) -> bytes:
        """Equal for submodels that hold the same units (such clients can be stacked on one cut)."""
        return b"|".join(np.asarray(units, np.int32).tobytes() for units in self.held.values())

    @cached_property
    def key(self) -> bytes:
        """Equal for equal submodels."""
        return self.held_key + b"/" + b"|".join(np.asarray(u, np.int32).tobytes() for u in self.trained.values())

    @property
    def is_window(self) -> bool:
        """Whether some held unit is not trained."""
        return self.trained_widths != self.widths

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Submodel) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        return ", ".join(f"{axis}: {len(self.trained[axis])} of {len(held)}" for axis, held in self.held.items())


def positions(layout: Layout, dimension: Dimension, units: Mapping[str, IntArray]) -> Tensor:
    """Entries of one dimension that belong to these units; int64, ascending. Row axes and plain numbers come in full."""
    if isinstance(dimension, int):
        return torch.arange(dimension)
    parts, start = [], 0
    for name in dimension:
        size = layout.axes[name].size
        own = torch.from_numpy(np.asarray(units[name], np.int64)) if name in units else torch.arange(size)
        parts.append(own + start)
        start += size
    return torch.cat(parts)


def mask(layout: Layout, dimension: Dimension, units: Mapping[str, IntArray]) -> Tensor:
    """1.0 where an entry of a dimension belongs to these units, else 0.0; float32 `[extent]`."""
    result = torch.zeros(layout.extent(dimension, layout.full))
    result[positions(layout, dimension, units)] = 1.0
    return result


def extract(model: Tensors, layout: Layout, submodel: Submodel, rows: Tensor | None = None) -> Tensors:
    """Cut the held units out of a model: a physically smaller, dense, contiguous one.

    Args:
        model: tensors of the full model, any subset of the layout's.
        rows: touched rows to keep, int64 `[rows]`; all of them if None. Private tensors keep all rows.
    """
    cut: Tensors = {}
    for name, tensor in model.items():
        for axis, dimension in enumerate(layout.tensors[name]):
            if axis == 0 and layout.kind(name) != "shared":
                if rows is not None and layout.kind(name) == "touched":
                    tensor = tensor.index_select(0, rows.to(tensor.device))
                continue
            kept = positions(layout, dimension, submodel.held)
            if len(kept) < tensor.shape[axis]:
                tensor = tensor.index_select(axis, kept.to(tensor.device))
        cut[name] = tensor.contiguous()
    return cut


def scatter(into: Tensors, layout: Layout, submodel: Submodel, part: Tensors, rows: Tensor | None = None) -> None:
    """Write the entries of a cut model back where `extract` took them from, in place; all others stay as they are."""
    for name, tensor in part.items():
        mesh = [positions(layout, d, submodel.held) for d in layout.tensors[name]]
        if rows is not None and layout.kind(name) == "touched":
            mesh[0] = rows
        index = torch.meshgrid(*(m.to(tensor.device) for m in mesh), indexing="ij")
        into[name][index] = tensor
