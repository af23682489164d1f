"""Federated SVD: item embeddings before the first round, from sums over clients alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
        model, private = dict(model), dict(private)
        layout = recommender.layout
        counts = np.bincount(train.item, minlength=train.items)
        for name in layout.named("touched"):
            if len(layout.tensors[name]) == 1 and self.popularity_bias:
                share = np.log((counts + 1.0) / (train.users + 2.0))
                model[name] = torch.from_numpy(share - share.mean()).float()
        if self.iterations == 0:
            return model, private
        rows = normalised(train, self.norm)
        found: dict[int, tuple[FloatArray, FloatArray]] = {}  # NeuMF's two halves start alike
        for name in layout.named("touched"):
            if len(layout.tensors[name]) != 2:
                continue
            latent = model[name].shape[1]
            if latent not in found:
                found[latent] = subspace(rows, latent, self.iterations, seed)
            vectors, values = found[latent]
            weighted = vectors * np.sqrt(values)
            model[name] = _scaled(weighted, recommender.scale)
            axis = layout.tensors[name][1]
            for own in layout.named("private"):
                if layout.tensors[own][1] == axis:
                    private[own] = _scaled(rows @ (vectors / np.maximum(np.sqrt(values), 1e-12)), recommender.scale)
        return model, private


def normalised(train: Interactions, norm: float) -> sparse.csr_matrix:
    """X `[users, items]`; a client's row needs its own degree and the (summed) item degrees."""
    degree_user = np.diff(train.starts).clip(min=1).astype(float)
    degree_item = np.bincount(train.item, minlength=train.items).clip(min=1).astype(float)
    values = degree_user[train.user] ** -norm * degree_item[train.item] ** -norm
    return sparse.csr_matrix((values, (train.user, train.item)), shape=(train.users, train.items))


def contribution(row: FloatArray, basis: FloatArray) -> FloatArray:
    """What one client sends in an iteration: x_u (x_u^T Q), `[items, latent]`, zero outside its own items."""
    return np.outer(row, row @ basis)


def subspace(rows: Any, rank: int, iterations: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """Leading right singular vectors `[items, rank]` of X and singular values `[rank]`, by orthogonal iteration.

    `rows` is X, a scipy sparse matrix `[users, items]`. What a catalogue of fewer than `rank` items cannot give is zero.
    """
    found = min(rank, rows.shape[1])
    basis = np.linalg.qr(stream(seed, "warm start").normal(size=(rows.shape[1], found)))[0]
    for _ in range(iterations):
        basis = np.linalg.qr(rows.T @ (rows @ basis))[0]  # the sum over clients of `contribution`
    values, rotation = np.linalg.eigh(basis.T @ (rows.T @ (rows @ basis)))
    order = np.argsort(values)[::-1]
    missing = rank - found
    vectors = np.pad(basis @ rotation[:, order], ((0, 0), (0, missing)))
    return vectors, np.pad(np.sqrt(np.maximum(values[order], 0.0)), (0, missing))


def _scaled(values: FloatArray, scale: float) -> torch.Tensor:
    spread = math.sqrt(float((values**2).mean())) or 1.0
    return torch.from_numpy(values * (scale / spread)).float()
