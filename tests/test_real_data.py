"""MovieLens-100K as published, and the figures that stand in every table."""

from __future__ import annotations

import numpy as np
import pytest

from fedprune.baselines import popularity, pure_svd
from fedprune.data import Interactions, leave_one_out, load
from fedprune.errors import DataError
from fedprune.evaluation import evaluate

pytestmark = pytest.mark.real_data


@pytest.fixture(scope="module")
def movies() -> Interactions:
    try:
        return load("ml-100k")
    except DataError as error:
        pytest.skip(str(error))


def test_counts(movies):
    assert (movies.users, movies.items, movies.rows) == (943, 1682, 100_000)
    assert movies.notes == ()
    assert movies.user_ids[0] == "1" and movies.item_ids[-1] == "1682"
    assert np.diff(movies.starts).min() == 20


def test_split(movies):
    split = leave_one_out(movies)
    assert split.train.rows == 98_114
    assert (split.test >= 0).all() and (split.validation >= 0).all()


def test_baselines(movies):
    """facts/feasibility.md 1.1 of the project's prototype: popularity .2270 and .0442, PureSVD .3800 and .0757."""
    split = leave_one_out(movies)
    popular = evaluate(popularity(split.train), split, "test")
    assert popular["ndcg10_expected"] == pytest.approx(0.2270, abs=0.0005)
    assert popular["ndcg10_full"] == pytest.approx(0.0441, abs=0.0005)
    svd = evaluate(pure_svd(split.train), split, "test")
    assert svd["ndcg10_expected"] == pytest.approx(0.3784, abs=0.001)
    assert svd["ndcg10_full"] == pytest.approx(0.0751, abs=0.001)
