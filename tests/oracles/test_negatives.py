"""Negatives that weigh more or less: the loss by pencil, and powers of two to a bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from world import LATENT, USERS, World, order, world

from fedprune.errors import ConfigError
from fedprune.exchange import Report
from fedprune.objective import Objective


def trained(weight: float, **settings: Any) -> tuple[World, Report, torch.Tensor]:
    """Client 5's only order, three negatives per positive and one step, and its private row before."""
    here = world()
    generator = torch.Generator().manual_seed(4)
    model = {name: torch.randn(t.shape, generator=generator) for name, t in here.state.model.items()}
    here.state = replace(here.state, model=model)
    here.population.private.values["user_embedding"].copy_(torch.randn(USERS, LATENT, generator=generator))
    here.fleet.send([order(here, 5, 0, negatives=3, weight_negatives=weight, **settings)])
    before = here.private["user_embedding"][5].clone()
    arrived = here.fleet.next()
    assert isinstance(arrived, Report)
    return here, arrived, before


@pytest.mark.parametrize("weight", [0.25, 1.0, 2.5])
def test_negatives_weigh_what_they_are_to(weight: float):
    """sum_i w_i BCE(p . q_i + b_i, y_i) by autograd in float64: its gradient is what the rows step by."""
    here, arrived, before = trained(weight)
    objective = arrived.order.objective
    drawn = here.population.draw([5], [0], objective, here.state.seed)
    rows, label = drawn.rows[0], drawn.label[0].double()
    p = before.double().requires_grad_()
    q = here.state.model["item_embedding"][rows].double().requires_grad_()
    b = here.state.model["item_bias"][rows].double().requires_grad_()
    each = F.binary_cross_entropy_with_logits(q @ p + b, label, reduction="none")
    loss = (each * torch.where(label > 0, 1.0, weight)).sum()
    by_p, by_q, by_b = torch.autograd.grad(loss, (p, q, b))
    assert 0 < int((label > 0).sum()) < len(label) == 4 * int((label > 0).sum())
    torch.testing.assert_close(arrived.updates.tensors["item_embedding"][0].double(), -by_q, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(arrived.updates.tensors["item_bias"][0].double(), -by_b, atol=1e-6, rtol=1e-5)
    gradient = by_p / len(label) + objective.decay_private * p.detach()
    moved = p.detach() - objective.lr_private * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(here.private["user_embedding"][5].double(), moved, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        here.population.private.first["user_embedding"][5].double(), 0.1 * gradient, atol=1e-6, rtol=1e-5
    )
    assert arrived.loss == pytest.approx(float(loss.detach()) / len(label), rel=1e-5)


def test_a_weight_of_one_changes_no_bit_and_a_power_of_two_doubles_to_a_bit():
    scores, label = (
        torch.randn(3, 50, generator=torch.Generator().manual_seed(2)),
        (torch.arange(150).reshape(3, 50) % 4 == 0).float(),
    )
    plain = F.binary_cross_entropy_with_logits(scores, label, reduction="none")
    assert torch.equal(Objective(weight_negatives=1.0).error(scores, label), plain)
    double = Objective(weight_negatives=2.0).error(scores, label)
    assert torch.equal(double[label > 0], plain[label > 0]) and torch.equal(double[label == 0], 2 * plain[label == 0])
    one, two = trained(1.0)[1], trained(2.0)[1]
    positive = world().population.draw([5], [0], one.order.objective, 1).label[0] > 0
    for name in ("item_embedding", "item_bias"):
        first, second = one.updates.tensors[name][0], two.updates.tensors[name][0]
        assert torch.equal(first[positive], second[positive]) and torch.equal(2 * first[~positive], second[~positive])


def test_ratings_have_no_negatives_to_weigh():
    scores, rating = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])
    assert Objective(task="ratings", weight_negatives=5.0).error(scores, rating).tolist() == [4.0, 4.0]
    with pytest.raises(ConfigError, match=r"weight_negatives is 0\.0; it must be above 0"):
        Objective(weight_negatives=0.0)
