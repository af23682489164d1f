"""What a client minimises, and how far it goes in one order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedprune.distill import Distillation
from fedprune.errors import ConfigError
from fedprune.types import Seconds


@dataclass(frozen=True)
class Objective:
    """Binary cross-entropy on a client's positives and fresh negatives, plus terms that are off at their zero.

    L = sum_i BCE(sigmoid(s_i), y_i) + proximal/2 ||w - w_received||^2 + sparse R(w), by SGD on what is shared and by Adam on
    what is private. Touched item rows move by their summed gradient, shared tensors and private rows by the mean over examples.

    Attributes:
        task: "implicit" is the above; "ratings" predicts the ratings of what a user took, by squared error and without
            negatives.
        negatives: unseen items drawn per positive, without replacement, anew for every order. Held-out items are unseen.
        weight_negatives: what a negative counts in the loss beside a positive.
        epochs: passes over the examples.
        batch: examples per step; None takes them all in one.
        lr: of the shared tensors and item rows.
        lr_private: of the private rows' Adam (moments `betas`), which a client keeps from order to order.
        decay_private: L2 penalty on the private rows.
        private_steps: further steps on the private rows alone after each epoch; they cost no upload.
        proximal: FedProx's mu.
        sparse: weight of a penalty on what was received, so that it becomes prunable (`sparse.slope`).
        sparse_by: "units" penalises each unit's norm (group lasso), "entries" the sum of |w|.
        until: stop after so many seconds of an order and report what is done (FedProx's partial work); None: never.
        recency: how much more the newest positive weighs in the private rows' gradient; 0 switches it off. Nothing
            that leaves the device changes. A positive followed by `a` later ones weighs 1 + recency * exp(-a / horizon).
        horizon: see `recency`.
        distillation: what a teacher adds; None: nothing.
        nested: how much the client's own narrower self counts, which learns the wider one's scores (FjORD's
            self-distillation, Horvath et al. 2021, arXiv:2102.13451, section 4.2; as branches, Ghorbani et al. 2020,
            arXiv:2010.04516): nested * CE(sigmoid(s), sigmoid(s_narrow)). It has no cost in bytes.
        narrower: share of the held units that this narrower self has.
        gate: report how well the received model does on the client's own held-out item, for tickets that are drawn
            client by client: the share of the order's negatives that the item outscores.
    """

    task: Literal["implicit", "ratings"] = "implicit"
    negatives: int = 4
    weight_negatives: float = 1.0
    epochs: int = 1
    batch: int | None = None
    lr: float = 1.0
    lr_private: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    decay_private: float = 0.01
    private_steps: int = 0
    proximal: float = 0.0
    sparse: float = 0.0
    sparse_by: Literal["units", "entries"] = "units"
    until: Seconds | None = None
    recency: float = 0.0
    horizon: float = 4.0
    distillation: Distillation | None = None
    nested: float = 0.0
    narrower: float = 0.5
    gate: bool = False

    def __post_init__(self) -> None:
        for name in ("negatives", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "lr_private", "horizon", "weight_negatives"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("decay_private", "private_steps", "proximal", "sparse", "recency", "nested"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.batch is not None and self.batch < 1:
            raise ConfigError(f"batch is {self.batch}; it must be at least 1, or left out for one step over all examples")

        if self.task not in ("implicit", "ratings"):
            raise ConfigError(f'task "{self.task}"; it is implicit or ratings')
        if self.sparse_by not in ("units", "entries"):
            raise ConfigError(f'sparse_by "{self.sparse_by}"; it is units or entries')
        if not 0 < self.narrower < 1:
            raise ConfigError(f"narrower is {self.narrower}; it must be in (0, 1), a share of the client's own width")
        steps = self.epochs > 1 or self.batch is not None or self.private_steps > 0
        if self.distillation is not None and self.distillation.teacher == "past" and not steps:
            raise ConfigError('teacher "past" says nothing in the first step; set epochs above 1, batch, or private_steps')

    def error(self, scores: Tensor, label: Tensor) -> Tensor:
        """Each example's loss, of the shape of both."""
        if self.task == "ratings":
            return (scores - label) ** 2
        error = F.binary_cross_entropy_with_logits(scores, label, reduction="none")
        return error if self.weight_negatives == 1.0 else error * (label + (1.0 - label) * self.weight_negatives)

    def recency_weights(self, age: Tensor, label: Tensor) -> Tensor | None:
        """Weights of the examples in the private rows' gradient; None where all weigh the same.

        Args:
            age: number of the user's later positives; any shape.
            label: 1.0 for positives.
        """
        if self.recency == 0.0:
            return None
        return 1.0 + label * self.recency * torch.exp(-age / self.horizon)
