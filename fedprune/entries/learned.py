"""Dynamic probabilistic pruning: masks of exactly k of n per unit, learned like weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedprune.axes import Layout
from fedprune.entries.base import Mean, maskable
from fedprune.errors import ConfigError
from fedprune.exchange import Report
from fedprune.random import uniform_grid
from fedprune.recommenders import Recommender
from fedprune.recommenders.base import LOGITS
from fedprune.types import BoolArray, ClientId, Memory, Rate, Tensors, Version


@dataclass(frozen=True)
class KOfN:
    """Each row of an embedding or matrix keeps exactly k of its n entries; which ones follows from logits that are trained too.

    DPP (Gonzalez-Carabarin et al. 2022, arXiv:2105.12686): the k largest of phi + noise * Gumbel, one draw per order; backward,
    each of the k picks is a softmax at temperature tau over what is not picked yet (straight through). Regular: every row has
    the same k, so bytes and time are known beforehand, and an export needs no ragged format. While they are learned the
    logits travel too, so training moves more bytes than the dense model, not fewer.

    Differs from the paper: logits start from the weights' own magnitudes (standardised per row, times the paper's .5) instead
    of noise alone, which a warm start would be wasted on; served without noise.

    Attributes:
        keep: k / n, of the units that are held; k is rounded and at least 1.
        noise: scale of the Gumbel noise; the authors' code has .001.
        hot, cold, over: temperature falls linearly from hot to cold over so many versions (the authors' code: 5 to .5).
        entropy: weight of the summed entropy of the softmaxes of the rows that a client trains (as in the authors' code; shared
            matrices' gradients are averaged over a client's examples, this one's included).
    """

    keep: float
    noise: float = 0.001
    hot: float = 5.0
    cold: float = 0.5
    over: int = 100
    entropy: float = 5e-5
    through = False
    gate = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep is {self.keep}; it must be in (0, 1], k / n")
        if not 0 < self.cold <= self.hot or self.over < 1:
            raise ConfigError(
                f"hot {self.hot} must be at least cold {self.cold}, that above 0, and over {self.over} at least 1"
            )
        if self.noise < 0 or self.entropy < 0:
            raise ConfigError(f"noise {self.noise} and entropy {self.entropy} must not be negative")

    def parametrise(self, recommender: Recommender) -> Recommender:
        """The recommender whose matrices are masked by logits of their own."""
        layout = recommender.layout
        masked = maskable(layout)
        tensors = dict(layout.tensors) | {name + LOGITS: layout.tensors[name] for name in masked}

        def effective(given: Tensors) -> Tensors:
            return {n: t * self.of(n, given) if n + LOGITS in given else t for n, t in given.items()}

        def chance(version: Version, key: np.ndarray, rows: Tensor, cut: Tensors) -> Tensors:
            drawn = {"temperature": torch.tensor(self.temperature(version))}
            for number, name in enumerate(masked):
                touched = layout.kind(name) == "touched"
                shape = cut[name + LOGITS].shape
                numbers = rows if touched else torch.arange(shape[1]).expand(len(key), -1)
                u = uniform_grid(key ^ np.uint64(number + 1), numbers, shape[-1])
                drawn[name + LOGITS] = -self.noise * torch.log(-torch.log(u.clamp(1e-12, 1 - 1e-7))).float()
            return drawn

        def penalty(leaves: Tensors) -> Tensor:
            terms = []
            for name in masked:
                log = torch.log_softmax(leaves[name + LOGITS], -1)
                terms.append(-(log.exp() * log).sum(-1).flatten(1).sum(1))
            return self.entropy * torch.stack(terms).sum(0)

        def score(given: Tensors) -> Tensor:
            return recommender.score(effective(given))

        activity = recommender.activity
        return replace(
            recommender, layout=Layout(layout.axes, tensors), score=score, chance=chance, penalty=penalty,
            effective=lambda given: {n: t for n, t in effective(given).items() if not n.endswith(LOGITS)},
            activity=None if activity is None else lambda given: activity(effective(given)),
        )  # fmt: skip

    def temperature(self, version: Version) -> float:
        """tau of a version."""
        return self.hot + (self.cold - self.hot) * min(1.0, version / self.over)

    def of(self, name: str, given: Tensors) -> Tensor:
        """The mask of one tensor, exactly k ones per row; with a gradient to its logits where noise is given."""
        logits = given[name + LOGITS]
        k = self._k(logits.shape[-1])
        noise = given.get(f"{name}{LOGITS}_noise")
        if noise is None:
            return k_hot(logits, k)
        return straight_through(logits, noise, k, float(given["temperature_noise"]))

    def prepare(self, memory: Memory, model: Tensors, layout: Layout, version: Version) -> tuple[Memory, Tensors]:
        """Start the logits from the weights, once."""
        if memory:
            return memory, model
        started = dict(model)
        for name, logits in model.items():
            if name.endswith(LOGITS):
                size = model[name.removesuffix(LOGITS)].abs()
                spread = size.std(-1, keepdim=True).clamp(min=1e-12)
                started[name] = (0.5 * (size - size.mean(-1, keepdim=True)) / spread).to(logits)
        masked = [layout.shape(name) for name in layout.tensors if name.endswith(LOGITS)]
        there = sum(math.prod(shape[:-1]) * self._k(shape[-1]) for shape in masked)
        return {"kept": np.array(there / max(1, sum(map(math.prod, masked))))}, started

    def mask(self, memory: Memory, layout: Layout, client: ClientId, rate: Rate) -> Mapping[str, BoolArray]:
        """None of the server's: the model masks itself."""
        return {}

    def learn(self, memory: Memory, model: Tensors, layout: Layout, reports: Sequence[Report], mean: Mean) -> Memory:
        """Nothing: logits are merged like weights."""
        return memory

    def facts(self, memory: Memory) -> dict[str, float]:
        """Share of the entries that is there at full width, every row's k rounded."""
        return {"kept": float(memory["kept"])}

    def _k(self, size: int) -> int:
        return max(1, round(self.keep * size))


def k_hot(logits: Tensor, k: int) -> Tensor:
    """1.0 at the k largest of each row (ties: the first), else 0.0."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(logits).scatter_(-1, order[..., :k], 1.0)


def straight_through(logits: Tensor, noise: Tensor, k: int, temperature: float) -> Tensor:
    """k-hot of the perturbed logits; its gradient is that of k softmaxes, each over what is not picked yet."""
    perturbed = logits + noise
    order = perturbed.detach().argsort(dim=-1, descending=True, stable=True)[..., :k]
    hard = torch.zeros_like(logits).scatter_(-1, order, 1.0)
    open_, soft = torch.zeros_like(logits), torch.zeros_like(logits)
    for pick in range(k):
        soft = soft + torch.softmax((perturbed + open_) / temperature, -1)
        open_ = open_.scatter(-1, order[..., pick : pick + 1], -torch.inf)
    return hard + (soft - soft.detach())  # in this order: exactly 0 or 1
