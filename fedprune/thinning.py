"""Some of the touched rows instead of all: drawn by size, weighted by 1/chance, so that nothing is lost on average."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedprune.axes import Layout
from fedprune.random import keys, uniform_grid
from fedprune.submodel import like
from fedprune.types import Tensors


def thinned(
    layout: Layout, update: Tensors, rows: Tensor, present: Tensor, share: float, seed: int, tickets: Sequence[int]
) -> Tensors:
    """Touched rows divided by their chance, or zero; shared tensors as they are.

    Row i goes up with chance p_i = min(1, c |row|), the norm taken over all touched tensors and c such that sum p_i = share *
    rows: among chances of equal sum those with the least variance (Wangni et al. 2018, arXiv:1710.09854). The expected update
    is the update itself, so sums and weighted means over clients keep their expected value as long as they count every client
    that touched a row, drawn or not: rows stay `present`. Chance follows from (seed, ticket, row) alone.

    Args:
        update: touched tensors `[clients, rows, ...]`; changed in place.
        rows, present: item numbers, and which are no padding, `[clients, rows]`.
    """
    touched = [name for name in update if layout.kind(name) == "touched"]
    squares = torch.zeros(rows.shape)
    for name in touched:
        tensor = update[name]
        squares += (torch.linalg.vector_norm(tensor.flatten(2), dim=-1) if tensor.dim() > 2 else tensor).square()
    chance = chances(squares.double().sqrt(), share * present.sum(1))
    drawn = uniform_grid(keys(seed, "which rows", tickets), rows, 1)[..., 0]
    # A chance that is not a number keeps its row: what has diverged shall be seen.
    factor = torch.where(drawn >= chance, 0.0, 1.0 / chance).float()
    for name in touched:
        update[name].mul_(like(factor, update[name]))
    return update


def chances(size: Tensor, wanted: Tensor) -> Tensor:
    """min(1, c * size) with the sum that is wanted; 1 for all that is not zero where that is fewer.

    Args:
        size: not negative, float64 `[clients, rows]`.
        wanted: `[clients]`.
    """
    ranked = torch.from_numpy(np.sort(size.numpy(), axis=1)).flip(1)  # NumPy sorts so many short lines much faster
    rest = ranked.flip(1).cumsum(1).flip(1)
    certain = torch.arange(size.shape[1])
    # c if the `certain` largest are sure to be drawn; right at the first one at which the next is not above 1.
    factor = torch.where(rest > 0, (wanted[:, None] - certain) / rest, torch.inf)
    fits = (factor * ranked <= 1) | (rest <= 0)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    chosen = torch.where(fits.any(1, keepdim=True), factor.gather(1, first), torch.inf)
    return torch.where(size == 0, 0.0, (chosen * size).clamp(max=1.0))
