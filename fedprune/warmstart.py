"""Federated SVD: item embeddings before the first round, from sums over clients alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy import sparse

from fedprune.data import Interactions
from fedprune.random import stream
from fedprune.recommenders import Recommender
from fedprune.types import FloatArray, Tensors


@dataclass(frozen=True)
class WarmStart:
    """Subspace iteration on the normalised interactions X = D_u^-norm A D_i^-norm.

    In every iteration a client computes x_u (x_u^T Q) from its own row x_u and the server's current basis Q `[items, latent]`;
    the server adds these up, which secure aggregation can do without seeing any of them, and orthonormalises. Item
    counts (for D_i, and for the bias) are one more such sum. After Budhiraja 2021, arXiv:2110.03665 (SVD as embeddings).

    A calibrated SVD is a good recommender by itself, so a target that it meets says nothing about training; and training
    with a large first step destroys it before it improves on it. Both are why embeddings are rescaled to `scale`.

    Attributes:
        iterations: passes over all clients; 8 come close to the exact SVD on MovieLens-100K.
        norm: exponent of the user's and the item's degree.
        popularity_bias: start item biases from the logarithm of the items' counts.
    """

    iterations: int = 8
    norm: float = 0.5
    popularity_bias: bool = True

    def __call__(
        self, recommender: Recommender, train: Interactions, model: Tensors, private: Tensors, seed: int
    ) -> tuple[Tensors, Tensors]:
        """The model and the private rows with embeddings in place of their random ones; other tensors are left alone."""
        crowd = Gathered(train, self.norm, dict(private))
        return self.start(recommender, crowd, model, seed), crowd.private

    def start(self, recommender: Recommender, crowd: Crowd, model: Tensors, seed: int) -> Tensors:
        """The model; private rows are left with the crowd."""
        model, layout = dict(model), recommender.layout
        if not self.popularity_bias and self.iterations == 0:
            return model
        counts = crowd.counts()
        for name in layout.named("touched"):
            if len(layout.tensors[name]) == 1 and self.popularity_bias:
                share = np.log((counts + 1.0) / (crowd.users + 2.0))
                model[name] = torch.from_numpy(share - share.mean()).float()
        if self.iterations == 0:
            return model
        found: dict[int, tuple[FloatArray, FloatArray]] = {}  # NeuMF's two halves start alike
        for name in layout.named("touched"):
            if len(layout.tensors[name]) != 2:
                continue
            latent = model[name].shape[1]
            if latent not in found:
                found[latent] = subspace(crowd.spread, len(counts), latent, self.iterations, seed)
            vectors, values = found[latent]
            weighted = vectors * np.sqrt(values)
            model[name] = torch.from_numpy(weighted * (recommender.scale / _root_mean_square(weighted))).float()
            # Row lengths of X V are the singular values, so the scale of everybody's rows is known without seeing them.
            size = math.sqrt(values.sum() / (crowd.users * latent)) or 1.0
            projection = vectors / np.maximum(np.sqrt(values), 1e-12) * (recommender.scale / size)
            axis = layout.tensors[name][1]
            for own in layout.named("private"):
                if layout.tensors[own][1] == axis:
                    crowd.place(own, projection)
        return model


class Crowd(Protocol):
    """All clients, as sums over them."""

    @property
    def users(self) -> int:
        """How many there are in all."""
        ...

    def counts(self) -> FloatArray:
        """Interactions per item, `[items]`."""
        ...

    def spread(self, basis: FloatArray) -> FloatArray:
        """X^T X Q: the sum of what each client makes of the basis Q `[items, rank]`."""
        ...

    def place(self, name: str, projection: FloatArray) -> None:
        """Everybody sets its rows of a private tensor to X P, with P `[items, rank]`."""
        ...


class Gathered:
    """A crowd whose interactions are all here: one client's, or a whole simulation's.

    Args:
        degree_item: interactions per item in the whole crowd, where `train` is a part of it.
    """

    def __init__(self, train: Interactions, norm: float, private: Tensors, degree_item: FloatArray | None = None) -> None:
        self.train = train
        self.users = train.users
        self.private = private
        self._rows = normalised(train, norm, self.counts() if degree_item is None else degree_item)

    def counts(self) -> FloatArray:
        """Of these interactions."""
        return np.bincount(self.train.item, minlength=self.train.items).astype(float)

    def spread(self, basis: FloatArray) -> FloatArray:
        """X^T (X Q)."""
        return self._rows.T @ (self._rows @ basis)

    def place(self, name: str, projection: FloatArray) -> None:
        """X P."""
        self.private[name] = torch.from_numpy(self._rows @ projection).float()


def normalised(train: Interactions, norm: float, degree_item: FloatArray) -> sparse.csr_matrix:
    """X `[users, items]`; a client's row needs its own degree and the (summed) item degrees."""
    degree_user = np.diff(train.starts).clip(min=1).astype(float)
    values = degree_user[train.user] ** -norm * degree_item.clip(min=1)[train.item] ** -norm
    return sparse.csr_matrix((values, (train.user, train.item)), shape=(train.users, train.items))


def subspace(
    spread: Callable[[FloatArray], FloatArray], items: int, rank: int, iterations: int, seed: int
) -> tuple[FloatArray, FloatArray]:
    """Leading right singular vectors `[items, rank]` of X and singular values `[rank]`, by orthogonal iteration.

    `spread` computes X^T X Q. What a catalogue of fewer than `rank` items cannot give is zero.
    """
    found = min(rank, items)
    basis = np.linalg.qr(stream(seed, "warm start").normal(size=(items, found)))[0]
    for _ in range(iterations):
        basis = np.linalg.qr(spread(basis))[0]
    values, rotation = np.linalg.eigh(basis.T @ spread(basis))
    order = np.argsort(values)[::-1]
    missing = rank - found
    vectors = np.pad(basis @ rotation[:, order], ((0, 0), (0, missing)))
    return vectors, np.pad(np.sqrt(np.maximum(values[order], 0.0)), (0, missing))


def _root_mean_square(values: FloatArray) -> float:
    return math.sqrt(float((values**2).mean())) or 1.0
