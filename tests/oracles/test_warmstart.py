"""The federated SVD against numpy's, and as a sum over clients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from files import settings
from world import ITEMS, USERS, recommender, train

from fedprune.config import read
from fedprune.recommenders import mf
from fedprune.simulation import prepare, read_data, warm_start_event
from fedprune.warmstart import Gathered, WarmStart, normalised, subspace

RANK = 4


def matrix():
    """X of everybody, dense."""
    return normalised(train(), 0.5, np.bincount(train().item, minlength=ITEMS).astype(float)).toarray()


def test_rows_are_normalised_by_both_degrees():
    rows, data = matrix(), train()
    user, item = int(data.user[7]), int(data.item[7])
    degrees = (data.user == user).sum() * (data.item == item).sum()
    assert rows[user, item] == pytest.approx(degrees**-0.5)
    assert (rows > 0).sum() == data.rows


def test_equals_the_svd_up_to_sign():
    rows = matrix()
    vectors, values = subspace(lambda basis: rows.T @ (rows @ basis), ITEMS, RANK, 300, seed=0)
    _, expected, right = np.linalg.svd(rows)
    np.testing.assert_allclose(values, expected[:RANK], atol=1e-8)
    overlap = right[:RANK] @ vectors
    # Equal singular values (one per taste) leave a rotation among their vectors free.
    np.testing.assert_allclose(overlap @ overlap.T, np.eye(RANK), atol=1e-5)
    for place in range(RANK):
        if np.abs(np.delete(expected, place) - expected[place]).min() > 0.01:
            assert abs(overlap[place, place]) == pytest.approx(1, abs=1e-5)


def test_what_clients_send_adds_up_and_is_placed_alike():
    whole, data = Gathered(train(), 0.5, {}), train()
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(ITEMS, RANK)))[0]
    halves = [data.part(data.user % 2 == half) for half in (0, 1)]
    parts = [Gathered(half, 0.5, {}, whole.counts()) for half in halves]
    np.testing.assert_allclose(parts[0].counts() + parts[1].counts(), whole.counts())
    np.testing.assert_allclose(parts[0].spread(basis) + parts[1].spread(basis), whole.spread(basis), atol=1e-12)
    untouched = np.setdiff1d(np.arange(ITEMS), halves[0].item)
    assert (parts[0].spread(basis)[untouched] == 0).all(), "a client's items are all it speaks of"
    for crowd in (whole, *parts):
        crowd.place("rows", basis)
    np.testing.assert_allclose(parts[0].private["rows"] + parts[1].private["rows"], whole.private["rows"], atol=1e-6)


def test_embeddings_reproduce_the_truncated_svd_up_to_scale():
    what = mf(users=USERS, items=ITEMS, latent=RANK)
    model, private = WarmStart(iterations=300)(what, train(), what.initial(0), what.initial_private(0), seed=0)
    product = (private["user_embedding"] @ model["item_embedding"].T).double().numpy()
    left, values, right = np.linalg.svd(matrix())
    expected = left[:, :RANK] * values[:RANK] @ right[:RANK]
    np.testing.assert_allclose(product / np.linalg.norm(product), expected / np.linalg.norm(expected), atol=1e-5)
    for embedding in (model["item_embedding"], private["user_embedding"]):
        assert float((embedding**2).mean().sqrt()) == pytest.approx(what.scale, rel=1e-5)


def test_the_bias_is_the_centred_logarithm_of_popularity():
    what = recommender()
    start = what.initial(0)
    model, private = WarmStart(iterations=0)(what, train(), start, what.initial_private(0), seed=0)
    counts = np.bincount(train().item, minlength=ITEMS)
    expected = np.log((counts + 1) / (USERS + 2))
    np.testing.assert_allclose(model["item_bias"], expected - expected.mean(), atol=1e-6)
    assert model["item_embedding"] is start["item_embedding"], "no iteration, no embedding"
    plain, _ = WarmStart(popularity_bias=False)(what, train(), start, private, seed=0)
    assert plain["item_bias"] is start["item_bias"] and start["item_bias"].abs().sum() == 0


@pytest.mark.parametrize("name", ["gmf", "mlp", "neumf"])
def test_every_embedding_starts_warm_and_nothing_else_changes(name: str):
    what = recommender(name)
    start, own = what.initial(0), what.initial_private(0)
    model, private = WarmStart()(what, train(), start, own, seed=0)
    for key in what.layout.tensors:
        before, after = (start | own)[key], (model | private)[key]
        assert before.shape == after.shape
        assert (after is not before) == (what.layout.kind(key) != "shared")


@pytest.mark.parametrize(("silos", "rows"), [(3, "touched"), (3, "table"), (None, "touched")])
def test_a_silos_users_share_the_rows_that_travel(tmp_path: Path, silos: int | None, rows: str):
    """Two passes of 8 float32 a row: a silo's every row once, however many of its users took the item."""
    chosen = read(settings(tmp_path), [f"silos={silos or 'none'}", f"rows={rows}", "strategy=fedavg"]).only("fedavg")
    here = prepare(chosen, read_data(chosen))
    positives, items = here.fleet.population.positives_of_client, here.fleet.population.items
    event, each = warm_start_event(here), 2 * 4 * 8
    moved = np.minimum(positives, items) if rows == "touched" else np.full_like(positives, items)
    assert bool(positives.max() > items) is (silos is not None), "nothing is shared"
    assert event["bytes_down"] == event["bytes_up"] == each * moved.sum()
    assert event["flops"] == pytest.approx(each * positives.sum()), "each example is worked on"


def test_more_dimensions_than_items():
    what = mf(users=USERS, items=ITEMS, latent=ITEMS + 8)
    model, private = WarmStart()(what, train(), what.initial(0), what.initial_private(0), seed=0)
    assert tuple(model["item_embedding"].shape) == what.layout.shape("item_embedding")
    assert tuple(private["user_embedding"].shape) == what.layout.shape("user_embedding")
