"""What every choice of entries promises: masks that fit, memory that can be kept, and fleets that agree on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from world import USERS, World, close, copied, finite, same, train, unmasked, world

from fedprune.data import silos
from fedprune.distill import Distillation
from fedprune.entries import KINDS, All, Entries, Feedback, KOfN, Lottery, Personal, Salient
from fedprune.entries.base import group, maskable
from fedprune.objective import Objective
from fedprune.pruning import Importance, Pruning, Whole, Window
from fedprune.rates import ByCapability, Fixed
from fedprune.record import Snapshot, load_state, save_state
from fedprune.selection import Uniform
from fedprune.serving import listen
from fedprune.strategy import Strategy, prepared
from fedprune.submodel import Submodel, extract
from fedprune.types import Memory, Tensors

ENTRIES: dict[str, Entries] = {
    "all": All(),
    "lottery": Lottery(0.5, every=1, step=0.3),
    "not rewound": Lottery(0.4, every=1, step=0.6, rewind=None),
    "early bird": Lottery(0.4, early=0.9, patience=1),
    "feedback": Feedback(0.4, every=1),
    "by rate": Feedback(None),
    "through": Feedback(0.4, every=1, through=True),
    "k of n": KOfN(0.4, over=3, entropy=0.01),
    "personal": Personal(0.4, step=0.3, above=0.0),
    "if changed": Personal(0.4, step=0.3, above=0.0, distance=1e-4),
    "columns": Personal(0.5, step=0.3, above=0.0, by="columns"),
    "salient": Salient(0.2, every=2),
}
every_kind = pytest.mark.parametrize("kind", sorted(ENTRIES))
OWN = [name for name, entries in ENTRIES.items() if isinstance(entries, Personal)]
"""Those whose masks differ from client to client."""


def at_work(kind: str, *, pruning: Pruning | None = None, model: str = "mf", fleet: str = "vector", **objective) -> World:
    rates = ByCapability(8) if kind == "by rate" or pruning is not None else Fixed(1.0)
    strategy = Strategy(
        selector=Uniform(10), rates=rates, pruning=pruning or Whole(), entries=ENTRIES[kind],
        objective=Objective(lr=0.3, **objective),
    )  # fmt: skip
    return world(strategy, model=model, fleet=fleet, noise=0.1)


def mean(here: World, reports) -> Tensors:
    return {
        name: update for name, (update, _) in here.strategy.merge.means(here.state.model, here.state.layout, reports).items()
    }


def frozen(memory: Memory) -> Memory:
    return {name: array.copy() for name, array in memory.items()}


def alike(one: Memory, other: Memory) -> bool:
    return one.keys() == other.keys() and all(one[n].dtype == other[n].dtype and np.array_equal(one[n], other[n]) for n in one)


def test_the_table_is_complete():
    assert {type(entries) for entries in ENTRIES.values()} == {All, *KINDS.values()}, "a kind is missing here; add one"


@every_kind
@pytest.mark.parametrize("model", ["mf", "neumf"])
def test_masks_fit_the_layout(kind: str, model: str):
    here = at_work(kind, model=model)
    submodels = [order.submodel for done in here.rounds(5) for order in done.orders]
    layout = here.state.layout
    for submodel in submodels:
        Submodel.checked(layout, submodel.held, submodel.trained, submodel.entries)
        assert set(submodel.entries) in (set(), set(maskable(layout))), "biases stay whole"
        assert submodel.through == (ENTRIES[kind].through and bool(submodel.entries))
    assert any(s.entries for s in submodels) != (kind in ("all", "k of n")), "five rounds masked nothing"
    assert finite(here.state.model)


@every_kind
def test_arguments_stay_as_they_are(kind: str):
    here = at_work(kind)
    for _ in range(4):
        state, entries = here.state, here.strategy.entries
        memory, model, kept = state.entries, state.model, frozen(state.entries)
        before = copied(model)
        entries.prepare(memory, model, state.layout, state.version)
        assert alike(memory, kept) and same(model, before), "prepare changed its arguments"
        ready = prepared(here.strategy, state)
        kept, before = frozen(ready.entries), copied(ready.model)
        done = here.round()
        entries.learn(ready.entries, ready.model, state.layout, done.reports, lambda done=done: mean(here, done.reports))
        assert alike(ready.entries, kept) and same(ready.model, before), "learn changed its arguments"
        assert entries.learn(ready.entries, ready.model, state.layout, [], dict).keys() == kept.keys()


@every_kind
def test_memory_is_arrays_and_survives_a_checkpoint(kind: str, tmp_path: Path):
    here = at_work(kind)
    here.rounds(3)
    assert all(isinstance(array, np.ndarray) and array.dtype != object for array in here.state.entries.values())
    assert bool(here.state.entries) == (kind != "all")
    save_state(tmp_path / "state", here.state, Snapshot({}, {}), {})
    again, _, _ = load_state(tmp_path / "state", here.state)
    assert alike(again.entries, here.state.entries)
    one, other = (prepared(here.strategy, state) for state in (here.state, again))
    assert alike(one.entries, other.entries) and same(one.model, other.model)
    for client in range(USERS):
        assert here.strategy.carve(one, client, 0.5) == here.strategy.carve(other, client, 0.5)
    assert here.strategy.entries.facts(one.entries) == here.strategy.entries.facts(other.entries)


@every_kind
def test_equal_decisions_share_arrays(kind: str):
    here = at_work(kind)
    here.rounds(4)
    state = prepared(here.strategy, here.state)
    for client in range(USERS):
        one, other = (here.strategy.entries.mask(state.entries, state.layout, client, 0.5) for _ in range(2))
        assert all(one[name] is other[name] for name in one)
        first = 0 if kind not in OWN else client
        assert here.strategy.carve(state, client, 0.5) is here.strategy.carve(state, first, 0.5)


@pytest.mark.parametrize("kind", sorted(set(OWN) - {"columns"}))
def test_own_masks_are_ones_own(kind: str):
    here = at_work(kind)
    here.rounds(6)
    masks = {here.strategy.carve(here.state, client, 1.0).held_key for client in range(USERS)}
    assert len(masks) > 10


@every_kind
@pytest.mark.parametrize("model", ["mf", "neumf"])
def test_what_is_kept_is_what_was_asked_for(kind: str, model: str):
    here = at_work(kind, model=model)
    here.rounds(8)
    entries, state, layout = here.strategy.entries, here.state, here.state.layout
    if isinstance(entries, KOfN):
        for name in unmasked({n: state.model[n] for n in maskable(layout)}):
            rows = entries.of(name, state.model).sum(-1)
            assert (rows == max(1, round(0.4 * state.model[name].shape[-1]))).all()
        return
    served = [entries.mask(state.entries, layout, client, 0.5) for client in range(USERS)]
    pruned = [masks for masks in served if masks]
    for masks in pruned:
        for mask in masks.values():
            count = mask.sum() if kind != "columns" else mask.reshape(-1, mask.shape[-1]).any(0).sum()
            size = mask.size if kind != "columns" else mask.shape[-1]
            if kind == "columns":
                assert mask.sum() == count * (mask.size // size), "whole columns"
            wanted = 0.5 if kind == "by rate" else getattr(entries, "keep", 1.0)
            assert count >= max(1, round(wanted * size))
            if kind not in ("salient", *OWN):
                assert count == max(1, round(wanted * size))
    if kind == "salient":
        assert pruned and np.concatenate([m.ravel() for m in pruned[0].values()]).mean() < 1
    if kind in OWN:
        left = [float(share) for share in group(state.entries, "left").values()]
        assert len(left) == len(pruned) > 10 and min(left) == pytest.approx(entries.keep, abs=0.03)
        real = [np.concatenate([mask.ravel() for mask in masks.values()]).mean() for masks in pruned]
        assert entries.facts(state.entries)["kept"] == pytest.approx(np.mean(real))
    assert bool(pruned) == (kind != "all")


@every_kind
def test_facts_say_what_is_there(kind: str):
    """`kept` is counted from the masks; a `ticket`, which tells rounds apart, have those alone that shrink for everybody."""
    here = at_work(kind)
    for _ in range(5):
        done = here.round()
        masks = here.strategy.entries.mask(here.state.entries, here.state.layout, 0, 1.0)
        if kind not in ("all", "by rate", "k of n", *OWN):
            flat = [mask.ravel() for mask in masks.values()] or [np.ones(1)]
            assert done.facts["kept"] == pytest.approx(np.concatenate(flat).mean())
        assert ("kept" in done.facts) == (kind not in ("all", "by rate"))
        assert done.facts.get("ticket") == (done.facts["kept"] if isinstance(here.strategy.entries, Lottery) else None)


def listened(here: World, model: Tensors, clients: list[int], submodels: list[Submodel] | None) -> Tensors:
    """Everybody's private rows after some have listened."""
    population = here.population.copy()
    told, version = here.strategy.objective, here.state.version
    listen(here.fleet.recommender, population, model, clients, told, steps=5, seed=1, version=version, submodels=submodels)
    return population.private.values


@pytest.mark.parametrize("kind", ["by rate", "columns", "k of n", "personal"])
def test_who_is_silent_listens_to_what_it_is_served_with(kind: str):
    """With others or alone, and to a model masked beforehand alike; what it does not hold of its rows stays as it is."""
    here = at_work(kind, pruning=Importance())
    here.rounds(6)
    state, clients = prepared(here.strategy, here.state), list(range(0, USERS, 2))
    submodels = [here.strategy.carve(state, client, 0.5 if client % 4 else 1.0) for client in clients]
    assert len({submodel.held_key for submodel in submodels}) > 1
    start, together = here.private, listened(here, state.model, clients, submodels)
    for client, submodel in zip(clients, submodels, strict=True):
        alone = listened(here, state.model, [client], [submodel])
        held = torch.from_numpy(submodel.held["latent"])
        for name, rows in together.items():
            assert torch.allclose(alone[name][client], rows[client], atol=1e-6)
            rest = torch.ones(rows.shape[1], dtype=torch.bool)
            rest[held] = False
            assert torch.equal(rows[client][rest], start[name][client][rest])
            assert not torch.allclose(rows[client][held], start[name][client][held])
            assert torch.equal(rows[client + 1], start[name][client + 1])
        cut = extract(state.model, state.layout, submodel)
        assert same(listened(here, cut, [client], [submodel]), alone), "as on a device, which has nothing but its cut"
        if submodel.widths == state.layout.full:
            assert same(listened(here, cut, [client], None), alone)


COMBINED = {
    "minibatches": {"batch": 8},
    "a network, of any width": {"model": "neumf", "pruning": Importance()},
    "silos and windows": {"silo": True, "pruning": Window(), "batch": 16},
    "a network in silos, windows": {"model": "neumf", "silo": True, "pruning": Window(), "epochs": 2},
}


def agree(strategy: Strategy, *, model: str = "mf", silo: bool = False, atol: float = 1e-5) -> None:
    owner = silos(train(), 7, by="quantity", seed=3) if silo else None
    serial, vector = (
        world(strategy, model=model, fleet=fleet, noise=0.1, client_of_user=owner) for fleet in ("serial", "vector")
    )
    start = serial.state.model
    for one, other in zip(serial.rounds(4), vector.rounds(4), strict=True):
        for left, right in zip(one.reports, other.reports, strict=True):
            assert (left.order.ticket, left.finished, left.examples) == (right.order.ticket, right.finished, right.examples)
            assert left.order.submodel == right.order.submodel
            assert left.loss == pytest.approx(right.loss, abs=1e-5)
            assert left.gate == pytest.approx(right.gate, nan_ok=True)
            padding = ~right.updates.present[right.position]
            for name in right.order.model:
                if vector.state.layout.kind(name) == "touched":
                    assert not right.updates.tensors[name][right.position][padding].any(), "padding was trained"
    assert close(serial.state.model, vector.state.model, atol) and close(serial.private, vector.private, atol)
    assert finite(serial.state.model) and not same(serial.state.model, start)


@every_kind
@pytest.mark.parametrize("case", sorted(COMBINED))
def test_fleets_agree(kind: str, case: str):
    given = dict(COMBINED[case])
    model, silo, pruning = given.pop("model", "mf"), given.pop("silo", False), given.pop("pruning", Whole())
    strategy = Strategy(
        selector=Uniform(3 if silo else 6), rates=ByCapability(8), pruning=pruning, entries=ENTRIES[kind],
        objective=Objective(lr=0.3, **given),
    )  # fmt: skip
    agree(strategy, model=model, silo=silo)


TAUGHT = {
    "local": Objective(lr=0.3, distillation=Distillation("local", 0.5, 2.0, top=4, ranking=0.1, attention=0.1)),
    "local, in steps": Objective(lr=0.3, batch=8, distillation=Distillation("local", 0.5, 2.0, top=4, ranking=0.1)),
    "sent": Objective(lr=0.3, epochs=2, distillation=Distillation("sent", 0.3, attention=0.2)),
    "past": Objective(lr=0.3, epochs=2, batch=8, distillation=Distillation("past", 0.5, attention=0.1)),
    "itself, narrower": Objective(lr=0.3, epochs=2, nested=0.5),
}


@pytest.mark.parametrize("silo", [False, True], ids=["one user", "silos"])
@pytest.mark.parametrize("teacher", sorted(TAUGHT))
def test_fleets_agree_on_what_is_taught(teacher: str, silo: bool):
    entries = Personal(0.4, step=0.3, above=0.0)
    strategy = Strategy(
        selector=Uniform(3 if silo else 6), rates=ByCapability(8), pruning=Importance(), entries=entries,
        objective=TAUGHT[teacher],
    )  # fmt: skip
    agree(strategy, silo=silo)


def test_relations_agree_at_one_width():
    """Cosines of rows of two units near zero magnify rounding, so widths are whole here."""
    objective = Objective(lr=0.3, batch=8, distillation=Distillation("sent", relation=0.5, compared=6))
    agree(Strategy(entries=Feedback(0.7), pruning=Whole(), selector=Uniform(8), objective=objective))


@every_kind
def test_clients_who_vanish_leave_no_trace_in_the_masks(kind: str):
    """Masks follow from the reports: lost orders must not count."""
    here = at_work(kind)
    here.rounds(2)
    state, entries = prepared(here.strategy, here.state), here.strategy.entries
    here.fleet.devices = replace(here.fleet.devices, dropout=0.999)
    lost = here.round()
    assert not lost.reports and lost.lost
    assert alike(here.state.entries, state.entries)
    assert entries.facts(here.state.entries) == entries.facts(state.entries)
