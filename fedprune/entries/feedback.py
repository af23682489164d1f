"""Dynamic pruning with feedback: the server keeps the dense model, and masks follow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedprune.axes import Layout
from fedprune.entries.base import Mean, Same, group, kept, largest, magnitudes, maskable
from fedprune.errors import ConfigError
from fedprune.exchange import Report
from fedprune.recommenders import Recommender
from fedprune.types import BoolArray, ClientId, Memory, Rate, Tensors, Version

TYPICAL = 0.2
"""The rate whose mask facts speak of where shares follow rates."""


@dataclass(frozen=True)
class Feedback:
    """The largest entries of the server's dense model, chosen anew every few rounds; what nobody holds keeps its value.

    DPF (Lin et al. 2020, arXiv:2006.07253): w_{t+1} = w_t - eta g(m_t * w_t). The gradient is taken at the pruned model and
    applied to the dense one, so an entry that was pruned by mistake comes back. Here the dense model is the server's, and
    is evaluated and served through its masks alone: pruned entries go stale, and the model without a mask is worse.

    Differs from the paper: masks per tensor instead of global; what a client does not hold gets its gradient from clients
    that do (`through=True` is the paper's: everybody reports all entries' gradients, which saves no upload).

    Attributes:
        keep: share of the entries of every embedding and matrix; None: the client's rate.
        every: versions between two choices (the paper: 16 steps); 0 chooses once, for good: a permanent mask.
        ramp: versions over which sparsity grows to its final value, s_t = s (1 - (1 - t / ramp)^3) (Zhu & Gupta 2017).
        until: no choice after this version; None: to the end.
        through: everybody reports the gradients of all entries, masked or not.
    """

    keep: float | None = None
    every: int = 2
    ramp: int = 0
    until: int | None = None
    through: bool = False
    gate = False

    def __post_init__(self) -> None:
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ConfigError(f"keep is {self.keep}; it must be in (0, 1], a share of the entries")
        if self.every < 0 or self.ramp < 0:
            raise ConfigError(f"every {self.every} and ramp {self.ramp} are counted in versions and must not be negative")
        if self.until is not None and self.until < 0:
            raise ConfigError(f"until is {self.until}; it is a version, so not negative")
        if self.ramp and not self.every:
            raise ConfigError(f"ramp {self.ramp} needs more than one choice; set every to at least 1, or ramp to 0")
        if self.ramp and self.until is not None and self.until - self.until % self.every < self.ramp:
            raise ConfigError(
                f"until {self.until} with every {self.every} makes the last choice at version "
                f"{self.until - self.until % self.every}, before sparsity is at its final value at {self.ramp}; "
                f"until must be at least {-(-self.ramp // self.every) * self.every}"
            )
        if not isinstance(self.through, bool):
            raise ConfigError(f"through is {self.through!r}; it must be true or false")

    def parametrise(self, recommender: Recommender) -> Recommender:
        """As it is."""
        return recommender

    def prepare(self, memory: Memory, model: Tensors, layout: Layout, version: Version) -> tuple[Memory, Tensors]:
        """The magnitudes that masks are drawn from until the next choice."""
        over = self.until is not None and version > self.until
        if memory and (over or not self.every or version % self.every):
            return (memory | {"back": np.array(0)} if memory["back"] else memory), model
        sizes = magnitudes(model, maskable(layout))
        fresh: Memory = {f"magnitude/{name}": array for name, array in sizes.items()} | {"version": np.array(version)}
        was, now = self._masks(memory, TYPICAL), self._masks(fresh, TYPICAL)
        back = sum(int((now[name] & ~mask).sum()) for name, mask in was.items())
        return fresh | {"back": np.array(back)}, model

    def mask(self, memory: Memory, layout: Layout, client: ClientId, rate: Rate) -> Mapping[str, BoolArray]:
        """The largest entries, as many as the client's share allows."""
        return self._masks(memory, rate)

    def learn(self, memory: Memory, model: Tensors, layout: Layout, reports: Sequence[Report], mean: Mean) -> Memory:
        """Nothing: masks follow the model."""
        return memory

    def facts(self, memory: Memory) -> dict[str, float]:
        """Entries that came back in this round, and the share that is there; where shares follow rates, at a rate of .2."""
        said = {"reactivated": float(memory["back"])}
        if self.keep is None:
            return said
        left = kept(self._masks(memory, 1.0))
        return said | {"kept": left} | ({"ticket": left} if self.ramp else {})

    def _masks(self, memory: Memory, rate: Rate) -> dict[str, BoolArray]:
        keep = self._share(int(memory["version"]), rate) if memory else 1.0
        return {} if keep >= 1 else {n: _largest(Same(a), keep) for n, a in group(memory, "magnitude").items()}

    def _share(self, version: Version, rate: Rate) -> float:
        sparsity = 1.0 - (rate if self.keep is None else self.keep)
        if version < self.ramp:
            sparsity *= 1.0 - (1.0 - version / self.ramp) ** 3
        return 1.0 - sparsity


@lru_cache(maxsize=256)
def _largest(magnitude: Same, keep: float) -> BoolArray:
    return largest(magnitude.array, keep)
