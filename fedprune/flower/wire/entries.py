"""Masks of entries as bits, and tensors without the entries that are not there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord
from torch import Tensor

from fedprune.axes import Layout
from fedprune.errors import FleetError, LayoutError
from fedprune.flower.wire.fields import list_of, need, pieces
from fedprune.submodel import Submodel, positions, there


def masked(layout: Layout, submodel: Submodel) -> list[str]:
    """Tensors of which a submodel lacks entries, in the layout's order."""
    return [name for name in layout.named("shared", "touched") if name in submodel.entries]


def bits(layout: Layout, submodel: Submodel) -> np.ndarray:
    """One bit per held entry of every masked tensor, tensor after tensor, padded once to whole bytes; uint8."""
    masks = [there(layout, submodel, name) for name in masked(layout, submodel)]
    return (
        np.packbits(torch.cat([mask.flatten() for mask in masks if mask is not None]).numpy())
        if masks
        else np.zeros(0, np.uint8)
    )


def read_masks(config: ConfigRecord, arrays: ArrayRecord, layout: Layout, submodels: Sequence[Submodel]) -> list[Submodel]:
    """The submodels with their masks of entries, in the full model's shape; False outside the held units.

    Raises:
        FleetError: which field is wrong, and how.
    """
    if "masked" not in config:
        need("entries" not in arrays, "entries", "came without saying what it masks")
        return list(submodels)
    words, through = list_of(config, "masked", str), list_of(config, "through", bool)
    for name, values in (("masked", words), ("through", through)):
        need(len(values) == len(submodels), name, f"has {len(values)} entries for {len(submodels)} submodels")
    travels, shapes = layout.named("shared", "touched"), []
    for text, submodel in zip(words, submodels, strict=True):
        names = text.split()
        for name in names:
            need(name in travels, "masked", f'names "{name[:80]}", which is no tensor that travels')
        need(names == [name for name in travels if name in names], "masked", "is not in the layout's order, or names one twice")
        shapes.append({name: layout.shape(name, submodel.widths) for name in names})
    counts = [sum(map(math.prod, shape.values())) for shape in shapes]
    packed = pieces(arrays, "entries", np.uint8, [-(-count // 8) for count in counts])
    result = []
    for submodel, shape, count, own, reported in zip(submodels, shapes, counts, packed, through, strict=True):
        flags = np.unpackbits(own).astype(bool)
        need(not flags[count:].any(), "entries", f"goes on after the {count} entries that it masks")
        parts = np.split(flags[:count], np.cumsum([math.prod(extents) for extents in shape.values()])[:-1])
        masks = {}
        for (name, extents), part in zip(shape.items(), parts, strict=False):
            masks[name] = np.zeros(layout.shape(name), bool)
            places = [positions(layout, dimension, submodel.held).numpy() for dimension in layout.tensors[name]]
            masks[name][np.ix_(*places)] = part.reshape(extents)
        try:
            checked = Submodel.checked(layout, submodel.held, submodel.trained, masks)
        except LayoutError as error:
            raise FleetError(f'field "entries": {error}') from None
        result.append(replace(checked, through=reported))
    return result


def chosen(
    layout: Layout, submodel: Submodel, name: str, part: Literal["held", "trained"], rows: Tensor | None = None
) -> Tensor | None:
    """Mask of a tensor's entries at held (or trained) widths; of these rows alone if it is a touched one. None: all are there.

    Args:
        rows: item numbers, int64.
    """
    mask = there(layout, submodel, name, part)
    return mask if mask is None or rows is None or layout.kind(name) != "touched" else mask[rows]


def without_gaps(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The entries that are there, end to end."""
    return tensor.flatten() if mask is None else tensor[mask]


def with_gaps(entries: Tensor, shape: Sequence[int], mask: Tensor | None) -> Tensor:
    """The inverse of `without_gaps`, zero where no entry is; memory of its own."""
    # Cloned: kernels round differently on memory that is not aligned, as a piece of a flat buffer may be.
    if mask is None:
        return entries.reshape(tuple(shape)).clone()
    result = torch.zeros(tuple(shape), dtype=entries.dtype)
    result[mask] = entries
    return result
