"""One client's steps where entries are masked, once more by autograd at the masked model.

With m the mask and u the update so far, the client scores with m * (m w + u), and a step is

    u <- u - lr g,   g the gradient with respect to the entries it scores with: all of them with `through` (DPF),
                     m g without, so that u is zero wherever m is.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from world import World, order, same, world

from fedprune.entries import Feedback
from fedprune.objective import Objective
from fedprune.strategy import Strategy, prepared
from fedprune.submodel import Submodel, extract
from fedprune.types import Tensors

CLIENT, LR = 5, 0.3


def masked(here: World, share: float = 0.5, through: bool = False, trained: dict | None = None) -> Submodel:
    layout, rng = here.state.layout, np.random.default_rng(4)
    names = [name for name in layout.named("shared", "touched") if name != "item_bias"]
    whole = Submodel.full(layout)
    entries = {name: rng.random(layout.shape(name)) < share for name in names}
    return Submodel(whole.held, trained or {}, entries, through)


def by_hand(here: World, submodel: Submodel, epochs: int) -> Tensors:
    """The update of the client's rows and of what is shared, the private row standing still."""
    what, model = here.fleet.recommender, here.state.model
    drawn = here.population.draw([CLIENT], [0], Objective(), here.state.seed)
    rows = drawn.rows[0]
    mask = {n: torch.from_numpy(submodel.entries[n]).float() if n in submodel.entries else torch.ones_like(t)
            for n, t in model.items()}  # fmt: skip
    touched = [name for name in model if what.layout.kind(name) == "touched"]
    mask = {n: m[rows] if n in touched else m for n, m in mask.items()}
    received = {n: (t[rows] if n in touched else t) * mask[n] for n, t in model.items()}
    own = {name: tensor[CLIENT][None, None] for name, tensor in here.private.items()}
    update = {name: torch.zeros_like(tensor) for name, tensor in received.items()}
    for _ in range(epochs):
        leaves = {n: (mask[n] * (received[n] + update[n])).requires_grad_() for n in received}
        score = what.score({n: t[None] for n, t in leaves.items()} | own)[0]
        torch.nn.functional.binary_cross_entropy_with_logits(score, drawn.label[0], reduction="sum").backward()
        for name, leaf in leaves.items():
            gradient = leaf.grad if name in touched else leaf.grad / len(rows)
            update[name] = update[name] - LR * (gradient if submodel.through else gradient * mask[name])
    return update


@pytest.mark.parametrize("fleet", ["serial", "vector"])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("model", ["mf", "neumf"])
def test_gradients_of_masked_entries(model: str, through: bool, epochs: int, fleet: str):
    here = world(fleet=fleet, model=model)
    submodel = masked(here, through=through)
    expected = by_hand(here, submodel, epochs)
    sent = order(here, CLIENT, 0, submodel=submodel, lr=LR, lr_private=1e-12, epochs=epochs)
    here.fleet.send([sent])
    got = here.fleet.next()
    rows = got.updates.rows[got.position]
    for name, update in got.updates.tensors.items():
        own = update[got.position]
        torch.testing.assert_close(own, expected[name], atol=2e-6, rtol=1e-4)
        if name in submodel.entries:
            gone = ~torch.from_numpy(submodel.entries[name])
            gone = gone[rows] if here.state.layout.kind(name) == "touched" else gone
            assert own[gone].any() == through, "a masked entry moved" if not through else "no gradient went through"


def test_masked_entries_are_zero_where_the_client_scores():
    """Neither their values on the server nor what others train changes what the client sees and does."""
    one, other = world(fleet="serial", model="neumf"), world(fleet="serial", model="neumf")
    submodel = masked(one)
    for name, there in submodel.entries.items():
        cut = extract(one.state.model, one.state.layout, submodel)[name]
        assert not cut[~torch.from_numpy(there)].any() and torch.equal(
            cut[torch.from_numpy(there)], one.state.model[name][torch.from_numpy(there)]
        )
    louder = {
        n: torch.where(torch.from_numpy(submodel.entries[n]), t, 9.0) if n in submodel.entries else t
        for n, t in other.state.model.items()
    }
    other.state = replace(other.state, model=louder)
    got = []
    for here in (one, other):
        here.fleet.send([order(here, CLIENT, 0, submodel=submodel, lr=LR, epochs=2, batch=8)])
        got.append(here.fleet.next())
    assert got[0].loss == got[1].loss and same(got[0].updates.tensors, got[1].updates.tensors)
    assert same(one.private, other.private)


def test_a_window_and_a_mask_both_hold():
    here = world(fleet="serial", model="neumf")
    layout = here.state.layout
    trained = {axis: units[: len(units) // 2] for axis, units in Submodel.full(layout).held.items()}
    submodel = masked(here, trained=trained)
    here.fleet.send([order(here, CLIENT, 0, submodel=submodel, lr=LR)])
    update = here.fleet.next().updates.tensors
    weight, there = update["hidden1_weight"][0], torch.from_numpy(submodel.entries["hidden1_weight"])
    assert not weight[~there].any() and not weight[8:].any()
    assert not weight[:, 4:8].any() and not weight[:, 12:].any()
    inside = torch.zeros_like(there)
    inside[:8, :4] = inside[:8, 8:12] = True
    assert weight[inside & there].any()
    assert update["hidden1_bias"][0, :8].any() and not update["hidden1_bias"][0, 8:].any(), "no mask, half a window"


@pytest.mark.parametrize("through", [True, False])
def test_the_server_keeps_the_dense_model(through: bool):
    """w_{t+1} = w_t - eta g(m * w_t): after a round w is not m * w, and with `through` its pruned entries have moved."""
    here = world(Strategy(entries=Feedback(0.4, through=through), objective=Objective(lr=LR)))
    ready = prepared(here.strategy, here.state)
    masks = here.strategy.entries.mask(ready.entries, ready.layout, 0, 1.0)
    here.round()
    after, before = here.state.model["item_embedding"], ready.model["item_embedding"]
    gone = ~torch.from_numpy(masks["item_embedding"])
    assert 0.55 < gone.float().mean() < 0.65
    assert (after[gone] != 0).all() and (after[~gone] != before[~gone]).any()
    assert torch.equal(after[gone], before[gone]) != through
    if through:
        assert (after[gone] != before[gone]).float().mean() > 0.9
