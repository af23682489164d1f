"""What a client minimises, and how far it goes in one order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedprune.errors import ConfigError
from fedprune.types import Seconds


@dataclass(frozen=True)
class Objective:
    """Binary cross-entropy on a client's positives and fresh negatives, plus terms that are off at their zero.

    L = sum_i BCE(sigmoid(s_i), y_i) + proximal/2 ||w - w_received||^2, by SGD on what is shared and by Adam on what is
    private. Touched item rows move by their summed gradient, shared tensors and private rows by the mean over examples.

    Attributes:
        negatives: unseen items drawn per positive, without replacement, anew for every order. Held-out items are unseen.
        epochs: passes over the examples.
        batch: examples per step; None takes them all in one.
        lr: of the shared tensors and item rows.
        lr_private: of the private rows' Adam (moments `betas`), which a client keeps from order to order.
        decay_private: L2 penalty on the private rows.
        private_steps: further steps on the private rows alone after each epoch; they cost no upload.
        proximal: FedProx's mu.
        until: stop after so many seconds of an order and report what is done (FedProx's partial work); None: never.
        recency: how much more the newest positive weighs in the private rows' gradient; 0 switches it off. Nothing
            that leaves the device changes. A positive followed by `a` later ones weighs 1 + recency * exp(-a / horizon).
        horizon: see `recency`.
    """

    negatives: int = 4
    epochs: int = 1
    batch: int | None = None
    lr: float = 1.0
    lr_private: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    decay_private: float = 0.01
    private_steps: int = 0
    proximal: float = 0.0
    until: Seconds | None = None
    recency: float = 0.0
    horizon: float = 4.0

    def __post_init__(self) -> None:
        for name in ("negatives", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "lr_private", "horizon"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("decay_private", "private_steps", "proximal", "recency"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.batch is not None and self.batch < 1:
            raise ConfigError(f"batch is {self.batch}; it must be at least 1, or left out for one step over all examples")

    def recency_weights(self, age: Tensor, label: Tensor) -> Tensor | None:
        """Weights of the examples in the private rows' gradient; None where all weigh the same.

        Args:
            age: number of the user's later positives; any shape.
            label: 1.0 for positives.
        """
        if self.recency == 0.0:
            return None
        return 1.0 + label * self.recency * torch.exp(-age / self.horizon)
