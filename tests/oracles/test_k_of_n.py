"""DPP by hand: exactly k of n, the gradient of k successive softmaxes, entropy, temperature and noise."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from world import ITEMS, LATENT, close, louder, order, recommender, world

from fedprune.entries import KOfN
from fedprune.entries.learned import k_hot, straight_through
from fedprune.exchange import Report
from fedprune.objective import Objective
from fedprune.pruning import Importance
from fedprune.random import keys
from fedprune.recommenders.base import LOGITS
from fedprune.strategy import Strategy
from fedprune.submodel import Submodel

QUICK = settings(max_examples=80, deadline=None)


@some.composite
def rows(draw: some.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Logits full of ties, noise or none, and k."""
    shape = (*draw(some.lists(some.integers(1, 4), min_size=0, max_size=2)), draw(some.integers(1, 9)))
    chance = np.random.default_rng(draw(some.integers(0, 2**31)))
    levels = draw(some.sampled_from([1, 2, 3, 1000]))
    logits = torch.from_numpy(chance.integers(0, levels, shape) / 3.0).float()
    scale = draw(some.sampled_from([0.0, 0.001, 30.0]))
    noise = torch.from_numpy(scale * chance.gumbel(size=shape)).float()
    return logits, noise, draw(some.integers(1, shape[-1]))


@QUICK
@given(rows(), some.sampled_from([0.05, 0.5, 5.0]))
def test_every_row_keeps_exactly_k(drawn: tuple, temperature: float):
    logits, noise, k = drawn
    for mask in (k_hot(logits, k), straight_through(logits.requires_grad_(), noise, k, temperature).detach()):
        assert mask.shape == logits.shape
        assert set(mask.unique().tolist()) <= {0.0, 1.0}, "to the bit"
        assert (mask.sum(-1) == k).all()
    flat = logits.detach().reshape(-1, logits.shape[-1]).tolist()
    for row, mask in zip(flat, k_hot(logits, k).reshape(-1, logits.shape[-1]).tolist(), strict=True):
        first = sorted(range(len(row)), key=lambda place: (-row[place], place))[:k]
        assert [place for place, one in enumerate(mask) if one] == sorted(first), "the largest, ties to the first"


@QUICK
@given(rows(), some.sampled_from([0.5, 1.0, 5.0]), some.integers(0, 99))
def test_the_gradient_is_that_of_k_successive_softmaxes(drawn: tuple, temperature: float, seed: int):
    """sum_pick p_i (g_i - p . g) / tau, p = softmax over what is not picked yet; float64 in NumPy."""
    logits, noise, k = drawn
    leaf = logits.clone().requires_grad_()
    upstream = torch.from_numpy(np.random.default_rng(seed).normal(size=logits.shape)).float()
    (straight_through(leaf, noise, k, temperature) * upstream).sum().backward()
    size = logits.shape[-1]
    expected = np.zeros((logits.numel() // size, size))
    perturbed = (logits + noise).reshape(-1, size).numpy()
    for number, (z, g) in enumerate(zip(perturbed, upstream.reshape(-1, size).double().numpy(), strict=True)):
        open_ = list(range(size))
        for _ in range(k):
            values = z[open_].astype(float) / temperature
            p = np.exp(values - values.max())
            p /= p.sum()
            expected[number, open_] += p * (g[open_] - p @ g[open_]) / temperature
            open_.remove(max(open_, key=lambda place: (z[place], -place)))
    np.testing.assert_allclose(leaf.grad.reshape(-1, size).numpy(), expected, atol=3e-5, rtol=1e-3)


def test_the_penalty_is_the_entropy_of_the_rows():
    what = KOfN(0.5, entropy=0.25).parametrise(recommender("mf"))
    logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, -90.0, -90.0]], [[50.0, 0.0, 0.0, 0.0]] * 2])
    even, three_to_one = math.log(4), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    got = what.penalty({"item_embedding_logits": logits, "item_embedding": logits, "item_bias": logits[..., 0]})
    assert got.tolist() == pytest.approx([0.25 * (even + three_to_one), 0.0], abs=1e-6)


def test_the_temperature_falls_linearly_and_stays():
    entries = KOfN(0.5)
    assert [entries.temperature(version) for version in (0, 50, 99, 100, 1000)] == pytest.approx([5, 2.75, 0.545, 0.5, 0.5])
    what = KOfN(0.5, hot=3.0, cold=1.0, over=4).parametrise(recommender("mf"))
    cut = {name: tensor[None, :2] for name, tensor in what.initial(0).items()}
    drawn = what.chance(1, keys(0, "chance", [0]), torch.tensor([[0, 1]]), cut)
    assert float(drawn["temperature"]) == 2.5


def test_the_noise_is_gumbels_and_follows_the_item():
    what = KOfN(0.5, noise=0.3).parametrise(recommender("neumf"))
    key = keys(0, "chance", range(200))
    items = torch.arange(ITEMS).expand(200, -1)
    cut = {n: t.expand(200, *t.shape) for n, t in what.initial(0).items()}
    drawn = what.chance(0, key, items, cut)
    for name in ("item_embedding_logits", "hidden1_weight_logits"):
        sample = drawn[name]
        assert sample.shape == cut[name].shape
        assert sample.mean() == pytest.approx(0.3 * 0.57722, rel=0.02) and sample.std() == pytest.approx(
            0.3 * 1.28255, rel=0.02
        )
    assert not torch.allclose(drawn["item_embedding_logits"], drawn["item_tower_logits"], atol=0.1)
    turned = what.chance(0, key, items.flip(1), cut)
    assert torch.equal(turned["item_embedding_logits"].flip(1), drawn["item_embedding_logits"])
    alone = what.chance(0, key[7:8], items[7:8], {n: t[7:8] for n, t in cut.items()})
    assert torch.equal(alone["hidden1_weight_logits"][0], drawn["hidden1_weight_logits"][7])


def test_logits_start_from_the_weights_once():
    entries = KOfN(0.5)
    here = world(Strategy(entries=entries))
    memory, model = entries.prepare({}, here.state.model, here.state.layout, 3)
    size, logits = model["item_embedding"].abs(), model["item_embedding_logits"]
    assert torch.equal(size.argsort(-1), logits.argsort(-1))
    torch.testing.assert_close(logits.mean(-1), torch.zeros(ITEMS), atol=1e-6, rtol=0)
    torch.testing.assert_close(logits.std(-1), torch.full((ITEMS,), 0.5), atol=1e-6, rtol=0)
    assert torch.equal(model["item_embedding"], here.state.model["item_embedding"])
    assert entries.prepare(memory, model, here.state.layout, 4)[1] is model


def test_what_is_kept_is_rounded_like_every_rows_k():
    """.3 of 8 is 2.4, so 2 of 8; of NeuMF's rows of 16 it is 5."""
    for name, share in (("mf", 2 / 8), ("neumf", None)):
        here = world(Strategy(entries=KOfN(0.3)), model=name)
        done, model = here.round(), here.state.model
        masks = [KOfN(0.3).of(n.removesuffix(LOGITS), model) for n in model if n.endswith(LOGITS)]
        counted = sum(float(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        assert done.facts == {"kept": pytest.approx(share or counted)} == {"kept": pytest.approx(counted)}


def test_logits_make_no_unit_important():
    here = world(Strategy(entries=KOfN(0.3), pruning=Importance()), model="neumf")
    plain = {name: tensor for name, tensor in here.state.model.items() if not name.endswith(LOGITS)}
    loud = {name: tensor * 100 if name.endswith(LOGITS) else tensor for name, tensor in here.state.model.items()}
    memories = [Importance().prepare({}, model, here.state.layout) for model in (plain, here.state.model, loud)]
    for axis, units in memories[0].items():
        assert all(np.array_equal(units, memory[axis]) for memory in memories[1:])


@pytest.mark.parametrize("name", ["mf", "neumf"])
def test_it_scores_with_masked_weights(name: str):
    """Served without noise; k is a share of what is held, at any width."""
    plain, entries = recommender(name), KOfN(0.4)
    what = entries.parametrise(plain)
    chance = torch.Generator().manual_seed(2)
    model = {n: torch.randn(t.shape, generator=chance) for n, t in what.initial(0).items()}
    masked = {
        n: t * k_hot(model[f"{n}_logits"], max(1, round(0.4 * t.shape[-1]))) if f"{n}_logits" in model else t
        for n, t in model.items()
        if "logits" not in n
    }
    assert ("item_bias_logits" in model, "item_embedding_logits" in model) == (False, True)
    own = {n: torch.randn(1, 1, *t.shape[1:], generator=chance) for n, t in what.initial_private(0).items()}
    given = what.score({n: t[None] for n, t in model.items()} | own)
    torch.testing.assert_close(given, plain.score({n: t[None] for n, t in masked.items()} | own))
    assert not torch.allclose(given, plain.score({n: model[n][None] for n in masked} | own), atol=1e-3)


def test_logits_learn_where_the_loss_wants_an_entry():
    """One step of one client: straight-through times the weight's own gradient, by the chain rule at k = n - 1."""
    here = world(Strategy(entries=KOfN(1 - 1 / LATENT, noise=0.0, entropy=0.0)), fleet="serial")
    done = here.round()
    got = done.reports[0]
    update, layout = got.updates.tensors["item_embedding_logits"][got.position], here.state.layout
    assert update.any() and (update.sum(-1).abs() < 1e-6).all(), "softmaxes move mass, they make none"
    assert layout.parameters(layout.full, ITEMS) == ITEMS * (2 * LATENT + 1), "logits travel"
    assert got.cost.bytes_up == 4 * ITEMS * (2 * LATENT + 1) and got.order.submodel == Submodel.full(layout)


def test_every_order_is_trained_at_its_own_temperature():
    """Two versions of one model, as after a round without reports: they may not share a stack, nor a temperature."""
    updates: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for fleet in ("serial", "vector"):
        here = louder(world(Strategy(entries=KOfN(0.4, over=1)), fleet=fleet))
        here.state, objective = here.strategy.begun(here.state), Objective(lr=0.3)
        orders = [order(here, client, client) for client in range(8)]
        here.fleet.send([replace(o, objective=objective, version=o.client % 2) for o in orders])
        updates[fleet] = {}
        while (report := here.fleet.next()) is not None:
            assert isinstance(report, Report)
            real = report.updates.present[report.position]
            updates[fleet][report.order.client] = {n: t[report.position][real] for n, t in report.updates.tensors.items()}
    for client in range(8):
        assert close(updates["serial"][client], updates["vector"][client])
    other = louder(world(Strategy(entries=KOfN(0.4, over=1)), fleet="serial"))
    other.state = other.strategy.begun(other.state)
    other.fleet.send([replace(order(other, 1, 1), objective=Objective(lr=0.3), version=0)])
    hot = other.fleet.next()
    assert isinstance(hot, Report)
    logits = f"item_embedding{LOGITS}"
    assert not torch.allclose(hot.updates.tensors[logits][0], updates["vector"][1][logits], atol=1e-3), "hot, and cold"
