"""Lottery tickets of the global model: prune by magnitude, rewind, and train again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedprune.axes import Layout
from fedprune.entries.base import Mean, group, kept, largest, magnitudes, maskable
from fedprune.errors import ConfigError
from fedprune.exchange import Report
from fedprune.recommenders import Recommender
from fedprune.types import BoolArray, ClientId, Memory, Rate, Tensors, Version


@dataclass(frozen=True)
class Lottery:
    """Iterative magnitude pruning: every so often the smallest survivors go, and the others return to an early checkpoint.

    Frankle & Carbin 2019, arXiv:1803.03635, strategy 1, with rewinding to a checkpoint instead of the initial values
    (Frankle et al. 2019, arXiv:1903.01611): m' = the largest (1 - step) of what m left, theta <- theta_k, and the server's
    optimiser forgets. The ticket is everybody's. On recommenders: Wang et al. 2021, arXiv:2108.00944.

    Differs from the papers: masks per tensor, of what travels (private rows stay whole); the checkpoint is a merged model.

    Attributes:
        keep: share of the entries that is left in the end.
        every: versions between two prunings, the time a ticket has to show what it is worth.
        step: share of the survivors that goes each time; 1 - keep prunes at once (one-shot).
        rewind: the checkpoint is the model of this version (of the papers' training: 0.1 to 7 %); None: nothing is rewound,
            which is plain magnitude pruning.
        early: draw the whole ticket at once, as soon as the mask that would be drawn has changed by less than this share over
            each of the last `patience` versions that changed the model (early-bird tickets, You et al. 2020,
            arXiv:1909.11957; there .1 and 5), and train on without rewinding; None: by `every` and `step`.
    """

    keep: float
    every: int = 20
    step: float = 0.2
    rewind: int | None = 0
    early: float | None = None
    patience: int = 5
    through = False
    gate = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep is {self.keep}; it must be in (0, 1], a share of the entries")
        if not 0 < self.step < 1:
            raise ConfigError(f"step is {self.step}; it must be in (0, 1), the share of the survivors that goes each time")
        if self.every < 1 or self.patience < 1:
            raise ConfigError(f"every {self.every} and patience {self.patience} are counted in versions, from 1")
        if self.rewind is not None and self.rewind < 0:
            raise ConfigError(f"rewind is {self.rewind}; it is a version, so not negative")
        if self.early is not None and not 0 < self.early < 1:
            raise ConfigError(f"early is {self.early}; it must be in (0, 1), a share of the entries")

    def parametrise(self, recommender: Recommender) -> Recommender:
        """As it is."""
        return recommender

    def prepare(self, memory: Memory, model: Tensors, layout: Layout, version: Version) -> tuple[Memory, Tensors]:
        """Keep the checkpoint when its version has come; prune, and rewind, when it is time."""
        if self.early is not None:
            return self._watch(memory, model, layout), model
        start = self.rewind or 0
        if version == start and self.rewind is not None:
            memory = memory | {f"checkpoint/{name}": t.cpu().numpy().copy() for name, t in model.items()}
        masks = group(memory, "mask")
        done = kept(masks) <= self.keep * 1.001
        if done or version <= start or (version - start) % self.every or int(memory.get("pruned", -1)) == version:
            return memory or {"pruned": np.array(-1)}, model
        share = max(self.keep, kept(masks) * (1 - self.step))
        fresh = {name: largest(size, share, masks.get(name)) for name, size in magnitudes(model, maskable(layout)).items()}
        if masks and all(np.array_equal(fresh[name], mask) for name, mask in masks.items()):
            return memory, model  # as few as whole numbers allow: nothing goes, so nothing is rewound
        memory = memory | {f"mask/{name}": mask for name, mask in fresh.items()} | {"pruned": np.array(version)}
        if self.rewind is None:
            return memory, model
        return memory, {name: torch.from_numpy(array.copy()) for name, array in group(memory, "checkpoint").items()}

    def mask(self, memory: Memory, layout: Layout, client: ClientId, rate: Rate) -> Mapping[str, BoolArray]:
        """The ticket so far."""
        return group(memory, "mask")

    def learn(self, memory: Memory, model: Tensors, layout: Layout, reports: Sequence[Report], mean: Mean) -> Memory:
        """Nothing: magnitudes are the server's own."""
        return memory

    def facts(self, memory: Memory) -> dict[str, float]:
        """Share of the entries that is left: the ticket's."""
        left = kept(group(memory, "mask"))
        return {"kept": left, "ticket": left}

    def _watch(self, memory: Memory, model: Tensors, layout: Layout) -> Memory:
        """Early birds: compare the mask that would be drawn now with the last one's, until it holds still."""
        if group(memory, "mask"):
            return memory
        now, last = magnitudes(model, maskable(layout)), group(memory, "candidate")
        if last and all(np.array_equal(now[name], size) for name, size in last.items()):
            return memory  # nobody reported: nothing has stood still that could have moved
        fresh = {name: largest(size, self.keep) for name, size in now.items()}
        calm = int(memory.get("calm", 0))
        if last:
            moved = sum(int((mask != largest(last[name], self.keep)).sum()) for name, mask in fresh.items())
            moved /= sum(mask.size for mask in fresh.values())
            calm = calm + 1 if moved < (self.early or 0) else 0
        if calm >= self.patience:
            return {f"mask/{name}": mask for name, mask in fresh.items()}
        return {f"candidate/{name}": size for name, size in now.items()} | {"calm": np.array(calm)}
