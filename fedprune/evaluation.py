"""How well held-out items rank: in the whole catalogue, among 99 negatives exactly, and in one fixed draw of 99.

And, for models trained on ratings, how far the predicted ratings of the held-out items are off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedprune.data.split import Split
from fedprune.errors import DataError
from fedprune.metrics import expected_gain, gains
from fedprune.ranking import Ranks, Scorer, Seen, rank_held_out
from fedprune.types import FloatArray, IntArray

__all__ = ["PerUser", "Ranks", "Scorer", "Seen", "average", "evaluate", "quality", "rank_held_out", "rating_errors"]


@dataclass(frozen=True, eq=False)
class PerUser:
    """Quality of each evaluated user's list, float64 `[evaluated]` each, in 0 .. 1.

    Attributes:
        user: user numbers, int64 `[evaluated]`.
        k: length of the list.
        hr_full: probability that the held-out item is among the first k of all candidates (a 0 or 1 without ties).
        ndcg_full: 1 / log2(position + 1) if it is, else 0; positions count from 1.
        hr_expected: the same among itself and 99 negatives, averaged over every possible draw.
        ndcg_expected: likewise.
        hr_draw: the same for one fixed draw, for comparison with papers.
        ndcg_draw: likewise.
    """

    user: IntArray
    k: int
    hr_full: FloatArray
    ndcg_full: FloatArray
    hr_expected: FloatArray
    ndcg_expected: FloatArray
    hr_draw: FloatArray
    ndcg_draw: FloatArray


def quality(ranks: Ranks, k: int = 10) -> PerUser:
    """Hit rate and NDCG at k of each user, in three protocols.

    Items of equal score stand in random order, so with b better and t tied candidates the position is uniform on
    b + 1 .. b + t + 1 (b + t/2 + 1 on average, "ties count half"), and every figure here is the expectation over that
    order. The expectation over the draws of 99 is exact as well (`metrics.expected_gain`), so it has no sampling noise.

    Full ranking is what counts: sampled metrics can order models differently (Krichene & Rendle 2020, "On sampled
    metrics for item recommendation", section 4).
    """
    if k < 1:
        raise DataError(f"k is {k}; a list holds at least 1 item.")
    others = ranks.candidates - 1
    drawn = np.minimum(ranks.negatives, others)
    figures = {}
    for name, gain in gains(k).items():
        figures[f"{name}_full"] = expected_gain(gain, ranks.better, ranks.ties, others, others)
        figures[f"{name}_expected"] = expected_gain(gain, ranks.better, ranks.ties, others, drawn)
        figures[f"{name}_draw"] = expected_gain(gain, ranks.draw_better, ranks.draw_ties, drawn, drawn)
    return PerUser(user=ranks.user, k=k, **figures)


def average(per_user: PerUser, users: NDArray[np.bool_] | None = None) -> dict[str, float]:
    """Mean over evaluated users, or over those of them in `users` (bool `[users]` of the whole data set).

    Returns:
        `hr10_full`, `ndcg10_full`, `hr10_expected`, `ndcg10_expected`, `hr10_draw`, `ndcg10_draw` (for k = 10).

    Raises:
        DataError: the mask holds no evaluated user.
    """
    chosen = np.ones(len(per_user.user), dtype=bool) if users is None else users[per_user.user]
    if not chosen.any():
        raise DataError(f"none of the {len(per_user.user)} evaluated users is in the mask; an average needs at least 1.")
    return {
        f"{name}{per_user.k}_{protocol}": float(getattr(per_user, f"{name}_{protocol}")[chosen].mean())
        for protocol in ("full", "expected", "draw")
        for name in ("hr", "ndcg")
    }


def evaluate(
    scorer: Scorer, split: Split, on: Literal["validation", "test"], *, k: int = 10, chunk: int = 256
) -> dict[str, float]:
    """Rank the held-out items of a split and average: the six figures of `average`.

    Choose settings and rounds on "validation"; read "test" once.
    """
    seen = split.train if on == "validation" else split.seen_before_test()
    return average(quality(rank_held_out(scorer, seen, getattr(split, on), chunk=chunk), k))


def rating_errors(scorer: Scorer, split: Split, on: Literal["validation", "test"], *, chunk: int = 256) -> dict[str, float]:
    """How far predicted ratings of held-out items are off, for models trained on ratings (explicit feedback).

    The score s of a user's held-out item is its predicted rating. As is the field's custom, it is clipped to the range of
    the training ratings, lo .. hi (of all users); r is what the file says; n users have a held-out item with a rating:

        e = min(max(s, lo), hi) - r,    mse = sum e^2 / n,    mae = sum |e| / n.

    Clipping hides how far beyond the range a score lies: infinite scores count as lo or hi. Models trained on the fact of
    an interaction score on another scale, and their figures mean nothing.

    Args:
        scorer: see `Scorer`; scores in the unit of the ratings.
        split: with ratings, in training and held out.
        on: choose settings and rounds on "validation"; read "test" once.
        chunk: users scored at once; memory grows with chunk x items.

    Returns:
        `mse`, in the squared unit of the ratings (stars^2), and `mae`, in their unit.

    Raises:
        DataError: the data have no ratings, nobody has a held-out item with one, a score is NaN, or `scorer` returns
            another shape than `[chunk, items]`.
    """
    train = split.train
    held_out, rating = (split.validation, split.validation_rating) if on == "validation" else (split.test, split.test_rating)
    if train.rating is None or rating is None:
        lacking = "training" if train.rating is None else on
        raise DataError(
            f"{train.name} has no {lacking} ratings; a rating error needs both training and {on} ones: "
            'give a file with a column "rating" and split it with leave_one_out, or rank with evaluate.'
        )
    known = train.rating[~np.isnan(train.rating)]
    users = np.flatnonzero((held_out >= 0) & ~np.isnan(rating))
    if not len(users) or not len(known):
        raise DataError(
            f"{len(users):,} of {train.users:,} users have a rated {on} item and {len(known):,} of {train.rows:,} training "
            "rows a rating; at least 1 of each is needed. A test item needs 2 interactions of a user, a validation item 3."
        )
    predicted = np.empty(len(users))
    for start in range(0, len(users), chunk):
        part = users[start : start + chunk]
        scores = scorer(part)
        if scores.shape != (len(part), train.items):
            raise DataError(
                f"the scorer returned {list(scores.shape)} for {len(part)} users; it must return {[len(part), train.items]}."
            )
        if bad := int(torch.isnan(scores).sum()):
            raise DataError(f"{bad:,} of {scores.numel():,} scores are NaN: the model has diverged; lower its learning rate.")
        own = scores.gather(1, torch.from_numpy(held_out[part])[:, None].to(scores.device))
        predicted[start : start + chunk] = own[:, 0].cpu().double().numpy()
    error = predicted.clip(known.min(), known.max()) - rating[users]
    return {"mse": float(np.square(error).mean()), "mae": float(np.abs(error).mean())}
