"""Chance as an argument: every stream follows from (seed, purpose, number), never from grouping or order of execution."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def stream(seed: int, *purpose: str | int) -> np.random.Generator:
    """Generator for one purpose of one run; the same arguments give the same numbers on every machine.

    >>> stream(3, "choose", 7).integers(1000) == stream(3, "choose", 7).integers(1000)
    np.True_
    """
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def keys(seed: int, purpose: str, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """One 64-bit key per number (a ticket, a user), computed for all of them at once.

    Returns:
        uint64 `[len(numbers)]`. SplitMix64 (Steele, Lea & Flood 2014) of the number, offset by a hash of (seed, purpose).
    """
    offset = int.from_bytes(hashlib.blake2b(repr((seed, purpose)).encode(), digest_size=8).digest(), "little")
    with np.errstate(over="ignore"):
        return _mixed(np.asarray(numbers).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(offset))


def _mixed(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser."""
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniform(seed: int, purpose: str, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """One number in [0, 1) per number; float64 `[len(numbers)]`."""
    return (keys(seed, purpose, numbers) >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def uniform_grid(key: np.ndarray, numbers: Tensor, columns: int) -> Tensor:
    """Uniform numbers in [0, 1) that follow from (key, number, column) alone, whoever stands beside them.

    Args:
        key: uint64 `[clients]` from `keys`.
        numbers: int64 `[clients, rows]`.

    Returns:
        float64 `[clients, rows, columns]`.
    """
    with np.errstate(over="ignore"):
        place = numbers.numpy().astype(np.uint64)[..., None] * np.uint64(columns) + np.arange(columns, dtype=np.uint64)
        z = key[:, None, None] + (place + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        return torch.from_numpy((_mixed(z) >> np.uint64(11)).astype(np.float64) / float(1 << 53))


def _rounds(size: int) -> int:
    """Rounds of the Feistel network. Three suffice in theory (Luby & Rackoff 1988), whose halves are large; in catalogues of a
    few dozen items pairs of values were measured to depend on each other at three, and not at six."""
    return 3 if size > 1024 else 6


def permuted(key: np.ndarray, draws: int, size: int) -> Tensor:
    """First `draws` values of a pseudo-random permutation of range(size), one permutation per key.

    Drawing without replacement in time proportional to the draws, whatever the catalogue's size, and for a whole stack
    of clients in one go: a Feistel network over Z_a x Z_b with a*b >= size, walked along its cycle until the value is
    in range (Black & Rogaway 2002, section 4).

    Args:
        key: uint64 `[clients]` from `keys`.
        draws: how many values, at most `size`.
        size: at most 2**30.

    Returns:
        int64 `[clients, draws]`, distinct within a row.
    """
    if not 0 <= draws <= size < 1 << 30:
        raise ValueError(f"cannot draw {draws} of {size} values without replacement")
    side = max(1, math.isqrt(max(size - 1, 0)) + 1)
    other = max(1, -(-size // side))
    words = [_round_keys(key, number) for number in range(_rounds(size))]
    value = torch.arange(draws, dtype=torch.int32).expand(len(key), draws)
    value = _feistel(value, words, side, other)
    while (outside := value >= size).any():  # a*b exceeds size by less than one row: a few walk on
        row, _ = outside.nonzero(as_tuple=True)
        value[outside] = _feistel(value[outside][:, None], [word[row] for word in words], side, other)[:, 0]
    return value.long()


PRIORITIES = 1 << 24
"""More than a client has examples."""


def priorities(key: np.ndarray, draws: int) -> Tensor:
    """Values to shuffle by: distinct within a row, and the first n are the same however many are drawn.

    `permuted(key, n, n)` shuffles too, but differently for every n, so a client padded to its stack's width would be shuffled
    otherwise than alone.

    Returns:
        int64 `[clients, draws]`, below `PRIORITIES`.
    """
    return permuted(key, draws, PRIORITIES)


def drawn(key: np.ndarray, wanted: np.ndarray, barred: Tensor) -> Tensor:
    """Per key, the first `wanted` values of its permutation that are not barred: a draw without replacement.

    Args:
        key: uint64 `[clients]`.
        wanted: int64 `[clients]`, at most as many as are not barred.
        barred: bool `[clients, size]`.

    Returns:
        int64 `[clients, wanted.max()]`; what is beyond a client's own `wanted` is 0.
    """
    size, most = barred.shape[1], int(wanted.max(initial=0))
    count = barred.sum(1).numpy()
    # Enough values for nearly every row, four standard deviations above the mean; the few others get as many as always do.
    mean = wanted * size / np.maximum(size - count, 1)
    guess = min(size, int((mean + 4 * np.sqrt(mean * count / size) + 1).max(initial=0)))
    result = torch.zeros(len(key), most + 1, dtype=torch.long)
    rows = np.arange(len(key))
    for draws in (guess, min(size, int((wanted + count).max(initial=0)))):
        value = permuted(key[rows], draws, size)
        free = ~barred[rows].gather(1, value)
        place = free.cumsum(1)
        goal = torch.from_numpy(wanted[rows])[:, None]
        target = torch.where(free & (place <= goal), place - 1, most)
        result[rows] = torch.zeros(len(rows), most + 1, dtype=torch.long).scatter_(1, target, value)
        rows = rows[(free.sum(1, keepdim=True) < goal)[:, 0].numpy()]
        if not len(rows):
            break
    return result[:, :most] * (torch.arange(most) < torch.from_numpy(wanted)[:, None])


def _round_keys(key: np.ndarray, number: int) -> Tensor:
    with np.errstate(over="ignore"):
        word = key * np.uint64(0xD6E8FEB86659FD93) + np.uint64(0xA0761D6478BD642F) * np.uint64(number + 1)
    return torch.from_numpy((word >> np.uint64(32)).astype(np.uint32).view(np.int32).copy())[:, None]


def _feistel(value: Tensor, words: list[Tensor], side: int, other: int) -> Tensor:
    left = value // other
    right = value - left * other
    for number, word in enumerate(words):
        if number % 2 == 0:
            left = _add(left, right, word, side)
        else:
            right = _add(right, left, word, other)
    return left * other + right


def _add(value: Tensor, by: Tensor, word: Tensor, modulus: int) -> Tensor:
    mixed = (by * -1640531535).add_(word)  # int32 throughout: mixing relies on its wrap-around
    mixed.bitwise_xor_(mixed >> 15).mul_(-2048144777)
    mixed.bitwise_right_shift_(16).bitwise_and_(0x7FFF).mul_(modulus).bitwise_right_shift_(15)
    mixed.add_(value)
    return mixed.sub_((mixed >= modulus).int(), alpha=modulus)
