"""Replies to a message and back: packed by trained entries, unpacked to what the merge takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedprune.axes import Layout
from fedprune.codec import Codec
from fedprune.errors import FleetError
from fedprune.exchange import Order, Updates
from fedprune.fleet.trainer import Result
from fedprune.flower.wire.fields import FORMAT, arrays_of, list_of, need, part_of, pieces, speaks, value_of
from fedprune.flower.wire.orders import Parcel
from fedprune.flower.wire.packing import Precision, laid_out, picked_up
from fedprune.flower.wire.updates import pack, plan, sizes_of, unpack
from fedprune.submodel import like


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

    A stack of one client is written as its order's codec says; larger stacks, which exist in simulations only, always by
    touched rows.
    """
    update, rows, present, drawn, private, widths = [], [], [], [], [], []
    codecs = {order.ticket: order.codec for order in parcel.orders}
    for stack in stacks:
        codec = codecs[stack.tickets[0]]
        if dense(len(stack.tickets), codec):
            updates = _as_table(stack.updates, layout)
        else:
            updates = _close_up(stack.updates, layout)
            rows.append(updates.rows.to(torch.int32).flatten())
        widths.append(updates.rows.shape[1])
        present.append(_packed(updates.present))
        sent = None
        if codec.sampled < 1:
            sent = _sent(updates, layout)
            drawn.append(_packed(sent))
        update.append(pack(updates, layout, codec.precision, sent))
        if stack.private is not None:
            private.append(stack.private)
    arrays = laid_out("update", [codec.precision for codec in codecs.values()], update)
    for name, parts in (("present", present), ("rows", rows), ("drawn", drawn), ("private", private)):
        if parts:
            arrays[name] = torch.cat(parts)
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
    if any(order.objective.gate for order in parcel.orders):
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
    for extra in set(arrays) - {"update", "codes", "halves", "rows", "present", "drawn", "private"}:
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
    judged = {order.ticket for order in orders if order.objective.gate}
    need(bool(judged) or "gates" not in figures, "gates", "was not asked for")
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
        told = tuple(lists["gates"][part]) if judged.issuperset(group) else None
        result.append(Stacked(tuple(group), update, examples, losses, work, own, told))
        at += len(group)
    return result


def dense(clients: int, codec: Codec) -> bool:
    """Whether all item rows of a stack of so many clients travel, so that its size tells nothing about the client."""
    return codec.rows == "table" and clients == 1


def _read_stacks(
    arrays: ArrayRecord, layout: Layout, members: Sequence[Sequence[Order]], widths: Sequence[int]
) -> list[Updates]:
    items, full = layout.items, [dense(len(group), group[0].codec) for group in members]
    for group, rows, whole in zip(members, widths, full, strict=True):
        alike = {(order.submodel.units_key, order.submodel.through, order.codec) for order in group}
        need(len(alike) == 1, "stack-clients", "stacks clients of unequal submodels or codecs")
        need(not whole or rows == items, "stack-rows", f"is {rows}; all {items} rows were asked for")
    listed = [0 if whole else len(g) * rows for g, rows, whole in zip(members, widths, full, strict=True)]
    named = pieces(arrays, "rows", np.int32, listed) if any(listed) else [np.zeros(0, np.int32)] * len(listed)
    rows_of = []
    for group, width, whole, values in zip(members, widths, full, named, strict=True):
        own = torch.arange(items) if whole else torch.from_numpy(values.astype(np.int64)).reshape(len(group), width)
        need(bool(((own >= 0) & (own < items)).all()), "rows", f"must be in 0..{items - 1}")
        rows_of.append(own.expand(len(group), width))
    present_of = _flags(arrays, "present", [tuple(rows.shape) for rows in rows_of])
    some = [group[0].codec.sampled < 1 for group in members]
    need(any(some) or "drawn" not in arrays, "drawn", "was not asked for")
    shapes = [tuple(rows.shape) if sampled else (0, 0) for sampled, rows in zip(some, rows_of, strict=True)]
    drawn_of = _flags(arrays, "drawn", shapes) if any(some) else present_of
    plans = []
    for group, rows, present, drawn in zip(members, rows_of, present_of, drawn_of, strict=True):
        need(bool(present.any(1).all()), "present", "says that a client trained no row")
        distinct = [int(there.sum()) == len(torch.unique(own[there])) for own, there in zip(rows, present, strict=True)]
        need(all(distinct), "rows", "names a row twice")
        sent = drawn if group[0].codec.sampled < 1 else None
        need(sent is None or not bool((sent & ~present).any()), "drawn", "names rows that were not trained")
        plans.append(plan(layout, [order.submodel for order in group], rows, group[0].codec.precision, sent))
    precisions: list[Precision] = [order.codec.precision for group in members for order in group]
    parts = picked_up(arrays, "update", precisions, [sizes_of(own) for own in plans])
    result = []
    for group, rows, present, own, part in zip(members, rows_of, present_of, plans, parts, strict=True):
        submodels, precision = tuple(order.submodel for order in group), group[0].codec.precision
        tensors = unpack(part, layout, submodels, rows.shape[1], own)
        for name in layout.named("touched"):
            away = ~like(present, tensors[name])
            kind = "update" if precision == "float32" else "codes" if len(layout.tensors[name]) > 1 else "halves"
            need(not bool((tensors[name] * away).any()), kind, "changes rows that it says were not trained")
        result.append(Updates(submodels, rows, present, tensors))
    return result


def _packed(flags: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(flags.numpy().flatten()))


def _flags(arrays: ArrayRecord, name: str, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The inverse of `_packed`, for several that lie end to end."""
    parts = pieces(arrays, name, np.uint8, [-(-math.prod(shape) // 8) for shape in shapes])
    flags = [np.unpackbits(part)[: math.prod(shape)].astype(bool) for part, shape in zip(parts, shapes, strict=True)]
    return [torch.from_numpy(own).reshape(shape) for own, shape in zip(flags, shapes, strict=True)]


def _sent(updates: Updates, layout: Layout) -> Tensor:
    """Rows of which something is not zero, `[clients, rows]`: those that were drawn, as far as anybody can tell."""
    sent = torch.zeros_like(updates.present)
    for name in layout.named("touched"):
        changed = updates.tensors[name] != 0
        sent |= changed.flatten(2).any(2) if changed.dim() > 2 else changed
    return sent & updates.present


def _read_private(arrays: ArrayRecord, groups: Sequence[Sequence[int]], sizes: Mapping[int, int] | None) -> list[Tensor | None]:
    if sizes is None:
        need("private" not in arrays, "private", "must not leave the device")
        return [None] * len(groups)
    parts = pieces(arrays, "private", np.float32, [sum(sizes[ticket] for ticket in group) for group in groups])
    return [torch.from_numpy(part) for part in parts]


def _as_table(updates: Updates, layout: Layout) -> Updates:
    """One client's update with all item rows, zero where it trained none."""
    (present,), (rows,) = updates.present, updates.rows

    def spread(tensor: Tensor) -> Tensor:
        whole = torch.zeros(layout.items, *tensor.shape[2:], dtype=tensor.dtype)
        whole[rows[present]] = tensor[0][present]
        return whole[None]

    flags = torch.zeros(layout.items, dtype=torch.bool)
    flags[rows[present]] = True
    return _with_rows(updates, layout, torch.arange(layout.items)[None], flags[None], spread)


def _close_up(updates: Updates, layout: Layout) -> Updates:
    """The real rows of each client first, and no more padding than the one with most of them leaves to the others."""
    width = int(updates.present.sum(1).max())
    if width == updates.present.shape[1]:
        return updates
    order = updates.present.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
    client = torch.arange(len(order))[:, None]
    present = updates.present[client, order]
    return _with_rows(updates, layout, updates.rows[client, order], present, lambda tensor: tensor[client, order])


def _with_rows(updates: Updates, layout: Layout, rows: Tensor, present: Tensor, laid: Callable[[Tensor], Tensor]) -> Updates:
    """The same with other rows, and the touched tensors and their scales laid out accordingly."""
    tensors, scales = (
        {name: laid(own) if layout.kind(name) == "touched" else own for name, own in which.items()}
        for which in (updates.tensors, updates.scales)
    )
    return replace(updates, rows=rows, present=present, tensors=tensors, scales=scales)
