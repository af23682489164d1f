"""What the codec and the workload predict is what travels, and what does not travel is nowhere missed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn import (
    QUICK,
    alike,
    arrives,
    merged,
    order_of,
    random_masks,
    random_units,
    random_updates,
    sent,
    some_precision,
    some_rows,
    some_seed,
    what,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as some
from world import ITEMS, same

from fedprune.axes import Layout
from fedprune.codec import Codec, sizes
from fedprune.distill import Distillation
from fedprune.flower import wire
from fedprune.objective import Objective
from fedprune.precision import nearest
from fedprune.submodel import Submodel, extract, there
from fedprune.workload import workload


def one_per_row(rng: np.random.Generator, layout: Layout, name: str) -> np.ndarray:
    columns = int(np.prod(layout.shape(name)[1:]))
    return (np.arange(columns) == rng.integers(columns, size=(layout.shape(name)[0], 1))).reshape(layout.shape(name))


def masked_submodel(kind: str, rng: np.random.Generator, layout: Layout) -> Submodel:
    whole, half = Submodel.full(layout), Submodel({a: random_units(rng, np.arange(x.size)) for a, x in layout.prunable.items()})
    window = Submodel(whole.held, half.held)
    items = {name: rng.random(layout.shape(name)) < 0.3 for name in layout.named("touched")}
    tower = {name: rng.random(layout.shape(name)) < 0.6 for name in layout.named("shared")}
    each = {name: one_per_row(rng, layout, name) for name in layout.named("touched") if len(layout.shape(name)) > 1}
    match kind:
        case "units":
            return half
        case "window":
            return window
        case "entries":
            return replace(whole, entries=items)
        case "entries of narrower units":
            return replace(half, entries=items)
        case "entries of a window":
            return replace(window, entries=items | tower)
        case "one entry per row":
            return replace(whole, entries=each)
        case "tower":
            return replace(half, entries=tower)
        case _:
            return replace(whole, entries={name: np.zeros_like(there) for name, there in items.items()})


KINDS = [
    "units", "window", "entries", "entries of narrower units", "entries of a window", "one entry per row", "tower", "nothing"
]  # fmt: skip


def nbytes(content, *names: str) -> int:
    return sum(content["arrays"][name].numpy().nbytes for name in names if name in content["arrays"])


def by_hand(layout: Layout, submodel: Submodel, rows: torch.Tensor, precision: str) -> int:
    """Bytes of these item rows' trained entries, and of what is shared."""
    total = 0
    for name in layout.named("touched", "shared"):
        shape = layout.shape(name, submodel.trained_widths)
        count = len(rows) if layout.kind(name) == "touched" else shape[0]
        entries = count * int(np.prod(shape[1:]))
        if name in submodel.entries:
            trained = there(layout, submodel, name, "trained")
            entries = int((trained[rows] if layout.kind(name) == "touched" else trained).sum())
        total += 4 * entries if precision == "float32" else 2 * entries if len(shape) == 1 else entries + 2 * count
    return total


@settings(max_examples=100, deadline=None)
@given(some_seed, some.sampled_from(["mf", "neumf"]), some_rows, some_precision, some.booleans(), some.sampled_from(KINDS))
def test_bytes_on_the_wire_are_those_that_are_predicted(
    seed: int, model: str, rows: str, precision: str, sampled: bool, kind: str
):
    rng, layout, start = np.random.default_rng(seed), what(model).layout, what(model).initial(1)
    submodel = masked_submodel(kind, rng, layout)
    if kind == "tower" and not layout.named("shared"):
        return
    share = 0.5 if sampled and rows == "touched" else 1.0
    order = order_of(rng, model, 0, submodel, rows, start, precision=precision, sampled=share)
    predicted = sizes(layout, submodel, ITEMS, order.codec)
    content = wire.write_orders([order], layout, run="r", settings="{}")
    assert nbytes(content, "model", "codes", "halves", "entries") == predicted.down
    assert precision == "int8" or nbytes(content, "model") == 4 * predicted.parameters
    (got,) = wire.read_orders(content, layout).orders
    assert same(got.model, arrives(order, layout)) and alike(layout, got.submodel, submodel)
    assert precision == "int8" or same(got.model, extract(start, layout, submodel))
    updates = sent(random_updates(rng, model, (submodel,)), order, layout)
    reply = wire.write_reply(
        wire.Parcel("r", "{}", (got,), (1.0,)), [wire.Stacked((0,), updates, (1,), (0.0,), (1.0,))], layout
    )
    up = nbytes(reply, "update", "codes", "halves")
    if rows == "table":
        assert up == predicted.up == by_hand(layout, submodel, torch.arange(ITEMS), precision)
    else:
        changed = [updates.tensors[name][0].flatten(1).any(1) if updates.tensors[name].dim() > 2
                   else updates.tensors[name][0] != 0 for name in layout.named("touched")]  # fmt: skip
        drawn = torch.stack(changed).any(0) if share < 1 else updates.present[0]
        assert up == by_hand(layout, submodel, updates.rows[0][drawn], precision)
        if not submodel.entries:
            assert up == sizes(layout, submodel, int(drawn.sum()), replace(order.codec, sampled=1.0)).up
            assert sizes(layout, submodel, 2 * int(drawn.sum()), replace(order.codec, sampled=0.5)).up == up
    (back,) = wire.read_reply(reply, [order], layout, "r")
    assert same(merged(model, start, [order], [back.updates], "equal"), merged(model, start, [order], [updates], "equal"))


@QUICK
@given(some_seed, some.sampled_from(["mf", "neumf"]), some.integers(2, 4))
def test_every_client_may_lack_other_entries(seed: int, model: str, clients: int):
    rng, layout, start = np.random.default_rng(seed), what(model).layout, what(model).initial(1)
    units = masked_submodel("units", rng, layout)
    submodels = [replace(units, entries=random_masks(rng, layout)) for _ in range(clients)]
    first = order_of(rng, model, 0, submodels[0], "touched", start)
    orders = [replace(first, ticket=n, client=n, submodel=s) for n, s in enumerate(submodels)]
    content = wire.write_orders(orders, layout, run="r", settings="{}")
    different = {s.key: s for s in submodels}.values()
    assert nbytes(content, "model", "entries") == sum(sizes(layout, s, ITEMS).down for s in different)
    parcel = wire.read_orders(content, layout)
    for order, got in zip(orders, parcel.orders, strict=True):
        assert alike(layout, got.submodel, order.submodel) and same(got.model, extract(start, layout, order.submodel))
    updates = random_updates(rng, model, tuple(o.submodel for o in parcel.orders))
    stack = wire.Stacked(tuple(range(clients)), updates, (1,) * clients, (0.0,) * clients, (1.0,) * clients)
    (back,) = wire.read_reply(wire.write_reply(parcel, [stack], layout), orders, layout, "r")
    assert same(dict(back.updates.tensors), dict(updates.tensors))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher", ["local", "sent"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_teacher_travels_whole_and_once(kind: str, teacher: str, precision: str):
    rng, layout, start = np.random.default_rng(3), what("neumf").layout, what("neumf").initial(1)
    objective = Objective(distillation=Distillation(teacher, weight=0.5, top=3))
    orders = [
        replace(
            order_of(rng, "neumf", n, masked_submodel(kind, rng, layout), "table", start, precision=precision),
            objective=objective,
        )
        for n in range(2)
    ]
    content = wire.write_orders(orders, layout, run="r", settings="{}")
    local = replace(objective, distillation=replace(objective.distillation, teacher="local"))
    codec, whole = Codec(precision=precision), Submodel.full(layout)
    load = workload(layout, orders[0].submodel, local, codec, examples=9, listed=3, rows=ITEMS, items=ITEMS)
    masks = {o.submodel.key: sizes(layout, o.submodel, ITEMS).masks for o in orders}
    moved = nbytes(content, "model", "codes", "halves")
    assert moved == sizes(layout, whole, ITEMS, codec).down == load.down - masks[orders[0].submodel.key]
    assert moved == layout.bytes(layout.full, ITEMS) if precision == "float32" else moved < layout.bytes(layout.full, ITEMS) / 3
    assert nbytes(content, "entries") == sum(masks.values()), "each one's own masks"
    parcel, received = wire.read_orders(content, layout), start if precision == "float32" else nearest(layout, start).tensors
    assert all(same(got.model, received) for got in parcel.orders) and parcel.orders[0].model is parcel.orders[1].model
    assert all(alike(layout, got.submodel, sent.submodel) for got, sent in zip(parcel.orders, orders, strict=True))
    past = replace(objective, distillation=Distillation("past", weight=0.5), epochs=2)
    content = wire.write_orders([replace(o, objective=past) for o in orders[:1]], layout, run="r", settings="{}")
    alone = sizes(layout, orders[0].submodel, ITEMS, codec).down
    assert nbytes(content, "model", "codes", "halves", "entries") == alone, "it knows its past self"


some_positive = some.floats(1e-3, 1e3, allow_subnormal=False)
some_weight = some.floats(0.0, 1.0, allow_subnormal=False)
some_share = some.floats(0.1, 0.9, allow_subnormal=False)
some_distillation = some.builds(
    Distillation, teacher=some.sampled_from(["local", "sent", "given"]), weight=some_weight, temperature=some_positive,
    top=some.integers(1, 50), ranking=some_weight, decay=some_positive, attention=some_weight, relation=some_weight,
    compared=some.integers(2, 99),
)  # fmt: skip
some_objective = some.builds(
    Objective, task=some.sampled_from(["implicit", "ratings"]), negatives=some.integers(1, 9), epochs=some.integers(1, 9),
    batch=some.none() | some.integers(1, 99), lr=some_positive, lr_private=some_positive, decay_private=some_weight,
    private_steps=some.integers(0, 9), proximal=some_weight, until=some.none() | some_positive, recency=some_weight,
    horizon=some_positive, distillation=some.none() | some_distillation, nested=some_weight, narrower=some_share,
    gate=some.booleans(), weight_negatives=some_positive,
)  # fmt: skip


@QUICK
@given(some_objective)
def test_an_objective_comes_back_as_it_was(objective: Objective):
    rng, layout = np.random.default_rng(1), what("mf").layout
    order = replace(order_of(rng, "mf", 0, Submodel.full(layout), "table", what("mf").initial(1)), objective=objective)
    (got,) = wire.read_orders(wire.write_orders([order], layout, run="r", settings="{}"), layout).orders
    assert got.objective == objective


def test_padding_stays_at_home():
    """Of a client that did a part of its work, or that learns from a list, rows are padded, and could be more than items."""
    rng, layout, start = np.random.default_rng(1), what("mf").layout, what("mf").initial(1)
    submodel = masked_submodel("entries", rng, layout)
    order = order_of(rng, "mf", 0, submodel, "touched", start)
    updates = random_updates(rng, "mf", (submodel,))
    width, wide = updates.rows.shape[1], ITEMS + 10
    at = torch.from_numpy(np.sort(rng.choice(wide, width, replace=False)))
    rows, present = torch.zeros(1, wide, dtype=torch.long), torch.zeros(1, wide, dtype=torch.bool)
    rows[:, at], present[:, at] = updates.rows, True
    tensors = {}
    for name, tensor in updates.tensors.items():
        tensors[name] = tensor
        if layout.kind(name) == "touched":
            tensors[name] = torch.zeros(1, wide, *tensor.shape[2:])
            tensors[name][:, at] = tensor
    padded = replace(updates, rows=rows, present=present, tensors=tensors)
    parcel = wire.Parcel("r", "{}", (order,), (1.0,))
    lean, same_again = (
        wire.write_reply(parcel, [wire.Stacked((0,), own, (1,), (0.0,), (1.0,))], layout) for own in (updates, padded)
    )
    assert {n: a.data for n, a in lean["arrays"].items()} == {n: a.data for n, a in same_again["arrays"].items()}


@pytest.mark.parametrize("gate", [True, False])
def test_gates_travel_where_they_are_asked_for(gate: bool):
    rng, layout, start = np.random.default_rng(1), what("mf").layout, what("mf").initial(1)
    full = Submodel.full(layout)
    orders = [replace(order_of(rng, "mf", n, full, "table", start), objective=Objective(gate=gate)) for n in range(3)]
    updates = [random_updates(rng, "mf", (full, full)), random_updates(rng, "mf", (full,))]
    stacks = [
        wire.Stacked((2, 0), updates[0], (1, 1), (0.0, 0.0), (1.0, 1.0), gates=(0.25, float("nan"))),
        wire.Stacked((1,), updates[1], (1,), (0.0,), (1.0,)),
    ]
    reply = wire.write_reply(wire.Parcel("r", "{}", tuple(orders), (1.0,) * 3), stacks, layout)
    assert ("gates" in reply["metrics"]) == gate
    one, other = wire.read_reply(reply, orders, layout, "r")
    if gate:
        assert one.gates[0] == 0.25 and one.gates[1] != one.gates[1] and other.gates[0] != other.gates[0]
    else:
        assert one.gates is None is other.gates
