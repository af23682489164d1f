"""Tickets of one's own: every client prunes by what it trained, once its model does well on its own held-out items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from fedprune.axes import Layout
from fedprune.entries.base import Mean, Same, group, largest, maskable
from fedprune.errors import ConfigError
from fedprune.exchange import Report
from fedprune.recommenders import Recommender
from fedprune.submodel import positions
from fedprune.types import BoolArray, ClientId, Memory, Rate, Tensors, Version


@dataclass(frozen=True)
class Personal:
    """A mask per client, pruned by `step` of its survivors whenever its gate says that it can afford it.

    LotteryFL-style (Li et al. 2020, arXiv:2008.03371) and Sub-FedAvg-style (Vahidian et al. 2021, arXiv:2105.00562): if the
    received model's accuracy on the client's own validation data exceeds `above`, and more than `keep` of the entries is left,
    the smallest of what the client trained are pruned. Accuracy is the share of the order's negatives that the held-out
    item outscores (`teaching.gates`), so validation figures of such a run are not independent of it; test figures are.

    Differs from the papers: the server prunes from the reported weights, which are the client's, so no mask travels up;
    survivors go on from the global model, since resetting them to theta_0 on one client throws away what all have learned;
    untouched item rows count with the global values that the client has.

    Attributes:
        keep: share of the entries at which pruning stops.
        step: share of the survivors that goes each time.
        above: the gate's threshold.
        distance: prune only if pruning what was received and what was trained would differ by more than this share of the
            entries (Sub-FedAvg's condition); 0 asks for nothing.
        by: "entries", or "columns": whole columns of embeddings and matrices (Hermes-style, Li et al. 2021).
    """

    keep: float = 0.3
    step: float = 0.2
    above: float = 0.5
    distance: float = 0.0
    by: Literal["entries", "columns"] = "entries"
    through = False
    gate = True

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or not 0 < self.step < 1:
            raise ConfigError(f"keep {self.keep} must be in (0, 1] and step {self.step} in (0, 1)")
        if not 0 <= self.above <= 1 or self.distance < 0:
            raise ConfigError(f"above {self.above} must be in [0, 1] and distance {self.distance} not negative")
        if self.by not in ("entries", "columns"):
            raise ConfigError(f'by "{self.by}"; it is entries or columns')

    def parametrise(self, recommender: Recommender) -> Recommender:
        """As it is."""
        return recommender

    def prepare(self, memory: Memory, model: Tensors, layout: Layout, version: Version) -> tuple[Memory, Tensors]:
        """Nothing: clients prune by their reports."""
        return memory, model

    def mask(self, memory: Memory, layout: Layout, client: ClientId, rate: Rate) -> Mapping[str, BoolArray]:
        """This client's; all entries before its first pruning."""
        return _unpacked(Same(memory[f"mask/{client}"]), layout) if f"mask/{client}" in memory else {}

    def learn(self, memory: Memory, model: Tensors, layout: Layout, reports: Sequence[Report], mean: Mean) -> Memory:
        """Prune the masks of those whose gate is open."""
        pruned = dict(memory)
        for report in reports:
            gate = report.gate
            if gate is None or not gate > self.above:
                continue
            client = report.order.client
            old = self.mask(memory, layout, client, report.order.rate)
            left = float(np.concatenate([m.ravel() for m in old.values()]).mean()) if old else 1.0
            if left <= self.keep * 1.001:
                continue
            share = max(self.keep, left * (1 - self.step))
            received = {name: report.order.model[name] for name in maskable(layout)}
            fresh = {n: self._largest(w, share, old.get(n)) for n, w in _trained(received, layout, report).items()}
            if all(name in old and np.array_equal(mask, old[name]) for name, mask in fresh.items()):
                continue  # as few as whole numbers allow
            if self.distance:
                same = {n: self._largest(w, share, old.get(n)) for n, w in received.items()}
                moved = sum(int((fresh[n] != same[n]).sum()) for n in fresh) / sum(m.size for m in fresh.values())
                if moved <= self.distance:
                    continue
            flat = np.concatenate([fresh[n].ravel() for n in maskable(layout)])
            pruned[f"mask/{client}"], pruned[f"left/{client}"] = np.packbits(flat), np.array(flat.mean())
        return pruned

    def facts(self, memory: Memory) -> dict[str, float]:
        """Mean share of the entries that is left, over the clients that have pruned, and how many these are."""
        left = sorted(float(share) for share in group(memory, "left").values())  # in one order, whoever wrote the memory
        return {"kept": float(np.mean(left)) if left else 1.0, "pruned_clients": float(len(left))}

    def _largest(self, weights: torch.Tensor, share: float, among: BoolArray | None) -> BoolArray:
        size = weights.abs().cpu().numpy()
        if self.by == "entries":
            return largest(size, share, among)
        columns = size.sum(axis=tuple(range(size.ndim - 1)))
        alive = None if among is None else np.asarray(among.any(axis=tuple(range(size.ndim - 1))))
        before = columns.size if alive is None else int(alive.sum())
        # A step smaller than a column would never come to an end; the last one stops at `keep`.
        left = max(1, round(self.keep * columns.size), min(round(share * columns.size), before - 1))
        return np.broadcast_to(largest(columns, left / columns.size, alive), size.shape).copy()


def _trained(received: Tensors, layout: Layout, report: Report) -> Tensors:
    """What the client's weights were after training."""
    updates, place, result = report.updates, report.position, {}
    for name, tensor in received.items():
        result[name] = tensor.clone()
        mesh = [positions(layout, d, report.order.submodel.held) for d in layout.tensors[name]]
        delta = updates.tensors[name][place]
        if layout.kind(name) == "touched":
            real = updates.present[place]
            mesh[0], delta = updates.rows[place][real], delta[real]
        index = torch.meshgrid(*mesh, indexing="ij")
        result[name][index] += delta
    return result


@lru_cache(maxsize=1024)
def _unpacked(packed: Same, layout: Layout) -> dict[str, BoolArray]:
    names = maskable(layout)
    sizes = [int(np.prod(layout.shape(name))) for name in names]
    flat = np.unpackbits(packed.array, count=sum(sizes)).astype(bool)
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return {name: part.reshape(layout.shape(name)) for name, part in zip(names, parts, strict=True)}
