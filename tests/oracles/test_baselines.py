"""Each baseline against its definition, computed the slow way on a small dense matrix."""

from __future__ import annotations

import numpy as np
import pytest

from fedprune.baselines import baselines, ease, item_knn, popularity, pure_svd
from fedprune.data import Interactions, leave_one_out
from fedprune.data.interactions import arrange
from fedprune.errors import DataError


@pytest.fixture(scope="module")
def train() -> Interactions:
    user, item = (np.random.default_rng(0).random((30, 17)) < np.linspace(0.1, 0.7, 17)).nonzero()
    names = [str(number) for number in range(30)]
    return arrange("own", user, item, user_ids=names, item_ids=names)


@pytest.fixture(scope="module")
def dense(train: Interactions) -> np.ndarray:
    matrix = np.zeros((train.users, train.items))
    matrix[train.user, train.item] = 1
    return matrix


EVERYBODY = np.arange(30)
SOME = np.array([3, 17, 4])


def test_popularity(train, dense):
    np.testing.assert_array_equal(popularity(train)(SOME).numpy(), np.tile(dense.sum(0), (3, 1)))


@pytest.mark.parametrize(("neighbours", "shrink", "block"), [(4, 0.0, 1024), (4, 2.0, 5), (50, 0.0, 7)])
def test_item_knn_by_brute_force(train, dense, neighbours, shrink, block):
    items = dense.shape[1]
    similar = np.zeros((items, items))
    for i in range(items):
        for j in range(items):
            together = dense[:, i] @ dense[:, j]
            similar[i, j] = 0 if i == j else together / (np.linalg.norm(dense[:, i]) * np.linalg.norm(dense[:, j]) + shrink)
    got = item_knn(train, neighbours=neighbours, shrink=shrink, block=block)(EVERYBODY).numpy()
    for j in range(items):
        column = similar[:, j]
        floor = np.sort(column)[-min(neighbours, items - 1)]
        sure, tied = np.where(column > floor, column, 0), np.where(column == floor, column, 0)
        assert (got[:, j] >= dense @ sure - 1e-5).all()  # which of equally similar items are kept is left open
        assert (got[:, j] <= dense @ (sure + tied) + 1e-5).all()
    if neighbours >= items:
        np.testing.assert_allclose(got, dense @ similar, rtol=1e-5)


def test_ease_by_definition(train, dense):
    """Steck 2019: each column solves a ridge regression on all other items (the zero diagonal is a constraint)."""
    weights = np.zeros((dense.shape[1],) * 2)
    for j in range(dense.shape[1]):
        others = np.delete(np.arange(dense.shape[1]), j)
        x = dense[:, others]
        weights[others, j] = np.linalg.solve(x.T @ x + 3.0 * np.eye(len(others)), x.T @ dense[:, j])
    got = ease(train, regularisation=3.0)(SOME).numpy()
    np.testing.assert_allclose(got, (dense @ weights)[SOME], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("normalise", "popular"), [(0.0, 0.0), (0.25, 0.25), (0.5, 0.1)])
def test_pure_svd_against_numpy(train, dense, normalise, popular):
    scaled = dense / (dense.sum(1) ** normalise)[:, None] / dense.sum(0) ** normalise
    _, _, directions = np.linalg.svd(scaled)
    want = scaled @ directions[:5].T @ directions[:5] * dense.sum(0) ** popular
    got = pure_svd(train, rank=5, normalise=normalise, popular=popular)(SOME).numpy()
    np.testing.assert_allclose(got, want[SOME], rtol=1e-4, atol=1e-5)


def test_the_same_matrix_gives_the_same_scores(train):
    assert (pure_svd(train, rank=5)(EVERYBODY) == pure_svd(train, rank=5)(EVERYBODY)).all()


def test_all_four_in_one_table(train):
    figures = baselines(leave_one_out(train), k=5)
    assert list(figures) == ["popularity", "item-kNN", "EASE", "PureSVD"]
    for row in figures.values():
        assert set(row) == {f"{name}5_{how}" for name in ("hr", "ndcg") for how in ("full", "expected", "draw")}
        assert all(0 <= value <= 1 for value in row.values())


def test_an_item_nobody_trains_on_is_ranked_too():
    # Item z is only ever a test item: its column is empty, and nothing may divide by its popularity of 0.
    item = np.array([0, 1, 2, 0, 2, 1, 1, 0, 3])
    split = leave_one_out(arrange("own", np.repeat(range(3), 3), item, user_ids="uvw", item_ids="abcz"))
    for row in baselines(split, k=1).values():
        assert all(np.isfinite(value) for value in row.values())


def test_refusals(train):
    with pytest.raises(DataError, match="30 users and 17 items allow 1 to 16"):
        pure_svd(train, rank=17)
    with pytest.raises(DataError, match="lambda above 0"):
        ease(train, regularisation=0)
    with pytest.raises(DataError, match="at least 1"):
        item_knn(train, neighbours=0)
