"""Leave one out by time: the last item of every user tests, the one before it chooses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedprune.data.interactions import Interactions
from fedprune.types import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Split:
    """Training rows and two held-out items per user, all under the numbers of the whole data set.

    Attributes:
        train: what clients train on. Negatives are drawn from "not in train", held-out items included: excluding them
            tells the model what the answer is not, and was measured to lift a published method's NDCG from .32 to .48.
        validation: int64 `[users]`, item number or -1 for a user without one. Choose settings and rounds on it.
        test: likewise. Read it once.
        validation_rating: what the file says of the validation item, float64 `[users]`, in the file's own unit (stars); NaN
            for a user without one. None where the data have no ratings.
        test_rating: likewise.
    """

    train: Interactions
    validation: IntArray
    test: IntArray
    validation_rating: FloatArray | None = None
    test_rating: FloatArray | None = None

    def seen_before_test(self) -> tuple[IntArray, IntArray]:
        """(user, item) pairs that are no candidates when the test item is ranked: train and validation."""
        has = np.flatnonzero(self.validation >= 0)
        return np.concatenate([self.train.user, has]), np.concatenate([self.train.item, self.validation[has]])


def leave_one_out(interactions: Interactions) -> Split:
    """Hold out each user's last interaction for test and the one before for validation.

    A user with two interactions gives the last to test and trains on the other; a user with one only trains. How many
    there were of each is added to the notes of `train`. Equal timestamps keep the order of the file.

    Source: the protocol of He et al. 2017, "Neural Collaborative Filtering", section 4.1 (its test item), with the
    validation item that later work adds.
    """
    starts = interactions.starts
    counts = np.diff(starts)
    last = starts[1:] - 1
    test = np.full(interactions.users, -1, dtype=np.int64)
    validation = test.copy()
    tested, validated = counts >= 2, counts >= 3
    test[tested] = interactions.item[last[tested]]
    validation[validated] = interactions.item[last[validated] - 1]
    keep = np.ones(interactions.rows, dtype=bool)
    keep[last[tested]] = False
    keep[last[validated] - 1] = False
    notes = []
    if two := int((counts == 2).sum()):
        notes.append(f"{two:,} of {interactions.users:,} users have 2 interactions: a test item, no validation item.")
    if one := int((counts == 1).sum()):
        notes.append(f"{one:,} of {interactions.users:,} users have 1 interaction: they train and are not evaluated.")
    return Split(
        interactions.part(keep, *notes),
        validation,
        test,
        validation_rating=_rating_of(interactions, validated, last[validated] - 1),
        test_rating=_rating_of(interactions, tested, last[tested]),
    )


def _rating_of(interactions: Interactions, users: NDArray[np.bool_], rows: IntArray) -> FloatArray | None:
    """Rating of one row of each of `users` (bool `[users]`), float64 `[users]`, NaN elsewhere; None without ratings."""
    if interactions.rating is None:
        return None
    rating = np.full(interactions.users, np.nan)
    rating[users] = interactions.rating[rows]
    return rating
