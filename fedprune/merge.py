"""How do reports become the next model?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from fedprune.axes import Layout
from fedprune.errors import ConfigError
from fedprune.exchange import Report, Updates
from fedprune.submodel import mask, positions
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
            reported, so that who lacks it votes for the old value (FedMP's R2SP).
        weights: w_k: "equal"; "examples" (FedAvg's n_k); "period": merges since the model was sent, plus one, so that who
            reports every s-th round counts s-fold; "coverage": 1 / (trained share of the axes), so that each unit is
            expected to count alike however seldom a client trains it (Horvitz & Thompson 1952).
        optimiser: the server's step.
    """

    over: Literal["holders", "cohort"] = "holders"
    weights: Literal["equal", "examples", "period", "coverage"] = "equal"
    optimiser: ServerOptimiser = field(default_factory=Average)

    def __post_init__(self) -> None:
        if self.over not in ("holders", "cohort"):
            raise ConfigError(f'merge over "{self.over}"; it is holders or cohort')
        if self.weights not in ("equal", "examples", "period", "coverage"):
            raise ConfigError(f'merge weights "{self.weights}"; they are equal, examples, period or coverage')

    def __call__(self, model: Tensors, memory: Tensors, layout: Layout, reports: Sequence[Report]) -> tuple[Tensors, Tensors]:
        """The next model and the optimiser's next memory; neither argument is changed.

        Reports are taken in the order of their tickets: float addition does not commute bit for bit.
        """
        if not reports:
            return model, memory
        reports = sorted(reports, key=lambda r: r.order.ticket)
        weight = torch.tensor([self.weight(report, layout) for report in reports])
        stacks: dict[int, tuple[Updates, list[tuple[int, float]]]] = {}
        for report, w in zip(reports, weight.tolist(), strict=True):
            stacks.setdefault(id(report.updates), (report.updates, []))[1].append((report.position, w))
        sums = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
        covered = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
        for updates, members in stacks.values():
            places, weights = zip(*sorted(members), strict=True)
            _add_stack(sums, covered, layout, updates, list(places), torch.tensor(weights))
        memory, merged = dict(memory), {}
        for name, tensor in model.items():
            held = covered[name] > 0
            count = covered[name] if self.over == "holders" else weight.sum()
            mean = torch.where(held, sums[name] / torch.where(held, count, 1.0), 0.0)
            merged[name] = tensor + self.optimiser.step(memory, name, mean, held)
        return merged, memory

    def weight(self, report: Report, layout: Layout) -> float:
        """w_k of one report."""
        match self.weights:
            case "equal":
                return 1.0
            case "examples":
                return float(report.examples)
            case "period":
                return float(1 + report.staleness)
            case "coverage":
                submodel, full = report.order.submodel, layout.full
                return len(full) / sum(submodel.trained_widths[axis] / size for axis, size in full.items())


def _add_stack(sums: Tensors, covered: Tensors, layout: Layout, updates: Updates, places: list[int], weight: Tensor) -> None:
    """Add the weighted updates of some clients of a stack (places ascending), and the weights themselves where they trained."""
    clients = torch.tensor(places)
    whole = len(places) == len(updates.submodels)
    submodels = [updates.submodels[place] for place in places]
    same = len({s.key for s in submodels}) == 1
    items = next((layout.axes[a].size for a in layout.axes if layout.axes[a].touched), 0)
    rows, present = (updates.rows, updates.present) if whole else (updates.rows[clients], updates.present[clients])
    row_weight = present * weight[:, None]
    if same:  # one line of weights stands for all clients
        incidence = torch.zeros(items).index_add_(0, rows.flatten(), row_weight.flatten())[None]
    else:
        incidence = torch.zeros(len(places), items).scatter_add_(1, rows, row_weight)
    agreed = submodels[:1] if same else submodels
    equal = bool((weight == 1).all())
    for name, stacked in updates.tensors.items():
        delta = stacked if whole else stacked[clients]
        delta = delta if equal else delta * _like(weight, delta)
        touched = layout.kind(name) == "touched"
        dimensions = layout.tensors[name][1 if touched else 0 :]
        # Who trained what, `[clients or 1, extent]` per dimension.
        factors = [torch.stack([mask(layout, d, s.trained) for s in agreed]) for d in dimensions]
        clients_weight = incidence if touched else weight.sum(0, keepdim=True)[None] if same else weight[:, None]
        covered[name] += _outer(clients_weight, factors).reshape(covered[name].shape)
        _add_deltas(sums[name], layout, dimensions, submodels, delta, rows if touched else None)


def _outer(first: Tensor, factors: list[Tensor]) -> Tensor:
    """sum_k first[k, :] x factors[0][k, :] x factors[1][k, :] x ..."""
    letters = "abcdefg"
    terms = ",".join(f"k{letters[i]}" for i in range(1 + len(factors)))
    return torch.einsum(f"{terms}->{letters[: 1 + len(factors)]}", first, *factors)


def _add_deltas(total: Tensor, layout: Layout, dimensions: tuple, submodels: list, delta: Tensor, rows: Tensor | None) -> None:
    """Add `[clients, (rows,) held...]` into the full tensor; clients that hold the same units go in together."""
    groups: dict[bytes, list[int]] = {}
    for place, submodel in enumerate(submodels):
        groups.setdefault(submodel.held_key, []).append(place)
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


def _like(factor: Tensor, tensor: Tensor) -> Tensor:
    return factor.reshape(-1, *[1] * (tensor.dim() - 1))
