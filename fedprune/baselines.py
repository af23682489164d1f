"""What a central recommender without any training loop achieves: the rows every table must contain."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import svds

from fedprune.data.interactions import Interactions
from fedprune.data.split import Split
from fedprune.errors import DataError
from fedprune.evaluation import Scorer, evaluate


def popularity(train: Interactions) -> Scorer:
    """Everybody gets what most users took.

    s_uj = n_j, the number of users with item j in `train`. Source: Cremonesi, Koren & Turrin 2010, "Performance of
    recommender algorithms on top-N recommendation tasks", section 4.1 ("TopPop").
    """
    counts = torch.from_numpy(np.bincount(train.item, minlength=train.items)).float()
    return lambda users: counts.expand(len(users), -1)


def item_knn(train: Interactions, *, neighbours: int = 50, shrink: float = 0.0, block: int = 1024) -> Scorer:
    """Items like those the user has, by who took them.

    s_uj = sum of w_ij over the items i of u, where w_ij = n_ij / (sqrt(n_i n_j) + shrink), n_ij users have both items,
    and w_ij is kept where i is among the `neighbours` most similar items of j (i = j excluded). Source: Sarwar et al.
    2001, "Item-based collaborative filtering", sections 3.1.1 and 3.2.1; cosine of implicit feedback, unnormalised sum
    as in Deshpande & Karypis 2004, "Item-based top-N recommendation algorithms", section 4.

    Args:
        train: what users have.
        neighbours: k, 1 or more; more than there are items means all.
        shrink: pulls similarities that rest on few users towards 0; 0 is the plain cosine.
        block: items compared at once; memory is block x items float64.

    Raises:
        DataError: fewer than one neighbour.
    """
    if neighbours < 1:
        raise DataError(f"neighbours is {neighbours}; item-kNN needs at least 1, usually 20 to 200.")
    matrix = _matrix(train)
    transposed = csr_array(matrix.T)
    norm = np.sqrt(np.maximum(np.diff(transposed.indptr), 1))
    kept = min(neighbours, train.items - 1)
    rows, columns, values = [], [], []
    for start in range(0, train.items, block):
        item = np.arange(start, min(start + block, train.items))
        similar = (transposed[item] @ matrix).toarray()  # [block, items] users in common
        similar /= norm[item][:, None] * norm[None, :] + shrink
        similar[np.arange(len(item)), item] = -1
        nearest = np.argpartition(-similar, kept - 1, axis=1)[:, :kept]
        value = np.take_along_axis(similar, nearest, axis=1)
        some = value > 0
        rows.append(nearest[some])
        columns.append(np.broadcast_to(item[:, None], nearest.shape)[some])
        values.append(value[some])
    where = np.concatenate(rows), np.concatenate(columns)
    weights = csr_array((np.concatenate(values), where), shape=(train.items, train.items))
    return lambda users: torch.from_numpy((matrix[users] @ weights).toarray()).float()


def ease(train: Interactions, *, regularisation: float = 200.0) -> Scorer:
    """The best linear map from a user's items to a user's items that may not use the item itself.

    P = (X^T X + lambda I)^-1, B_ij = -P_ij / P_jj for i != j, B_jj = 0, S = X B. Source: Steck 2019, "Embarrassingly
    shallow autoencoders for sparse data", section 3.1, equations 6 to 8. Dense: memory is about 3 x items^2 x 8 bytes
    (6 GB for 15,000 items), time grows with items^3.

    Args:
        train: what users have.
        regularisation: lambda, above 0; 200 was the best on ml-100k's validation items.

    Raises:
        DataError: lambda is not above 0.
    """
    if not regularisation > 0:
        raise DataError(f"regularisation is {regularisation}; EASE needs a lambda above 0, usually 50 to 1000.")
    matrix = _matrix(train)
    gram = torch.from_numpy((csr_array(matrix.T) @ matrix).toarray())
    gram.diagonal().add_(regularisation)
    factor = torch.linalg.cholesky(gram)
    del gram
    inverse = torch.cholesky_inverse(factor)
    del factor
    weights = inverse.div_(-inverse.diagonal().clone()[None, :]).fill_diagonal_(0).float()
    weights = weights.contiguous().numpy()  # LAPACK's order is by column, and every product would copy all of it
    single = matrix.astype(np.float32)
    return lambda users: torch.from_numpy(np.asarray(single[users] @ weights))


def pure_svd(train: Interactions, *, rank: int = 32, normalise: float = 0.25, popular: float = 0.25) -> Scorer:
    """The user's items, seen through the leading directions of all users' items.

    Y = D_U^-a X D_I^-a with D_U, D_I the numbers of rows per user and item; Y ~ U S V^T truncated at `rank`;
    s_uj = (Y V V^T)_uj n_j^b. With a = b = 0 it is the original: Cremonesi, Koren & Turrin 2010, section 4.3
    ("PureSVD"); scaling by powers of popularity as in Nikolakopoulos et al. 2019, "EigenRec", section 3.1.

    Args:
        train: what users have.
        rank: d, 1 to min(users, items) - 1.
        normalise: exponent a, 0 or more.
        popular: exponent b; b = a undoes the scaling of items.

    Raises:
        DataError: rank out of range.
    """
    limit = min(train.users, train.items) - 1
    if not 1 <= rank <= limit:
        raise DataError(f"rank is {rank}; {train.users} users and {train.items} items allow 1 to {limit}.")
    matrix = _matrix(train)
    per_user, per_item = (np.maximum(matrix.sum(axis=axis), 1) for axis in (1, 0))
    scaled = csr_array(diags_array(per_user**-normalise) @ matrix @ diags_array(per_item**-normalise))
    start = np.random.default_rng(0).standard_normal(limit + 1)  # ARPACK's start, fixed so that runs agree
    directions: Any = svds(scaled, k=rank, v0=start)[2]
    vectors = torch.from_numpy(np.ascontiguousarray(directions.T)).float()  # [items, rank]
    taste = torch.from_numpy(np.asarray(scaled @ directions.T)).float()  # [users, rank]
    back = vectors * torch.from_numpy(per_item**popular).float()[:, None]
    return lambda users: taste[torch.from_numpy(users)] @ back.T


def baselines(split: Split, *, k: int = 10, rank: int = 32) -> dict[str, dict[str, float]]:
    """Test quality of all four, under the names they have in tables; see `evaluation.average` for the figures.

    They learn from `split.train` only, as every federated model does. On data with fewer than rank + 1 users or items
    PureSVD takes the largest rank there is.
    """
    train = split.train
    scorers = {
        "popularity": popularity(train),
        "item-kNN": item_knn(train),
        "EASE": ease(train),
        "PureSVD": pure_svd(train, rank=min(rank, train.users - 1, train.items - 1)),
    }
    return {name: evaluate(scorer, split, "test", k=k) for name, scorer in scorers.items()}


def _matrix(train: Interactions) -> Any:
    """X, float64 sparse `[users, items]`: 1 where the user has the item."""
    return csr_array((np.ones(train.rows), (train.user, train.item)), shape=(train.users, train.items))
