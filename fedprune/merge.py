"""How do reports become the next model?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedprune.axes import Layout
from fedprune.errors import ConfigError
from fedprune.exchange import Report, Updates
from fedprune.submodel import Submodel, like, mask, positions, there
from fedprune.types import Tensors


class ServerOptimiser(Protocol):
    """Turns a mean update into the model's step."""

    def step(self, memory: Tensors, name: str, mean: Tensor, covered: Tensor) -> Tensor:
        """What to add to tensor `name`; zero wherever `covered` is false. May keep moments in `memory`."""
        ...


@dataclass(frozen=True)
class Average:
    """model <- model + lr * mean update; FedAvg at lr 1 (McMahan et al. 2017)."""

    lr: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"the server's rate is {self.lr}; it must be above 0, and 1 takes the mean as it is")

    def step(self, memory: Tensors, name: str, mean: Tensor, covered: Tensor) -> Tensor:
        """lr times the mean."""
        return mean if self.lr == 1.0 else self.lr * mean


@dataclass(frozen=True)
class Adam:
    """FedAdam (Reddi et al. 2021, algorithm 2): the mean update as the gradient of an Adam step on the server.

    Differs from the paper: an entry that nobody reported keeps its value and its moments, and bias is corrected by how
    often the entry was reported.
    """

    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"the server's rate is {self.lr}; it must be above 0, and about .01 suits most recommenders")

    def step(self, memory: Tensors, name: str, mean: Tensor, covered: Tensor) -> Tensor:
        """lr * m_hat / (sqrt(v_hat) + epsilon)."""
        shape = mean.shape
        m = memory.get(f"{name}.m", torch.zeros(shape, device=mean.device))
        v = memory.get(f"{name}.v", torch.zeros(shape, device=mean.device))
        t = memory.get(f"{name}.t", torch.zeros(shape, device=mean.device)) + covered
        m = torch.where(covered, self.beta1 * m + (1 - self.beta1) * mean, m)
        v = torch.where(covered, self.beta2 * v + (1 - self.beta2) * mean * mean, v)
        memory[f"{name}.m"], memory[f"{name}.v"], memory[f"{name}.t"] = m, v, t
        age = t.clamp(min=1)
        m_hat = m / (1 - self.beta1**age)
        v_hat = v / (1 - self.beta2**age)
        return torch.where(covered, self.lr * m_hat / (v_hat.sqrt() + self.epsilon), 0.0)


@dataclass(frozen=True)
class Merge:
    """Coordinate by coordinate, the weighted mean of those who trained it, then the server's step.

    mean_j = sum_k w_k m_kj d_kj / sum_k w_k m_kj, over clients k with updates d_k and masks m_k of trained entries.

    Attributes:
        over: "holders" divides by those who trained the coordinate (HeteroFL; AdaptCL's by-unit); "cohort" by all who
            reported, so that who lacks it votes for the old value (FedMP's R2SP); "common" merges only what everybody trained
            who reported (and who touched its row), the rest keeps its old value (Hermes).
        weights: w_k: "equal"; "examples" (FedAvg's n_k); "period": merges from one report of the client to its next, those
            included for which it is not chosen, so that who reports every s-th round counts s-fold (a second report in one
            merge counts 1, though it spans none); "coverage": 1 / (the share of the tensor that k trains), so that each entry
            is expected to count alike however seldom a client trains it (Horvitz & Thompson 1952).
        discount: a report's update counts (1 + staleness)^-discount, and the mean is not made up for it (FedAsync, FedBuff).
        mixing: what a stale report brings is not its update but the model it ends with, which pulls the present one back
            towards the version it began with (FedAsync); on the entries that it trained.
        scaling: the server's step is multiplied by (reports / `among`)^scaling, for merging before all have reported at the
            rate of merging when they have: 1/2 is the square-root rule for Adam with smaller batches (Malladi et al. 2022).
        damp: the server's step of an entry is multiplied by (the share of this round's reporters that train its units)^damp, so
            that what few devices hold moves less; against the over-fitting of mixed widths (`simulations/widths.py`).
        among: reports at which the step is whole; None: one of every client.
        optimiser: the server's step; None: plain averaging, unless the experiment has another.
    """

    over: Literal["holders", "cohort", "common"] = "holders"
    weights: Literal["equal", "examples", "period", "coverage"] = "equal"
    discount: float = 0.0
    mixing: bool = False
    damp: float = 0.0
    scaling: float = 0.0
    among: int | None = None
    optimiser: ServerOptimiser | None = None

    def __post_init__(self) -> None:
        if self.over not in ("holders", "cohort", "common"):
            raise ConfigError(f'merge over "{self.over}"; it is holders, cohort or common')
        if self.weights not in ("equal", "examples", "period", "coverage"):
            raise ConfigError(f'merge weights "{self.weights}"; they are equal, examples, period or coverage')
        if not 0 <= self.discount < math.inf:
            raise ConfigError(f"discount is {self.discount}; it is an exponent of 1/(1 + staleness), so not negative")
        if not 0 <= self.damp < math.inf:
            raise ConfigError(f"damp is {self.damp}; it is an exponent of a share, so not negative")
        if not 0 <= self.scaling <= 1 or (self.among is not None and self.among < 1):
            raise ConfigError(f"scaling is {self.scaling} and among {self.among}; they must be in [0, 1] and at least 1")

    def __call__(
        self, model: Tensors, memory: Tensors, layout: Layout, reports: Sequence[Report], population: int = 1
    ) -> tuple[Tensors, Tensors]:
        """The next model and the optimiser's next memory; neither argument is changed.

        Reports are taken in the order of their tickets: float addition does not commute bit for bit.
        """
        if not reports:
            return model, memory
        memory, merged, optimiser = dict(memory), {}, self.optimiser or Average()
        scale = min(1.0, len(reports) / (self.among or population)) ** self.scaling
        for name, (mean, held) in self.means(model, layout, reports).items():
            step = optimiser.step(memory, name, mean, held)
            if self.damp:
                step = step * trained_by(reports, layout, name) ** self.damp
            merged[name] = model[name] + (step if scale == 1.0 else scale * step)
        return merged, memory

    def means(self, model: Tensors, layout: Layout, reports: Sequence[Report]) -> dict[str, tuple[Tensor, Tensor]]:
        """Per tensor the mean update, and which of its entries it speaks of (it is zero elsewhere)."""
        stacks: dict[int, list[Report]] = {}
        for report in sorted(reports, key=lambda r: r.order.ticket):
            stacks.setdefault(id(report.updates), []).append(report)
        sums = _Sums.zeros(model, layout)
        cohort = dict.fromkeys(model, 0.0)
        for members in stacks.values():
            members.sort(key=lambda r: r.position)
            weights = {name: torch.tensor([self.weight(r, layout, name) for r in members]) for name in model}
            strength = torch.tensor([(1.0 + r.staleness) ** -self.discount for r in members])
            begun = members[0].order.model if self.mixing else model
            behind = {} if begun is model else {name: begun[name] - model[name] for name in model}
            sums.add(members[0].updates, [r.position for r in members], weights, strength, behind)
            cohort = {name: total + float(weights[name].sum()) for name, total in cohort.items()}
        result = {}
        for name in model:
            covered = sums.covered[name]
            held = covered > 0
            if self.over == "common":
                held &= covered > (1 - 1e-5) * like(sums.reached[name], covered)
            count = torch.tensor(cohort[name]) if self.over == "cohort" else covered
            result[name] = torch.where(held, sums.deltas[name] / torch.where(held, count, 1.0), 0.0), held
        return result

    def weight(self, report: Report, layout: Layout, name: str) -> float:
        """w_k of one report, for one tensor."""
        match self.weights:
            case "equal":
                return 1.0
            case "examples":
                return float(report.examples)
            case "period":
                return float(report.period)
            case "coverage":
                share = coverage(report.order.submodel, layout, name)
                return 1.0 / share if share else 1.0  # who trains none of it has reported all the same


def trained_by(reports: Sequence[Report], layout: Layout, name: str) -> Tensor:
    """Share of the reporters that train each entry's units, broadcastable to the tensor; masks of entries aside."""
    touched = layout.kind(name) == "touched"
    share, counted = torch.zeros(()), Counter(report.order.submodel for report in reports)
    for submodel, times in counted.items():
        trained = torch.ones(())
        for dimension in layout.tensors[name][1 if touched else 0 :]:
            trained = trained[..., None] * mask(layout, dimension, submodel.trained)
        share = share + times / len(reports) * trained
    return share[None] if touched else share


@lru_cache(maxsize=8192)
def coverage(submodel: Submodel, layout: Layout, name: str) -> float:
    """Share of a tensor's entries that a submodel trains, rows aside: the product over its dimensions, and over its mask."""
    mask = there(layout, submodel, name, "trained")
    share = 1.0 if mask is None else float(mask.float().mean())
    for dimension in layout.tensors[name]:
        share *= layout.extent(dimension, submodel.trained_widths) / layout.extent(dimension, layout.full)
    return share


@dataclass(frozen=True)
class _Sums:
    """Weighted sums over reports, per tensor of the full model.

    Attributes:
        deltas: of updates.
        covered: of the weights of those who trained an entry.
        reached: of the weights of those who had the row, `[items]`, or the tensor, `[1]`.
    """

    layout: Layout
    deltas: Tensors
    covered: Tensors
    reached: Tensors

    @classmethod
    def zeros(cls, model: Tensors, layout: Layout) -> _Sums:
        """Of nobody."""
        reached = {name: torch.zeros(len(t) if layout.kind(name) == "touched" else 1) for name, t in model.items()}
        deltas = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
        return cls(layout, deltas, {name: torch.zeros_like(tensor) for name, tensor in model.items()}, reached)

    def add(self, updates: Updates, places: list[int], weights: Tensors, strength: Tensor, behind: Tensors) -> None:
        """Add the weighted updates of some clients of a stack (places ascending), and their weights where they trained.

        Args:
            weights: per tensor, `[clients]`.
            strength: `[clients]`, multiplies updates and not weights.
            behind: what to add to each client's update where it trained; nothing where empty.
        """
        submodels = [updates.submodels[place] for place in places]
        keys = [s.key for s in submodels]
        same = len(set(keys)) == 1
        if not same and any(s.entries for s in submodels):  # masks do not factorise: one submodel after another
            for key in dict.fromkeys(keys):
                own = [number for number, k in enumerate(keys) if k == key]
                self.add(updates, [places[n] for n in own], {n: w[own] for n, w in weights.items()}, strength[own], behind)
            return
        whole = len(places) == len(updates.submodels)
        clients = torch.tensor(places)
        agreed = submodels[:1] if same else submodels
        rows, present = (updates.rows, updates.present) if whole else (updates.rows[clients], updates.present[clients])

        def covering(name: str, factors: list[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
            """Each entry's sum of weights, `[full shape]`, and each row's."""
            if self.layout.kind(name) != "touched":  # one line of weights stands for all clients that agree on what they train
                by_row = weight.sum(0, keepdim=True)[None] if same else weight[:, None]
            elif same:
                flat = torch.zeros(self.layout.items).index_add_(0, rows.flatten(), (present * weight[:, None]).flatten())
                by_row = flat[None]
            else:
                by_row = torch.zeros(len(places), self.layout.items).scatter_add_(1, rows, present * weight[:, None])
            outer = _outer(by_row, factors).reshape(self.covered[name].shape)
            if name in agreed[0].entries and not agreed[0].through:
                outer = outer * torch.from_numpy(agreed[0].entries[name])
            return outer, by_row.sum(0)

        for name, stacked in updates.tensors.items():
            delta, weight = stacked if whole else stacked[clients], weights[name]
            touched = self.layout.kind(name) == "touched"
            dimensions = self.layout.tensors[name][1 if touched else 0 :]
            # Who trained what, `[clients or 1, extent]` per dimension.
            factors = [torch.stack([mask(self.layout, d, s.trained) for s in agreed]) for d in dimensions]
            outer, reached = covering(name, factors, weight)
            self.covered[name] += outer
            self.reached[name] += reached
            counted = weight * strength
            weighted = delta if bool((counted == 1).all()) else delta * like(counted, delta)
            _add_deltas(self.deltas[name], self.layout, dimensions, submodels, weighted, rows if touched else None)
            if name in behind:
                self.deltas[name] += covering(name, factors, counted)[0] * behind[name]


def _outer(first: Tensor, factors: list[Tensor]) -> Tensor:
    """sum_k first[k, :] x factors[0][k, :] x factors[1][k, :] x ..."""
    letters = "abcdefg"
    terms = ",".join(f"k{letters[i]}" for i in range(1 + len(factors)))
    return torch.einsum(f"{terms}->{letters[: 1 + len(factors)]}", first, *factors)


def _add_deltas(total: Tensor, layout: Layout, dimensions: tuple, submodels: list, delta: Tensor, rows: Tensor | None) -> None:
    """Add `[clients, (rows,) held...]` into the full tensor; clients that hold the same units go in together."""
    groups: dict[bytes, list[int]] = {}
    for place, submodel in enumerate(submodels):
        groups.setdefault(submodel.units_key, []).append(place)
    for places in groups.values():
        part = delta if len(groups) == 1 else delta[places]
        held = submodels[places[0]].held
        if rows is None:
            summed = part.sum(0)
        else:
            here = rows if len(groups) == 1 else rows[places]
            summed = torch.zeros(len(total), *part.shape[2:])
            summed.index_add_(0, here.flatten(), part.flatten(0, 1))
        mesh = [positions(layout, d, held) for d in dimensions]
        if rows is not None:
            mesh.insert(0, torch.arange(len(total)))
        if summed.shape == total.shape:
            total += summed
        else:
            total[torch.meshgrid(*mesh, indexing="ij")] += summed
