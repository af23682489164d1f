"""Codecs on Flower's wire: what a device receives and what the server merges is what one process would have made of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn import QUICK, arrives, order_of, random_submodel, random_updates, sent, some_model, some_seed, what
from flower_world import Tamper, flower_world
from hypothesis import given
from hypothesis import strategies as some
from tampering import array, data, entry, extra, pickled, untouched, without
from test_shard import MASKED, TAUGHT, on_nodes, settings
from world import same

from fedprune.codec import Codec
from fedprune.flower import wire
from fedprune.objective import Objective
from fedprune.simulation import Simulation, prepare, read_data
from fedprune.spending import Mix
from fedprune.strategy import Strategy, one_round
from fedprune.types import Tensors

BAD, CLIENTS = 1, 3
CODECS = [Codec(precision="int8"), Codec("touched", "int8"), Codec("touched", sampled=0.5), Codec("touched", "int8", 0.5)]
some_codec = some.sampled_from([Codec(), Codec("touched"), *CODECS])


# ---- several plans in one message ------------------------------------------------------------------------------------


@QUICK
@given(some_seed, some_model, some.lists(some_codec, min_size=1, max_size=5))
def test_every_order_keeps_its_own_plan(seed: int, model: str, codecs: list[Codec]):
    rng, layout = np.random.default_rng(seed), what(model).layout
    submodels, start = [random_submodel(rng, model) for _ in range(2)], what(model).initial(1)
    orders = [
        replace(
            order_of(rng, model, number, submodels[rng.integers(2)], "table", start),
            codec=codec, objective=Objective(negatives=1 + int(rng.integers(3))), seed=7, expires=None,
        )
        for number, codec in enumerate(codecs)
    ]  # fmt: skip
    content = wire.write_orders(orders, layout, run="r", settings="{}")
    assert len(content["arrays"]) <= 5
    parcel = wire.read_orders(content, layout)
    for asked, got in zip(orders, parcel.orders, strict=True):
        assert (got.objective, got.codec) == (asked.objective, asked.codec)
        assert same(got.model, arrives(asked, layout))
    updates = [sent(random_updates(rng, model, (order.submodel,)), order, layout) for order in orders]
    stacks = [wire.Stacked((order.ticket,), own, (1,), (0.0,), (1.0,)) for order, own in zip(orders, updates, strict=True)]
    reply = wire.write_reply(parcel, stacks, layout)
    assert len(reply["arrays"]) <= 6
    for order, own, back in zip(orders, updates, wire.read_reply(reply, orders, layout, "r"), strict=True):
        assert same(by_row(own), by_row(back.updates)), order.codec
        assert int(own.present.sum()) == int(back.updates.present.sum()), "who is not drawn has trained all the same"


def by_row(updates) -> Tensors:
    """Of one client: shared tensors, and touched rows in the order of their numbers."""
    present, result = updates.present[0], {}
    order = updates.rows[0][present].argsort()
    for name, tensor in updates.tensors.items():
        touched = tensor.shape[1] == len(present) and name.startswith("item")
        result[name] = tensor[0][present][order] if touched else tensor[0]
    return result


@QUICK
@given(some_seed, some_model, some_codec, some.integers(2, 4))
def test_stacks_come_back_as_they_were(seed: int, model: str, codec: Codec, clients: int):
    rng, layout, start = np.random.default_rng(seed), what(model).layout, what(model).initial(1)
    held = random_submodel(rng, model)
    own = (held, *(random_submodel(rng, model, held) for _ in range(clients - 1)))
    first = order_of(rng, model, 0, held, "table", start)
    orders = [replace(first, ticket=n, submodel=submodel, codec=codec) for n, submodel in enumerate(own)]
    updates = sent(random_updates(rng, model, own), orders[0], layout)
    stack = wire.Stacked(tuple(range(clients)), updates, (1,) * clients, (0.0,) * clients, (1.0,) * clients)
    content = wire.write_reply(wire.Parcel("r", "{}", tuple(orders), (1.0,) * clients), [stack], layout)
    (back,) = wire.read_reply(content, orders, layout, "r")
    assert same(dict(back.updates.tensors), dict(updates.tensors)) and back.updates.present.equal(updates.present)


# ---- the same run ----------------------------------------------------------------------------------------------------


def went_alike(here: Simulation, there: Simulation, strategy: Strategy, rounds: int = 3) -> None:
    one, other = here.state, there.state
    for _ in range(rounds):
        one, mine = one_round(strategy, one, here.fleet)
        other, theirs = one_round(strategy, other, there.fleet)
        assert [order.codec for order in mine.orders] == [order.codec for order in theirs.orders]
    here.fleet.settle()
    there.fleet.settle()
    assert same(one.model, other.model) and not same(one.model, here.state.model)
    assert same(here.fleet.population.private.values, there.fleet.population.private.values)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        ["strategy=heterofl"], ["strategy=window"], ["strategy=window", "silos=4"], TAUGHT["taught"], MASKED["own tickets"],
        TAUGHT["by what the server sent"], TAUGHT["by its past"], MASKED["gradients of all entries"], TAUGHT["learned"],
    ],
    ids=["units", "window", "silos", "taught", "tickets", "sent", "past", "through", "learned"],
)  # fmt: skip
def test_nodes_round_as_one_process_does(tmp_path: Path, codec: Codec, changes: list[str]):
    model = "mf" if "silos=4" in changes else "neumf"
    chosen = settings(tmp_path, *changes, f"recommender={model}")
    split = read_data(chosen)
    here, there = prepare(chosen, split), prepare(chosen, split, on_nodes(chosen))
    went_alike(here, there, replace(here.strategy, codec=codec), rounds=2)


def test_plans_of_one_round_may_differ(tmp_path: Path):
    chosen = settings(tmp_path, "strategy=heterofl", "rows=touched")
    split = read_data(chosen)
    here, there = prepare(chosen, split), prepare(chosen, split, on_nodes(chosen))
    strategy = replace(here.strategy, spending=Mix(width=0.5, examples=0.5, negatives=4, precision="auto", sampled="auto"))
    orders = {(order.objective, order.codec) for order in one_round(strategy, here.state, here.fleet)[1].orders}
    assert len(orders) > 1
    here = prepare(chosen, split)
    went_alike(here, there, strategy)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_devices_round_as_one_process_does(codec: Codec):
    here = flower_world(Strategy(codec=codec), model="neumf", clients=CLIENTS)
    before, done = here.state, here.round()
    assert len(done.reports) == CLIENTS and same(here.state.model, here.merged(before, done.orders))
    bytes_up = max(report.cost.bytes_up for report in done.reports)
    plain = flower_world(Strategy(codec=Codec(codec.rows)), model="neumf", clients=CLIENTS)
    assert bytes_up < min(report.cost.bytes_up for report in plain.round().reports)


# ---- hostile replies -------------------------------------------------------------------------------------------------


def but_one(bits: np.ndarray) -> np.ndarray:
    """Without the rows of one byte."""
    bits[0] = 0
    return bits


ROUNDED: dict[str, tuple[str, Tamper]] = {
    "codes too short": ("codes", array("codes", lambda v: v[:-1])),
    "codes too long": ("codes", array("codes", lambda v: np.append(v, v))),
    "codes in float32": ("codes", array("codes", lambda v: v.astype(np.float32))),
    "codes in a pickle": ("codes", data("codes", pickled)),
    "without codes": ("codes", without("arrays", "codes")),
    "halves too short": ("halves", array("halves", lambda v: v[:-1])),
    "halves in double": ("halves", array("halves", lambda v: v.astype(np.float64))),
    "halves NaN": ("halves", entry("halves", math.nan)),
    "halves infinite": ("halves", entry("halves", -math.inf)),
    "halves large": ("update", array("halves", lambda v: np.full_like(v, 300.0))),
    "without halves": ("halves", without("arrays", "halves")),
    "as float32 all the same": ("update", extra("update")),
    "fewer drawn than codes": ("codes", array("drawn", lambda v: 0 * v)),
    "fewer trained than drawn": ("drawn", array("present", but_one)),
    "drawn a byte short": ("drawn", array("drawn", lambda v: v[:-1])),
    "drawn as booleans": ("drawn", array("drawn", lambda v: np.unpackbits(v).astype(bool))),
    "without drawn": ("drawn", without("arrays", "drawn")),
}


@pytest.mark.parametrize(("field", "tamper"), ROUNDED.values(), ids=ROUNDED)
def test_bad_numbers_are_refused(field: str, tamper: Tamper):
    codec = Codec("touched", "int8", 0.5)
    here = flower_world(Strategy(codec=codec), clients=CLIENTS)
    here.fleet.send([here.order(client, client) for client in range(CLIENTS)])
    here.devices.tamper[BAD] = tamper
    events = {event.order.client: event for event in (here.fleet.next() for _ in range(CLIENTS))}
    for client in (0, 2):
        assert same(dict(events[client].updates.tensors), dict(here.devices.results[client].updates.tensors))
    assert events[BAD].reason == "refused" and f'field "{field}"' in events[BAD].detail


def test_a_row_that_was_not_trained_cannot_be_rounded_either():
    here = flower_world(Strategy(codec=Codec(precision="int8")), clients=CLIENTS)
    here.fleet.send([here.order(client, client) for client in range(CLIENTS)])
    here.devices.tamper[BAD] = untouched
    events = {event.order.client: event for event in (here.fleet.next() for _ in range(CLIENTS))}
    assert events[BAD].reason == "refused" and 'field "codes" changes rows' in events[BAD].detail
