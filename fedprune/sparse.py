"""Sparse training: a penalty that makes units, or single entries, small enough to be pruned without harm.

Clients follow its gradient by plain steps, so what it makes small stays within about lr * sparse of zero and does not become
zero by itself: that is left to pruning, which orders units or entries by their size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fedprune.axes import Layout, Widths
from fedprune.errors import LayoutError
from fedprune.recommenders.base import LOGITS
from fedprune.submodel import like
from fedprune.types import Tensors


def slope(layout: Layout, widths: Widths, model: Tensors, present: Tensor, by: Literal["units", "entries"]) -> Tensors:
    """Gradient of each client's penalty on what it received; zero where that has a corner (at zero).

    "entries": sum |w|. "units": sum over the units of all prunable axes of ||everything the unit owns||_2, the group lasso
    (Wen et al. 2016, arXiv:1608.03665). A unit owns what `pruning.Importance` judges it by: its slice of every
    tensor that names its axis, the client's own item rows among them. Tensors that learn masks are left out.

    Args:
        widths: held units per axis (`held_widths`).
        model: touched tensors `[clients, rows, ...]`, shared ones `[clients, ...]`.
        present: which touched rows are no padding, bool `[clients, rows]`.
    """
    real: Tensors = {}
    for name, tensor in model.items():
        if not name.endswith(LOGITS):
            real[name] = torch.where(like(present, tensor), tensor, 0.0) if layout.kind(name) == "touched" else tensor
    if by == "entries":
        return {name: tensor.sign() for name, tensor in real.items()}
    return _of_units(layout, widths, real)


def _of_units(layout: Layout, widths: Widths, model: Tensors) -> Tensors:
    """w times the sum of 1 / norm over the units that own it; one or two, as an entry lies on so many prunable axes."""
    first = next(iter(model.values()))
    clients = len(first)
    squares = {axis: first.new_zeros(clients, widths[axis]) for axis in layout.prunable}
    for name, tensor in model.items():
        for place, axes in _owners(layout, name):
            others = [d for d in range(1, tensor.dim()) if d != place]
            along = tensor.square().sum(others) if others else tensor.square()
            for axis, part in zip(axes, along.split([widths[axis] for axis in axes], 1), strict=True):
                squares[axis] = squares[axis] + part
    inverse = {axis: torch.where(total > 0, total.rsqrt(), 0.0) for axis, total in squares.items()}
    result: Tensors = {}
    for name, tensor in model.items():
        factor = first.new_zeros(())
        for place, axes in _owners(layout, name):
            along = torch.cat([inverse[axis] for axis in axes], 1)
            factor = factor + along.reshape(clients, *[1] * (place - 1), -1, *[1] * (tensor.dim() - 1 - place))
        result[name] = tensor * factor
    return result


def _owners(layout: Layout, name: str) -> list[tuple[int, tuple[str, ...]]]:
    """Dimensions of a stacked tensor that lie along prunable axes, and these axes."""
    return [
        (place, dimension)
        for place, dimension in enumerate(layout.tensors[name], start=1)
        if isinstance(dimension, tuple) and dimension[0] in layout.prunable
    ]


def held_widths(layout: Layout, tensors: Mapping[str, Tensor]) -> Widths:
    """How many units of every prunable axis stacked tensors have.

    Raises:
        LayoutError: an axis that stands only in concatenations with others that do as well.
    """
    found: dict[str, int] = {}
    while len(found) < len(layout.prunable):
        before = len(found)
        for name in tensors:
            for place, axes in _owners(layout, name):
                unknown = [axis for axis in axes if axis not in found]
                if len(set(unknown)) == 1:
                    rest = tensors[name].shape[place] - sum(found.get(axis, 0) for axis in axes)
                    found[unknown[0]] = rest // len(unknown)
        if len(found) == before:
            missing = sorted(set(layout.prunable) - set(found))
            raise LayoutError(f'no tensor tells how many units of axis "{missing[0]}" are held')
    return found
