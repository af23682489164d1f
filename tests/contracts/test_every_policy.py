"""What every pruning policy promises about the units it carves."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from world import recommender

from fedprune.axes import Axis, Layout
from fedprune.errors import LayoutError
from fedprune.pruning import Importance, Leading, Pruning, Window
from fedprune.submodel import Submodel

POLICIES: dict[str, Pruning] = {"leading": Leading(), "importance": Importance(), "window": Window()}
NESTED = ["importance", "leading"]
every_policy = pytest.mark.parametrize("name", sorted(POLICIES))
MODELS = ["mf", "neumf"]
RATES = [0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]


class Carver:
    """A policy with the memory of its first round."""

    def __init__(self, name: str, model: str) -> None:
        what = recommender(model)
        chance = torch.Generator().manual_seed(3)
        self.model = {key: torch.randn(t.shape, generator=chance) for key, t in what.initial(0).items()}
        self.layout: Layout = what.layout
        self.policy = POLICIES[name]
        self.memory = self.policy.prepare({}, self.model, self.layout)

    def __call__(self, rate: float, client: int = 0, version: int = 0) -> Submodel:
        return self.policy.carve(self.memory, self.layout, client, version, rate)


@every_policy
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rate", RATES)
def test_units_are_sorted_unique_in_range_and_enough(name: str, model: str, rate: float):
    carve = Carver(name, model)
    for client, version in [(0, 0), (5, 0), (5, 9), (23, 1000)]:
        submodel = carve(rate, client, version)
        Submodel.checked(carve.layout, submodel.held, submodel.trained)
        assert submodel.trained_widths == carve.layout.widths(rate)
        for axis, kind in carve.layout.prunable.items():
            for units in (submodel.held[axis], submodel.trained[axis]):
                assert units.dtype == np.int64 and (np.diff(units) > 0).all()
                assert kind.floor <= len(units) and units[0] >= 0 and units[-1] < kind.size
            assert set(submodel.trained[axis]) <= set(submodel.held[axis])


@every_policy
def test_the_same_question_has_the_same_answer(name: str):
    assert Carver(name, "neumf")(0.5, 3, 4) == Carver(name, "neumf")(0.5, 3, 4)


@every_policy
@pytest.mark.parametrize("model", MODELS)
def test_rate_one_is_the_whole_model(name: str, model: str):
    carve = Carver(name, model)
    submodel = carve(1.0, 7, 3)
    assert submodel == Submodel.full(carve.layout) and not submodel.is_window


@every_policy
def test_too_small_a_rate_is_refused_with_the_smallest(name: str):
    carve = Carver(name, "neumf")  # its narrowest axis has 8 units
    assert carve.layout.smallest_rate == 0.125
    with pytest.raises(LayoutError, match=r'keeps 0 of 8 units of "latent", below its floor 1.*smallest rate.*0\.125'):
        carve(0.05)
    for rate in (0.0, 1.01, -1.0):
        with pytest.raises(LayoutError, match=r"not in \(0, 1\]"):
            carve(rate)
    carve(carve.layout.smallest_rate)


def test_widths_are_the_nearest_whole_numbers():
    layout = Layout.of({"ten": Axis(10), "three": Axis(3)}, one="ten three")
    assert [layout.widths(rate) for rate in (0.28, 0.34, 0.9)] == [
        {"ten": 3, "three": 1},
        {"ten": 3, "three": 1},
        {"ten": 9, "three": 3},
    ]


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("model", MODELS)
def test_smaller_is_part_of_larger_and_the_same_for_everybody(name: str, model: str):
    carve = Carver(name, model)
    for small, large in pairwise(RATES):
        for axis in carve.layout.prunable:
            assert set(carve(small).held[axis]) <= set(carve(large).held[axis])
    assert carve(0.5, 0, 0) == carve(0.5, 17, 40)
    assert not carve(0.5).is_window


def test_the_policies_not_nested_are_named():
    assert set(POLICIES) - set(NESTED) == {"window"}


def test_importance_takes_the_largest_norms_and_keeps_its_order():
    carve = Carver("importance", "mf")
    norms = carve.model["item_embedding"].norm(dim=0)
    assert set(carve(0.25).held["latent"]) == set(norms.topk(2).indices.tolist())
    later = {key: tensor.flip(-1) for key, tensor in carve.model.items()}
    assert carve.policy.prepare(carve.memory, later, carve.layout) is carve.memory


def test_importance_counts_both_halves_of_a_concatenation():
    carve = Carver("importance", "mlp")
    weight, item = carve.model["hidden1_weight"].double(), carve.model["item_tower"].double()
    size = item.shape[1]
    expected = (item**2).sum(0) + (weight[:, :size] ** 2).sum(0) + (weight[:, size:] ** 2).sum(0)
    assert carve.memory["tower"].tolist() == torch.argsort(expected, descending=True).tolist()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rate", [0.25, 0.625])
def test_a_window_holds_everything_and_covers_all_units_evenly(model: str, rate: float):
    carve = Carver("window", model)
    for axis, kind in carve.layout.prunable.items():
        count = np.zeros(kind.size, int)
        for version in range(kind.size):
            submodel = carve(rate, 11, version)
            assert len(submodel.held[axis]) == kind.size and submodel.is_window
            count[submodel.trained[axis]] += 1
        assert (count == carve.layout.widths(rate)[axis]).all()


def test_windows_differ_between_clients_and_cover_all_units_in_every_round():
    carve = Carver("window", "mf")
    windows = [tuple(carve(0.25, client, 4).trained["latent"]) for client in range(24)]
    assert len(set(windows)) == 8, "8 units, 8 offsets"
    assert set().union(*windows) == set(range(8))
    assert carve(0.25, 3, 4) != carve(0.25, 3, 5)


def test_windows_are_neighbouring_units_around_the_end():
    carve = Carver("window", "mf")
    for version in range(8):
        units = carve(0.375, 0, version).trained["latent"]
        assert set(units) == {(version + step) % 8 for step in range(3)}
