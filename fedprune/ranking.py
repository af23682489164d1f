"""Where held-out items rank: what beats them and what equals them, among all candidates and among 99 drawn ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedprune.data.interactions import Interactions
from fedprune.errors import DataError
from fedprune.random import drawn, keys
from fedprune.types import IntArray

Scorer: TypeAlias = Callable[[IntArray], Tensor]
"""User numbers int64 `[chunk]` -> scores of every item, `[chunk, items]`; higher is better, any device."""
Seen: TypeAlias = Interactions | tuple[IntArray, IntArray]
"""What a user already has and nobody would recommend again: rows, or (user, item) number pairs."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """Where each held-out item stands; one entry per evaluated user.

    Attributes:
        user: user numbers, int64 `[evaluated]`, ascending.
        better: candidates scored strictly above the held-out item.
        ties: other candidates with exactly its score.
        candidates: items ranked, the held-out one included: those the user has not seen.
        draw_better: as `better`, among the negatives of the fixed draw only.
        draw_ties: as `ties`, likewise.
        negatives: how many negatives the sampled protocol draws; a user with fewer candidates gets all of them.
    """

    user: IntArray
    better: IntArray
    ties: IntArray
    candidates: IntArray
    draw_better: IntArray
    draw_ties: IntArray
    negatives: int


def rank_held_out(
    scorer: Scorer, seen: Seen, held_out: IntArray, *, negatives: int = 99, draw_seed: int = 2024, chunk: int = 256
) -> Ranks:
    """Count, for every user with a held-out item, the candidates that beat and that equal it.

    The draw is a function of `draw_seed`, the user's number and the user's candidates: models, rounds and chunk sizes are
    compared on the same negatives.

    Args:
        scorer: see `Scorer`.
        seen: items that are no candidates. For test: train and validation (`Split.seen_before_test`); for validation:
            train, so that the test item is an ordinary candidate.
        held_out: int64 `[users]`, item number, or -1 for a user who is left out.
        negatives: of the fixed draw, and of the expectation that `quality` takes.
        draw_seed: of the fixed draw.
        chunk: users scored at once; memory grows with chunk x items.

    Raises:
        DataError: a score is NaN, a held-out item is also seen, nobody has a held-out item, or `scorer` returns another
            shape than `[chunk, items]`.
    """
    users = np.flatnonzero(held_out >= 0)
    if not len(users):
        raise DataError("no user has a held-out item; a test item needs 2 interactions of a user, a validation item 3.")
    if negatives < 1:
        raise DataError(f"negatives is {negatives}; the sampled protocol needs at least 1, usually 99.")
    seen_item, starts = _by_user(seen, len(held_out))
    parts = []
    for start in range(0, len(users), chunk):
        part = users[start : start + chunk]
        scores = scorer(part)
        if scores.ndim != 2 or len(scores) != len(part):
            raise DataError(f"the scorer returned {list(scores.shape)} for {len(part)} users; it must return [users, items].")
        # The sum is a cheap first look: NaN anywhere makes it NaN.
        if torch.isnan(scores.sum()) and (bad := int(torch.isnan(scores).sum())):
            raise DataError(f"{bad:,} of {scores.numel():,} scores are NaN: the model has diverged; lower its learning rate.")
        counts = starts[part + 1] - starts[part]
        row = np.repeat(np.arange(len(part)), counts)
        column = seen_item[np.repeat(starts[part] - np.cumsum(counts) + counts, counts) + np.arange(len(row))]
        target = held_out[part]
        _refuse_seen(part, target, row, column)
        draw = _drawn(part, target, row, column, scores.shape[1], negatives, draw_seed)
        parts.append(_count(scores, target, row, column, draw))
    better, ties, candidates, draw_better, draw_ties = np.concatenate(parts, axis=1)
    return Ranks(users, better, ties, candidates, draw_better, draw_ties, negatives)


def _by_user(seen: Seen, users: int) -> tuple[IntArray, IntArray]:
    user, item = (seen.user, seen.item) if isinstance(seen, Interactions) else seen
    if len(user) > 1 and (np.diff(user) < 0).any():
        order = np.argsort(user, kind="stable")
        user, item = user[order], item[order]
    return item, np.searchsorted(user, np.arange(users + 1))


def _refuse_seen(user: IntArray, target: IntArray, row: IntArray, column: IntArray) -> None:
    if (same := column == target[row]).any():
        raise DataError(
            f"user {user[row[same][0]]} has the held-out item {column[same][0]} among the seen ones; "
            "a held-out item must be in neither train nor, for test, validation."
        )


def _count(scores: Tensor, target: IntArray, row: IntArray, column: IntArray, drawn: IntArray) -> IntArray:
    """Better, ties, candidates, draw_better, draw_ties; int64 `[5, chunk]`."""
    device = scores.device
    own = scores.gather(1, torch.from_numpy(target)[:, None].to(device))
    place = torch.from_numpy(row).to(device), torch.from_numpy(column).to(device)
    ours, seen = own[place[0], 0], scores[place]
    # Counting everything and taking the seen off again is faster than masking, and leaves the scores as they are.
    flags = torch.empty_like(scores)  # sums of 0.0 and 1.0 are exact and several times faster than sums of booleans
    above = torch.gt(scores, own, out=flags).sum(1).cpu().numpy() - _per_row(seen > ours, row, len(target))
    equal = torch.eq(scores, own, out=flags).sum(1).cpu().numpy() - _per_row(seen == ours, row, len(target)) - 1
    candidates = scores.shape[1] - np.bincount(row, minlength=len(target))
    negative = torch.from_numpy(drawn).to(device)
    there, values = negative >= 0, scores.gather(1, negative.clamp(min=0))
    draw_above = ((values > own) & there).sum(1).cpu().numpy()
    draw_equal = ((values == own) & there).sum(1).cpu().numpy()
    return np.stack([above, equal, candidates, draw_above, draw_equal]).astype(np.int64)


def _per_row(true: Tensor, row: IntArray, rows: int) -> IntArray:
    return np.bincount(row[true.cpu().numpy()], minlength=rows)


def _drawn(
    user: IntArray, target: IntArray, row: IntArray, column: IntArray, items: int, negatives: int, seed: int
) -> IntArray:
    """Negatives of the fixed draw, without repetition, int64 `[chunk, negatives]`; -1 where there are fewer."""
    barred = np.zeros((len(user), items), dtype=bool)
    barred[row, column] = True
    barred[np.arange(len(user)), target] = True
    wanted = np.minimum(negatives, items - barred.sum(1))
    result = np.full((len(user), negatives), -1, dtype=np.int64)
    values = drawn(keys(seed, "draw", user), wanted, torch.from_numpy(barred)).numpy()
    result[:, : values.shape[1]] = np.where(np.arange(values.shape[1]) < wanted[:, None], values, -1)
    return result
