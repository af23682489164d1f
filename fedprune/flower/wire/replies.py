"""Replies to a message and back: packed by trained entries, unpacked to what the merge takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedprune.axes import Layout
from fedprune.errors import FleetError
from fedprune.exchange import Order, Updates
from fedprune.fleet.trainer import Result
from fedprune.flower.wire.entries import chosen, with_gaps, without_gaps
from fedprune.flower.wire.fields import FORMAT, arrays_of, list_of, need, part_of, pieces, speaks, value_of
from fedprune.flower.wire.orders import Parcel
from fedprune.submodel import Submodel, positions
from fedprune.types import Tensors


@dataclass(frozen=True)
class Stacked:
    """A stack of updates with what belongs to each of its clients.

    Attributes:
        tickets: of the orders, one per client of the stack.
        examples, losses, work: one each.
        private: float32 `[entries]`, in simulations.
        gates: one each (`Result.gate`), where the objective asks for them; NaN: unknown.
    """

    tickets: tuple[int, ...]
    updates: Updates
    examples: tuple[int, ...]
    losses: tuple[float, ...]
    work: tuple[float, ...]
    private: Tensor | None = None
    gates: tuple[float, ...] | None = None


def gates(results: Sequence[Result]) -> tuple[float, ...] | None:
    """Of a stack's results, NaN where unknown; None where nobody asked for them."""
    known = [result.gate for result in results]
    return None if all(gate is None for gate in known) else tuple(math.nan if gate is None else gate for gate in known)


def write_reply(
    parcel: Parcel, stacks: Sequence[Stacked], layout: Layout, metrics: Mapping[str, Any] | None = None
) -> RecordDict:
    """The message content that answers a parcel.

    A stack of one client is written as its order's `rows` says; larger stacks, which exist in simulations only, always by
    touched rows.
    """
    update, rows, present, private, widths = [], [], [], [], []
    for stack in stacks:
        if dense(len(stack.tickets), parcel.orders[0]):
            updates = _as_table(stack.updates, layout)
        else:
            updates = _close_up(stack.updates, layout)
            rows.append(updates.rows.to(torch.int32).flatten())
        widths.append(updates.rows.shape[1])
        present.append(torch.from_numpy(np.packbits(updates.present.numpy().flatten())))
        update.append(_pack(updates, layout))
        if stack.private is not None:
            private.append(stack.private)
    arrays = {"update": torch.cat(update), "present": torch.cat(present)}
    if rows:
        arrays["rows"] = torch.cat(rows)
    if private:
        arrays["private"] = torch.cat(private)
    config = ConfigRecord(
        {
            "format": FORMAT,
            "server-round": max(order.version for order in parcel.orders),
            "run": parcel.run,
            "tickets": [ticket for stack in stacks for ticket in stack.tickets],
            "stack-clients": [len(stack.tickets) for stack in stacks],
            "stack-rows": widths,
        }
    )
    figures: dict[str, Any] = {
        "num-examples": sum(sum(stack.examples) for stack in stacks),
        "examples": [int(count) for stack in stacks for count in stack.examples],
        "losses": [float(loss) for stack in stacks for loss in stack.losses],
        "work": [float(share) for stack in stacks for share in stack.work],
    }
    if parcel.orders[0].objective.gate:
        figures["gates"] = [float(gate) for stack in stacks for gate in stack.gates or [math.nan] * len(stack.tickets)]
    return RecordDict({"arrays": arrays_of(arrays), "metrics": MetricRecord(figures | dict(metrics or {})), "config": config})


def read_reply(
    content: RecordDict, orders: Sequence[Order], layout: Layout, run: str, private: Mapping[int, int] | None = None
) -> list[Stacked]:
    """Updates that answer these orders, and nothing else.

    Args:
        private: per ticket, how many private entries must come along (simulations).

    Raises:
        FleetError: which field is wrong, and how; the whole reply is then refused.
    """
    by_ticket = {order.ticket: order for order in orders}
    config, arrays = part_of(content, "config", ConfigRecord), part_of(content, "arrays", ArrayRecord)
    figures = part_of(content, "metrics", MetricRecord)
    speaks(config)
    for extra in set(arrays) - {"update", "rows", "present", "private"}:
        raise FleetError(f'field "{extra}" is none that a reply has')
    need(value_of(config, "run", str) == run, "run", "is of another run")
    version = max(order.version for order in orders)
    need(value_of(config, "server-round", int) == version, "server-round", f"is not {version}, the version that was sent")
    tickets = list_of(config, "tickets", int)
    need(sorted(tickets) == sorted(by_ticket), "tickets", f"answers {sorted(tickets)[:5]}; asked was {sorted(by_ticket)[:5]}")
    clients, widths = list_of(config, "stack-clients", int), list_of(config, "stack-rows", int)
    need(len(clients) == len(widths), "stack-rows", f"has {len(widths)} entries for {len(clients)} stacks")
    need(min(clients) > 0 and sum(clients) == len(tickets), "stack-clients", f"sums to {sum(clients)} of {len(tickets)}")
    items = layout.items
    need(min(widths) > 0 and max(widths) <= items, "stack-rows", f"must be in 1..{items}; got {widths[:5]}")
    lists = {"examples": list_of(figures, "examples", int), "losses": list_of(figures, "losses", float)}
    lists["work"] = list_of(figures, "work", float)
    judged = orders[0].objective.gate
    need(judged or "gates" not in figures, "gates", "was not asked for")
    if judged:
        lists["gates"] = list_of(figures, "gates", float)
        need(all(math.isnan(v) or 0 <= v <= 1 for v in lists["gates"]), "gates", "must be in [0, 1], or NaN where unknown")
    for name, values in lists.items():
        need(len(values) == len(tickets), name, f"has {len(values)} entries for {len(tickets)} orders")
    need(min(lists["examples"]) > 0, "examples", "must be above 0")
    need(max(lists["examples"]) < 1 << 31, "examples", "is not credible")
    need(all(math.isfinite(v) and v >= 0 for v in lists["losses"]), "losses", "must be finite and not negative")
    need(all(0 < v <= 1 for v in lists["work"]), "work", "must be in (0, 1]")
    need(value_of(figures, "num-examples", int) == sum(lists["examples"]), "num-examples", "is not the sum of examples")

    groups, at = [], 0
    for count in clients:
        groups.append(tickets[at : at + count])
        at += count
    members = [[by_ticket[ticket] for ticket in group] for group in groups]
    updates = _read_stacks(arrays, layout, members, widths)
    owned = _read_private(arrays, groups, private)
    result, at = [], 0
    for group, update, own in zip(groups, updates, owned, strict=True):
        part = slice(at, at + len(group))
        examples, losses, work = (tuple(lists[name][part]) for name in ("examples", "losses", "work"))
        told = tuple(lists["gates"][part]) if judged else None
        result.append(Stacked(tuple(group), update, examples, losses, work, own, told))
        at += len(group)
    return result


def dense(clients: int, order: Order) -> bool:
    """Whether all item rows of a stack of so many clients travel, so that its size tells nothing about the client."""
    return order.rows == "table" and clients == 1


def _read_stacks(
    arrays: ArrayRecord, layout: Layout, members: Sequence[Sequence[Order]], widths: Sequence[int]
) -> list[Updates]:
    items, full = layout.items, [dense(len(group), group[0]) for group in members]
    for group, rows, whole in zip(members, widths, full, strict=True):
        alike = {(order.submodel.units_key, order.submodel.through) for order in group}
        need(len(alike) == 1, "stack-clients", "stacks clients of unequal submodels")
        need(not whole or rows == items, "stack-rows", f"is {rows}; all {items} rows were asked for")
    listed = [0 if whole else len(g) * rows for g, rows, whole in zip(members, widths, full, strict=True)]
    named = pieces(arrays, "rows", np.int32, listed) if any(listed) else [np.zeros(0, np.int32)] * len(listed)
    rows_of = []
    for group, width, whole, values in zip(members, widths, full, named, strict=True):
        own = torch.arange(items) if whole else torch.from_numpy(values.astype(np.int64)).reshape(len(group), width)
        need(bool(((own >= 0) & (own < items)).all()), "rows", f"must be in 0..{items - 1}")
        rows_of.append(own.expand(len(group), width))
    bits = [-(-len(group) * rows // 8) for group, rows in zip(members, widths, strict=True)]
    present_part = iter(pieces(arrays, "present", np.uint8, bits))
    sizes = [
        sum(_entries(layout, order.submodel, own) for order, own in zip(group, rows, strict=True))
        for group, rows in zip(members, rows_of, strict=True)
    ]
    update_part = iter(pieces(arrays, "update", np.float32, sizes))
    result = []
    for group, rows in zip(members, rows_of, strict=True):
        shape, packed, flat = tuple(rows.shape), next(present_part), torch.from_numpy(next(update_part))
        need(bool(torch.isfinite(flat).all()), "update", "holds a NaN or an infinite value")
        present = torch.from_numpy(np.unpackbits(packed)[: rows.numel()].astype(bool)).reshape(shape)
        need(bool(present.any(1).all()), "present", "says that a client trained no row")
        distinct = [int(there.sum()) == len(torch.unique(own[there])) for own, there in zip(rows, present, strict=True)]
        need(all(distinct), "rows", "names a row twice")
        tensors = _unpack(flat, layout, [order.submodel for order in group], rows)
        for name in layout.named("touched"):
            away = ~present.reshape(*shape, *[1] * (tensors[name].dim() - 2))
            need(not bool((tensors[name] * away).any()), "update", "changes rows that it says were not trained")
        result.append(Updates(tuple(order.submodel for order in group), rows, present, tensors))
    return result


def _read_private(arrays: ArrayRecord, groups: Sequence[Sequence[int]], sizes: Mapping[int, int] | None) -> list[Tensor | None]:
    if sizes is None:
        need("private" not in arrays, "private", "must not leave the device")
        return [None] * len(groups)
    parts = pieces(arrays, "private", np.float32, [sum(sizes[ticket] for ticket in group) for group in groups])
    return [torch.from_numpy(part) for part in parts]


def _as_table(updates: Updates, layout: Layout) -> Updates:
    """One client's update with all item rows, zero where it trained none."""
    (present,), (rows,) = updates.present, updates.rows
    tensors = dict(updates.tensors)
    for name in layout.named("touched"):
        whole = torch.zeros(layout.items, *tensors[name].shape[2:])
        whole[rows[present]] = tensors[name][0][present]
        tensors[name] = whole[None]
    flags = torch.zeros(layout.items, dtype=torch.bool)
    flags[rows[present]] = True
    return replace(updates, rows=torch.arange(layout.items)[None], present=flags[None], tensors=tensors)


def _close_up(updates: Updates, layout: Layout) -> Updates:
    """The real rows of each client first, and no more padding than the one with most of them leaves to the others."""
    width = int(updates.present.sum(1).max())
    if width == updates.present.shape[1]:
        return updates
    order = updates.present.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    client = torch.arange(len(order))[:, None]
    tensors = {n: t[client, order] if layout.kind(n) == "touched" else t for n, t in updates.tensors.items()}
    return replace(updates, rows=updates.rows[client, order], present=updates.present[client, order], tensors=tensors)


def _pack(updates: Updates, layout: Layout) -> Tensor:
    """The trained entries of every client of a stack, client after client, as far as they are there; float32 `[entries]`."""
    parts = []
    for places in _alike(updates.submodels):
        submodel, rows, columns = updates.submodels[places[0]], updates.rows[places[0]], []
        for name in layout.named("shared", "touched"):
            part = updates.tensors[name][places]
            for axis, inside in _trained(layout, name, submodel):
                part = part.index_select(axis, inside)
            mask = chosen(layout, submodel, name, "trained", rows)
            columns.append(part.flatten(1) if mask is None else without_gaps(part[0], mask)[None])
        parts.append(torch.cat(columns, 1).flatten())
    return torch.cat(parts)


def _unpack(flat: Tensor, layout: Layout, submodels: Sequence[Submodel], rows: Tensor) -> Tensors:
    """The inverse of `_pack`: tensors at held width, zero where not trained."""
    held, width = submodels[0].widths, rows.shape[1]
    shapes = {
        name: ((width,) if layout.kind(name) == "touched" else ())
        + tuple(layout.extent(d, held) for d in layout.tensors[name][1 if layout.kind(name) == "touched" else 0 :])
        for name in layout.named("shared", "touched")
    }
    result = {name: torch.zeros(len(submodels), *shape) for name, shape in shapes.items()}
    at = 0
    for places in _alike(submodels):
        submodel, own = submodels[places[0]], rows[places[0]]
        entries = _entries(layout, submodel, own)
        part = flat[at : at + entries * len(places)].reshape(len(places), entries)
        at += entries * len(places)
        column = 0
        for name, shape in shapes.items():
            inside = dict(_trained(layout, name, submodel))
            mesh = [inside.get(axis, torch.arange(n)) for axis, n in enumerate(shape, start=1)]
            extents, mask = [len(m) for m in mesh], chosen(layout, submodel, name, "trained", own)
            size = math.prod(extents) if mask is None else int(mask.sum())
            values = part[:, column : column + size]
            values = values.reshape(len(places), *extents) if mask is None else with_gaps(values[0], extents, mask)[None]
            column += size
            if values.shape[1:] == tuple(shape):
                result[name][places] = values
            else:
                result[name][torch.meshgrid(torch.tensor(places), *mesh, indexing="ij")] = values
    return result


def _alike(submodels: Sequence[Submodel]) -> list[list[int]]:
    """Places of clients whose updates are packed in one go: all of them, if they train the same and lack no entries."""
    everybody = list(range(len(submodels)))
    alike = len({submodel.key for submodel in submodels}) == 1 and not submodels[0].entries
    return [everybody] if alike else [[place] for place in everybody]


def _trained(layout: Layout, name: str, submodel: Submodel) -> list[tuple[int, Tensor]]:
    """Per prunable axis of a stacked tensor, the places of the trained units among the held ones."""
    result = []
    for axis, dimension in enumerate(layout.tensors[name]):
        if axis == 0 and layout.kind(name) == "touched":
            continue
        held = positions(layout, dimension, submodel.held)
        inside = torch.isin(held, positions(layout, dimension, submodel.trained)).nonzero()[:, 0]
        if len(inside) < len(held):
            result.append((axis + 1, inside))
    return result


def _entries(layout: Layout, submodel: Submodel, rows: Tensor) -> int:
    """Trained entries of one client, in these rows of the touched tensors, that are there."""
    if not submodel.entries:
        return layout.parameters(submodel.trained_widths, len(rows))
    total = 0
    for name in layout.named("shared", "touched"):
        mask, widths = chosen(layout, submodel, name, "trained", rows), submodel.trained_widths
        if mask is not None:
            total += int(mask.sum())
        elif layout.kind(name) == "touched":
            total += len(rows) * layout.row_entries(name, widths)
        else:
            total += math.prod(layout.shape(name, widths))
    return total
