"""Matrix factorisation: the dot product that is hard to beat (Koren et al. 2009; Rendle et al. 2020, arXiv:2005.09683)."""

from __future__ import annotations

from torch import Tensor

from fedprune.axes import Axis, Layout
from fedprune.recommenders.base import Recommender, dot
from fedprune.types import Tensors


def mf(*, users: int, items: int, latent: int = 32, scale: float = 0.05) -> Recommender:
    """s(u, i) = p_u . q_i + b_i, with p_u private to its client (the federated form is Ammad-ud-din et al. 2019).

    Differs from the paper: gradients of a sampled cross-entropy instead of weighted alternating least squares.
    """
    layout = Layout.of(
        {"user": Axis(users, private=True), "item": Axis(items, touched=True), "latent": Axis(latent)},
        user_embedding="user latent",
        item_embedding="item latent",
        item_bias="item",
    )
    return Recommender("mf", layout, _score, scale, _activity, bilinear=(("user_embedding", "item_embedding"),))


def _score(tensors: Tensors) -> Tensor:
    return dot(tensors["user_embedding"], tensors["item_embedding"]) + tensors["item_bias"]


def _activity(tensors: Tensors) -> Tensor:
    """|p_u * q_i|^2."""
    return dot(tensors["user_embedding"] ** 2, tensors["item_embedding"] ** 2)
