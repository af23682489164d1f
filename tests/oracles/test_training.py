"""One client's local steps of matrix factorisation, once more in NumPy.

The script is `by_hand`: for a user p, item rows q_i, biases b_i and labels y_i,

    g_i = sigmoid(p . q_i + b_i) - y_i
    q_i <- q_i - lr (g_i p + proximal (q_i - q_i received)),   b_i likewise without p
    p   <- Adam(sum_i r_i g_i q_i / n + decay p),              r_i the recency weight
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from world import USERS, World, order, train, world

from fedprune.exchange import Report
from fedprune.objective import Objective
from fedprune.submodel import Submodel


def by_hand(received: dict, private: dict, label: np.ndarray, age: np.ndarray, objective: Objective) -> dict:
    """float64 throughout; tensors of one user."""
    p, q, b = private["p"].copy(), received["q"].copy(), received["b"].copy()
    m, v, t = private["m"].copy(), private["v"].copy(), private["t"]
    beta1, beta2 = objective.betas
    recency = 1 + objective.recency * label * np.exp(-age / objective.horizon)
    losses = []

    def step_private(error: np.ndarray, rows: np.ndarray) -> None:
        nonlocal p, m, v, t
        gradient = (recency * error) @ rows / len(label) + objective.decay_private * p
        t += 1
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        p = p - objective.lr_private * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + 1e-8)

    for _ in range(objective.epochs):
        score = q @ p + b
        error = 1 / (1 + np.exp(-score)) - label
        losses.append(np.mean(np.log1p(np.exp(score)) - label * score))
        pull_q, pull_b = objective.proximal * (q - received["q"]), objective.proximal * (b - received["b"])
        rows, old = q, p
        q = q - objective.lr * (np.outer(error, old) + pull_q)
        b = b - objective.lr * (error + pull_b)
        step_private(error, rows)
        for _ in range(objective.private_steps):
            step_private(1 / (1 + np.exp(-(q @ p + b))) - label, q)
    return {"p": p, "q": q - received["q"], "b": b - received["b"], "m": m, "v": v, "t": t, "loss": losses[0]}


CLIENT = 5


def ordered(here: World, ticket: int, **settings: object) -> tuple[Report, dict, dict, np.ndarray, np.ndarray]:
    """Run one order, and what the client had before: received rows, private row, labels and ages."""
    here.fleet.settle()
    sent = order(here, CLIENT, ticket, **settings)
    drawn = here.population.draw([CLIENT], [ticket], sent.objective, sent.seed)
    rows = drawn.rows[0]
    received = {
        "q": here.state.model["item_embedding"][rows].double().numpy(),
        "b": here.state.model["item_bias"][rows].double().numpy(),
    }
    kept = here.population.private
    private = {
        "p": kept.values["user_embedding"][CLIENT].double().numpy(),
        "m": kept.first["user_embedding"][CLIENT].double().numpy(),
        "v": kept.second["user_embedding"][CLIENT].double().numpy(),
        "t": int(kept.steps[CLIENT]),
    }
    here.fleet.send([sent])
    got = here.fleet.next()
    here.fleet.settle()
    return got, received, private, drawn.label[0].double().numpy(), drawn.age[0].double().numpy()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"epochs": 3, "lr": 0.7},
        {"epochs": 3, "proximal": 0.4},
        {"recency": 3.0, "horizon": 2.0},
        {"epochs": 2, "private_steps": 2, "recency": 1.0, "decay_private": 0.1, "betas": (0.5, 0.8), "negatives": 2},
    ],
    ids=str,
)
def test_local_steps(settings: dict):
    here = world(fleet="serial")
    for ticket in range(2):  # the second order continues with the private row's moments
        got, received, private, label, age = ordered(here, ticket, **settings)
        expected = by_hand(received, private, label, age, Objective(**settings))
        update = {name: tensor[got.position].double().numpy() for name, tensor in got.updates.tensors.items()}
        np.testing.assert_allclose(update["item_embedding"], expected["q"], atol=2e-6)
        np.testing.assert_allclose(update["item_bias"], expected["b"], atol=2e-6)
        kept = here.population.private
        np.testing.assert_allclose(kept.values["user_embedding"][CLIENT], expected["p"], atol=2e-5)
        np.testing.assert_allclose(kept.first["user_embedding"][CLIENT], expected["m"], atol=1e-6)
        np.testing.assert_allclose(kept.second["user_embedding"][CLIENT], expected["v"], atol=1e-6)
        assert kept.steps[CLIENT] == expected["t"] and got.examples == len(label)
        assert got.loss == pytest.approx(expected["loss"], abs=1e-6)


@pytest.mark.parametrize("model", ["gmf", "neumf"])
def test_rows_move_by_the_sum_and_what_is_shared_by_the_mean(model: str):
    """-lr times autograd's gradient of sum_i BCE for item rows, and of its mean over examples for shared tensors."""
    here = world(fleet="serial", model=model)
    sent, what = order(here, CLIENT, 0, lr=0.3), here.fleet.recommender
    drawn = here.population.draw([CLIENT], [0], sent.objective, sent.seed)
    whole = {name: tensor.clone().requires_grad_() for name, tensor in sent.model.items()}
    own = {name: tensor[CLIENT][None, None] for name, tensor in here.private.items()}
    stacked = {n: t[drawn.rows] if what.layout.kind(n) == "touched" else t[None] for n, t in whole.items()}
    score = what.score(stacked | own)[0]
    torch.nn.functional.binary_cross_entropy_with_logits(score, drawn.label[0], reduction="sum").backward()
    here.fleet.send([sent])
    got = here.fleet.next()
    for name, update in got.updates.tensors.items():
        gradient = whole[name].grad
        if what.layout.kind(name) == "touched":
            expected = -0.3 * gradient[drawn.rows[0]]
        else:
            expected = -0.3 * gradient / drawn.label.shape[1]
        torch.testing.assert_close(update[0], expected, atol=1e-6, rtol=1e-4)


def test_other_clients_keep_their_rows():
    here = world(fleet="serial")
    before = here.private["user_embedding"].clone()
    ordered(here, 0)
    others = [user for user in range(USERS) if user != CLIENT]
    assert torch.equal(here.private["user_embedding"][others], before[others])


def test_recency_weights_touch_the_private_gradient_alone():
    plain, recent = world(fleet="serial"), world(fleet="serial")
    one, *_ = ordered(plain, 0)
    other, *_ = ordered(recent, 0, recency=4.0)
    for name, tensor in one.updates.tensors.items():
        torch.testing.assert_close(tensor, other.updates.tensors[name], atol=1e-7, rtol=1e-6)
    first = [w.population.private.first["user_embedding"][CLIENT] for w in (plain, recent)]
    assert not torch.allclose(*first, rtol=0.1, atol=1e-4)


def test_ages_count_later_positives():
    here = world()
    drawn = here.population.draw([CLIENT], [0], Objective(), 1)
    positives = train().items_of(CLIENT)
    assert drawn.rows[0, : len(positives)].tolist() == positives.tolist()
    assert drawn.age[0, : len(positives)].tolist() == list(range(len(positives) - 1, -1, -1))
    weights = Objective(recency=2.0, horizon=4.0).recency_weights(drawn.age, drawn.label)[0]
    assert weights[len(positives) - 1] == 3.0 and (weights[len(positives) :] == 1.0).all()
    assert weights[len(positives) - 2] == pytest.approx(1 + 2 * np.exp(-0.25))


def test_a_frozen_unit_of_a_window_does_not_move():
    here = world(fleet="serial")
    whole = Submodel.full(here.state.layout)
    window = Submodel(whole.held, {"latent": np.array([1, 2])})
    here.fleet.send([order(here, CLIENT, 0, submodel=window)])
    got = here.fleet.next()
    moved = got.updates.tensors["item_embedding"][0].abs().sum(0) > 0
    assert moved.nonzero().flatten().tolist() == [1, 2]
    plain = world(fleet="serial")
    plain.fleet.send([order(plain, CLIENT, 0)])
    full = plain.fleet.next().updates.tensors["item_embedding"][0]
    assert torch.equal(got.updates.tensors["item_embedding"][0][:, [1, 2]], full[:, [1, 2]])
    assert torch.equal(plain.private["user_embedding"], here.private["user_embedding"]), "a window trains all of p"


def test_partial_work_is_a_share_of_the_examples():
    here = world()
    count = len(train().items_of(9))
    whole = here.population.draw([9], [0], Objective(negatives=1), 1)
    part = here.population.draw([9], [0], Objective(negatives=1), 1, [0.5])
    assert whole.count.item() == 2 * count
    half = int(np.ceil(0.5 * count))
    assert part.label.sum() - (part.label * (1 - part.weight)).sum() == half
    assert part.count.item() == 2 * half
    named = [set(drawn.rows[0][drawn.present[0]].tolist()) for drawn in (whole, part)]
    assert named[1] < named[0]
