"""PruneFL: one mask for all, of the entries with the largest squared gradients; all entries are taken to cost the same."""

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
class Salient:
    """Every so often all gradients are asked for once, and the entries with the largest g_j^2 are kept.

    PruneFL-style (Jiang et al. 2019, arXiv:1909.12326). At a reconfiguration the largest of the entries that are there stay
    whatever they promise, in each tensor all but a share `decrease` of them; of the others those are added, in order of
    g_j^2 / t_j, whose own ratio exceeds that of the set so far, Gamma / T with Gamma = sum g_j^2 and T = c + sum t_j.
    `decrease` halves every `half_life` versions. A reconfiguration takes one dense round, in which everybody trains all
    entries of the masked model: those that had gone start at zero, and the server's optimiser starts anew.

    Differs from the paper: t_j = 1 for every entry, whatever tensor it is in; c is `overhead` of the dense model's sum of
    them; g is the mean update of that one round; there is no pruning at one client before the first round.

    Attributes:
        keep: share of each tensor's entries that stays whatever they promise.
        every: versions between reconfigurations (the paper: 50).
        decrease: largest share of a tensor's remaining entries that may go at once (the paper: .3).
        half_life: of `decrease`, in versions (the paper: 10,000).
        overhead: c, as a share of the dense model's cost.
    """

    keep: float = 0.1
    every: int = 50
    decrease: float = 0.3
    half_life: float = 10_000.0
    overhead: float = 0.1
    through = False
    gate = False

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or not 0 < self.decrease < 1:
            raise ConfigError(f"keep {self.keep} must be in (0, 1] and decrease {self.decrease} in (0, 1)")
        if self.every < 1 or not self.half_life > 0 or self.overhead < 0:
            raise ConfigError(
                f"every {self.every} must be at least 1 version, half_life {self.half_life} above 0 "
                f"and overhead {self.overhead} not negative"
            )

    def parametrise(self, recommender: Recommender) -> Recommender:
        """As it is."""
        return recommender

    def prepare(self, memory: Memory, model: Tensors, layout: Layout, version: Version) -> tuple[Memory, Tensors]:
        """Note whether this round is a dense one, and the magnitudes it starts from: those of the masked model."""
        memory = {name: array for name, array in memory.items() if not name.startswith("magnitude/")}
        if version % self.every or version == 0:
            return memory | {"version": np.array(version)}, model
        masks = group(memory, "mask")
        if masks:  # what had gone kept its value: gradients are wanted where it is zero
            model = {n: t * torch.from_numpy(masks[n]).to(t) if n in masks else t for n, t in model.items()}
        sizes = {f"magnitude/{n}": a for n, a in magnitudes(model, maskable(layout)).items()}
        return memory | sizes | {"version": np.array(version)}, model

    def mask(self, memory: Memory, layout: Layout, client: ClientId, rate: Rate) -> Mapping[str, BoolArray]:
        """Everybody's mask; none in a dense round."""
        return {} if group(memory, "magnitude") else group(memory, "mask")

    def learn(self, memory: Memory, model: Tensors, layout: Layout, reports: Sequence[Report], mean: Mean) -> Memory:
        """Choose anew after a dense round."""
        sizes, masks = group(memory, "magnitude"), group(memory, "mask")
        if not sizes or not reports:
            return memory
        total = sum(size.size for size in sizes.values())
        decrease = self.decrease * 0.5 ** (float(memory["version"]) / self.half_life)
        left = {name: float(masks[name].mean()) if masks else 1.0 for name in sizes}
        stay = {n: largest(size, max(self.keep, left[n] * (1 - decrease)), masks.get(n)) for n, size in sizes.items()}
        saliency = {name: tensor.double().square().numpy() for name, tensor in mean().items() if name in sizes}
        inside = np.concatenate([stay[name].ravel() for name in sizes])
        promise = np.concatenate([saliency[name].ravel() for name in sizes])
        others = np.flatnonzero(~inside)
        order = others[np.argsort(-promise[others], kind="stable")]
        gain = promise[inside].sum() + np.concatenate([[0.0], np.cumsum(promise[order])[:-1]])
        cost = self.overhead * total + inside.sum() + np.arange(len(order))
        inside[order[promise[order] > gain / cost]] = True
        parts = np.split(inside, np.cumsum([size.size for size in sizes.values()])[:-1])
        chosen = {f"mask/{n}": p.reshape(sizes[n].shape) for n, p in zip(sizes, parts, strict=True)}
        return {"version": memory["version"]} | chosen

    def facts(self, memory: Memory) -> dict[str, float]:
        """Share of the entries that is left."""
        return {"kept": kept(group(memory, "mask"))}
