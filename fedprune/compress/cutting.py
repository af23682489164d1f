"""How much is what share: units and tickets of a given part of a dense model's parameters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedprune.axes import Layout
from fedprune.entries.base import largest, magnitudes, maskable
from fedprune.errors import ConfigError
from fedprune.pruning import Importance
from fedprune.recommenders import Recommender
from fedprune.submodel import Submodel, mask
from fedprune.types import BoolArray, Rate, Tensors


def rate_for(layout: Layout, keep: float) -> Rate:
    """The largest rate whose submodel has at most `keep` of the parameters and of the FLOPs.

    Raises:
        ConfigError: there is none, not even at the axes' floors.
    """
    size, work = layout.parameters(layout.full, layout.items), layout.work(layout.full, layout.full).forward
    finest = max(layout.full.values())
    for units in range(finest, 0, -1):
        rate = units / finest
        if rate < layout.smallest_rate:
            break
        widths = layout.widths(rate)
        if layout.parameters(widths, layout.items) <= keep * size and layout.work(widths, widths).forward <= keep * work:
            return rate
    least = layout.widths(layout.smallest_rate)
    share = layout.parameters(least, layout.items) / size
    raise ConfigError(f"keep {keep:g} is below this model's smallest submodel, which has {share:.3f} of its parameters")


def units(model: Tensors, layout: Layout, keep: float) -> Submodel:
    """The most important units of a model (`pruning.Importance`), so many that `keep` of its parameters and FLOPs is left."""
    importance = Importance()
    return importance.carve(importance.prepare({}, model, layout), layout, 0, 0, rate_for(layout, keep))


def turned(recommender: Recommender, model: Tensors, private: Tensors) -> tuple[Tensors, Tensors]:
    """The same scores in principal axes, most important first, where a recommender does not mind the basis (`bilinear`).

    P Q^T = U S V^T becomes (U S^1/2)(V S^1/2)^T, so that leaving the last units out is the best approximation of that rank
    (Eckart & Young 1936); in the basis that training happens to end in, no unit is much less important than the others.
    Needs the two Gram matrices P^T P and Q^T Q alone, which are sums over users and over items.
    """
    model, private = dict(model), dict(private)
    for own, touched in recommender.bilinear:
        p, q = private[own].double(), model[touched].double()
        (root_p, back_p), (root_q, back_q) = _roots(p.T @ p), _roots(q.T @ q)
        u, values, vt = torch.linalg.svd(root_p @ root_q)
        scale = values.sqrt()
        private[own] = (p @ back_p @ u * scale).float().contiguous()
        model[touched] = (q @ back_q @ vt.T * scale).float().contiguous()
    return model, private


def _roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a Gram matrix, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(gram)
    large = values > values.max() * 1e-12
    root = torch.where(large, values, 0.0).sqrt()
    inverse = torch.where(large, 1 / root.clamp(min=1e-300), 0.0)
    return (vectors * root) @ vectors.T, (vectors * inverse) @ vectors.T


def tickets(model: Tensors, layout: Layout, held: Submodel, keep: float) -> Submodel:
    """The largest entries of every matrix among what is held, so many that all parameters are `keep` of the dense model's.

    Raises:
        ConfigError: biases, which are never masked, are more than that already.
    """
    names = maskable(layout)
    inside = {name: _inside(layout, held, name) for name in names}
    before = sum(int(there.sum()) for there in inside.values())
    fixed = layout.parameters(held.widths, layout.items) - before
    budget = keep * layout.parameters(layout.full, layout.items) - fixed
    if budget < len(names):
        raise ConfigError(f"keep {keep:g} leaves no entries beside the {fixed:,} that are never masked (biases)")
    sizes, left = magnitudes(model, names), min(1.0, budget / before)
    masks: dict[str, BoolArray] = {}
    for name in names:
        there = inside[name] & held.entries[name] if name in held.entries else inside[name]
        masks[name] = largest(sizes[name], left * float(inside[name].mean()), there)
    return replace(held, entries=masks)


def share(layout: Layout, submodel: Submodel) -> float:
    """Parameters of some units, as a share of the dense model's."""
    return layout.parameters(submodel.widths, layout.items) / layout.parameters(layout.full, layout.items)


def _inside(layout: Layout, held: Submodel, name: str) -> BoolArray:
    """Which entries of a tensor belong to held units, in full shape."""
    result = np.ones(layout.shape(name), bool)
    for axis, dimension in enumerate(layout.tensors[name]):
        if axis or layout.kind(name) == "shared":
            flags = mask(layout, dimension, held.held).numpy().astype(bool)
            result &= flags.reshape([-1 if place == axis else 1 for place in range(result.ndim)])
    return result
