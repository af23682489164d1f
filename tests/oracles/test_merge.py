"""Merging by hand: two clients, three items, two latent units, and numbers that can be checked in the head."""

from __future__ import annotations

import pytest
import torch
from reports import alone, report
from world import same, world

from fedprune.axes import Axis, Layout
from fedprune.catalog import build
from fedprune.errors import ConfigError
from fedprune.exchange import Report, Updates
from fedprune.merge import Adam, Average, Merge
from fedprune.submodel import Submodel
from fedprune.types import Tensors

LAYOUT = Layout.of(
    {"item": Axis(3, touched=True), "latent": Axis(2)}, item_embedding="item latent", item_bias="item", bias="latent"
)
MODEL: Tensors = {"item_embedding": torch.zeros(3, 2), "item_bias": torch.zeros(3), "bias": torch.tensor([10.0, 20.0])}


def narrow(**settings: float) -> Report:
    """Client 0 holds unit 0 alone, and items 0 and 2."""
    updates = alone(
        LAYOUT,
        {"latent": [0]},
        [0, 2],
        {
            "item_embedding": torch.tensor([[1.0], [2.0]]),
            "item_bias": torch.tensor([1.0, 1.0]),
            "bias": torch.tensor([6.0]),
        },
    )
    return report(updates, ticket=0, **settings)


def wide(**settings: float) -> Report:
    """Client 1 holds both units, and items 0 and 1."""
    updates = alone(
        LAYOUT,
        {"latent": [0, 1]},
        [0, 1],
        {
            "item_embedding": torch.tensor([[3.0, 4.0], [5.0, 6.0]]),
            "item_bias": torch.tensor([3.0, 5.0]),
            "bias": torch.tensor([2.0, 8.0]),
        },
    )
    return report(updates, ticket=1, **settings)


def merged(merge: Merge, *reports: Report) -> dict[str, list]:
    model, _ = merge(MODEL, {}, LAYOUT, reports)
    return {name: tensor.tolist() for name, tensor in model.items()}


def test_holders_are_averaged_coordinate_by_coordinate():
    assert merged(Merge(), narrow(), wide()) == {
        "item_embedding": [
            [2.0, 4.0],
            [5.0, 6.0],
            [2.0, 0.0],
        ],  # row 0: (1+3)/2 and 4/1; row 1: client 1; row 2: client 0
        "item_bias": [2.0, 5.0, 1.0],
        "bias": [14.0, 28.0],  # 10 + (6+2)/2, 20 + 8/1
    }


def test_the_cohort_divides_by_all_who_reported():
    assert merged(Merge(over="cohort"), narrow(), wide()) == {
        "item_embedding": [[2.0, 2.0], [2.5, 3.0], [1.0, 0.0]],
        "item_bias": [2.0, 2.5, 0.5],
        "bias": [14.0, 24.0],
    }


def test_coverage_weights_by_what_is_trained():
    """One of two units counts twice, both count once; what has no prunable axis counts once for everybody."""
    result = merged(Merge(weights="coverage"), narrow(), wide())
    assert result["item_bias"] == [2.0, 5.0, 1.0]  # (1*1 + 1*3) / 2
    assert result["bias"] == pytest.approx([10 + 14 / 3, 28.0])  # 10 + (2*6 + 1*2) / 3
    assert result["item_embedding"][0] == pytest.approx([5 / 3, 4.0])


@pytest.mark.parametrize(
    ("weights", "first", "second"),
    [
        ("examples", {"examples": 1}, {"examples": 3}),
        ("period", {"staleness": 0}, {"staleness": 2}),
    ],
)
def test_weights(weights: str, first: dict, second: dict):
    """Weights 1 and 3, whatever they come from."""
    assert merged(Merge(weights=weights), narrow(**first), wide(**second)) == {
        "item_embedding": [[2.5, 4.0], [5.0, 6.0], [2.0, 0.0]],  # (1*1 + 3*3) / 4
        "item_bias": [2.5, 5.0, 1.0],
        "bias": [13.0, 28.0],  # 10 + (6 + 3*2) / 4
    }
    assert merged(Merge(weights=weights, over="cohort"), narrow(**first), wide(**second)) == {
        "item_embedding": [[2.5, 3.0], [3.75, 4.5], [0.5, 0.0]],
        "item_bias": [2.5, 3.75, 0.25],
        "bias": [13.0, 26.0],
    }


def test_equal_weights_ignore_examples_staleness_and_rate():
    plain = merged(Merge(), narrow(), wide())
    assert merged(Merge(), narrow(examples=9, staleness=4, rate=0.5), wide(examples=2)) == plain


def test_the_server_learning_rate_scales_the_step():
    assert merged(Merge(optimiser=Average(lr=0.5)), narrow(), wide())["bias"] == [12.0, 24.0]


def test_nobody_reported_nothing_changes():
    model, memory = Merge(optimiser=Adam())(MODEL, {}, LAYOUT, [])
    assert model is MODEL and memory == {}


def test_arguments_are_not_changed():
    before, memory = {name: tensor.clone() for name, tensor in MODEL.items()}, {}
    Merge(optimiser=Adam())(MODEL, memory, LAYOUT, [narrow(), wide()])
    assert same(MODEL, before) and memory == {}


def test_a_stack_merges_like_its_clients_alone_and_padding_counts_for_nothing():
    both = Updates(
        (Submodel.full(LAYOUT),) * 2,
        torch.tensor([[0, 2], [1, 0]]),  # the second row of client 1 is padding that names item 0
        torch.tensor([[True, True], [True, False]]),
        {
            "item_embedding": torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [0.0, 0.0]]]),
            "item_bias": torch.tensor([[1.0, 2.0], [3.0, 0.0]]),
            "bias": torch.tensor([[2.0, 4.0], [4.0, 8.0]]),
        },
    )
    assert merged(Merge(), report(both, 0, ticket=0), report(both, 1, ticket=1)) == {
        "item_embedding": [[1.0, 2.0], [5.0, 6.0], [3.0, 4.0]],
        "item_bias": [1.0, 3.0, 2.0],
        "bias": [13.0, 26.0],
    }
    assert merged(Merge(), report(both, 1, ticket=1))["item_embedding"] == [[0.0, 0.0], [5.0, 6.0], [0.0, 0.0]]


def test_a_window_counts_for_what_it_trained_only():
    """The first client holds both units and trains the second; its zero for the first must not pull."""
    part = alone(
        LAYOUT,
        {"latent": [0, 1]},
        [0],
        {
            "item_embedding": torch.tensor([[0.0, 2.0]]),
            "item_bias": torch.tensor([2.0]),
            "bias": torch.tensor([0.0, 2.0]),
        },
        trained={"latent": [1]},
    )
    result = merged(Merge(), report(part, ticket=0), wide())
    assert result["item_embedding"] == [[3.0, 3.0], [5.0, 6.0], [0.0, 0.0]]
    assert result["bias"] == [12.0, 25.0] and result["item_bias"] == [2.5, 5.0, 0.0]


def test_fedadam_is_adam_on_the_mean_update():
    """Tensors that everybody always trains, against torch.optim.Adam with the negative mean as its gradient."""
    settings = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "epsilon": 1e-3}
    merge, memory, model = Merge(optimiser=Adam(**settings)), {}, dict(MODEL)
    weight = torch.nn.Parameter(MODEL["bias"].clone())
    rival = torch.optim.Adam([weight], lr=0.05, betas=(0.8, 0.95), eps=1e-3)
    chance = torch.Generator().manual_seed(0)
    for number in range(6):
        deltas = torch.randn(3, 2, generator=chance)
        reports = []
        for client in range(3):
            rows = {"item_embedding": torch.zeros(1, 2), "item_bias": torch.zeros(1), "bias": deltas[client]}
            reports.append(report(alone(LAYOUT, {"latent": [0, 1]}, [0], rows), ticket=3 * number + client))
        model, memory = merge(model, memory, LAYOUT, reports)
        weight.grad = -deltas.mean(0)
        rival.step()
        torch.testing.assert_close(model["bias"], weight.detach(), atol=1e-5, rtol=1e-6)


def test_fedadam_leaves_alone_what_nobody_reported():
    merge, memory, model = Merge(optimiser=Adam(lr=0.1)), {}, dict(MODEL)
    model, memory = merge(model, memory, LAYOUT, [wide()])
    after, later = merge(model, memory, LAYOUT, [narrow()])
    assert torch.equal(after["item_embedding"][1], model["item_embedding"][1]), "item 1 was not reported"
    assert torch.equal(after["bias"][1], model["bias"][1])
    assert later["bias.t"].tolist() == [2.0, 1.0] and later["item_bias.t"].tolist() == [2.0, 1.0, 1.0]
    # Its first step, whenever it comes, is lr times the sign.
    torch.testing.assert_close(after["item_embedding"][2], torch.tensor([0.1, 0.0]))


def test_a_device_s_times_slower_counts_s_fold():
    """Speeds 1, 2 and 3: reports every round, every second, every third, with those weights."""
    here = world(build("skip"), workload="equal", slowness=[1.0, 2.0, 3.0] * 8)
    odd = 1.0 / 1.3717  # times that are no round numbers: whole multiples must not miss the deadline by rounding
    here.fleet.advance(0.1)
    devices = here.fleet.devices
    for speeds in (devices.flops, devices.bytes_down, devices.bytes_up):
        speeds *= odd
    rounds = here.rounds(12)
    merge = here.strategy.merge
    for done in rounds:
        for arrived in done.reports:
            assert merge.weight(arrived, here.state.layout, "item_embedding") == devices.slowness[arrived.order.client]
    total = dict.fromkeys((1.0, 2.0, 3.0), 0.0)
    for done in rounds:
        for arrived in done.reports:
            total[float(devices.slowness[arrived.order.client])] += merge.weight(arrived, here.state.layout, "item_embedding")
    assert total == {1.0: 96.0, 2.0: 96.0, 3.0: 96.0}, "over 12 rounds every device's data weighs the same"


@pytest.mark.parametrize("lr", [0.0, -0.5, float("inf"), float("nan")])
@pytest.mark.parametrize("optimiser", [Average, Adam])
def test_a_server_that_does_not_move_is_refused(optimiser: type, lr: float):
    with pytest.raises(ConfigError, match=f"the server's rate is {lr}; it must be above 0"):
        optimiser(lr)


def test_unknown_answers_are_refused():
    with pytest.raises(ConfigError, match="holders, cohort or common"):
        Merge(over="everybody")
    with pytest.raises(ConfigError, match="equal, examples, period or coverage"):
        Merge(weights="loud")
