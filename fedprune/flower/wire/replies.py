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
    """

    tickets: tuple[int, ...]
    updates: Updates
    examples: tuple[int, ...]
    losses: tuple[float, ...]
    work: tuple[float, ...]
    private: Tensor | None = None


def write_reply(
    parcel: Parcel, stacks: Sequence[Stacked], layout: Layout, metrics: Mapping[str, Any] | None = None
) -> RecordDict:
    """The message content that answers a parcel.

    A stack of one client is written as its order's `rows` says; larger stacks, which exist in simulations only, always by
    touched rows.
    """
    update, rows, present, private = [], [], [], []
    for stack in stacks:
        updates = stack.updates
        if dense(stack, parcel.orders[0]):
            updates = _as_table(updates, layout)
        else:
            rows.append(updates.rows.to(torch.int32).flatten())
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
            "stack-rows": [
                next(iter(_touched_sizes(layout))) if dense(stack, parcel.orders[0]) else stack.updates.rows.shape[1]
                for stack in stacks
            ],
        }
    )
    figures: dict[str, Any] = {
        "num-examples": sum(sum(stack.examples) for stack in stacks),
        "examples": [int(count) for stack in stacks for count in stack.examples],
        "losses": [float(loss) for stack in stacks for loss in stack.losses],
        "work": [float(share) for stack in stacks for share in stack.work],
    }
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
    items = next(iter(_touched_sizes(layout)))
    need(min(widths) > 0 and max(widths) <= items, "stack-rows", f"must be in 1..{items}; got {widths[:5]}")
    lists = {"examples": list_of(figures, "examples", int), "losses": list_of(figures, "losses", float)}
    lists["work"] = list_of(figures, "work", float)
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
    updates = _read_stacks(arrays, layout, members, widths, items)
    owned = _read_private(arrays, groups, private)
    result, at = [], 0
    for group, update, own in zip(groups, updates, owned, strict=True):
        part = slice(at, at + len(group))
        examples, losses, work = (tuple(lists[name][part]) for name in ("examples", "losses", "work"))
        result.append(Stacked(tuple(group), update, examples, losses, work, own))
        at += len(group)
    return result


def dense(stack: Stacked, order: Order) -> bool:
    """Whether all item rows of a stack travel, so that its size tells nothing about the client."""
    return order.rows == "table" and len(stack.tickets) == 1


def _read_stacks(
    arrays: ArrayRecord, layout: Layout, members: Sequence[Sequence[Order]], widths: Sequence[int], items: int
) -> list[Updates]:
    full = [len(group) == 1 and group[0].rows == "table" for group in members]
    for group, rows, whole in zip(members, widths, full, strict=True):
        need(len({order.submodel.held_key for order in group}) == 1, "stack-clients", "stacks clients of unequal submodels")
        need(not whole or rows == items, "stack-rows", f"is {rows}; all {items} rows were asked for")
    listed = [0 if whole else len(g) * rows for g, rows, whole in zip(members, widths, full, strict=True)]
    row_part = iter(pieces(arrays, "rows", np.int32, listed)) if any(listed) else iter([np.zeros(0, np.int32)] * len(listed))
    bits = [-(-len(group) * rows // 8) for group, rows in zip(members, widths, strict=True)]
    present_part = iter(pieces(arrays, "present", np.uint8, bits))
    sizes = [sum(_entries(layout, o.submodel, rows) for o in group) for group, rows in zip(members, widths, strict=True)]
    update_part = iter(pieces(arrays, "update", np.float32, sizes))
    result = []
    for group, width, whole in zip(members, widths, full, strict=True):
        shape = (len(group), width)
        listed_rows, packed, flat = next(row_part), next(present_part), torch.from_numpy(next(update_part))
        need(bool(torch.isfinite(flat).all()), "update", "holds a NaN or an infinite value")
        present = torch.from_numpy(np.unpackbits(packed)[: len(group) * width].astype(bool)).reshape(shape)
        need(bool(present.any(1).all()), "present", "says that a client trained no row")
        if whole:
            rows = torch.arange(items).expand(shape)
        else:
            rows = torch.from_numpy(listed_rows.astype(np.int64)).reshape(shape)
            need(bool(((rows >= 0) & (rows < items)).all()), "rows", f"must be in 0..{items - 1}")
            distinct = [int(present[k].sum()) == len(torch.unique(rows[k][present[k]])) for k in range(len(group))]
            need(all(distinct), "rows", "names a row twice")
        tensors = _unpack(flat, layout, [order.submodel for order in group], width)
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
    items = next(iter(_touched_sizes(layout)))
    tensors = dict(updates.tensors)
    for name in layout.named("touched"):
        whole = torch.zeros(items, *tensors[name].shape[2:])
        whole[rows[present]] = tensors[name][0][present]
        tensors[name] = whole[None]
    flags = torch.zeros(items, dtype=torch.bool)
    flags[rows[present]] = True
    return replace(updates, rows=torch.arange(items)[None], present=flags[None], tensors=tensors)


def _pack(updates: Updates, layout: Layout) -> Tensor:
    """The trained entries of every client of a stack, client after client; float32 `[entries]`."""
    same = len({submodel.key for submodel in updates.submodels}) == 1
    groups = [range(len(updates.submodels))] if same else [[k] for k in range(len(updates.submodels))]
    parts = []
    for places in groups:
        submodel, columns = updates.submodels[places[0]], []
        for name in layout.named("shared", "touched"):
            part = updates.tensors[name][list(places)]
            for axis, inside in _trained(layout, name, submodel):
                part = part.index_select(axis, inside)
            columns.append(part.flatten(1))
        parts.append(torch.cat(columns, 1).flatten())
    return torch.cat(parts)


def _unpack(flat: Tensor, layout: Layout, submodels: Sequence[Submodel], rows: int) -> Tensors:
    """The inverse of `_pack`: tensors at held width, zero where not trained."""
    held = submodels[0].widths
    shapes = {
        name: ((rows,) if layout.kind(name) == "touched" else ())
        + tuple(layout.extent(d, held) for d in layout.tensors[name][1 if layout.kind(name) == "touched" else 0 :])
        for name in layout.named("shared", "touched")
    }
    result = {name: torch.zeros(len(submodels), *shape) for name, shape in shapes.items()}
    same = len({submodel.key for submodel in submodels}) == 1
    groups = [list(range(len(submodels)))] if same else [[k] for k in range(len(submodels))]
    at = 0
    for places in groups:
        submodel = submodels[places[0]]
        entries = _entries(layout, submodel, rows)
        part = flat[at : at + entries * len(places)].reshape(len(places), entries)
        at += entries * len(places)
        column = 0
        for name, shape in shapes.items():
            inside = dict(_trained(layout, name, submodel))
            mesh = [inside.get(axis, torch.arange(n)) for axis, n in enumerate(shape, start=1)]
            size = math.prod(len(m) for m in mesh)
            values = part[:, column : column + size].reshape(len(places), *(len(m) for m in mesh))
            column += size
            if values.shape[1:] == tuple(shape):
                result[name][places] = values
            else:
                result[name][torch.meshgrid(torch.tensor(places), *mesh, indexing="ij")] = values
    return result


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


def _entries(layout: Layout, submodel: Submodel, rows: int) -> int:
    """Trained entries of one client."""
    return layout.parameters(submodel.trained_widths, rows)


def _touched_sizes(layout: Layout) -> list[int]:
    return [axis.size for axis in layout.axes.values() if axis.touched]
