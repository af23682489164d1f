"""Tickets of one's own, by brute force: who prunes, and what of what was trained is left."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from reports import alone, report

from fedprune.axes import Axis, Layout
from fedprune.entries import Personal
from fedprune.errors import ConfigError
from fedprune.exchange import Report
from fedprune.types import Memory, Tensors

LAYOUT = Layout.of(
    {"item": Axis(6, touched=True), "latent": Axis(5), "hidden": Axis(4)},
    item_embedding="item latent",
    weight="hidden latent",
    bias="hidden",
)
EVERYTHING = {"latent": range(5), "hidden": range(4)}


def drawn(seed: int, scale: float = 1.0) -> tuple[Tensors, dict[str, torch.Tensor]]:
    """A model, and an update of items 1, 3 and 4 and of all that is shared."""
    chance = torch.Generator().manual_seed(seed)
    model = {name: torch.randn(LAYOUT.shape(name), generator=chance) for name in LAYOUT.tensors}
    shapes = {"item_embedding": (3, 5), "weight": (4, 5), "bias": (4,)}
    return model, {name: scale * torch.randn(shape, generator=chance) for name, shape in shapes.items()}


def told(model: Tensors, update: Tensors, gate: float | None, client: int = 0) -> Report:
    sent = report(alone(LAYOUT, EVERYTHING, [1, 3, 4], update))
    return replace(sent, gate=gate, order=replace(sent.order, client=client, model=model))


def trained(model: Tensors, update: Tensors) -> Tensors:
    after = {name: tensor.clone() for name, tensor in model.items()}
    after["item_embedding"][[1, 3, 4]] += update["item_embedding"]
    after["weight"] += update["weight"]
    return after


def by_force(weights: torch.Tensor, share: float, among: np.ndarray | None = None) -> set[int]:
    """Places of the largest, as many as the share of all says, among those still there."""
    flat = weights.abs().flatten().tolist()
    alive = [place for place in range(len(flat)) if among is None or among.flat[place]]
    return set(sorted(alive, key=lambda place: -flat[place])[: max(1, round(share * len(flat)))])


def learned(entries: Personal, memory: Memory, *reports: Report) -> Memory:
    return entries.learn(memory, {}, LAYOUT, reports, lambda: pytest.fail("the mean was asked for"))


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_of_what_was_trained_stay(seed: int):
    entries, memory, last, told_apart = Personal(0.3, step=0.4, above=0.5), {}, {}, 0
    for number, share in enumerate([0.6, 0.36, 0.3]):  # .6 * .6, then .216 is below keep
        model, update = drawn(10 * seed + number)
        memory = learned(entries, memory, told(model, update, 0.9))
        masks = entries.mask(memory, LAYOUT, 0, 1.0)
        after = trained(model, update)
        for name in ("item_embedding", "weight"):
            expected = by_force(after[name], share, last.get(name))
            assert set(np.flatnonzero(masks[name])) == expected
            told_apart += expected != by_force(model[name], share, last.get(name))
        assert set(masks) == {"item_embedding", "weight"}
        last = masks
    assert told_apart >= 4, "the received weights would say the same"
    again = learned(entries, memory, told(*drawn(99), 0.9))
    assert np.array_equal(again["mask/0"], memory["mask/0"]), "no fewer than keep"


@pytest.mark.parametrize("gate", [None, float("nan"), 0.0, 0.5])
def test_a_closed_gate_prunes_nothing(gate: float | None):
    memory = learned(Personal(above=0.5), {}, told(*drawn(1), gate))
    assert memory == {}
    assert learned(Personal(above=0.5), {}, told(*drawn(1), 0.51)) != {}


def test_everybody_prunes_for_himself():
    entries = Personal(0.3, step=0.4)
    one, other = drawn(1), drawn(2)
    memory = learned(entries, {}, told(*one, 0.9, client=3), told(*other, 0.9, client=5), told(*one, 0.1, client=7))
    assert set(np.flatnonzero(entries.mask(memory, LAYOUT, 3, 1.0)["weight"])) == by_force(trained(*one)["weight"], 0.6)
    assert set(np.flatnonzero(entries.mask(memory, LAYOUT, 5, 1.0)["weight"])) == by_force(trained(*other)["weight"], 0.6)
    assert entries.mask(memory, LAYOUT, 7, 1.0) == {}
    assert entries.facts(memory) == {"kept": pytest.approx(0.6), "pruned_clients": 2.0}
    assert learned(entries, memory, told(*drawn(8), 0.9, client=5))["mask/3"] is memory["mask/3"]


def test_only_where_training_has_changed_what_would_go():
    """Sub-FedAvg's distance: the share of entries in which the two masks differ, counted."""
    model, update = drawn(4, scale=0.3)
    after, differing = trained(model, update), 0
    for name in ("item_embedding", "weight"):
        differing += len(by_force(model[name], 0.6) ^ by_force(after[name], 0.6))
    distance = differing / 50
    assert 0 < distance < 1
    assert learned(Personal(0.3, step=0.4, distance=distance - 1e-9), {}, told(model, update, 0.9))
    assert not learned(Personal(0.3, step=0.4, distance=distance), {}, told(model, update, 0.9))
    still = {name: torch.zeros_like(tensor) for name, tensor in update.items()}
    assert not learned(Personal(0.3, step=0.4, distance=1e-9), {}, told(model, still, 0.9))


def test_whole_columns():
    entries, memory, model = Personal(0.4, step=0.4, by="columns"), {}, {}
    alive = {"item_embedding": set(range(5)), "weight": set(range(5))}
    for number, left in enumerate([3, 2]):  # .6 and .4 of 5 columns
        model, update = drawn(20 + number)
        memory = learned(entries, memory, told(model, update, 0.9))
        masks, after = entries.mask(memory, LAYOUT, 0, 1.0), trained(model, update)
        for name, columns in alive.items():
            size = {column: float(after[name][:, column].abs().sum()) for column in columns}
            alive[name] = set(sorted(size, key=lambda column: -size[column])[:left])
            assert {tuple(map(bool, row)) for row in masks[name]} == {tuple(c in alive[name] for c in range(5))}
    assert entries.facts(memory)["kept"] == pytest.approx(0.4)


def test_the_last_column_to_go_is_the_last_that_may():
    """.55 of 5 columns are 3, more than .55, and a step of a column would leave 2."""
    entries, memory = Personal(0.55, step=0.4, by="columns"), {}
    for number in range(3):
        before, memory = memory, learned(entries, memory, told(*drawn(30 + number), 0.9))
        assert entries.facts(memory)["kept"] == pytest.approx(0.6)
    assert memory["mask/0"] is before["mask/0"]
    slow, shares = Personal(0.55, step=0.01, by="columns"), []
    for number in range(4):
        memory = learned(slow, memory if shares else {}, told(*drawn(40 + number), 0.9))
        shares.append(slow.facts(memory)["kept"])
    assert shares == pytest.approx([0.8, 0.6, 0.6, 0.6]), "a step is a column at least"


def test_narrow_clients_count_the_rest_as_received():
    """A client that holds units 0 and 2 of both axes; it trained those alone."""
    model, _ = drawn(6)
    held = {"latent": [0, 2], "hidden": [0, 2]}
    update = {"item_embedding": torch.full((1, 2), 40.0), "weight": torch.full((2, 2), 50.0), "bias": torch.zeros(2)}
    sent = report(alone(LAYOUT, held, [2], update))
    sent = replace(sent, gate=0.9, order=replace(sent.order, model=model))
    entries = Personal(0.1, step=0.8)
    masks = entries.mask(learned(entries, {}, sent), LAYOUT, 0, 1.0)
    assert set(np.flatnonzero(masks["weight"])) == {0, 2, 10, 12}
    assert {10, 12} < set(np.flatnonzero(masks["item_embedding"])) and masks["item_embedding"].sum() == 6


def test_impossible_settings_are_refused():
    for settings in ({"keep": 0.0}, {"step": 1.0}, {"above": 1.1}, {"distance": -1.0}, {"by": "rows"}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            Personal(**settings)
