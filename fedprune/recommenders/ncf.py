"""Neural collaborative filtering: GMF, MLP and NeuMF, towers of any widths (He et al. 2017, arXiv:1708.05031)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedprune.axes import Axis, Layout
from fedprune.errors import ConfigError
from fedprune.recommenders.base import Recommender
from fedprune.types import Tensors


def gmf(*, users: int, items: int, latent: int = 32, scale: float = 0.05) -> Recommender:
    """s = h . (p_u * q_i) + b_i: a matrix factorisation with a learned weight per dimension (section 3.2)."""
    return _ncf("gmf", users, items, latent, (), scale)


def mlp(*, users: int, items: int, latent: int = 32, hidden: Sequence[int] = (32, 16), scale: float = 0.05) -> Recommender:
    """s = h . phi_L(...phi_1([p_u, q_i])) + b_i, a tower of ReLU layers on the concatenation (section 3.3)."""
    if not hidden:
        raise ConfigError("an mlp needs at least one hidden layer; for none take gmf or mf")
    return _ncf("mlp", users, items, latent, tuple(hidden), scale)


def neumf(*, users: int, items: int, latent: int = 32, hidden: Sequence[int] = (32, 16), scale: float = 0.05) -> Recommender:
    """s = h . [p_u * q_i, phi_L(...)] + b_i: both halves, each with embeddings of its own (section 3.4).

    Differs from the paper: no separate pre-training of the halves; an item bias, which costs nothing and helps MF too.
    """
    if not hidden:
        raise ConfigError("neumf needs at least one hidden layer; for none take gmf")
    return _ncf("neumf", users, items, latent, tuple(hidden), scale)


def _ncf(name: str, users: int, items: int, latent: int, hidden: tuple[int, ...], scale: float) -> Recommender:
    product, tower = name in ("gmf", "neumf"), bool(hidden)
    axes = {"user": Axis(users, private=True), "item": Axis(items, touched=True)}
    words: dict[str, str] = {}
    if product:
        axes["latent"] = Axis(latent)
        words |= {"user_embedding": "user latent", "item_embedding": "item latent"}
    if tower:
        axes["tower"] = Axis(latent)
        words |= {"user_tower": "user tower", "item_tower": "item tower"}
        below = "tower+tower"
        for number, width in enumerate(hidden, start=1):
            axes[f"hidden{number}"] = Axis(width)
            words |= {f"hidden{number}_weight": f"hidden{number} {below}", f"hidden{number}_bias": f"hidden{number}"}
            below = f"hidden{number}"
    last = [*(["latent"] if product else []), *([f"hidden{len(hidden)}"] if tower else [])]
    words |= {"output_weight": f"1 {'+'.join(last)}", "item_bias": "item"}
    depth = len(hidden)

    def features(tensors: Tensors) -> Tensor:
        parts = []
        if product:
            parts.append(tensors["user_embedding"] * tensors["item_embedding"])
        if tower:
            parts.append(_tower(tensors, depth))
        return torch.cat(parts, -1)

    def score(tensors: Tensors) -> Tensor:
        weight = tensors["output_weight"].squeeze(-2)  # [clients, features]
        return (features(tensors) @ weight.unsqueeze(-1)).squeeze(-1) + tensors["item_bias"]

    def activity(tensors: Tensors) -> Tensor:
        return (features(tensors) ** 2).sum(-1)

    return Recommender(name, Layout.of(axes, **words), score, scale, activity)


def _tower(tensors: Tensors, depth: int) -> Tensor:
    user, item = tensors["user_tower"], tensors["item_tower"]
    weight = tensors["hidden1_weight"]
    # The user's half of the first layer is the same for all of a user's examples, so it is multiplied before they spread.
    width = user.shape[-1]
    hidden = user @ weight[..., :width].transpose(-1, -2) + item @ weight[..., width:].transpose(-1, -2)
    hidden = torch.relu(hidden + tensors["hidden1_bias"].unsqueeze(-2))
    for number in range(2, depth + 1):
        hidden = hidden @ tensors[f"hidden{number}_weight"].transpose(-1, -2)
        hidden = torch.relu(hidden + tensors[f"hidden{number}_bias"].unsqueeze(-2))
    return hidden
