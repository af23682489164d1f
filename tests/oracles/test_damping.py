"""Damped steps by hand: the step of an entry times (the share of the reporters that train it)^damp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from reports import alone, report
from world import LATENT, USERS, same, world

from fedprune.axes import Axis, Layout
from fedprune.catalog import build, trained_with
from fedprune.errors import ConfigError
from fedprune.exchange import Report, Updates
from fedprune.merge import Adam, Average, Merge, trained_by
from fedprune.objective import Objective
from fedprune.submodel import Submodel
from fedprune.types import Tensors

LAYOUT = Layout.of(
    {"item": Axis(3, touched=True), "latent": Axis(2), "hidden": Axis(2)},
    item_embedding="item latent",  # touched rows
    item_bias="item",  # rows without units: everybody trains all there is
    bias="hidden",  # a vector
    weight="hidden latent",  # a shared matrix
)
MODEL: Tensors = {
    "item_embedding": torch.zeros(3, 2),
    "item_bias": torch.zeros(3),
    "bias": torch.tensor([10.0, 20.0]),
    "weight": torch.zeros(2, 2),
}


def narrow() -> Report:
    """Client 0 holds the first unit of both axes, and items 0 and 2."""
    updates = {
        "item_embedding": torch.tensor([[1.0], [2.0]]),
        "item_bias": torch.tensor([1.0, 1.0]),
        "bias": torch.tensor([6.0]),
        "weight": torch.tensor([[4.0]]),
    }
    return report(alone(LAYOUT, {"latent": [0], "hidden": [0]}, [0, 2], updates), ticket=0)


def wide() -> Report:
    """Client 1 holds everything of items 0 and 1."""
    updates = {
        "item_embedding": torch.tensor([[3.0, 4.0], [5.0, 6.0]]),
        "item_bias": torch.tensor([3.0, 5.0]),
        "bias": torch.tensor([2.0, 8.0]),
        "weight": torch.tensor([[2.0, 8.0], [16.0, 32.0]]),
    }
    return report(alone(LAYOUT, {"latent": [0, 1], "hidden": [0, 1]}, [0, 1], updates), ticket=1)


def moved_by_one(ticket: int, held: Mapping[str, Sequence[int]], trained: Mapping[str, Sequence[int]]) -> Report:
    """A client that moves each entry that it trains, all items' among them, by 1."""
    units = [[float(unit in trained[axis]) for unit in held[axis]] for axis in ("latent", "hidden")]
    latent, hidden = (torch.tensor(there) for there in units)
    updates = {
        "item_embedding": latent.repeat(3, 1),
        "item_bias": torch.ones(3),
        "bias": hidden,
        "weight": hidden[:, None] * latent,
    }
    return report(alone(LAYOUT, held, [0, 1, 2], updates, trained), ticket=ticket)


FULL = {"latent": [0, 1], "hidden": [0, 1]}
FIRST = {"latent": [0], "hidden": [0]}


def random(ticket: int, held: Mapping[str, Sequence[int]], rows: Sequence[int]) -> Report:
    """A client with any update."""
    chance = torch.Generator().manual_seed(ticket)
    latent, hidden = len(held["latent"]), len(held["hidden"])
    shapes = {
        "item_embedding": (len(rows), latent),
        "item_bias": (len(rows),),
        "bias": (hidden,),
        "weight": (hidden, latent),
    }
    updates = {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}
    return report(alone(LAYOUT, held, rows, updates), ticket=ticket)


def merged(merge: Merge, *reports: Report) -> dict[str, list]:
    model, _ = merge(MODEL, {}, LAYOUT, reports)
    return {name: tensor.tolist() for name, tensor in model.items()}


@pytest.mark.parametrize(
    ("damp", "rows", "vector", "matrix"),
    [
        (0.0, [[2.0, 4.0], [5.0, 6.0], [2.0, 0.0]], [14.0, 28.0], [[3.0, 8.0], [16.0, 32.0]]),
        (1.0, [[2.0, 2.0], [5.0, 3.0], [2.0, 0.0]], [14.0, 24.0], [[3.0, 4.0], [8.0, 16.0]]),
        (2.0, [[2.0, 1.0], [5.0, 1.5], [2.0, 0.0]], [14.0, 22.0], [[3.0, 2.0], [4.0, 8.0]]),
    ],
)
def test_what_half_of_the_reporters_train_moves_half_to_the_power(damp: float, rows: list, vector: list, matrix: list):
    """Units and not rows: item 2 was client 0's alone, and moves in full where everybody trains the unit.

    The matrix' last entry is of two units that one of two clients trains together: its share is 1/2 and not 1/4.
    """
    assert merged(Merge(damp=damp), narrow(), wide()) == {
        "item_embedding": rows,
        "item_bias": [2.0, 5.0, 1.0],
        "bias": vector,
        "weight": matrix,
    }


@pytest.mark.parametrize("damp", [0.5, 1.0, 2.0, 3.0])
def test_a_window_counts_for_what_it_trains_and_not_for_what_it_holds(damp: float):
    """Four clients, all trained entries moved by 1: the step is the share itself, to the power."""
    reports = [
        moved_by_one(0, FIRST, FIRST),
        moved_by_one(1, FULL, {"latent": [1], "hidden": [0, 1]}),
        moved_by_one(2, FULL, {"latent": [0, 1], "hidden": [1]}),
        moved_by_one(3, FULL, FULL),
    ]
    model, _ = Merge(damp=damp)(MODEL, {}, LAYOUT, reports)
    latent = torch.tensor([3 / 4, 3 / 4]) ** damp
    hidden = torch.tensor([3 / 4, 3 / 4]) ** damp
    both = torch.tensor([[2 / 4, 2 / 4], [2 / 4, 3 / 4]]) ** damp  # hidden by latent
    torch.testing.assert_close(model["item_embedding"], latent.repeat(3, 1))
    torch.testing.assert_close(model["bias"], MODEL["bias"] + hidden)
    torch.testing.assert_close(model["weight"], both)
    assert model["item_bias"].tolist() == [1.0, 1.0, 1.0]


def test_masks_of_entries_do_not_count():
    """Who trains the units counts, whatever its mask leaves of them."""
    masked = Submodel.checked(LAYOUT, Submodel.full(LAYOUT).held, entries={"weight": np.eye(2, dtype=bool)})
    updates = Updates((masked,), torch.zeros(1, 0).long(), torch.zeros(1, 0).bool(), {})
    assert trained_by([narrow(), report(updates, ticket=1)], LAYOUT, "weight").tolist() == [[1.0, 0.5], [0.5, 0.5]]


def test_nobody_s_entries_stay_where_they_are():
    """0 to any power is nothing, and no NaN."""
    assert merged(Merge(damp=0.5), narrow())["weight"] == [[4.0, 0.0], [0.0, 0.0]]


def test_the_optimiser_s_step_is_damped_and_not_what_it_remembers():
    reports = [random(0, FIRST, [0, 2]), random(1, FULL, [0, 1])]
    plain, memory = Merge(optimiser=Adam(lr=0.1))(MODEL, {}, LAYOUT, reports)
    model, damped_memory = Merge(optimiser=Adam(lr=0.1), damp=1.0)(MODEL, {}, LAYOUT, reports)
    assert same(memory, damped_memory)
    steps, damped = ({name: m[name] - MODEL[name] for name in MODEL} for m in (plain, model))
    torch.testing.assert_close(damped["weight"], steps["weight"] * torch.tensor([[1.0, 0.5], [0.5, 0.5]]))
    torch.testing.assert_close(damped["item_embedding"], steps["item_embedding"] * torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(damped["bias"], steps["bias"] * torch.tensor([1.0, 0.5]), atol=2e-6, rtol=1e-5)


def test_it_goes_with_the_other_factors_of_a_step():
    """A server's rate of 1/2, half of four clients merged at scaling 1, and half of the reporters: an eighth."""
    merge = Merge(damp=1.0, scaling=1.0, among=4, optimiser=Average(lr=0.5))
    assert merged(merge, narrow(), wide())["weight"] == [[0.75, 1.0], [2.0, 4.0]]


@pytest.mark.parametrize("optimiser", [None, Adam(lr=0.1)])
def test_no_damping_is_the_same_bits(optimiser: Adam | None):
    reports = [random(0, FIRST, [0, 2]), random(1, FULL, [0, 1]), random(2, FIRST, [1, 2])]
    plain, memory = Merge(optimiser=optimiser)(MODEL, {}, LAYOUT, reports)
    model, again = Merge(optimiser=optimiser, damp=0.0)(MODEL, {}, LAYOUT, reports)
    assert same(plain, model) and same(memory, again)


@pytest.mark.parametrize("held", [FULL, FIRST])
@pytest.mark.parametrize("optimiser", [None, Adam(lr=0.1)])
def test_equal_widths_are_the_same_bits_at_any_damping(held: dict, optimiser: Adam | None):
    """Three reporters: thirds would not add up to 1 if each were counted by itself."""
    reports = [random(number, held, rows) for number, rows in enumerate([[0, 2], [0, 1], [1, 2]])]
    plain, _ = Merge(optimiser=optimiser)(MODEL, {}, LAYOUT, reports)
    model, _ = Merge(optimiser=optimiser, damp=2.0)(MODEL, {}, LAYOUT, reports)
    assert same(plain, model)


@pytest.mark.parametrize("damp", [-0.5, -2])
def test_a_negative_exponent_is_refused(damp: float):
    with pytest.raises(ConfigError, match=f"damp is {damp}; it is an exponent of a share, so not negative"):
        Merge(damp=damp)
    with pytest.raises(ConfigError, match="not negative"):
        build("heterofl", damp=damp)


@pytest.mark.parametrize("damp", ["much", None, True])
def test_what_is_no_number_is_refused(damp: object):
    with pytest.raises(ConfigError, match=r"damp is .*; it must be a number"):
        build("heterofl", damp=damp)


def test_heterofl_builds_it_and_an_experiment_keeps_it():
    strategy = build("heterofl", damp=2)
    assert strategy.merge == Merge(damp=2.0) and build("heterofl").merge == Merge()
    assert trained_with(strategy, Objective(), Merge(optimiser=Adam())).merge == Merge(damp=2.0, optimiser=Adam())


def test_heterofl_damped_moves_what_few_hold_less():
    """A third of the devices hold all, a third half, a third a quarter: each unit's first step is its share to the power."""
    slowness = [1.0, 2.0, 4.0] * (USERS // 3)
    plain, damped = (world(build("heterofl", damp=damp), slowness=slowness) for damp in (0.0, 2.0))
    before = plain.state.model["item_embedding"]
    plain.round()
    damped.round()
    steps, less = (here.state.model["item_embedding"] - before for here in (plain, damped))
    share = torch.tensor([1.0] * (LATENT // 4) + [2 / 3] * (LATENT // 4) + [1 / 3] * (LATENT // 2))
    torch.testing.assert_close(less, steps * share**2, atol=1e-6, rtol=1e-4)


def test_heterofl_damped_is_fedavg_on_equal_devices():
    damped, plain = (
        world(build(name, **own), slowness=[1.0] * USERS) for name, own in (("heterofl", {"damp": 2}), ("fedavg", {}))
    )
    damped.rounds(2)
    plain.rounds(2)
    assert same(damped.state.model, plain.state.model)
