"""Tensors at eight bits: an int8 per entry of a matrix and a float16 per row of it, a float16 per entry of a vector.

A row is what one index of the leading dimension holds; its scale s is the smallest float16 with 127 s >= max |x|. An entry
arrives as n s with a whole number n in -127..127, which float32 holds exactly, so n is found again from n s and s.

Downwards n is the nearest one. Upwards it is drawn between the two around x / s, with an expected value of x / s, so that the
errors of many clients cancel instead of adding up (stochastic rounding: Gupta et al. 2015, arXiv:1502.02551, section 3; with a
scale per part it is QSGD's: Alistarh et al. 2017, arXiv:1610.02132, section 3). What is zero stays zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedprune.axes import Layout
from fedprune.random import keys
from fedprune.submodel import like
from fedprune.types import Tensors

LARGEST = 127
ABOVE = (1 + 2**-20) / LARGEST
"""A hair above 1 / 127: no quotient may round to more than 127."""
GRAIN = 1.0 / (1 << 16)
"""Of the random numbers. Chances are wrong by half of it at most: no more than float32 rounds the row's largest entry."""


@dataclass(frozen=True)
class Rounded:
    """Tensors as they arrive.

    Attributes:
        tensors: float32.
        scales: float16, of those that travel as int8: their shape up to the rows.
    """

    tensors: Tensors
    scales: Tensors


def nearest(layout: Layout, cut: Tensors) -> Rounded:
    """A model as it is received, every tensor `[rows, ...]`."""
    tensors, scales = {}, {}
    for name, tensor in cut.items():
        if len(layout.tensors[name]) == 1:
            tensors[name] = tensor.half().float()
            continue
        rows = tensor.flatten(1)
        own = scales[name] = _scales(rows)
        tensors[name] = (rows / _divisor(own)).round_().mul_(own.float()[..., None]).reshape(tensor.shape)
    return Rounded(tensors, scales)


def stochastic(layout: Layout, update: Tensors, rows: Tensor, seed: int, tickets: Sequence[int]) -> Rounded:
    """Updates as they are reported; chance follows from (seed, ticket, tensor, row, column) alone.

    Args:
        update: touched tensors `[clients, rows, ...]`, shared ones `[clients, ...]`; they are used up, for memory is what
            a round's time goes to.
        rows: item numbers, int64 `[clients, rows]`.
    """
    tensors, scales = {}, {}
    for name, tensor in update.items():
        key = keys(seed, f"round {name}", tickets)
        numbers = rows if layout.kind(name) == "touched" else torch.arange(tensor.shape[1]).expand(len(tickets), -1)
        if len(layout.tensors[name]) == 1:
            tensors[name] = _half(tensor, _chance(key, numbers, 1)[..., 0])
            continue
        flat = tensor.flatten(2)
        own = scales[name] = _scales(flat)
        quotient = flat.div_(_divisor(own))
        quotient.add_(_chance(key, numbers, flat.shape[2]), alpha=GRAIN).add_(0.5 + GRAIN / 2).floor_()
        tensors[name] = quotient.mul_(own.float()[..., None]).reshape(tensor.shape)
    return Rounded(tensors, scales)


def codes(tensor: Tensor, scales: Tensor) -> Tensor:
    """The whole numbers that a rounded tensor `[..., rows, ...]` is made of; int8."""
    return (tensor / like(_divisor(scales), tensor)).round_().to(torch.int8)


def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """The inverse of `codes`."""
    return codes.float() * like(scales.float(), codes)


def _scales(rows: Tensor) -> Tensor:
    """Of `[..., rows, columns]`. Beyond float16's range they are infinite, and the row is not a number."""
    wanted = torch.maximum(rows.amax(-1), -rows.amin(-1)) * ABOVE
    scales = wanted.half()
    return torch.where(scales.float() < wanted, _above(scales), scales)


def _divisor(scales: Tensor) -> Tensor:
    """For `[..., rows, columns]`; a row of zeros is divided by 1."""
    return torch.where(scales == 0, 1.0, scales.float())[..., None]


def _above(half: Tensor) -> Tensor:
    """The next larger float16 of numbers that are not negative."""
    return (half.view(torch.int16) + 1).view(torch.float16)


def _half(tensor: Tensor, chance: Tensor) -> Tensor:
    """Each entry as one of the two float16 around it."""
    size = tensor.abs()
    near = size.half()
    below = torch.where(near.float() > size, (near.view(torch.int16) - 1).view(torch.float16), near)
    low, high = below.float(), _above(below).float()
    up = chance * GRAIN + (0.5 + GRAIN / 2) < (size - low) / (high - low)
    return torch.where(up, high, low).copysign(tensor)


def _chance(key: np.ndarray, rows: Tensor, columns: int) -> Tensor:
    """Random int16 `[clients, rows, columns]` that follow from (key, row, column) alone; four to a 64-bit word."""
    words = -(-columns // 4)
    with np.errstate(over="ignore"):
        place = rows.numpy().astype(np.uint64)[..., None] * np.uint64(words) + np.arange(words, dtype=np.uint64)
        place += key[:, None, None]
        drawn = keys(0, "four at once", place)
    return torch.from_numpy(drawn.astype("<u8", copy=False).view("<i2"))[..., :columns]
