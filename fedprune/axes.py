"""Declared layouts: every tensor names its axes once; cutting, merging, FLOPs, bytes and shapes follow from that table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from fedprune.errors import LayoutError, unknown
from fedprune.types import Rate

Widths: TypeAlias = Mapping[str, int]
"""How many units of every prunable axis are there."""
Dimension: TypeAlias = tuple[str, ...] | int
"""Axes laid end to end (usually one), or a number of entries that nobody prunes."""
BYTES_PER_ENTRY = 4
"""float32."""


@dataclass(frozen=True)
class Axis:
    """One thing a model has many of: items, users, latent dimensions, hidden units.

    Attributes:
        size: how many units the full model has.
        floor: a submodel keeps at least this many.
        touched: units are data (items): a client trains just the rows it has interactions or negatives of.
        private: units are users: rows that never leave their client.
    """

    size: int
    floor: int = 1
    touched: bool = False
    private: bool = False

    @property
    def prunable(self) -> bool:
        """Whether a submodel may hold fewer units of it."""
        return not (self.touched or self.private)


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one training example (a multiply-add counts 2)."""

    forward: float
    backward_inputs: float
    backward_weights: float

    @property
    def total(self) -> float:
        """All three together."""
        return self.forward + self.backward_inputs + self.backward_weights


@dataclass(frozen=True, eq=False)
class Layout:
    """Which axis each dimension of each tensor belongs to: the one table that pruning needs.

    A word is a dimension; `a+b` lays axes end to end (a concatenation); a number is a dimension nobody prunes. Tensors
    that name the same axis are cut together.

    >>> layout = Layout.of({"item": Axis(1682, touched=True), "latent": Axis(32)}, item_embedding="item latent")
    >>> layout.shape("item_embedding", layout.widths(0.25))
    (1682, 8)
    """

    axes: Mapping[str, Axis]
    tensors: Mapping[str, tuple[Dimension, ...]]

    @classmethod
    def of(cls, axes: Mapping[str, Axis], **words: str) -> Layout:
        """Parse one string per tensor.

        Raises:
            LayoutError: an unknown axis, a touched or private axis elsewhere than first, an axis no tensor uses.
        """
        tensors = {name: tuple(_dimension(name, word, axes) for word in text.split()) for name, text in words.items()}
        for name, dimensions in tensors.items():
            if not dimensions:
                raise LayoutError(f'tensor "{name}" names no axis')
            for position, dimension in enumerate(dimensions):
                rows = [a for a in _named(dimension) if not axes[a].prunable]
                if rows and (position > 0 or len(_named(dimension)) > 1):
                    raise LayoutError(f'tensor "{name}": axis "{rows[0]}" indexes rows and must stand first and alone')
        used = {axis for dimensions in tensors.values() for d in dimensions for axis in _named(d)}
        if unused := sorted(set(axes) - used):
            raise LayoutError(f'no tensor uses axis "{unused[0]}"')
        for name, axis in axes.items():
            if not 1 <= axis.floor <= axis.size:
                raise LayoutError(f'axis "{name}" has {axis.size} units and floor {axis.floor}; 1 <= floor <= size')
        return cls(dict(axes), tensors)

    # ---- what kind of thing a tensor is ------------------------------------------------------------------------------

    def kind(self, name: str) -> Literal["touched", "private", "shared"]:
        """How a tensor travels: by touched rows, never, or whole."""
        first = self.tensors[name][0]
        axis = self.axes[first[0]] if isinstance(first, tuple) else Axis(1)
        return "touched" if axis.touched else "private" if axis.private else "shared"

    def named(self, *kinds: str) -> list[str]:
        """Tensors of these kinds, in declared order."""
        return [name for name in self.tensors if self.kind(name) in kinds]

    @cached_property
    def prunable(self) -> dict[str, Axis]:
        """Axes that a submodel may hold fewer units of."""
        return {name: axis for name, axis in self.axes.items() if axis.prunable}

    @cached_property
    def items(self) -> int:
        """Rows of the touched tensors: the size of the catalogue; 0 without any."""
        return next((axis.size for axis in self.axes.values() if axis.touched), 0)

    # ---- widths and shapes -------------------------------------------------------------------------------------------

    @cached_property
    def full(self) -> Widths:
        """All units of every prunable axis."""
        return {name: axis.size for name, axis in self.prunable.items()}

    @cached_property
    def smallest_rate(self) -> Rate:
        """The rate at which the first axis meets its floor."""
        return max((axis.floor / axis.size for axis in self.prunable.values()), default=1.0)

    def widths(self, rate: Rate) -> Widths:
        """Units of every prunable axis at a rate: the nearest whole number.

        Raises:
            LayoutError: the rate is above 1 or takes an axis below its floor.
        """
        if not 0 < rate <= 1:
            raise LayoutError(f"rate {rate:g} is not in (0, 1]; 1 is the full model")
        widths = {name: round(rate * axis.size) for name, axis in self.prunable.items()}
        for name, width in widths.items():
            axis = self.axes[name]
            if width < axis.floor:
                raise LayoutError(
                    f'rate {rate:g} keeps {width} of {axis.size} units of "{name}", below its floor {axis.floor}; '
                    f"the smallest rate for this model is {self.smallest_rate:g}."
                )
        return widths

    def extent(self, dimension: Dimension, widths: Widths) -> int:
        """Entries along one dimension."""
        if isinstance(dimension, int):
            return dimension
        return sum(widths.get(axis, self.axes[axis].size) for axis in dimension)

    def shape(self, name: str, widths: Widths | None = None) -> tuple[int, ...]:
        """Shape of a tensor at these widths (the full model's if none are given); row axes in full."""
        return tuple(self.extent(d, self.full if widths is None else widths) for d in self.tensors[name])

    def row_entries(self, name: str, widths: Widths) -> int:
        """Entries of one row of a touched or private tensor."""
        entries = 1
        for dimension in self.tensors[name][1:]:
            entries *= self.extent(dimension, widths)
        return entries

    # ---- what follows: parameters, bytes, FLOPs ----------------------------------------------------------------------

    def parameters(self, widths: Widths, rows: int) -> int:
        """Entries that travel at these widths with this many touched rows (private rows never do)."""
        shared = sum(_product(self.shape(name, widths)) for name in self.named("shared"))
        return shared + rows * sum(self.row_entries(name, widths) for name in self.named("touched"))

    def bytes(self, widths: Widths, rows: int) -> int:
        """Bytes of these parameters as float32, without framing."""
        return BYTES_PER_ENTRY * self.parameters(widths, rows)

    def work(self, held: Widths, trained: Widths) -> Work:
        """FLOPs of one training example when `held` units are used forward and `trained` ones are updated.

        A weight matrix costs one multiply-add per entry, a bias or any other vector one addition; an example reads one row
        of every touched tensor and combines it once with its user's. Backward costs the same again for the gradient of the
        inputs (which reaches the private vector through all held units), and once more for that of the trained entries.
        """
        forward, weights = self._forward(held), self._forward(trained)
        return Work(forward, forward, weights)

    def _forward(self, widths: Widths) -> float:
        flops = 0.0
        for name, dimensions in self.tensors.items():
            each = 1.0 if len(dimensions) == 1 else 2.0
            match self.kind(name):
                case "touched":
                    flops += each * self.row_entries(name, widths)
                case "shared":
                    flops += each * _product(self.shape(name, widths))
        return flops

    def __str__(self) -> str:
        lines = [f"  {name:20} {self.kind(name):8} {self.shape(name)}" for name in self.tensors]
        return "\n".join(["Layout", *lines])


def _dimension(tensor: str, word: str, axes: Mapping[str, Axis]) -> Dimension:
    if word.isdigit():
        return int(word)
    names = tuple(word.split("+"))
    for name in names:
        if name not in axes:
            raise LayoutError(f'tensor "{tensor}": {unknown("axis", name, axes)}')
    return names


def _named(dimension: Dimension) -> tuple[str, ...]:
    return dimension if isinstance(dimension, tuple) else ()


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for extent in shape:
        result *= extent
    return result
