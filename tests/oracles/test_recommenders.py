"""Scores by the formulas of the papers, in NumPy, one user and one item at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from world import ITEMS, recommender

from fedprune.serving import scorer


def by_hand(name: str, t: dict[str, np.ndarray], user: int, item: int) -> float:
    """He et al. 2017: GMF (eq. 9), MLP (eq. 10), NeuMF (eq. 12), each plus an item bias; MF is p . q + b."""
    features = []
    if name in ("mf", "gmf", "neumf"):
        features.append(t["user_embedding"][user] * t["item_embedding"][item])
    if name == "mf":
        return float(features[0].sum() + t["item_bias"][item])
    if name in ("mlp", "neumf"):
        phi = np.concatenate([t["user_tower"][user], t["item_tower"][item]])
        for layer in (1, 2):
            phi = np.maximum(t[f"hidden{layer}_weight"] @ phi + t[f"hidden{layer}_bias"], 0)
        features.append(phi)
    return float(t["output_weight"][0] @ np.concatenate(features) + t["item_bias"][item])


@pytest.mark.parametrize("name", ["mf", "gmf", "mlp", "neumf"])
def test_scores_follow_the_formula(name: str):
    what, chance = recommender(name), torch.Generator().manual_seed(2)
    tensors = {key: torch.randn(what.layout.shape(key), generator=chance) for key in what.layout.tensors}
    private = {key: tensors[key] for key in what.layout.named("private")}
    model = {key: tensors[key] for key in what.layout.named("shared", "touched")}
    scored = scorer(what, model, private)(np.array([3, 11]))
    arrays = {key: tensor.double().numpy() for key, tensor in tensors.items()}
    expected = [[by_hand(name, arrays, user, item) for item in range(ITEMS)] for user in (3, 11)]
    np.testing.assert_allclose(scored.numpy(), expected, atol=1e-4)
