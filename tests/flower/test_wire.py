"""Orders and reports as messages, and back: the same to the last bit, in few bytes, and nobody's memory but one's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn import QUICK, alike, merged, order_of, random_submodel, random_updates, some_model, some_rows, some_seed, what
from hypothesis import assume, given
from hypothesis import strategies as some
from world import ITEMS, SETTINGS, same

from fedprune.codec import sizes
from fedprune.exchange import Order, Updates
from fedprune.flower import wire
from fedprune.flower.compat import wire_bytes
from fedprune.merge import coverage
from fedprune.submodel import Submodel, extract


@QUICK
@given(some_seed, some_model, some_rows, some.integers(1, 4))
def test_orders_come_back_as_they_were(seed: int, model: str, rows: str, count: int):
    rng, layout = np.random.default_rng(seed), what(model).layout
    models = [what(model).initial(1), what(model).initial(2)]
    submodels = [random_submodel(rng, model) for _ in range(2)]
    first = order_of(rng, model, 0, submodels[0], rows, models[0])
    orders = [
        replace(
            order_of(rng, model, n, submodels[rng.integers(2)], rows, models[rng.integers(2)]),
            objective=first.objective, seed=first.seed, expires=first.expires,
        )
        for n in range(count)
    ]  # fmt: skip
    orders[0] = replace(orders[0], submodel=first.submodel)
    work = [float(w) for w in rng.uniform(0.05, 1.0, count)]
    private = torch.from_numpy(rng.normal(size=7)).float() if rng.integers(2) else None
    content = wire.write_orders(orders, layout, run="a run", settings='{"x": 1}', work=work, private=private)
    parcel = wire.read_orders(content, layout)
    assert (parcel.run, parcel.settings, parcel.work) == ("a run", '{"x": 1}', tuple(work))
    assert (parcel.private is None) == (private is None) and (private is None or torch.equal(parcel.private, private))
    for sent, got in zip(orders, parcel.orders, strict=True):
        assert replace(got, model={}, submodel=sent.submodel) == replace(sent, model={})
        assert alike(layout, got.submodel, sent.submodel)
        assert got.submodel.widths == sent.submodel.widths and got.submodel.trained_widths == sent.submodel.trained_widths
        assert same(got.model, extract(sent.model, layout, sent.submodel))
    equal = {(id(o.model), o.submodel.held_key): id(p.model) for o, p in zip(orders, parcel.orders, strict=True)}
    assert len(set(equal.values())) == len(equal), "orders of one cut share it, others do not"
    assert len({id(p.model) for p in parcel.orders}) == len(equal)
    size = sum(sizes(layout, o.submodel, ITEMS).parameters for o in {id(p.model): p for p in parcel.orders}.values())
    assert content["arrays"]["model"].numpy().shape == (size,), "equal cuts are written once"


@QUICK
@given(some_seed, some_model, some_rows, some.sampled_from(["equal", "examples", "coverage"]))
def test_merging_what_travelled_equals_merging_the_original(seed: int, model: str, rows: str, weights: str):
    rng, layout = np.random.default_rng(seed), what(model).layout
    start = what(model).initial(3)
    orders: list[Order] = []
    stacks: list[Updates] = []
    for clients in rng.integers(1, 4, size=rng.integers(1, 4)).tolist():
        held = random_submodel(rng, model)
        own = (held, *(random_submodel(rng, model, held) for _ in range(clients - 1)))
        stacks.append(random_updates(rng, model, own))
        if weights == "coverage":  # which nobody has who trains nothing of a tensor
            assume(all(coverage(submodel, layout, name) for submodel in own for name in start))
        first = len(orders)
        orders += [order_of(rng, model, first + n, submodel, rows, start) for n, submodel in enumerate(own)]
    parcel = wire.Parcel("r", "{}", tuple(orders), (1.0,) * len(orders))
    numbers = iter(orders)
    written = []
    for updates in stacks:
        tickets = tuple(next(numbers).ticket for _ in updates.submodels)
        figures = tuple(int(n) for n in rng.integers(1, 99, len(tickets)))
        written.append(wire.Stacked(tickets, updates, figures, tuple(map(float, figures)), (1.0,) * len(tickets)))
    content = wire.write_reply(parcel, written, layout)
    before = wire_bytes(content), content.object_id, {n: a.data for n, a in content["arrays"].items()}
    back = wire.read_reply(content, orders, layout, "r")
    for sent, got in zip(written, back, strict=True):
        assert (got.tickets, got.examples, got.losses, got.work) == (sent.tickets, sent.examples, sent.losses, sent.work)
        assert torch.equal(got.updates.present.sum(1), sent.updates.present.sum(1))
    assert same(merged(model, start, orders, stacks, weights), merged(model, start, orders, [s.updates for s in back], weights))
    for stack in back:  # what the receiver does with its copy is its own business
        for tensor in stack.updates.tensors.values():
            tensor += 1.0
    assert before == (wire_bytes(content), content.object_id, {n: a.data for n, a in content["arrays"].items()})
    assert same(
        merged(model, start, orders, stacks, weights),
        merged(model, start, orders, [s.updates for s in wire.read_reply(content, orders, layout, "r")], weights),
    )


@pytest.mark.parametrize("rows", ["table", "touched"])
def test_private_rows_travel_where_they_are_asked_for_and_nowhere_else(rows: str):
    rng, start = np.random.default_rng(5), what("mf").initial(1)
    full = Submodel.full(what("mf").layout)
    orders = [order_of(rng, "mf", n, full, rows, start) for n in range(3)]
    sizes, parcel = {0: 4, 1: 2, 2: 6}, wire.Parcel("r", "{}", tuple(orders), (1.0,) * 3)
    stacks = [
        wire.Stacked((2, 0), random_updates(rng, "mf", (full, full)), (1, 1), (0.0, 0.0), (1.0, 1.0), torch.arange(10.0)),
        wire.Stacked((1,), random_updates(rng, "mf", (full,)), (1,), (0.0,), (1.0,), torch.arange(2.0) + 50),
    ]
    content = wire.write_reply(parcel, stacks, what("mf").layout)
    back = wire.read_reply(content, orders, what("mf").layout, "r", sizes)
    assert [stack.private.tolist() for stack in back] == [list(range(10)), [50.0, 51.0]]
    with pytest.raises(Exception, match='field "private" must not leave the device'):
        wire.read_reply(content, orders, what("mf").layout, "r")
    with pytest.raises(Exception, match='field "private" has'):
        wire.read_reply(content, orders, what("mf").layout, "r", sizes | {1: 3})


@pytest.mark.parametrize("model", sorted(SETTINGS))
def test_reading_an_order_leaves_it_alone(model: str):
    rng, layout, start = np.random.default_rng(1), what(model).layout, what(model).initial(1)
    kept = {name: tensor.clone() for name, tensor in start.items()}
    order = order_of(rng, model, 0, Submodel.full(layout), "table", start)
    content = wire.write_orders([order], layout, run="r", settings="{}")
    before = content.object_id, wire_bytes(content), {n: a.data for n, a in content["arrays"].items()}
    for _ in range(2):
        for tensor in wire.read_orders(content, layout).orders[0].model.values():
            tensor.fill_(7.0)
    assert before == (content.object_id, wire_bytes(content), {n: a.data for n, a in content["arrays"].items()})
    assert same(start, kept), "the server's model was changed through the message"
    assert same(wire.read_orders(content, layout).orders[0].model, start)


@pytest.mark.parametrize("model", sorted(SETTINGS))
def test_few_tensors_and_packed_masks(model: str):
    rng, layout, start = np.random.default_rng(1), what(model).layout, what(model).initial(1)
    full, window = Submodel.full(layout), random_submodel(rng, model, Submodel.full(layout)).units
    orders = [order_of(rng, model, n, [full, window][n % 2], "touched", start) for n in range(6)]
    content = wire.write_orders(orders, layout, run="r", settings="{}", private=torch.zeros(3))
    different = len({full.key, window.key})
    assert len(content["arrays"]) <= 4
    assert content["arrays"]["units"].shape == (different * 2 * sum(-(-a.size // 8) for a in layout.prunable.values()),)
    parcel = wire.Parcel("r", "{}", tuple(orders), (1.0,) * 6)
    stacks = [
        wire.Stacked((o.ticket,), random_updates(rng, model, (o.submodel,)), (1,), (0.0,), (1.0,), torch.zeros(2))
        for o in orders
    ]
    reply = wire.write_reply(parcel, stacks, layout)
    assert len(reply["arrays"]) <= 4
    rows = [stack.updates.rows.shape[1] for stack in stacks]
    assert reply["arrays"]["present"].shape == (sum(-(-r // 8) for r in rows),)
    entries = sum(layout.parameters(o.submodel.trained_widths, r) for o, r in zip(orders, rows, strict=True))
    assert reply["arrays"]["update"].shape == (entries,), "what was not trained does not travel"
    assert reply["arrays"]["rows"].numpy().dtype == np.int32


def test_bytes_are_those_that_flower_sends_and_grow_with_the_arrays_alone():
    def sent(arrays: dict) -> int:
        return wire_bytes(wire.write_numbers("r", "{}", arrays=arrays, step="counts"))

    rng = np.random.default_rng(1)
    small, large = rng.random(2000), rng.random(4000)
    difference = sent({"a": large}) - sent({"a": small})
    assert difference == 8 * 2000, "lengths are written in as many digits"
    assert sent({"a": small, "b": small}) - sent({"a": small}) < 8 * 2000, "equal objects travel once"
    content = wire.write_numbers("r", "{}", arrays={"a": small})
    deflated, todo = {}, [content]
    while todo:
        part = todo.pop()
        deflated[part.object_id] = len(part.deflate())
        todo += (part.children or {}).values()
    assert wire_bytes(content) == sum(deflated.values()) > small.nbytes
