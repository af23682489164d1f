"""What one client gets of the model: pure data, and the functions that cut a model along it and put it back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedprune.axes import Dimension, Layout, Widths
from fedprune.errors import LayoutError
from fedprune.types import BoolArray, IntArray, Tensors


@dataclass(frozen=True, eq=False)
class Submodel:
    """The units of every prunable axis that a client holds, and which of them it trains: a whole pruning decision.

    Held units are sent (or cached) and used in the forward pass; trained ones, a subset, are updated and reported.
    Held = trained is the classical submodel; held > trained is a window into a model that is otherwise read only.

    Units make a model physically smaller and its training faster. A mask of entries (a lottery ticket, k of n) makes what
    travels and what is stored smaller; the arithmetic stays dense. Both compose: entries of units that are not held are gone
    whatever the mask says.

    Attributes:
        held: axis -> unit numbers in the full model, ascending, int64.
        trained: likewise; the same as `held` if not given.
        entries: tensor -> which of its entries there are, bool in the full model's shape; the others are zero and stay so.
            A tensor that is not named has all of them.
        through: the masked entries are zero where the client scores, but their gradient is taken and reported all the same.
    """

    held: Mapping[str, IntArray]
    trained: Mapping[str, IntArray] = field(default_factory=dict)
    entries: Mapping[str, BoolArray] = field(default_factory=dict)
    through: bool = False

    def __post_init__(self) -> None:
        if not self.trained:
            object.__setattr__(self, "trained", self.held)

    @classmethod
    def full(cls, layout: Layout) -> Submodel:
        """Everything held and trained."""
        return cls({name: np.arange(axis.size) for name, axis in layout.prunable.items()})

    @classmethod
    def checked(
        cls,
        layout: Layout,
        held: Mapping[str, IntArray],
        trained: Mapping[str, IntArray] | None = None,
        entries: Mapping[str, BoolArray] | None = None,
    ) -> Submodel:
        """A submodel that fits the layout.

        Raises:
            LayoutError: an axis is missing, units are out of range, unsorted, below the floor, or trained but not held; a mask
                of entries is of no tensor that travels, or of another shape.
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
        for name, there in (entries or {}).items():
            if name not in layout.tensors or layout.kind(name) == "private":
                raise LayoutError(f'submodel masks entries of "{name}", which is no tensor that travels')
            if there.shape != layout.shape(name) or there.dtype != np.bool_:
                raise LayoutError(f'mask of "{name}" is {there.dtype} {there.shape}; it must be bool {layout.shape(name)}')
        return cls(held, trained or {}, entries or {})

    @cached_property
    def widths(self) -> Widths:
        """Held units per axis."""
        return {axis: len(units) for axis, units in self.held.items()}

    @cached_property
    def trained_widths(self) -> Widths:
        """Trained units per axis."""
        return {axis: len(units) for axis, units in self.trained.items()}

    @cached_property
    def units_key(self) -> bytes:
        """Equal for submodels that hold the same units (such clients can be stacked on one cut)."""
        return b"|".join(np.asarray(units, np.int32).tobytes() for units in self.held.values())

    @cached_property
    def held_key(self) -> bytes:
        """Equal for submodels that hold the same units and entries (such clients see the same model)."""
        if not self.entries:
            return self.units_key
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self.entries):
            digest.update(name.encode() + np.packbits(self.entries[name]).tobytes())
        return self.units_key + b"#" + digest.digest()

    @cached_property
    def key(self) -> bytes:
        """Equal for equal submodels."""
        trained = b"|".join(np.asarray(u, np.int32).tobytes() for u in self.trained.values())
        return self.held_key + (b"/through/" if self.through else b"/") + trained

    @property
    def is_window(self) -> bool:
        """Whether some held unit is not trained."""
        return self.trained_widths != self.widths

    @property
    def units(self) -> Submodel:
        """The same units with all their entries."""
        return self if not self.entries else replace(self, entries={}, through=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Submodel) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __str__(self) -> str:
        text = ", ".join(f"{axis}: {len(self.trained[axis])} of {len(held)}" for axis, held in self.held.items())
        for name, there in self.entries.items():
            text += f", {name}: {int(there.sum())} of {there.size} entries"
        return text


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


def like(factor: Tensor, tensor: Tensor) -> Tensor:
    """A factor of a tensor's leading axes, with axes of length 1 appended until it broadcasts along them."""
    return factor.reshape(*factor.shape, *[1] * (tensor.dim() - factor.dim()))


def mask(layout: Layout, dimension: Dimension, units: Mapping[str, IntArray]) -> Tensor:
    """1.0 where an entry of a dimension belongs to these units, else 0.0; float32 `[extent]`."""
    result = torch.zeros(layout.extent(dimension, layout.full))
    result[positions(layout, dimension, units)] = 1.0
    return result


@lru_cache(maxsize=2048)
def there(layout: Layout, submodel: Submodel, name: str, part: Literal["held", "trained"] = "held") -> Tensor | None:
    """Which entries of a tensor are there (or are trained), at held (or trained) widths, bool; None if all of them."""
    if name not in submodel.entries or (submodel.through and part == "trained"):
        return None
    result = torch.from_numpy(submodel.entries[name])
    units = submodel.held if part == "held" else submodel.trained
    for axis, dimension in enumerate(layout.tensors[name]):
        if axis or layout.kind(name) == "shared":
            result = result.index_select(axis, positions(layout, dimension, units))
    return result.contiguous()


def extract(model: Tensors, layout: Layout, submodel: Submodel, rows: Tensor | None = None) -> Tensors:
    """Cut the held units out of a model: a physically smaller, dense, contiguous one, zero where an entry is masked.

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
        present = there(layout, submodel, name)
        if present is not None:
            chosen = present if rows is None or layout.kind(name) != "touched" else present[rows.cpu()]
            tensor = tensor * chosen.to(tensor)
        cut[name] = tensor.contiguous()
    return cut


def scatter(into: Tensors, layout: Layout, submodel: Submodel, part: Tensors, rows: Tensor | None = None) -> None:
    """Write the entries of a cut model back where `extract` took them from, in place; all others stay as they are."""
    for name, tensor in part.items():
        mesh = [positions(layout, d, submodel.held) for d in layout.tensors[name]]
        present = there(layout, submodel, name)
        if rows is not None and layout.kind(name) == "touched":
            mesh[0] = rows
            present = None if present is None else present[rows.cpu()]
        index = torch.meshgrid(*(m.to(tensor.device) for m in mesh), indexing="ij")
        into[name][index] = tensor if present is None else torch.where(present.to(tensor.device), tensor, into[name][index])
