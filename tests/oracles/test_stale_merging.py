"""What stale reports count, by hand: three items, two latent units, and a model that has moved on since they were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from reports import alone, report
from world import close, same, world

from fedprune.axes import Axis, Layout
from fedprune.catalog import build
from fedprune.entries import Feedback
from fedprune.errors import ConfigError
from fedprune.exchange import Report, Updates
from fedprune.gather import Gather
from fedprune.merge import Adam, Average, Merge
from fedprune.pruning import Leading, Whole, Window
from fedprune.rates import ByCapability
from fedprune.strategy import Strategy
from fedprune.submodel import Submodel, mask, positions
from fedprune.types import Tensors

LAYOUT = Layout.of(
    {"item": Axis(3, touched=True), "latent": Axis(2)}, item_embedding="item latent", item_bias="item", bias="latent"
)
MODEL: Tensors = {
    "item_embedding": torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]),
    "item_bias": torch.tensor([1.0, 1.0, 1.0]),
    "bias": torch.tensor([10.0, 20.0]),
}
PAST: Tensors = {
    "item_embedding": torch.tensor([[0.0, 3.0], [5.0, 7.0], [9.0, 2.0]]),
    "item_bias": torch.tensor([3.0, 5.0, 0.0]),
    "bias": torch.tensor([8.0, 24.0]),
}
"""The version that stale reports began with."""


def begun(sent: Report, model: Tensors = PAST) -> Report:
    """The same report of that model."""
    return replace(sent, order=replace(sent.order, model=model))


def narrow(staleness: int = 0, ticket: int = 0) -> Report:
    """Client 0 holds unit 0 alone, and items 0 and 2."""
    tensors = {
        "item_embedding": torch.tensor([[1.0], [2.0]]),
        "item_bias": torch.tensor([1.0, 1.0]),
        "bias": torch.tensor([6.0]),
    }
    return report(alone(LAYOUT, {"latent": [0]}, [0, 2], tensors), ticket=ticket, staleness=staleness)


def wide(staleness: int = 0, ticket: int = 1) -> Report:
    """Client 1 holds both units, and items 0 and 1."""
    tensors = {
        "item_embedding": torch.tensor([[3.0, 4.0], [5.0, 6.0]]),
        "item_bias": torch.tensor([3.0, 5.0]),
        "bias": torch.tensor([2.0, 8.0]),
    }
    return report(alone(LAYOUT, {"latent": [0, 1]}, [0, 1], tensors), ticket=ticket, staleness=staleness)


def change(merge: Merge, *reports: Report, model: Tensors = MODEL) -> dict[str, list]:
    after, _ = merge(model, {}, LAYOUT, reports)
    return {name: (tensor - model[name]).tolist() for name, tensor in after.items()}


# ---- what is stale counts less -----------------------------------------------------------------------------------------


def test_the_discount_multiplies_what_is_summed_and_not_what_it_is_divided_by():
    """Client 1 is three merges behind, (1 + 3)^-1/2 = 1/2; two clients on unit 0, one on unit 1."""
    assert change(Merge(discount=0.5), narrow(), wide(3)) == {
        "item_embedding": [[1.25, 2.0], [2.5, 3.0], [2.0, 0.0]],  # (1 + 3/2)/2, 4/2; 5/2, 6/2; 2
        "item_bias": [1.25, 2.5, 1.0],
        "bias": [3.5, 4.0],  # (6 + 2/2)/2, 8/2
    }
    assert change(Merge(discount=1.0), narrow(), wide(3))["bias"] == [3.25, 2.0]
    assert change(Merge(discount=0.5), narrow(3), wide(3))["bias"] == [2.0, 4.0], "all of them stale, and nothing makes up"


def test_the_discount_beside_weights_and_the_cohort():
    """Periods 1 and 4: (1*6 + 4*2/2) / 5; by the cohort unit 1 is divided by 5 too."""
    assert change(Merge(discount=0.5, weights="period"), narrow(), wide(3))["bias"] == [2.0, 4.0]
    got = change(Merge(discount=0.5, weights="period", over="cohort"), narrow(), wide(3))
    assert got["bias"] == pytest.approx([2.0, 16 / 5])
    common = change(Merge(discount=0.5, over="common"), narrow(), wide(3))
    assert common["bias"] == [3.5, 0.0] and common["item_embedding"] == [[1.25, 0.0], [2.5, 3.0], [2.0, 0.0]]


def test_a_discount_of_zero_and_reports_of_this_version_are_plain_averages():
    plain = change(Merge(), narrow(), wide(3))
    assert change(Merge(discount=0.0), narrow(), wide(3)) == plain == change(Merge(discount=2.0), narrow(), wide())
    with pytest.raises(ConfigError, match=r"discount is -0.5; it is an exponent of 1/\(1 \+ staleness\), so not negative"):
        Merge(discount=-0.5)


def test_fedbuffs_formula():
    """w <- w + lr/K sum_i s(tau_i) d_i, K = 2, lr = 0.5, s(0) = 1, s(8) = 1/3 (Nguyen et al. 2022, algorithm 1)."""
    merge = Merge(discount=0.5, optimiser=Average(0.5))
    got = change(merge, wide(0, ticket=0), wide(8, ticket=1))
    assert got["bias"] == pytest.approx([0.5 / 2 * (2 + 2 / 3), 0.5 / 2 * (8 + 8 / 3)])


def test_fewer_reports_take_a_shorter_step():
    """(2 / among)^scaling of it, and never a longer one; among so many clients as there are, unless another number is given."""
    reports = [narrow(), wide()]

    def step(population: int, **settings: Any) -> list[float]:
        after, _ = Merge(optimiser=Average(0.5), **settings)(MODEL, {}, LAYOUT, reports, population)
        return (after["bias"] - MODEL["bias"]).tolist()

    assert step(8) == step(8, among=8) == [2.0, 4.0] == step(2, scaling=0.5) == step(1, scaling=1.0)
    assert step(8, scaling=0.5) == [1.0, 2.0] == step(99, scaling=0.5, among=8) == step(4, scaling=1.0)
    for wrong in ({"scaling": 1.5}, {"scaling": -0.1}, {"among": 0}):
        with pytest.raises(ConfigError, match=r"they must be in \[0, 1\] and at least 1"):
            Merge(**wrong)


# ---- the model that a stale report ends with ---------------------------------------------------------------------------


def test_fedasyncs_formula():
    """x <- (1 - a) x + a x_k, a = 0.6 (1 + 3)^-1/2 = 0.3, x_k = 8 + 2 and 24 + 8 (Xie et al. 2019, algorithm 1)."""
    merge = Merge(discount=0.5, mixing=True, optimiser=Average(0.6))
    got, _ = merge(MODEL, {}, LAYOUT, [begun(wide(3))])
    assert got["bias"].tolist() == pytest.approx([0.7 * 10 + 0.3 * 10, 0.7 * 20 + 0.3 * 32])
    assert got["item_bias"].tolist() == pytest.approx([0.7 + 0.3 * (3 + 3), 0.7 + 0.3 * (5 + 5), 1.0]), "item 2 is another's"
    assert got["item_embedding"].flatten().tolist() == pytest.approx([0.7 + 0.3 * 3, 0.7 + 0.3 * 7, 3.7, 4.6, 1.0, 1.0])


def test_mixing_pulls_on_what_was_trained_alone():
    """x + (x_tau + d - x), at the units that client 0 holds and the items that it had."""
    assert change(Merge(mixing=True), begun(narrow(1))) == {
        "item_embedding": [[0.0, 0.0], [0.0, 0.0], [10.0, 0.0]],  # 0 + 1 - 1; 9 + 2 - 1
        "item_bias": [3.0, 0.0, 0.0],  # 3 + 1 - 1; 0 + 1 - 1
        "bias": [4.0, 0.0],  # 8 + 6 - 10
    }


def test_mixing_reports_of_several_versions():
    """Client 0's began where the model still is, client 1's did not."""
    got = change(Merge(mixing=True, discount=0.5), begun(narrow(), MODEL), begun(wide(3)))
    assert got["bias"] == [3.0, 6.0]  # (6 + (8 + 2 - 10)/2)/2, (24 + 8 - 20)/2
    assert got["item_bias"] == [1.75, 4.5, 1.0]  # (1 + (3 + 3 - 1)/2)/2, (5 + 5 - 1)/2, 1
    weighted = change(Merge(mixing=True, weights="period"), begun(narrow(), MODEL), begun(wide(3)))
    assert weighted["bias"] == pytest.approx([1.2, 12.0])  # (1*6 + 4*0)/5, 12


def test_mixing_in_the_version_that_was_asked_is_the_mean_update_to_a_bit():
    reports = [begun(narrow(), MODEL), begun(wide(), MODEL)]
    for optimiser in (None, Average(0.3), Adam(0.1)):
        one, other = (Merge(mixing=mixing, optimiser=optimiser)(MODEL, {}, LAYOUT, reports) for mixing in (True, False))
        assert same(one[0], other[0]) and same(one[1], other[1])


def test_mixing_moves_no_more_of_a_window_than_it_trained():
    """Both units are held and the second is trained."""
    part = {"item_embedding": torch.tensor([[0.0, 2.0]]), "item_bias": torch.tensor([2.0]), "bias": torch.tensor([0.0, 2.0])}
    sent = report(alone(LAYOUT, {"latent": [0, 1]}, [0], part, trained={"latent": [1]}), staleness=2)
    assert change(Merge(mixing=True), begun(sent)) == {
        "item_embedding": [[0.0, 4.0], [0.0, 0.0], [0.0, 0.0]],  # 3 + 2 - 1
        "item_bias": [4.0, 0.0, 0.0],
        "bias": [0.0, 6.0],  # 24 + 2 - 20
    }


@pytest.mark.parametrize("through", [False, True])
def test_mixing_moves_no_entry_that_is_masked_for_good(through: bool):
    """With `through` the masked ones are trained all the same."""
    entries = {"bias": torch.tensor([True, False]).numpy(), "item_bias": torch.tensor([False, True, True]).numpy()}
    submodel = replace(Submodel.checked(LAYOUT, Submodel.full(LAYOUT).held, None, entries), through=through)
    on = torch.tensor([1.0, float(through)])
    plain = wide()
    tensors = {**plain.updates.tensors, "bias": plain.updates.tensors["bias"] * on}
    tensors["item_bias"] = plain.updates.tensors["item_bias"] * on.flip(0)
    updates = Updates((submodel,), plain.updates.rows, plain.updates.present, tensors)
    got = change(Merge(mixing=True), begun(report(updates, staleness=1)))
    assert got["bias"] == [0.0, 12.0 if through else 0.0] and got["item_bias"] == [5.0 if through else 0.0, 9.0, 0.0]
    assert got["item_embedding"] == [[2.0, 6.0], [9.0, 12.0], [0.0, 0.0]]


# ---- whole rounds, against the definition ------------------------------------------------------------------------------


def in_full(sent: Report, layout: Layout, model: Tensors) -> tuple[Tensors, Tensors]:
    """An update in the full model's shape, and 1.0 where its client trained."""
    submodel, place = sent.order.submodel, sent.position
    rows = sent.updates.rows[place][sent.updates.present[place]]
    there = torch.zeros(layout.items)
    there[rows] = 1.0
    updates, trained = {}, {}
    for name, dimensions in layout.tensors.items():
        if name not in model:
            continue
        part, mesh = sent.updates.tensors[name][place], [positions(layout, d, submodel.held) for d in dimensions]
        if layout.kind(name) == "touched":
            part, mesh[0] = part[sent.updates.present[place]], rows
        updates[name] = torch.zeros(layout.shape(name))
        updates[name][torch.meshgrid(*mesh, indexing="ij")] = part
        on = torch.ones(())
        for dimension in dimensions:
            on = on[..., None] * (there if dimension == ("item",) else mask(layout, dimension, submodel.trained))
        kept = {} if submodel.through else submodel.entries
        trained[name] = on * torch.from_numpy(kept[name]) if name in kept else on
    return updates, trained


def defined(merge: Merge, model: Tensors, layout: Layout, reports: Sequence[Report]) -> Tensors:
    """x_j + sum_k w_k s_k m_kj (d_kj + x_tau,j - x_j) / sum_k w_k m_kj."""
    given = [in_full(sent, layout, model) for sent in reports]
    result = {}
    for name, tensor in model.items():
        above, below = torch.zeros_like(tensor), torch.zeros_like(tensor)
        for sent, (updates, trained) in zip(reports, given, strict=True):
            weight, strength = merge.weight(sent, layout, name), (1 + sent.staleness) ** -merge.discount
            moved = updates[name] + (sent.order.model[name] - tensor if merge.mixing else 0)
            above += weight * strength * trained[name] * moved
            below += weight * trained[name]
        result[name] = tensor + torch.where(below > 0, above / below.clamp(min=1e-9), 0.0)
    return result


SHAPES = {
    "narrower": Strategy(rates=ByCapability(4), pruning=Leading()),
    "windows": Strategy(rates=ByCapability(4), pruning=Window()),
    "masks": Strategy(rates=ByCapability(4), pruning=Whole(), entries=Feedback(None, every=1)),
    "through": Strategy(rates=ByCapability(4), pruning=Whole(), entries=Feedback(None, every=1, through=True)),
}


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("model", ["mf", "neumf"])
def test_whole_rounds_equal_the_definition(shape: str, mixing: bool, model: str):
    """Clients stacked by the versions that they began with, some of them some merges ago."""
    merge = Merge(weights="period", discount=0.5, mixing=mixing)
    strategy = replace(SHAPES[shape], gather=Gather(within=8.0, late="keep", refill=2), merge=merge)
    here, stale = world(strategy, model=model, sigma=4.0), 0
    for _ in range(6):
        before = here.state.model
        done = here.round()
        stale = max([stale, *(sent.staleness for sent in done.reports)])
        expected = defined(merge, before, here.state.layout, done.reports)
        for name, tensor in here.state.model.items():
            torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert stale >= 1


def test_fedbuff_in_a_whole_run():
    """w + sum_i s(tau_i) d_i / K on what all train, s(tau) = (1 + tau)^-1/2, K reports."""
    here = world(build("fedbuff", buffer=4, cohort=9), model="neumf", workload="equal", sigma=3.0)
    stale = 0
    for _ in range(5):
        before = here.state.model["output_weight"]
        done = here.round()
        mean = sum((1 + r.staleness) ** -0.5 * r.updates.tensors["output_weight"][r.position] for r in done.reports) / 4
        torch.testing.assert_close(here.state.model["output_weight"], before + mean)
        stale += sum(r.staleness > 0 for r in done.reports)
    assert stale > 5


def test_fedasync_in_a_whole_run():
    """x + a (x_k - x), a = 0.6 (1 + tau)^-1/2, x_k the client's model at its end, on the rows that it trained."""
    here = world(build("fedasync", cohort=6), workload="equal", sigma=3.0)
    tried = set()
    for _ in range(12):
        before = here.state.model
        (report,) = here.round().reports
        rows = report.updates.rows[report.position][report.updates.present[report.position]]
        share = 0.6 * (1 + report.staleness) ** -0.5
        expected = {name: tensor.clone() for name, tensor in before.items()}
        for name, update in report.updates.tensors.items():
            ended = report.order.model[name][rows] + update[report.position][report.updates.present[report.position]]
            expected[name][rows] += share * (ended - before[name][rows])
        assert close(here.state.model, expected, atol=1e-6)
        tried.add(report.staleness)
    assert max(tried) > 2
