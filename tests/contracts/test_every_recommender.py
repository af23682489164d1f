"""What every recommender promises: its layout tells the truth, and it learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from world import ITEMS, SETTINGS, USERS, finite, recommender, split, world

from fedprune.errors import ConfigError
from fedprune.objective import Objective
from fedprune.pruning import Importance, Leading, Pruning, Window
from fedprune.rates import Fixed
from fedprune.recommenders import RECOMMENDERS, Recommender, build
from fedprune.serving import scorer
from fedprune.strategy import Strategy
from fedprune.submodel import Submodel, extract, scatter
from fedprune.types import Tensors

every_recommender = pytest.mark.parametrize("name", sorted(RECOMMENDERS))


def test_the_table_is_complete():
    assert set(SETTINGS) == set(RECOMMENDERS), "a recommender has no settings in tests/world.py"


def drawn(what: Recommender, seed: int = 5) -> tuple[Tensors, Tensors]:
    """Model and private rows without a zero in them, so that a wrong cut shows."""
    chance = torch.Generator().manual_seed(seed)
    everything = what.initial(0) | what.initial_private(0)
    full = {name: torch.randn(t.shape, generator=chance) for name, t in everything.items()}
    private = {name: full.pop(name) for name in what.layout.named("private")}
    return full, private


def scores(what: Recommender, model: Tensors, private: Tensors, users: np.ndarray, items: torch.Tensor) -> torch.Tensor:
    """`[clients, batch]`: one user per client, `items` `[clients, batch]`, tensors as the docstring of `score` says."""
    tensors = {}
    for name, tensor in (model | private).items():
        match what.layout.kind(name):
            case "touched":
                tensors[name] = tensor[items]
            case "private":
                tensors[name] = tensor[torch.from_numpy(users)][:, None]
            case _:
                tensors[name] = tensor.expand(len(users), *tensor.shape)
    return what.score(tensors)


@every_recommender
def test_layout_covers_every_tensor(name: str):
    what = recommender(name)
    model, private = what.initial(3), what.initial_private(3)
    assert set(model) | set(private) == set(what.layout.tensors) and not set(model) & set(private)
    for key, tensor in (model | private).items():
        assert tuple(tensor.shape) == what.layout.shape(key) and tensor.dtype == torch.float32
    read: set[str] = set()

    class Watched(dict):
        def __getitem__(self, key: str) -> torch.Tensor:
            read.add(key)
            return super().__getitem__(key)

    users, items = np.arange(3), torch.arange(6).reshape(3, 2)
    stacked = {
        key: t[items] if key in what.layout.named("touched") else t[:3, None] if key in private else t.expand(3, *t.shape)
        for key, t in (model | private).items()
    }
    what.score(Watched(stacked))
    assert read == set(what.layout.tensors), "a declared tensor is never used in the forward pass"
    assert scores(what, model, private, users, items).shape == (3, 2)


@every_recommender
def test_the_beginning_follows_from_the_seed(name: str):
    what = recommender(name)
    assert all(torch.equal(what.initial(3)[key], t) for key, t in what.initial(3).items())
    other = what.initial(4)
    assert any(not torch.equal(other[key], t) for key, t in what.initial(3).items())
    assert finite(what.initial(3)) and finite(what.initial_private(3))


@every_recommender
@pytest.mark.parametrize("rate", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("policy", [Leading(), Importance()], ids=["leading", "importance"])
def test_a_submodel_scores_like_the_full_model_with_dropped_units_zeroed(name: str, rate: float, policy):
    what = recommender(name)
    model, private = drawn(what)
    submodel = policy.carve(policy.prepare({}, model, what.layout), what.layout, 0, 0, rate)
    zeroed = {key: torch.zeros_like(t) for key, t in (model | private).items()}
    cut = extract(model | private, what.layout, submodel)
    scatter(zeroed, what.layout, submodel, cut)
    users, items = np.array([0, 5, 23]), torch.tensor([[0, 7, 39], [1, 1, 2], [38, 3, 9]])
    both = [
        scores(
            what,
            {key: tensors[key] for key in model},
            {key: tensors[key] for key in private},
            users,
            items,
        )
        for tensors in (cut, zeroed)
    ]
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-5)
    if rate < 1:
        assert not torch.allclose(both[0], scores(what, model, private, users, items), atol=1e-3)


@every_recommender
def test_a_masked_submodel_scores_like_the_full_model_with_these_entries_zeroed(name: str):
    what, rng = recommender(name), np.random.default_rng(2)
    model, private = drawn(what)
    units = Leading().carve({}, what.layout, 0, 0, 0.75)
    masks = {key: rng.random(what.layout.shape(key)) < 0.6 for key in what.layout.named("touched", "shared")}
    submodel = replace(units, entries=masks)
    zeroed = {key: torch.zeros_like(t) for key, t in (model | private).items()}
    scatter(zeroed, what.layout, units, extract(model | private, what.layout, units))
    zeroed |= {key: zeroed[key] * torch.from_numpy(mask) for key, mask in masks.items()}
    cut = extract(model | private, what.layout, submodel)
    users, items = np.array([0, 5, 23]), torch.tensor([[0, 7, 39], [1, 1, 2], [38, 3, 9]])
    both = [
        scores(what, {k: tensors[k] for k in model}, {k: tensors[k] for k in private}, users, items)
        for tensors in (cut, zeroed)
    ]
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-5)
    whole = extract(model | private, what.layout, units)
    assert not torch.allclose(
        both[0], scores(what, {k: whole[k] for k in model}, {k: whole[k] for k in private}, users, items), atol=1e-3
    )
    served = scorer(what, model, private, [submodel] * USERS)(users).gather(1, items)
    torch.testing.assert_close(served, both[0], atol=1e-4, rtol=1e-5)


@every_recommender
def test_a_stack_scores_like_each_client_alone(name: str):
    what = recommender(name)
    model, private = drawn(what)
    users, items = np.array([3, 0, 11]), torch.tensor([[0, 7, 39, 4], [1, 1, 2, 0], [38, 3, 9, 9]])
    together = scores(what, model, private, users, items)
    for place in range(3):
        alone = scores(what, model, private, users[place : place + 1], items[place : place + 1])
        torch.testing.assert_close(together[place], alone[0], atol=1e-5, rtol=1e-5)


@every_recommender
def test_users_per_example_score_like_a_user_per_client(name: str):
    """A silo hands over a private row for each example instead of one for all of them."""
    what = recommender(name)
    model, private = drawn(what)
    items = torch.tensor([[0, 7, 39], [1, 1, 2]])
    one = scores(what, model, private, np.array([3, 8]), items)
    tensors = {key: t[items] if what.layout.kind(key) == "touched" else t.expand(2, *t.shape) for key, t in model.items()}
    tensors |= {key: t[torch.tensor([[3, 3, 3], [8, 8, 8]])] for key, t in private.items()}
    torch.testing.assert_close(what.score(tensors), one, atol=1e-5, rtol=1e-5)


@every_recommender
def test_the_scorer_ranks_with_the_same_scores(name: str):
    what = recommender(name)
    model, private = drawn(what)
    users = np.array([4, 0, 17])
    expected = scores(what, model, private, users, torch.arange(ITEMS).expand(3, -1))
    torch.testing.assert_close(scorer(what, model, private)(users), expected, atol=1e-4, rtol=1e-5)
    narrow = Leading().carve({}, what.layout, 0, 0, 0.5)
    full = Submodel.full(what.layout)
    mixed = scorer(what, model, private, [narrow if user == 0 else full for user in range(USERS)])(users)
    torch.testing.assert_close(mixed[[0, 2]], expected[[0, 2]], atol=1e-4, rtol=1e-5)
    assert not torch.allclose(mixed[1], expected[1], atol=1e-3)


@every_recommender
@pytest.mark.parametrize(("policy", "rate"), [(Leading(), 1.0), (Leading(), 0.5), (Window(), 0.5)])
def test_learns_two_tastes(name: str, policy: Pruning, rate: float):
    """Users like one half of the catalogue each; held-out items of the own half must outrank the other half's."""
    objective = Objective(lr=0.5, lr_private=0.05)
    here = world(Strategy(objective=objective, rates=Fixed(rate), pruning=policy), model=name)
    rounds = here.rounds(80 if name == "mlp" else 50)
    loss = [float(np.mean([report.loss for report in done.reports])) for done in rounds]
    assert np.mean(loss[-5:]) < 0.75 * loss[0], f"loss went from {loss[0]:.3f} to {np.mean(loss[-5:]):.3f}"
    own_width = [order.submodel for order in rounds[-1].orders]  # one client per user; a window is scored whole
    scored = scorer(here.fleet.recommender, here.state.model, here.private, own_width)(np.arange(USERS)).numpy()
    better = []
    for user in range(USERS):
        own = split().test[user] // (ITEMS // 2)
        other_half = np.arange(ITEMS // 2) + (1 - own) * (ITEMS // 2)
        better.append((scored[user, split().test[user]] > scored[user, other_half]).mean())
    assert np.mean(better) > 0.8, f"held-out items beat only {np.mean(better):.0%} of the other taste's"


def test_unknown_and_impossible_models_are_refused():
    with pytest.raises(ConfigError, match='Did you mean "neumf"'):
        build("neumff", users=2, items=2)
    for name in ("mlp", "neumf"):
        with pytest.raises(ConfigError, match="at least one hidden layer"):
            build(name, users=2, items=2, hidden=())
