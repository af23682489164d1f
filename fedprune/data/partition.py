"""Which client holds which user: one phone each, or silos (hospitals, shops, regions) of many users."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import svds

from fedprune.data.interactions import Interactions
from fedprune.errors import DataError, unknown
from fedprune.types import IntArray

TASTE_DIRECTIONS = 3
"""Halvings of the population, so 2**3 = 8 tastes."""


def one_per_user(users: int) -> IntArray:
    """Cross-device: every user is a client of their own; int64 `[users]`."""
    return np.arange(users, dtype=np.int64)


def silos(
    train: Interactions,
    count: int,
    by: Literal["quantity", "equal", "dirichlet"],
    seed: int,
    alpha: float = 0.5,
) -> IntArray:
    """Cross-silo: divide the users among `count` clients, each of which gets at least one.

    - "equal": the same number of users each (to within one), with close to the same number of interactions.
    - "quantity": silo i gets users in proportion to 1/i (Zipf): few large, many small. Who goes where is chance.
    - "dirichlet": silos differ in taste. The users of each of the 8 `tastes` are spread over the silos by shares drawn
      from Dirichlet(alpha); small alpha: a taste sits in few silos; large: all silos alike. After Hsu et al. 2019,
      "Measuring the effects of non-identical data distribution", section 3, with tastes in place of class labels.

    Args:
        train: whose users are divided; silos never see held-out items.
        count: number of silos, 1 to the number of users.
        by: see above.
        seed: the same seed gives the same silos.
        alpha: above 0; for "dirichlet" only.

    Returns:
        Client number of each user, int64 `[users]`, in 0 .. count-1, every number present.

    Raises:
        DataError: `count` or `alpha` out of range, or `by` unknown.
    """
    if not 1 <= count <= train.users:
        raise DataError(f"{count} silos for {train.users} users; every silo needs a user: choose 1 to {train.users}.")
    if not alpha > 0:
        raise DataError(f"alpha is {alpha}; a Dirichlet distribution needs one above 0, usually 0.1 to 10.")
    rng = np.random.default_rng(seed)
    if by == "equal":
        return _equal(train, count, rng)
    if by == "quantity":
        return _by_quantity(train.users, count, rng)
    if by == "dirichlet":
        return _by_taste(tastes(train), count, alpha, rng)
    raise DataError(unknown("partition", by, ("quantity", "equal", "dirichlet")))


def tastes(train: Interactions) -> IntArray:
    """A cheap label of what a user likes: signs along the leading directions of the interactions, int64 `[users]`.

    Users and items are scaled to `X_ui / sqrt(n_u n_i)`, as in spectral co-clustering (Dhillon 2001, section 4), where
    the first singular pair is popularity and says nothing; the following 3 left singular vectors are cut at their
    medians, which gives up to 8 labels of similar size. Small matrices have fewer directions.
    """
    directions = min(TASTE_DIRECTIONS, min(train.users, train.items) - 2)
    if directions < 1:
        return np.zeros(train.users, dtype=np.int64)
    matrix = csr_array((np.ones(train.rows), (train.user, train.item)), shape=(train.users, train.items))
    scale = [1 / np.sqrt(np.maximum(matrix.sum(axis=axis), 1)) for axis in (1, 0)]
    matrix = diags_array(scale[0]) @ matrix @ diags_array(scale[1])
    start = np.random.default_rng(0).standard_normal(
        min(train.users, train.items)
    )  # fixed: the tastes are a property of the data
    found: Any = svds(matrix, k=directions + 1, v0=start)
    left = found[0][:, np.argsort(-found[1])[1:]]
    above = left > np.median(left, axis=0)
    return (above @ (1 << np.arange(directions))).astype(np.int64)


def _equal(train: Interactions, count: int, rng: np.random.Generator) -> IntArray:
    rows = np.diff(train.starts)
    order = rng.permutation(train.users)
    order = order[np.argsort(-rows[order], kind="stable")]
    client, load = np.empty(train.users, dtype=np.int64), np.zeros(count)
    for number, start in enumerate(range(0, train.users, count)):
        block = order[start : start + count]
        # Every other block is dealt by chance, so that silos are random; the one after it evens the loads out again.
        chosen = rng.permutation(count) if number % 2 == 0 else np.argsort(load, kind="stable")
        client[block] = chosen[: len(block)]
        load[client[block]] += rows[block]
    return client


def _by_quantity(users: int, count: int, rng: np.random.Generator) -> IntArray:
    share = 1 / np.arange(1, count + 1)
    exact = share / share.sum() * (users - count)
    sizes = np.floor(exact).astype(np.int64)
    sizes[np.argsort(sizes - exact, kind="stable")[: users - count - sizes.sum()]] += 1  # largest remainders
    return rng.permutation(np.repeat(np.arange(count), sizes + 1)).astype(np.int64)


def _by_taste(taste: IntArray, count: int, alpha: float, rng: np.random.Generator) -> IntArray:
    client = np.empty(len(taste), dtype=np.int64)
    for label in np.unique(taste):
        members = np.flatnonzero(taste == label)
        client[members] = rng.choice(count, size=len(members), p=rng.dirichlet(np.full(count, alpha)))
    sizes = np.bincount(client, minlength=count)
    for empty in np.flatnonzero(sizes == 0):
        largest = int(sizes.argmax())
        moved = rng.choice(np.flatnonzero(client == largest))
        client[moved] = empty
        sizes[largest] -= 1
        sizes[empty] = 1
    return client
