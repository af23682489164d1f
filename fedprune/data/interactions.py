"""Who took what, in which order: the one table everything else is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedprune.errors import DataError
from fedprune.types import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Interactions:
    """Implicit feedback, one row per distinct (user, item) pair, grouped by user and in time order within a user.

    Equal timestamps keep the order of the file; without timestamps the order of the file is the order of time.

    Attributes:
        name: of the data set, for tables.
        user: user numbers, int64 `[rows]`, ascending.
        item: item numbers, int64 `[rows]`.
        rating: what the file says, float64 `[rows]`, or None. Only the task "ratings" trains on it; all else on the fact.
        time: float64 `[rows]`, seconds since 1970 where the file holds dates, else the file's own unit; or None.
        user_ids: the file's text for each user number. A part of a data set (a split) keeps the numbers of the whole,
            so a user or an item may have no row.
        item_ids: the same for items.
        notes: one sentence for everything that was left out or assumed.
    """

    name: str
    user: IntArray
    item: IntArray
    rating: FloatArray | None
    time: FloatArray | None
    user_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def users(self) -> int:
        """How many users are numbered."""
        return len(self.user_ids)

    @property
    def items(self) -> int:
        """How many items are numbered: the catalogue that is ranked."""
        return len(self.item_ids)

    @property
    def rows(self) -> int:
        """How many interactions there are."""
        return len(self.user)

    @property
    def density(self) -> float:
        """Share of all (user, item) pairs that are present."""
        return self.rows / (self.users * self.items)

    @cached_property
    def starts(self) -> IntArray:
        """Row offsets: user u owns rows `starts[u]` to `starts[u + 1]`; int64 `[users + 1]`."""
        return np.searchsorted(self.user, np.arange(self.users + 1)).astype(np.int64)

    def items_of(self, user: int) -> IntArray:
        """Items of one user in time order, int64 `[its rows]`."""
        return self.item[self.starts[user] : self.starts[user + 1]]

    def part(self, keep: NDArray[np.bool_], *notes: str) -> Interactions:
        """The rows where `keep` (`[rows]`) holds, under the same numbers."""
        return replace(
            self,
            user=self.user[keep],
            item=self.item[keep],
            rating=None if self.rating is None else self.rating[keep],
            time=None if self.time is None else self.time[keep],
            notes=(*self.notes, *notes),
        )


def arrange(
    name: str,
    user: IntArray,
    item: IntArray,
    *,
    user_ids: Sequence[str],
    item_ids: Sequence[str],
    rating: FloatArray | None = None,
    time: NDArray[np.integer | np.floating] | None = None,
    notes: Sequence[str] = (),
    min_interactions: int = 1,
    least: int = 2,
) -> Interactions:
    """Sort numbered rows by user and time, keep the first of repeated pairs, and peel to the k-core.

    Args:
        name: of the data set.
        user: int64 `[rows]`, in file order, indices into `user_ids`; item likewise.
        item: see `user`.
        user_ids: text of every user; those that lose all their rows lose their number too. `item_ids` likewise.
        item_ids: see `user_ids`.
        rating: `[rows]` or None.
        time: `[rows]`, any number type without NaN, or None.
        notes: sentences to start from.
        min_interactions: k of the k-core: every user and every item keeps at least k rows, iterated until that holds.
        least: users and items there must be at least.

    Raises:
        DataError: fewer than `least` users or items remain, or `min_interactions` is below 1.
    """
    if min_interactions < 1:
        raise DataError(f"min_interactions is {min_interactions}; it must be at least 1, where nothing is left out.")
    said = list(notes)
    order = np.argsort(user, kind="stable") if time is None else np.lexsort((time, user))  # both stable: ties keep order
    _, first = np.unique(user[order] * len(item_ids) + item[order], return_index=True)
    if repeated := len(order) - len(first):
        said.append(f"{repeated:,} of {len(order):,} rows dropped: the user already had the item (the first counts).")
    order = order[np.sort(first)]
    user, item = user[order], item[order]
    kept = np.ones(len(user), dtype=bool)
    if min_interactions > 1:
        kept = core(user, item, min_interactions)
        if not kept.any():
            raise DataError(
                f"min_interactions {min_interactions} leaves nothing of {name}; "
                f"the largest that leaves something is {_largest_core(user, item)}."
            )
        if lost := len(kept) - int(kept.sum()):
            said.append(
                f"{lost:,} of {len(kept):,} rows dropped: their user or item has fewer than {min_interactions} "
                f"interactions ({min_interactions}-core)."
            )
    order, user, item = order[kept], user[kept], item[kept]
    present_users, user = np.unique(user, return_inverse=True)
    present_items, item = np.unique(item, return_inverse=True)
    if len(present_users) < least or len(present_items) < least:
        raise DataError(
            f"{name} has {len(order):,} usable rows, {len(present_users)} users and {len(present_items)} items; "
            f"a recommender needs at least {least} of each." + (f" {' '.join(said)}" if said else "")
        )
    return Interactions(
        name=name,
        user=user.astype(np.int64),
        item=item.astype(np.int64),
        rating=None if rating is None else rating[order],
        time=None if time is None else time[order].astype(np.float64),
        user_ids=tuple(user_ids[int(number)] for number in present_users),
        item_ids=tuple(item_ids[int(number)] for number in present_items),
        notes=tuple(said),
    )


def core(user: IntArray, item: IntArray, k: int) -> NDArray[np.bool_]:
    """Rows of the k-core of the bipartite graph: the largest part in which every user and item has k rows or more.

    Seidman 1983, "Network structure and minimum degree"; found by peeling until nothing changes.

    Returns:
        bool `[rows]`, all False where the core is empty.
    """
    kept = np.arange(len(user))
    while len(kept):
        enough = (np.bincount(user[kept])[user[kept]] >= k) & (np.bincount(item[kept])[item[kept]] >= k)
        if enough.all():
            break
        kept = kept[enough]
    rows = np.zeros(len(user), dtype=bool)
    rows[kept] = True
    return rows


def _largest_core(user: IntArray, item: IntArray) -> int:
    k = 0
    while True:
        kept = core(user, item, k + 1)  # cores are nested: each starts from the one before
        if not kept.any():
            return k
        user, item, k = user[kept], item[kept], k + 1
