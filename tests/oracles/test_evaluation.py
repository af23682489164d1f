"""Ranks and expected metrics: hand arithmetic, simulation, sklearn and scipy.stats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats
from sklearn.metrics import mean_absolute_error, mean_squared_error, ndcg_score

from fedprune.data import Split, leave_one_out
from fedprune.data.interactions import arrange
from fedprune.errors import DataError
from fedprune.evaluation import average, evaluate, quality, rank_held_out, rating_errors
from fedprune.metrics import expected_gain, gains

NOTHING = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


def table(scores):
    scores = torch.as_tensor(scores, dtype=torch.float32)
    return lambda users: scores[torch.from_numpy(users)]


def numbers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_by_hand():
    # User 0: item 2 (.5); 0 beats it, 1 is seen, 3 ties, 4 loses. User 1 is left out. User 2: item 0, the best.
    scores = [[0.9, 0.8, 0.5, 0.5, 0.1], [0, 0, 0, 0, 0], [5, 4, 3, 2, 1]]
    ranks = rank_held_out(table(scores), (numbers(0, 2, 2), numbers(1, 4, 3)), numbers(2, -1, 0), negatives=2, chunk=1)
    assert ranks.user.tolist() == [0, 2]
    assert ranks.better.tolist() == [1, 0]
    assert ranks.ties.tolist() == [1, 0]
    assert ranks.candidates.tolist() == [4, 3]
    figures = quality(ranks, k=2)
    # Full: place 2 or 3, evenly.
    assert figures.hr_full.tolist() == [0.5, 1.0]
    np.testing.assert_allclose(figures.ndcg_full, [0.5 / np.log2(3), 1.0])
    # Two of {better, tie, worse}: {b, t} -> place 2 or 3; {b, w} -> 2; {t, w} -> 1 or 2. Each pair with 1/3.
    np.testing.assert_allclose(figures.hr_expected, [(0.5 + 1 + 1) / 3, 1.0])
    np.testing.assert_allclose(figures.ndcg_expected, [((0.5 + 1 + 0.5) / np.log2(3) + 0.5) / 3, 1.0])
    assert average(figures) == pytest.approx(
        {
            "hr2_full": 0.75,
            "ndcg2_full": figures.ndcg_full.mean(),
            "hr2_expected": (2.5 / 3 + 1) / 2,
            "ndcg2_expected": figures.ndcg_expected.mean(),
            "hr2_draw": figures.hr_draw.mean(),
            "ndcg2_draw": figures.ndcg_draw.mean(),
        }
    )
    assert average(figures, np.array([True, True, False]))["hr2_full"] == 0.5


def test_full_ranking_against_sklearn():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 30))
    held_out = rng.integers(0, 30, 40)
    figures = quality(rank_held_out(table(scores), NOTHING, held_out), k=10)
    relevant = np.eye(30)[held_out]
    ours = [ndcg_score(relevant[[user]], scores[[user]].astype(np.float32), k=10) for user in range(40)]
    np.testing.assert_allclose(figures.ndcg_full, ours)
    # 29 competitors are fewer than 99, so all of them are drawn: the three protocols agree.
    np.testing.assert_allclose(figures.ndcg_expected, ours)
    np.testing.assert_allclose(figures.ndcg_draw, ours)


def test_ties_without_truncation_against_sklearn():
    # sklearn averages gains over tied places too (McSherry & Najork 2008), over the whole list if k is not given.
    scores = np.random.default_rng(1).integers(0, 5, size=(40, 30)).astype(float)
    held_out = np.random.default_rng(2).integers(0, 30, 40)
    figures = quality(rank_held_out(table(scores), NOTHING, held_out), k=30)
    relevant = np.eye(30)[held_out]
    np.testing.assert_allclose(figures.ndcg_full, [ndcg_score(relevant[[user]], scores[[user]]) for user in range(40)])


def by_definition(gain, b, t, n, m):
    """Mean over the tie order of the hypergeometric expectation, term by term, from scipy.stats."""
    places = np.arange(len(gain))
    return np.mean([stats.hypergeom.pmf(places, n, b + u, m) @ gain for u in range(t + 1)])


@settings(deadline=None, max_examples=150)
@given(some.data())
def test_closed_form_equals_scipy_term_by_term(data):
    n = data.draw(some.integers(1, 400))
    b = data.draw(some.integers(0, n))
    t = data.draw(some.integers(0, min(n - b, 60)))
    m = data.draw(some.integers(0, n))
    for gain in gains(data.draw(some.integers(1, 12))).values():
        got = expected_gain(gain, numbers(b), numbers(t), numbers(n), numbers(m))
        assert got == pytest.approx(by_definition(gain, b, t, n, m), abs=1e-9)


def test_large_catalogue_keeps_its_digits():
    b, t, n, m = numbers(0, 500, 20_000, 3), numbers(2, 1, 40, 0), numbers(*[60_000] * 4), numbers(*[99] * 4)
    for gain in gains(10).values():
        want = [by_definition(gain, *row) for row in zip(b, t, n, m, strict=True)]
        np.testing.assert_allclose(expected_gain(gain, b, t, n, m), want, atol=1e-6)


def test_expectation_against_simulation():
    """200,000 draws per row, ties broken by chance; four standard errors."""
    rng = np.random.default_rng(5)
    for b, t, n, m in ((30, 0, 600, 99), (60, 40, 600, 99), (0, 599, 600, 99), (9, 3, 50, 20)):
        draws = rng.multivariate_hypergeometric([b, t, n - b - t], m, size=200_000)
        place = draws[:, 0] + rng.integers(0, draws[:, 1] + 1)
        for gain in gains(10).values():
            simulated = np.where(place < 10, gain[np.minimum(place, 9)], 0.0)
            exact = expected_gain(gain, numbers(b), numbers(t), numbers(n), numbers(m))[0]
            assert abs(simulated.mean() - exact) < 4 * simulated.std() / np.sqrt(len(simulated)) + 1e-12


def test_fixed_draws_average_to_the_expectation():
    rng = np.random.default_rng(3)
    scores = table(rng.integers(0, 40, size=(30, 200)))
    seen = np.repeat(np.arange(30), 5), np.tile(np.arange(5), 30)
    held_out = rng.integers(5, 200, 30)
    draws = [quality(rank_held_out(scores, seen, held_out, negatives=20, draw_seed=seed), k=5).ndcg_draw for seed in range(60)]
    expected = quality(rank_held_out(scores, seen, held_out, negatives=20), k=5).ndcg_expected
    error = np.std(draws, axis=0).mean() / np.sqrt(60 * 30)
    assert abs(np.mean(draws) - expected.mean()) < 4 * error


def test_the_draw_depends_neither_on_the_chunk_nor_on_the_others():
    rng = np.random.default_rng(4)
    scores = table(rng.normal(size=(23, 300)))
    held_out = rng.integers(0, 300, 23)
    whole = rank_held_out(scores, NOTHING, held_out)
    small = rank_held_out(scores, NOTHING, held_out, chunk=4)
    fewer = rank_held_out(scores, NOTHING, np.where(np.arange(23) % 2, held_out, -1))
    assert (whole.draw_better == small.draw_better).all()
    assert (whole.draw_better[1::2] == fewer.draw_better).all()
    assert (whole.draw_better != rank_held_out(scores, NOTHING, held_out, draw_seed=1).draw_better).any()
    assert (whole.draw_better + whole.draw_ties <= 99).all()


def test_seen_items_may_come_in_any_order_and_are_no_candidates():
    rng = np.random.default_rng(6)
    scores = rng.normal(size=(12, 50))
    held_out = np.full(12, 49)
    user, item = (scores[:, :49] > 0.3).nonzero()
    shuffled = rng.permutation(len(user))
    ranks = rank_held_out(table(scores), (user[shuffled], item[shuffled]), held_out, chunk=5)
    scores[user, item] = -np.inf
    assert (ranks.better == (scores > scores[:, [49]]).sum(1)).all()
    assert (ranks.candidates == 50 - np.bincount(user, minlength=12)).all()


@settings(deadline=None, max_examples=50)
@given(some.integers(0, 2**32 - 1), some.integers(2, 60), some.integers(1, 12))
def test_properties(seed, items, k):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 8, size=(9, items)).astype(float)
    held_out = rng.integers(0, items, 9)
    figures = quality(rank_held_out(table(scores), NOTHING, held_out, negatives=20), k)
    for protocol in ("full", "expected", "draw"):
        hits, ndcg = getattr(figures, f"hr_{protocol}"), getattr(figures, f"ndcg_{protocol}")
        assert (ndcg >= 0).all() and (ndcg <= hits + 1e-9).all() and (hits <= 1 + 1e-9).all()
    assert (figures.hr_expected >= figures.hr_full - 1e-9).all()  # fewer competitors never hurt
    raised = scores.copy()
    raised[np.arange(9), held_out] += 1
    better = quality(rank_held_out(table(raised), NOTHING, held_out, negatives=20), k)
    assert (better.ndcg_full >= figures.ndcg_full - 1e-9).all()
    assert (better.ndcg_expected >= figures.ndcg_expected - 1e-9).all()
    rescaled = quality(rank_held_out(table(3 * scores - 7), NOTHING, held_out, negatives=20), k)
    assert (rescaled.ndcg_expected == figures.ndcg_expected).all()
    longer = quality(rank_held_out(table(scores), NOTHING, held_out, negatives=20), k + 1)
    assert (longer.ndcg_expected >= figures.ndcg_expected - 1e-9).all()


def test_constant_scores_are_worth_chance():
    figures = average(quality(rank_held_out(table(np.zeros((3, 500))), NOTHING, numbers(1, 2, 3))))
    assert figures["hr10_full"] == pytest.approx(10 / 500)
    assert figures["hr10_expected"] == pytest.approx(10 / 100)
    assert figures["hr10_draw"] == pytest.approx(10 / 100)


def test_only_the_held_out_item_is_left():
    figures = average(quality(rank_held_out(table([[0.0, 1.0]]), (numbers(0), numbers(1)), numbers(0))))
    assert set(figures.values()) == {1.0}


def test_evaluate_treats_the_test_item_as_a_candidate_in_validation():
    data = arrange("own", numbers(0, 0, 0, 1), numbers(0, 1, 2, 0), user_ids="uv", item_ids="abc")
    split = leave_one_out(data)  # user 0 trains on a, validates on b, tests on c
    scores = table([[9.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    assert evaluate(scores, split, "validation", k=1)["hr1_full"] == 0.0
    assert evaluate(scores, split, "test", k=1)["hr1_full"] == 1.0


def test_refusals():
    scores = np.zeros((2, 4))
    scores[1, 2] = np.nan
    with pytest.raises(DataError, match="1 of 8 scores are NaN: the model has diverged"):
        rank_held_out(table(scores), NOTHING, numbers(0, 0))
    with pytest.raises(DataError, match="user 0 has the held-out item 3 among the seen"):
        rank_held_out(table(np.zeros((1, 4))), (numbers(0), numbers(3)), numbers(3))
    with pytest.raises(DataError, match="no user has a held-out item"):
        rank_held_out(table(np.zeros((1, 4))), NOTHING, numbers(-1))
    with pytest.raises(DataError, match=r"returned \[4\] for 1 users"):
        rank_held_out(lambda users: torch.zeros(4), NOTHING, numbers(0))
    with pytest.raises(DataError, match="at least 1"):
        rank_held_out(table(np.zeros((1, 4))), NOTHING, numbers(0), negatives=0)
    ranks = rank_held_out(table(np.zeros((1, 4))), NOTHING, numbers(0))
    with pytest.raises(DataError, match="k is 0"):
        quality(ranks, 0)
    with pytest.raises(DataError, match="an average needs at least 1"):
        average(quality(ranks), np.array([False]))


def rated(*rating: float) -> Split:
    """User 0 trains on a and b, validates on c, tests on d; 1 trains on b, tests on a; 2 trains on c."""
    user, item = numbers(0, 0, 0, 0, 1, 1, 2), numbers(0, 1, 2, 3, 1, 0, 2)
    stars = np.array(rating) if rating else None
    return leave_one_out(arrange("own", user, item, user_ids="uvw", item_ids="abcd", rating=stars))


STARS = (2.0, 4.0, 1.0, 5.0, 3.0, 4.0, 3.0)


def test_the_split_keeps_the_ratings_of_what_it_holds_out():
    split = rated(*STARS)
    assert split.train.rating is not None and split.train.rating.tolist() == [2, 4, 3, 3]
    assert split.validation_rating is not None and split.validation_rating.dtype == np.float64
    np.testing.assert_array_equal(split.validation_rating, [1, np.nan, np.nan])
    np.testing.assert_array_equal(split.test_rating, [5, 4, np.nan])
    assert rated().validation_rating is rated().test_rating is None


def test_rating_errors_by_hand():
    # Training ratings lie in 2 .. 4. Test: |3.5 - 5|, |2.25 - 4|; validation: |2.5 - 1|. User 2 is never asked for.
    scores = [[0.0, 9.0, 2.5, 3.5], [2.25, 9.0, 9.0, 9.0], [np.nan] * 4]
    for chunk in (1, 2, 256):
        test = rating_errors(table(scores), rated(*STARS), "test", chunk=chunk)
        assert test == pytest.approx({"mse": (1.5**2 + 1.75**2) / 2, "mae": (1.5 + 1.75) / 2})
    assert rating_errors(table(scores), rated(*STARS), "validation") == {"mse": 1.5**2, "mae": 1.5}


def test_predictions_are_clipped_to_the_range_of_the_training_ratings():
    # 7 and -inf count as 4 and 2, the extremes of training, although the held-out ratings reach from 1 to 5.
    scores = [[0.0, 0.0, -np.inf, 7.0], [-3.0, 0.0, 0.0, 0.0], [0.0] * 4]
    assert rating_errors(table(scores), rated(*STARS), "test") == {"mse": (1**2 + 2**2) / 2, "mae": (1 + 2) / 2}
    assert rating_errors(table(scores), rated(*STARS), "validation") == {"mse": 1.0, "mae": 1.0}


def test_a_held_out_item_without_a_rating_is_left_out():
    scores = table(np.full((3, 4), 3.0))
    split = rated(2, 4, 1, np.nan, 3, 4, 3)
    assert rating_errors(scores, split, "test") == {"mse": 1.0, "mae": 1.0}
    split = rated(np.nan, 4, 1, 5, 3, 4, 3)  # training ratings 3 .. 4: a missing one has no part in the range
    assert rating_errors(table(np.zeros((3, 4))), split, "validation") == {"mse": 4.0, "mae": 2.0}


@settings(deadline=None, max_examples=30)
@given(some.integers(0, 2**32 - 1), some.integers(1, 9))
def test_rating_errors_against_sklearn(seed, chunk):
    rng = np.random.default_rng(seed)
    user, item = (rng.random((20, 15)) < 0.3).nonzero()
    stars = rng.integers(1, 6, len(user)).astype(float)
    names = [str(number) for number in range(20)]
    split = leave_one_out(arrange("own", user, item, user_ids=names, item_ids=names[:15], rating=stars))
    assert split.train.rating is not None and split.test_rating is not None
    scores = rng.normal(3, 3, (split.train.users, split.train.items)).astype(np.float32)
    has = split.test >= 0
    clipped = scores[has, split.test[has]].clip(split.train.rating.min(), split.train.rating.max())
    got = rating_errors(table(scores), split, "test", chunk=chunk)
    assert got["mse"] == pytest.approx(mean_squared_error(split.test_rating[has], clipped))
    assert got["mae"] == pytest.approx(mean_absolute_error(split.test_rating[has], clipped))


def test_rating_errors_refuse():
    split, threes = rated(*STARS), table(np.full((3, 4), 3.0))
    with pytest.raises(DataError, match=r"own has no training ratings; .* give a file with a column"):
        rating_errors(threes, rated(), "test")
    with pytest.raises(DataError, match="own has no test ratings"):
        rating_errors(threes, replace(split, test_rating=None), "test")
    with pytest.raises(DataError, match="0 of 3 users have a rated validation item and 4 of 4 training rows"):
        rating_errors(threes, replace(split, validation=numbers(-1, -1, -1)), "validation")
    with pytest.raises(DataError, match="2 of 3 users have a rated test item and 0 of 4 training rows"):
        rating_errors(threes, rated(np.nan, np.nan, 1, 5, np.nan, 4, np.nan), "test")
    scores = np.full((3, 4), 3.0)
    scores[0, 3] = np.nan
    with pytest.raises(DataError, match="1 of 8 scores are NaN: the model has diverged; lower its learning rate"):
        rating_errors(table(scores), split, "test")
    with pytest.raises(DataError, match=r"returned \[2, 5\] for 2 users; it must return \[2, 4\]"):
        rating_errors(table(np.zeros((3, 5))), split, "test")
