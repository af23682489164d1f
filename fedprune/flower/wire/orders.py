"""Orders to a message and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedprune.axes import Layout
from fedprune.codec import Codec
from fedprune.errors import FleetError, LayoutError
from fedprune.exchange import Order
from fedprune.fleet.trainer import teaches
from fedprune.flower.wire.entries import bits, chosen, masked, read_masks
from fedprune.flower.wire.fields import FORMAT, arrays_of, flat, list_of, need, part_of, speaks, value_of
from fedprune.flower.wire.objectives import read_plan, write_plan
from fedprune.flower.wire.packing import Block, Precision, laid_out, picked_up, read_all, summed, together
from fedprune.objective import Objective
from fedprune.precision import Rounded, nearest
from fedprune.submodel import Submodel, extract
from fedprune.types import IntArray, Tensors


@dataclass(frozen=True)
class Parcel:
    """What one node is to do.

    Attributes:
        run: which run it belongs to; the reply repeats it.
        settings: that run's settings, JSON.
        orders: their `model` is the cut alone, or the whole model where that is to teach (`trainer.cut_already`).
        work: share of its examples that each order is to do; 1.0 where that is the device's own business.
        private: rows that travel along, in simulations.
    """

    run: str
    settings: str
    orders: tuple[Order, ...]
    work: tuple[float, ...]
    private: Tensor | None = None


def write_orders(
    orders: Sequence[Order],
    layout: Layout,
    *,
    run: str,
    settings: str,
    work: Sequence[float] | None = None,
    private: Tensor | None = None,
) -> RecordDict:
    """The message content for one node. Equal cuts and equal submodels are written once."""
    first, full = orders[0], Submodel.full(layout)
    cuts: dict[tuple[int, bytes, Precision], int] = {}
    submodels: dict[bytes, int] = {}
    plans: dict[tuple[Objective, Codec], int] = {}
    model, cut_of, units, entries, names, through = [], [], [], [], [], []
    for order in orders:
        submodel, received = order.submodel, full if teaches(order.objective) else order.submodel
        key = (id(order.model), received.held_key, order.codec.precision)
        cut_of.append(cuts.setdefault(key, len(cuts)))
        if len(model) < len(cuts):
            model.append(_cut(order, layout, received))
        plans.setdefault((order.objective, order.codec), len(plans))
        if submodel.key not in submodels:
            submodels[submodel.key] = len(submodels)
            units += [_bits(layout, submodel.held), _bits(layout, submodel.trained)]
            entries.append(bits(layout, submodel))
            names.append(" ".join(masked(layout, submodel)))
            through.append(submodel.through)
    config: dict[str, Any] = {
        "format": FORMAT,
        "server-round": max(order.version for order in orders),
        "run": run,
        "settings": settings,
        "seed": first.seed,
        "tickets": [order.ticket for order in orders],
        "clients": [order.client for order in orders],
        "versions": [order.version for order in orders],
        "rates": [float(order.rate) for order in orders],
        "cuts": cut_of,
        "submodels": [submodels[order.submodel.key] for order in orders],
        "plans": [plans[order.objective, order.codec] for order in orders],
        "work": [float(share) for share in (work or [1.0] * len(orders))],
    }
    for (objective, codec), number in plans.items():
        config |= write_plan(objective, codec, number)
    if first.expires is not None:
        config["expires"] = float(first.expires)
    arrays = laid_out("model", [precision for _, _, precision in cuts], model)
    arrays["units"] = torch.from_numpy(np.concatenate(units))
    if any(names):
        config |= {"masked": names, "through": through}
        arrays["entries"] = torch.from_numpy(np.concatenate(entries))
    if private is not None:
        arrays["private"] = private
    return RecordDict({"arrays": arrays_of(arrays), "config": ConfigRecord(config)})


def read_orders(content: RecordDict, layout: Layout) -> Parcel:
    """What a node was sent.

    Raises:
        FleetError: which field is wrong, and how.
    """
    config, arrays = part_of(content, "config", ConfigRecord), part_of(content, "arrays", ArrayRecord)
    speaks(config)
    lists = {name: list_of(config, name, int) for name in ("tickets", "clients", "versions", "cuts", "submodels", "plans")}
    lists |= {name: list_of(config, name, float) for name in ("rates", "work")}
    count = len(lists["tickets"])
    for name, values in lists.items():
        need(len(values) == count, name, f"has {len(values)} entries for {count} tickets")
    for name in ("tickets", "clients", "versions"):
        need(min(lists[name]) >= 0, name, f"must not be negative; got {lists[name][:5]}")
    need(len(set(lists["tickets"])) == count, "tickets", "names an order twice")
    for name in ("rates", "work"):
        need(all(0 < share <= 1 for share in lists[name]), name, f"must be in (0, 1]; got {lists[name][:5]}")
    for name in ("cuts", "submodels", "plans"):
        numbers = sorted(set(lists[name]))
        need(numbers == list(range(len(numbers))), name, f"must number from 0 on; got {lists[name][:5]}")
    held_by = read_masks(config, arrays, layout, _units(arrays, layout, max(lists["submodels"]) + 1))
    plans = [read_plan(config, number) for number in range(max(lists["plans"]) + 1)]
    told, seed = [plans[number] for number in lists["plans"]], value_of(config, "seed", int)
    need(seed >= 0, "seed", f"is {seed}; it must not be negative")
    expires = value_of(config, "expires", float) if "expires" in config else None
    full, own = Submodel.full(layout), [held_by[number] for number in lists["submodels"]]
    received = [full if teaches(objective) else held for held, (objective, _) in zip(own, told, strict=True)]
    cuts = _cuts(arrays, layout, lists["cuts"], received, [codec.precision for _, codec in told])
    numbered = zip(*(lists[n] for n in ("tickets", "clients", "versions", "rates", "cuts")), own, told, strict=True)
    orders = tuple(
        Order(ticket, client, version, rate, submodel, objective, codec, cuts[cut], seed, expires)
        for ticket, client, version, rate, cut, submodel, (objective, codec) in numbered
    )
    private = flat(arrays, "private", np.float32) if "private" in arrays else None
    return Parcel(
        value_of(config, "run", str),
        value_of(config, "settings", str),
        orders,
        tuple(lists["work"]),
        None if private is None else torch.from_numpy(private),
    )


def _bits(layout: Layout, units: Mapping[str, IntArray]) -> np.ndarray:
    """Units of every prunable axis as bits, each axis padded to whole bytes; uint8."""
    parts = []
    for name, axis in layout.prunable.items():
        flags = np.zeros(axis.size, bool)
        flags[units[name]] = True
        parts.append(np.packbits(flags))
    return np.concatenate(parts)


def _units(arrays: ArrayRecord, layout: Layout, count: int) -> list[Submodel]:
    size = sum(-(-axis.size // 8) for axis in layout.prunable.values())
    packed = flat(arrays, "units", np.uint8, 2 * size * count).reshape(count, 2, size)
    submodels = []
    for number in range(count):
        held, trained = ({}, {})
        for units, row in ((held, packed[number, 0]), (trained, packed[number, 1])):
            start = 0
            for name, axis in layout.prunable.items():
                stop = start + -(-axis.size // 8)
                units[name] = np.flatnonzero(np.unpackbits(row[start:stop])[: axis.size]).astype(np.int64)
                start = stop
        try:
            submodels.append(Submodel.checked(layout, held, trained))
        except LayoutError as error:
            raise FleetError(f'field "units": {error}') from None
    return submodels


def _blocks(layout: Layout, submodel: Submodel, precision: Precision) -> dict[str, Block]:
    """What goes down of each tensor."""
    return {
        name: Block(layout.shape(name, submodel.widths), chosen(layout, submodel, name, "held"), precision)
        for name in layout.named("shared", "touched")
    }


def _cut(order: Order, layout: Layout, received: Submodel) -> Tensors:
    """What an order's client receives, per kind of number. A row's scale is that of all its held units, masked or not."""
    precision = order.codec.precision
    rounded = Rounded(extract(order.model, layout, received.units), {})
    if precision == "int8":
        rounded = nearest(layout, rounded.tensors)
    blocks = _blocks(layout, received, precision)
    scales = {name: own[None] for name, own in rounded.scales.items()}
    return together([block.write(rounded.tensors[name][None], scales.get(name)) for name, block in blocks.items()])


def _cuts(
    arrays: ArrayRecord, layout: Layout, cut_of: Sequence[int], submodels: Sequence[Submodel], precisions: Sequence[Precision]
) -> list[Tensors]:
    """What each cut holds, from what each order's client receives."""
    told = list(zip(submodels, precisions, strict=True))
    holder = dict(zip(cut_of, told, strict=True))
    same = all(
        holder[number][0].held_key == held.held_key and holder[number][1] == precision
        for number, (held, precision) in zip(cut_of, told, strict=True)
    )
    need(same, "cuts", "gives one cut to orders that hold different units, or hold them differently")
    plans = [_blocks(layout, *holder[number]) for number in range(len(holder))]
    parts = picked_up(arrays, "model", precisions, [summed(blocks.values()) for blocks in plans])
    return [
        {name: tensor[0] for name, tensor in read_all(blocks, part).items()} for blocks, part in zip(plans, parts, strict=True)
    ]
