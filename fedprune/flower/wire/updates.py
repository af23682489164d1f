"""Updates of a stack to flat numbers and back: the trained entries of every client, client after client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedprune.axes import Layout
from fedprune.exchange import Updates
from fedprune.flower.wire.entries import chosen
from fedprune.flower.wire.packing import Block, Precision, read_all, summed, together
from fedprune.submodel import Submodel, positions
from fedprune.types import Tensors

Inside = list[tuple[int, Tensor]]
"""Per axis of a stacked tensor that does not travel whole, the places that do."""


@dataclass(frozen=True)
class Part:
    """Clients of a stack that are written in one go.

    Attributes:
        places: which.
        blocks: what travels of each of their tensors.
        inside: where in the stacked tensor that is.
    """

    places: list[int]
    blocks: Mapping[str, Block]
    inside: Mapping[str, Inside]


def plan(
    layout: Layout, submodels: Sequence[Submodel], rows: Tensor, precision: Precision, drawn: Tensor | None = None
) -> list[Part]:
    """How a stack is written: in one go if all train the same, lack no entries, and send all their rows; else one by one.

    Args:
        rows: item numbers, `[clients, rows]`.
        drawn: which of them go up, `[clients, rows]`; None: all of them, padding too.
    """
    everybody = list(range(len(submodels)))
    alike = drawn is None and len({submodel.key for submodel in submodels}) == 1 and not submodels[0].entries
    parts = []
    for places in [everybody] if alike else [[place] for place in everybody]:
        submodel, own = submodels[places[0]], rows[places[0]]
        sent = None if drawn is None else drawn[places[0]].nonzero()[:, 0]
        numbers = own if sent is None else own[sent]
        blocks, inside = {}, {}
        for name in layout.named("shared", "touched"):
            shape = layout.shape(name, submodel.trained_widths)
            touched = layout.kind(name) == "touched"
            extents = (len(numbers), *shape[1:]) if touched else shape
            blocks[name] = Block(extents, chosen(layout, submodel, name, "trained", numbers), precision)
            inside[name] = _trained(layout, name, submodel)
            if touched and sent is not None:
                inside[name] = [(1, sent), *inside[name]]
        parts.append(Part(places, blocks, inside))
    return parts


def pack(updates: Updates, layout: Layout, precision: Precision, drawn: Tensor | None = None) -> Tensors:
    """The trained entries of every client of a stack, as far as they are there; per kind of number `[entries]`."""
    packed: dict[str, list[Tensor]] = {}
    for part in plan(layout, updates.submodels, updates.rows, precision, drawn):
        written = []
        for name, block in part.blocks.items():
            values, scales = updates.tensors[name][part.places], updates.scales.get(name)
            scales = None if scales is None else scales[part.places]
            for axis, inside in part.inside[name]:
                values = values.index_select(axis, inside)
                scales = scales.index_select(1, inside) if scales is not None and axis == 1 else scales
            written.append(block.write(values, scales))
        for kind, entries in together(written).items():
            packed.setdefault(kind, []).append(entries)
    return {kind: torch.cat(entries) for kind, entries in packed.items()}


def sizes_of(parts: Sequence[Part]) -> dict[str, int]:
    """Entries of a stack, per kind."""
    total: dict[str, int] = {}
    for part in parts:
        for kind, size in summed(part.blocks.values(), len(part.places)).items():
            total[kind] = total.get(kind, 0) + size
    return total


def unpack(packed: Tensors, layout: Layout, submodels: Sequence[Submodel], rows: int, parts: Sequence[Part]) -> Tensors:
    """The inverse of `pack`: tensors at held width, zero where not trained or not drawn."""
    held, result = submodels[0].widths, {}
    for name in layout.named("shared", "touched"):
        shape = layout.shape(name, held)
        result[name] = torch.zeros(len(submodels), *((rows, *shape[1:]) if layout.kind(name) == "touched" else shape))
    at = dict.fromkeys(packed, 0)
    for part in parts:
        own: Tensors = {}
        for kind, size in summed(part.blocks.values(), len(part.places)).items():
            own[kind] = packed[kind][at[kind] : at[kind] + size]
            at[kind] += size
        for name, values in read_all(part.blocks, own, len(part.places)).items():
            into, inside = result[name], dict(part.inside[name])
            if inside:
                mesh = [inside.get(axis, torch.arange(n)) for axis, n in enumerate(into.shape[1:], start=1)]
                into[torch.meshgrid(torch.tensor(part.places), *mesh, indexing="ij")] = values
            else:
                into[part.places] = values
    return result


def _trained(layout: Layout, name: str, submodel: Submodel) -> Inside:
    """Per prunable axis, the places of the trained units among the held ones."""
    result = []
    for axis, dimension in enumerate(layout.tensors[name]):
        if axis == 0 and layout.kind(name) == "touched":
            continue
        held = positions(layout, dimension, submodel.held)
        inside = torch.isin(held, positions(layout, dimension, submodel.trained)).nonzero()[:, 0]
        if len(inside) < len(held):
            result.append((axis + 1, inside))
    return result
