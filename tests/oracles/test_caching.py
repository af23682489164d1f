"""Downloads that are cached: which version a client trains on, what that costs, and what it knows of the rest of the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from world import ITEMS, USERS, World, close, copied, louder, same, world

from fedprune.axes import Layout
from fedprune.catalog import build, trained_with
from fedprune.codec import Codec
from fedprune.devices import disturbed
from fedprune.distill import Distillation
from fedprune.entries import Feedback
from fedprune.errors import ConfigError
from fedprune.exchange import Lost, Order, Report
from fedprune.gather import Gather
from fedprune.merge import Merge
from fedprune.objective import Objective
from fedprune.pruning import Leading, Whole, Window
from fedprune.rates import ByCapability, Fixed
from fedprune.record import load_state, save_state
from fedprune.selection import KeepBusy, Uniform
from fedprune.snapshot import restore, snapshot
from fedprune.spending import Mix
from fedprune.strategy import Round, Strategy, copies, one_round
from fedprune.submodel import Submodel, mask
from fedprune.types import Tensors
from fedprune.workload import workload

ROW = 4 * 9
"""Bytes of a row of eight latent units and a bias."""
CACHED = Strategy(codec=Codec(refresh=3), objective=Objective(lr=0.3))


def lived(strategy: Strategy, rounds: int, **where: Any) -> tuple[World, list[Tensors], list[Round]]:
    """A world after so many rounds, and the model that each of them began with."""
    here, models, done = louder(world(strategy, **where)), [], []
    for _ in range(rounds):
        models.append(here.state.model)
        done.append(here.round())
    return here, models, done


# ---- which version -----------------------------------------------------------------------------------------------------


def test_clients_train_on_the_version_of_the_last_refreshing():
    here, models, rounds = lived(CACHED, 7)
    for version, done in enumerate(rounds):
        assert len(done.orders) == USERS
        for order in done.orders:
            assert order.version == version and order.age == version % 3 and order.rest is None
            assert order.cached is (version % 3 > 0)
            assert order.model is models[version - version % 3]
        assert {(r.staleness, r.period) for r in done.reports} == {(version % 3, 1)}
    assert not same(models[1], models[0]) and not same(models[2], models[1]), "the server goes on all the same"
    assert same(here.state.base, models[6]) and here.state.cached["version"].tolist() == [6] * USERS


@pytest.mark.parametrize("model", ["mf", "neumf"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_what_is_reported_is_what_training_on_that_version_yields(model: str, precision: Any):
    """The second round's updates, against orders that bring the first version with them."""
    strategy = replace(CACHED, codec=Codec(precision=precision, refresh=3))
    here, _, _ = lived(strategy, 1, model=model)
    here.fleet.settle()
    plain, first = louder(world(strategy, model=model)), here.state.base
    plain.population.private = here.population.copy().private
    done = here.round()
    plain.fleet.send([replace(o, model=first, age=0, cached=False, codec=Codec(precision=precision)) for o in done.orders])
    for _ in range(USERS):
        wanted = plain.fleet.next()
        assert isinstance(wanted, Report)
        (got,) = [r for r in done.reports if r.order.client == wanted.order.client]
        for name, tensor in wanted.updates.tensors.items():
            assert torch.equal(got.updates.tensors[name][got.position], tensor[wanted.position])
    assert same(here.private, plain.private)


def test_a_late_report_is_as_stale_as_its_copy_was_old():
    """Reports of 10, 25 and 40 seconds in rounds of 10.5: asked in version 4 with a copy of 3, merged into 7: 4 behind."""
    strategy = replace(CACHED, gather=Gather(within=10.5, late="keep"))
    _, models, rounds = lived(strategy, 9, workload="equal", slowness=[1.0, 2.5, 4.0] * 8)
    seen = set()
    for version, done in enumerate(rounds):
        for sent in done.reports:
            order = sent.order
            assert sent.staleness == version - order.version + order.age and sent.period == version - order.version + 1
            assert order.model is models[order.version - order.version % 3]
            seen.add((order.version, version, sent.staleness))
    assert {(0, 3, 3), (4, 7, 4), (3, 5, 2), (8, 8, 2), (6, 6, 0)} <= seen


def test_who_has_no_copy_downloads_the_version_that_the_others_work_with():
    here, models, rounds = lived(replace(CACHED, selector=Uniform(8)), 9)
    fresh = 0
    for version, done in enumerate(rounds):
        had = {o.client for before in rounds[version - version % 3 : version] for o in before.orders}
        for order in done.orders:
            assert order.cached is (order.client in had) and order.model is models[version - version % 3]
            fresh += version % 3 > 0 and not order.cached
        for sent in done.reports:
            assert sent.cost.bytes_down == (0 if sent.order.cached else ITEMS * ROW)
    assert fresh > 10
    versions = here.state.cached["version"]
    last = [
        max((d.version - d.version % 3 for d in rounds for o in d.orders if o.client == c), default=-1) for c in range(USERS)
    ]
    assert versions.tolist() == last


def test_without_caching_nothing_is_remembered():
    here, models, rounds = lived(Strategy(), 2)
    assert not here.state.cached and not here.state.base
    assert all((o.age, o.cached, o.rest) == (0, False, None) and o.model is models[1] for o in rounds[1].orders)
    with pytest.raises(ConfigError, match="refresh is 0; it must be at least 1, which downloads anew for every order"):
        Codec(refresh=0)


# ---- what it costs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["table", "touched"])
@pytest.mark.parametrize(("precision", "row"), [("float32", ROW), ("int8", 8 + 2 + 2)])
def test_the_whole_table_comes_down_once(rows: Any, precision: Any, row: int):
    """Whichever rows an order needs: the next one will need others. What goes up is as ever."""
    strategy = replace(CACHED, codec=Codec(rows, precision, refresh=3), objective=Objective(negatives=1))
    here, _, rounds = lived(strategy, 4)
    touched = here.population.rows_of_client(strategy.objective)
    assert touched.min() < ITEMS
    for version, done in enumerate(rounds):
        for sent in done.reports:
            assert sent.cost.bytes_down == (0 if version % 3 else ITEMS * row)
            assert sent.cost.bytes_up == (ITEMS if rows == "table" else touched[sent.order.client]) * row
            assert (sent.cost.seconds.download == 0) is (version % 3 > 0)


def test_a_window_downloads_what_it_trains():
    """Half of eight units: four and the bias. Who trains all of the model works with its copy, and downloads nothing."""
    strategy = replace(build("window", grid=2, refresh=3), rates=Halves())
    _, _, rounds = lived(strategy, 5)
    for version, done in enumerate(rounds):
        for sent in done.reports:
            window = sent.order.client % 2 == 0
            assert sent.order.submodel.is_window is window and sent.order.cached is (version % 3 > 0)
            cached = ITEMS * 4 * 5 if window else 0
            assert sent.cost.bytes_down == (cached if version % 3 else ITEMS * ROW)
            assert sent.cost.bytes_up == ITEMS * (4 * 5 if window else ROW)
            assert sent.order.age == (0 if window else version % 3) == sent.staleness, "what a window trains is fresh"


class Halves(Fixed):
    """Even clients train half of the model."""

    def propose(self, memory: Any, clients: Any, roster: Any, offer: Any) -> Any:
        return np.where(clients % 2 == 0, 0.5, 1.0)


def test_workloads_by_pencil():
    layout = world().state.layout
    half, some = Leading().carve({}, layout, 0, 0, 0.5), Window().carve({}, layout, 1, 0, 0.5)

    def down(submodel: Submodel, codec: Codec, **settings: Any) -> int:
        cached = settings.pop("cached", False)
        told = Objective(**settings)
        return workload(layout, submodel, told, codec, examples=30.0, listed=0, rows=7, items=ITEMS, cached=cached).down

    touched = Codec("touched", refresh=4)
    assert (
        down(half, Codec("touched")) == 7 * 20 and down(half, touched) == ITEMS * 20 and down(half, touched, cached=True) == 0
    )
    assert down(some, Codec("touched")) == 7 * 36 and down(some, touched) == ITEMS * 36
    assert down(some, touched, cached=True) == 7 * 20, "a window's rows are those of this order"
    local = {"distillation": Distillation("local", 0.5)}
    assert down(half, Codec("touched"), **local) == 7 * 36
    for cached, training in ((False, 30 * 27), (True, 30 * 27)):
        got = workload(layout, half, Objective(), touched, examples=30.0, listed=0, rows=7, items=ITEMS, cached=cached)
        assert (got.training, got.up, got.parameters) == (training, 7 * 20, 7 * 5)


# ---- what is not trained is of the copy ----------------------------------------------------------------------------------


def composed(layout: Layout, order: Order) -> Tensors:
    """The full model that a window's client has before it trains: what it trains of the order's version, the rest older."""
    assert order.rest is not None
    result = {}
    for name, fresh in order.model.items():
        on = torch.ones(())
        for dimension in layout.tensors[name]:
            on = on[..., None] * mask(layout, dimension, order.submodel.trained)
        result[name] = torch.where(on > 0, fresh, order.rest[name])
    return result


@pytest.mark.parametrize("model", ["mf", "neumf"])
@pytest.mark.parametrize("through", [None, False, True])
def test_windows_train_on_fresh_units_among_cached_ones(model: str, through: bool | None):
    """Against plain orders of a model that was put together beforehand, entry by entry."""
    entries = {} if through is None else {"entries": Feedback(0.7, every=1, through=through)}
    strategy = Strategy(
        rates=ByCapability(4), pruning=Window(), codec=Codec(refresh=4), objective=Objective(lr=0.3, epochs=2), **entries
    )
    here, models, _ = lived(strategy, 2, model=model, sigma=4.0)
    here.fleet.settle()
    before, current = here.population.copy(), here.state.model
    done = here.round()
    windows = [r for r in done.reports if r.order.submodel.is_window]
    assert len(windows) > 8 and all(sent.order.rest is models[0] and sent.order.model is current for sent in windows)
    plain = louder(world(strategy, model=model, sigma=4.0, fleet="serial"))
    plain.fleet.population.private = before.private
    differ = 0
    for sent in windows[:8]:
        whole = composed(here.state.layout, sent.order)
        differ += not close(whole, sent.order.model) and not close(whole, here.state.base)
        plain.fleet.send([replace(sent.order, model=whole, rest=None, cached=False, codec=Codec())])
        wanted = plain.fleet.next()
        assert isinstance(wanted, Report)
        for name, tensor in wanted.updates.tensors.items():
            got = sent.updates.tensors[name][sent.position]
            if here.state.layout.kind(name) == "touched":
                got = got[sent.updates.present[sent.position]]
            torch.testing.assert_close(got, tensor[0], atol=1e-6, rtol=1e-5)
        client = sent.order.client
        for name, own in plain.private.items():
            torch.testing.assert_close(here.private[name][client], own[client], atol=1e-6, rtol=1e-5)
    assert differ == 8, "no window was put together of two versions"


# ---- who has which copy ------------------------------------------------------------------------------------------------


def test_copies_by_hand():
    """Refreshed every fourth version: orders of version 6 leave copies of 4. Who is too late has it all the same."""
    here = world(replace(CACHED, codec=Codec(refresh=4)))
    _, done = one_round(here.strategy, replace(here.state, version=6, base=here.state.model), here.fleet)
    orders = done.orders[:6]
    assert copies({}, orders, [], 8)["version"].tolist() == [4] * 6 + [-1, -1]
    known = {"version": np.array([0, 0, 0, 0, 0, 0, 0, 4])}
    reasons = ("dropped out", "too late", "unfinished", "failed", "refused")
    cost = done.reports[0].cost
    lost = [Lost(order, reason, cost) for order, reason in zip(orders, reasons, strict=False)]
    assert copies(known, orders, lost, 8)["version"].tolist() == [-1, 4, -1, -1, -1, 4, 0, 4]
    assert known["version"].tolist() == [0] * 7 + [4], "arguments are not changed"
    plain = [replace(order, codec=Codec()) for order in orders]
    assert copies(known, plain, lost, 8) is known


def test_who_vanished_downloads_again():
    here, _, rounds = lived(replace(CACHED, codec=Codec(refresh=4)), 0)
    usual = here.fleet.devices
    here.fleet.devices = disturbed(usual, dropout=0.5)
    first = here.round()
    gone = {event.order.client for event in first.lost}
    assert 3 < len(gone) < 21
    here.fleet.devices = usual
    second, third = here.rounds(2)
    for done, without in ((second, gone), (third, set())):
        for sent in done.reports:
            assert sent.order.cached is (sent.order.client not in without)
            assert (sent.cost.bytes_down == 0) is sent.order.cached
    assert not rounds


def test_who_was_too_late_has_its_copy():
    strategy = replace(CACHED, gather=Gather(within=15.0))
    _, _, (first, *later) = lived(strategy, 4, workload="equal", slowness=[1.0] * 20 + [2.0] * 4)
    assert {event.order.client for event in first.lost} == {20, 21, 22, 23}
    asked = [order for done in later for order in done.orders if order.client >= 20 and order.version % 3]
    assert asked and all(order.cached for order in asked)


def test_who_vanished_and_is_asked_again_in_the_same_round_downloads_again():
    strategy = replace(CACHED, codec=Codec(refresh=50), gather=Gather(within=20.0, late="keep", refill=1))
    _, _, rounds = lived(strategy, 8, dropout=0.4, sigma=4.0, workload="equal")
    asked = [
        order.cached
        for done in rounds[1:]
        for order in done.orders
        if order.refill and order.client in {e.order.client for e in done.lost if e.order.version < done.version}
    ]
    assert len(asked) > 10 and not any(asked)


def test_what_a_teacher_sends_comes_down_with_every_order():
    """A score for each of 30 examples."""
    layout, told = world().state.layout, Objective(distillation=Distillation("sent", 0.5))
    codec, size = Codec(refresh=3), {"examples": 30.0, "listed": 0, "rows": ITEMS, "items": ITEMS}
    down = [workload(layout, Submodel.full(layout), told, codec, **size, cached=cached).down for cached in (False, True)]
    assert down == [ITEMS * ROW + 30 * 4, 30 * 4]


@pytest.mark.parametrize(("top", "listed"), [(0, 0), (5, 10)])
def test_who_teaches_itself_caches_the_whole_model(top: int, listed: int):
    """Refreshing is all rows at full width; from then on there is a mask's bits to send, and the window's own rows."""
    layout, told = world().state.layout, Objective(distillation=Distillation("local", 0.5, top=top))
    size = {"examples": 30.0, "listed": listed, "rows": 7, "items": ITEMS}
    half, some = Leading().carve({}, layout, 0, 0, 0.5), Window().carve({}, layout, 1, 0, 0.5)
    masked = Submodel(half.held, half.trained, {"item_embedding": np.tile([True, False], (ITEMS, 4))})
    for submodel, later in ((half, 0), (masked, 4), (some, 7 * 20)):  # 7 rows of 4 units: 28 bits
        down = [workload(layout, submodel, told, Codec("touched", refresh=4), **size, cached=c).down for c in (False, True)]
        assert down[0] >= ITEMS * ROW and down[1] == later
        assert submodel.entries or down[0] == ITEMS * ROW


# ---- checkpoints -------------------------------------------------------------------------------------------------------


def soon(strategy: Strategy, **gather: Any) -> Strategy:
    return replace(trained_with(strategy, Objective(lr=0.3), Merge()), gather=Gather(**gather))


RUNS = {
    "refreshed": soon(build("fedavg_tuned", refresh=3), within=9.0, late="keep"),
    "refilled": soon(build("fedprune", refresh=1), pace=1.2, late="keep", beat=True, refill=2),
    "both": soon(build("fedprune", refresh=4), pace=1.2, late="keep", beat=True, refill=2),
    "windows": soon(build("window", refresh=3), within=7.0, late="keep", refill=2),
    "masked": replace(
        soon(build("dpf"), within=9.0, late="keep", refill=2), codec=Codec(refresh=3), pruning=Whole(), entries=Feedback(0.6)
    ),
    "buffered": replace(
        soon(build("fedbuff"), count=4, late="keep", refill=1), selector=KeepBusy(9), codec=Codec(refresh=2),
        spending=Mix(examples=1.0, weigh=True), rates=ByCapability(8),
    ),
}  # fmt: skip
MOST = {"refreshed": (0, 1), "refilled": (1, 2), "both": (1, 2), "windows": (2, 1), "masked": (1, 1), "buffered": (0, 2)}
"""Whether something is under way at the checkpoint that was sent in the middle of a round, or is a window of an older version;
and of how many objectives and codecs at least."""


def units(submodel: Submodel) -> dict[str, list]:
    """What is held, what is trained, and the masks."""
    parts = {kind: getattr(submodel, kind) for kind in ("held", "trained", "entries")}
    return {f"{kind} {name}": array.tolist() for kind, part in parts.items() for name, array in part.items()}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_interrupted_ends_like_one_that_was_not(name: str, tmp_path: Path):
    """A checkpoint on a disk, with orders of several versions under way; afterwards nothing else is left."""
    where: dict[str, Any] = {"sigma": 6.0, "noise": 0.1, "dropout": 0.05, "model": "neumf"}
    whole = world(RUNS[name], **where)
    whole.rounds(8 if name == "both" else 6)
    listeners = whole.population.copy()
    save_state(tmp_path / "state", whole.state, snapshot(whole.state, whole.fleet, listeners), {})
    under_way = [event.order for event in whole.fleet.unfinished()]
    kind, most = MOST[name]
    assert len({order.version for order in under_way}) > 1
    assert len({(order.objective, order.codec) for order in under_way}) >= most
    assert not kind or any(order.refill for order in under_way)
    assert kind != 2 or any(order.rest is not None and order.version % 3 for order in under_way)
    assert RUNS[name].codec.refresh == 1 or kind == 2 or any(order.age for order in under_way)

    after = world(RUNS[name], **where)
    after.state, kept, _ = load_state(tmp_path / "state", after.state)
    restore(kept, after.state, after.fleet, after.population.copy(), RUNS[name])
    assert [e.order.ticket for e in after.fleet.unfinished()] == [order.ticket for order in under_way]
    for mine, event in zip(under_way, after.fleet.unfinished(), strict=True):
        theirs = event.order
        aside: dict[str, Any] = {"model": {}, "rest": None, "submodel": Submodel({})}
        assert replace(mine, **aside) == replace(theirs, **aside)
        assert units(mine.submodel) == units(theirs.submodel)
        assert same(mine.model, theirs.model) and (mine.rest is None) is (theirs.rest is None)
        assert mine.rest is None or same(mine.rest, theirs.rest or {})
    started = copied(whole.state.model)
    for one, other in zip(whole.rounds(6), after.rounds(6), strict=True):
        assert [(r.order.ticket, r.staleness, r.period, r.cost) for r in one.reports] == [
            (r.order.ticket, r.staleness, r.period, r.cost) for r in other.reports
        ]
        assert [o.ticket for o in one.orders] == [o.ticket for o in other.orders] and one.ended == other.ended
    assert not close(whole.state.model, started)
    assert same(after.state.model, whole.state.model) and same(after.private, whole.private)
    assert same(after.state.optimiser, whole.state.optimiser) and same(after.state.base, whole.state.base)
    assert all(np.array_equal(after.state.cached[k], v) for k, v in whole.state.cached.items())
