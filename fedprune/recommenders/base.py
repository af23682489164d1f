"""A recommender: a declared layout and a score, written once for stacked clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedprune.axes import Layout
from fedprune.random import stream
from fedprune.types import Tensors, Version

LOGITS = "_logits"
"""Ends the name of a tensor that learns another one's mask (`entries.KOfN`)."""


@dataclass(frozen=True)
class Recommender:
    """Everything fedprune needs to know of a model.

    Attributes:
        name: for tables.
        layout: which axes each tensor has; tensors whose first axis is private never leave their client.
        score: tensors -> scores (logits) `[clients, batch]`. Every tensor comes stacked and at whatever width the client
            holds: shared ones `[clients, ...]`, touched ones gathered per example `[clients, batch, ...]`, private ones
            `[clients, batch or 1, ...]`.
        scale: standard deviation of the initial embeddings.
        activity: tensors -> |h|^2 of what the last layer reads, `[clients, batch]`, for attention transfer.
        bilinear: pairs of a private and a touched embedding that the score knows by their inner product alone: any basis of
            the latent space is as good.
        chance: random tensors of an order, `(version, keys uint64 [clients], rows, cut) -> Tensors`, given to the score beside
            the model while it is trained, and never while it is served.
        effective: tensors -> the same as the score sees them, where it masks them itself.
        penalty: what the model's own tensors add to the loss, tensors -> `[clients]`.
    """

    name: str
    layout: Layout
    score: Callable[[Tensors], Tensor]
    scale: float = 0.05
    activity: Callable[[Tensors], Tensor] | None = None
    bilinear: tuple[tuple[str, str], ...] = ()
    chance: Callable[[Version, np.ndarray, Tensor, Tensors], Tensors] | None = None
    effective: Callable[[Tensors], Tensors] | None = None
    penalty: Callable[[Tensors], Tensor] | None = None

    def initial(self, seed: int) -> Tensors:
        """Shared and touched tensors before training: normal embeddings, Kaiming-uniform matrices, zero vectors."""
        return {name: self._draw(name, seed) for name in self.layout.named("shared", "touched")}

    def initial_private(self, seed: int) -> Tensors:
        """Private tensors of the whole population, `[users, ...]`, drawn like embeddings."""
        return {name: self._draw(name, seed) for name in self.layout.named("private")}

    def _draw(self, name: str, seed: int) -> Tensor:
        shape = self.layout.shape(name)
        rng = stream(seed, "initial", name)
        if len(shape) == 1:
            return torch.zeros(shape)
        if self.layout.kind(name) == "shared":
            bound = (6.0 / shape[-1]) ** 0.5
            return torch.from_numpy(rng.uniform(-bound, bound, shape)).float()
        return torch.from_numpy(rng.normal(0.0, self.scale, shape)).float()


def dot(user: Tensor, item: Tensor) -> Tensor:
    """Inner products of `[clients, batch or 1, latent]` and `[clients or 1, batch, latent]`; `[clients, batch]`."""
    if user.shape[1] > 1 or item.shape[1] == 1:
        return (user * item).sum(-1)
    if item.shape[0] == 1:  # one catalogue for many users
        return user[:, 0] @ item[0].T
    return (item @ user.transpose(1, 2)).squeeze(-1)
