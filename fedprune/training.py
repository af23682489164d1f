"""Local training: the same steps for a stack of clients as for one, which is a stack of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from fedprune.axes import Layout
from fedprune.distill import Lesson, soft_loss, taught_loss
from fedprune.objective import Objective
from fedprune.population import Examples, Private
from fedprune.random import PRIORITIES, priorities
from fedprune.recommenders import Recommender
from fedprune.sparse import held_widths, slope
from fedprune.submodel import Submodel, like, positions, there
from fedprune.types import Tensors


@dataclass(frozen=True)
class Trained:
    """What comes out of local training: `update` = trained - received, private rows, and each client's first loss."""

    update: Tensors
    private: Private
    loss: Tensor


def train(
    recommender: Recommender,
    received: Tensors,
    private: Private,
    examples: Examples,
    objective: Objective,
    trained: Mapping[str, Tensor] = MappingProxyType({}),
    key: np.ndarray | None = None,
    frozen: bool = False,
    seen: Mapping[str, Tensor] = MappingProxyType({}),
    chance: Mapping[str, Tensor] = MappingProxyType({}),
    narrow: Mapping[str, Tensor] = MappingProxyType({}),
) -> Trained:
    """Minimise the objective on a stack of clients.

    Args:
        received: touched tensors `[clients, rows, ...]`, shared ones `[clients, ...]`, at held widths.
        private: rows `[clients, users, ...]`.
        trained: masks of the trained entries of some tensors, broadcastable to them; of the others all are trained.
        key: uint64 `[clients]`, shuffles the examples where `objective.batch` is set.
        frozen: train the private rows alone, one step on all examples.
        seen: masks of the entries that are there, of tensors whose masked entries are trained all the same
            (`Submodel.through`): zero where the model scores, and transparent to the gradient.
        chance: what the recommender draws for this order (`Recommender.chance`).
        narrow: masks of each client's narrower self (`narrower`), for `objective.nested`.
    """
    torch.set_flush_denormal(True)  # masked training meets denormals, which slow a CPU down many times over
    step = _Step(recommender, objective, seen, chance, narrow)
    if frozen:
        loss, _, of_private = step.gradients(received, private, examples, shared=False)
        return Trained({}, _adam(private, of_private, examples, examples, objective), loss / examples.count)
    layout = recommender.layout
    update: Tensors = {}
    first_loss = torch.zeros(0)
    widths = held_widths(layout, dict(received) | private.values) if objective.sparse else {}
    for epoch in range(objective.epochs):
        for part in _batches(examples, objective.batch, key, epoch):
            current = {n: t + update[n] if n in update else t for n, t in received.items()}
            loss, gradient, of_private = step.gradients(current, private, part)
            if not len(first_loss):
                first_loss = loss / part.count.clamp(min=1)
            at_work = part.heard.any(1).float()  # who has run out of examples takes no step, not even back
            small: Tensors = {}
            if objective.sparse:
                scored = {n: t * seen[n] if n in seen else t for n, t in current.items()}
                small = slope(layout, widths, scored, part.present, objective.sparse_by)
            for name, change in gradient.items():
                if layout.kind(name) == "shared":
                    change = change / like(part.count.clamp(min=1), change)
                if objective.proximal and name in update:
                    change = change + objective.proximal * like(at_work, change) * update[name]
                if name in small:
                    change = change + objective.sparse * like(at_work, change) * small[name]
                if name in trained:
                    change = change * trained[name]
                update[name] = update[name] - objective.lr * change if name in update else change.mul_(-objective.lr)
            private = _adam(private, of_private, part, examples, objective)
        for _ in range(objective.private_steps):
            current = {n: t + update[n] for n, t in received.items()}
            _, _, of_private = step.gradients(current, private, examples, shared=False)
            private = _adam(private, of_private, examples, examples, objective)
    return Trained(update, private, first_loss)


def received(layout: Layout, cut: Tensors, examples: Examples, entries: Mapping[str, Tensor] = MappingProxyType({})) -> Tensors:
    """A cut model as each client of a stack receives it: its own touched rows, and views of what all share.

    Args:
        entries: masks of entries (`entry_masks`), where clients that share a cut differ by them.
    """
    rows, result = examples.rows, {}
    for name, tensor in cut.items():
        if layout.kind(name) == "touched":
            own = tensor.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        else:
            own = tensor.expand(len(rows), *tensor.shape)
        result[name] = own * entries[name] if name in entries else own
    return result


def entry_masks(layout: Layout, submodels: Sequence[Submodel], rows: Tensor) -> Tensors:
    """Masks of the entries that are there, of a stack that holds the same units.

    Returns:
        float32, `[clients, rows, ...]` for touched tensors, `[clients or 1, ...]` for shared ones; others are left out.
    """
    same, result = len({s.held_key for s in submodels}) == 1, {}
    for name in dict.fromkeys(name for s in submodels for name in s.entries):
        everything = torch.ones(layout.shape(name, submodels[0].widths), dtype=torch.bool)
        found = [there(layout, s, name) for s in (submodels[:1] if same else submodels)]
        masks = [everything if mask is None else mask for mask in found]
        if layout.kind(name) == "touched":
            own = masks[0][rows] if same else torch.stack([mask[rows[k]] for k, mask in enumerate(masks)])
            result[name] = own.float()
        else:
            result[name] = torch.stack(masks).float()
    return result


def masks(layout: Layout, submodels: Sequence[Submodel], entries: Mapping[str, Tensor] = MappingProxyType({})) -> Tensors:
    """Masks of the trained entries of a stack that holds the same units; of tensors that are not named, all are trained."""
    if submodels[0].through:
        entries = {}
    if not any(s.is_window for s in submodels):
        return dict(entries)
    result: Tensors = {}
    for name in layout.named("touched", "shared"):
        skip = 1 if layout.kind(name) == "touched" else 0
        dimensions = layout.tensors[name][skip:]
        factor = torch.ones(len(submodels), *[1] * (skip + len(dimensions)))
        for place, dimension in enumerate(dimensions, start=1 + skip):
            held = positions(layout, dimension, submodels[0].held)
            rows = [torch.isin(held, positions(layout, dimension, s.trained)) for s in submodels]
            shape = [len(submodels), *[1] * (skip + len(dimensions))]
            shape[place] = len(held)
            factor = factor * torch.stack(rows).float().reshape(shape)
        result[name] = factor * entries[name] if name in entries else factor
    return result


def narrower(layout: Layout, submodel: Submodel, share: float) -> Tensors:
    """Masks that leave the leading `share` of the held units of every axis (at least one), broadcastable to stacked tensors."""
    kept = {axis: units[: max(1, round(share * len(units)))] for axis, units in submodel.held.items()}
    result: Tensors = {}
    for name, dimensions in layout.tensors.items():
        skip = 0 if layout.kind(name) == "shared" else 1
        mask = torch.ones(1)
        for place, dimension in enumerate(dimensions[skip:], start=1 + skip):
            inside = torch.isin(positions(layout, dimension, submodel.held), positions(layout, dimension, kept)).float()
            mask = mask * inside.reshape(*[1] * place, -1, *[1] * (len(dimensions) - place))
        result[name] = mask
    return result


def _batches(examples: Examples, size: int | None, key: np.ndarray | None, epoch: int) -> list[Examples]:
    """Parts of the examples, one per step; each client's own order of them follows from its key alone."""
    total = examples.label.shape[1]
    if size is None:
        return [examples]
    if key is None:
        raise ValueError("minibatches need a key per client to shuffle by")
    # By a client's own numbering of its examples: columns depend on who else is in the stack.
    present = examples.heard
    number = (present.cumsum(1) - 1).clamp(min=0)
    priority = priorities(key + np.uint64(epoch), total).gather(1, number)
    order = torch.where(present, priority, PRIORITIES).argsort(dim=1, stable=True)  # padding last
    steps = -(-int(present.sum(1).max()) // size)
    parts = []
    for step in range(steps):
        chosen = order[:, step * size : (step + 1) * size]
        given = {
            name: tensor.gather(1, chosen)
            for name in ("label", "weight", "age", "item_at", "user_at", "rank")
            if (tensor := getattr(examples, name)) is not None
        }
        if examples.item_at is None:
            given["item_at"] = chosen  # one row per example
        lesson = None if examples.lesson is None else examples.lesson.at(chosen)
        parts.append(replace(examples, **given, lesson=lesson))
    return parts


def gathered(layout: Layout, model: Tensors, private: Tensors, part: Examples) -> Tensors:
    """What a recommender scores these examples from: touched rows per example, shared tensors, each example's user's rows."""
    inputs: Tensors = {}
    for name, tensor in model.items():
        touched = layout.kind(name) == "touched"
        inputs[name] = tensor if not touched or part.item_at is None else _pick(tensor, part.item_at)
    for name, rows in private.items():
        inputs[name] = rows if part.user_at is None else _pick(rows, part.user_at)
    return inputs


@dataclass(frozen=True)
class _Step:
    """What all steps of an order share."""

    recommender: Recommender
    objective: Objective
    seen: Mapping[str, Tensor]
    chance: Mapping[str, Tensor]
    narrow: Mapping[str, Tensor]

    def gradients(
        self, model: Tensors, private: Private, part: Examples, shared: bool = True
    ) -> tuple[Tensor, Tensors, Tensors]:
        """Summed task loss per client, and the gradients of what is shared and of what is private."""
        layout, objective = self.recommender.layout, self.objective
        leaves = {n: t.detach().requires_grad_(shared) for n, t in model.items()}
        own = {n: t.detach().requires_grad_() for n, t in private.values.items()}
        visible = {n: t + (t * self.seen[n] - t).detach() if n in self.seen else t for n, t in leaves.items()}
        inputs = gathered(layout, visible, own, part)
        weights = objective.recency_weights(part.age, part.label)
        if weights is not None:
            for name in own:
                rows = inputs[name].expand(-1, part.label.shape[1], *inputs[name].shape[2:])
                inputs[name] = _Weighted.apply(rows, like(weights, rows))
        for name, drawn in self.chance.items():
            pick = part.item_at is not None and name in layout.tensors and layout.kind(name) == "touched"
            inputs[f"{name}_noise"] = _pick(drawn, part.item_at) if pick and part.item_at is not None else drawn
        scores = self.recommender.score(inputs)
        errors = objective.error(scores, part.label)
        loss = (errors * part.weight).sum(1)
        total = loss if part.lesson is None else self._taught(part.lesson, errors, scores, inputs, visible, part)
        if objective.nested:
            narrow = self.recommender.score({n: t * self.narrow[n] if n in self.narrow else t for n, t in inputs.items()})
            soft = soft_loss(narrow, scores.detach(), 1.0, ratings=objective.task == "ratings")
            total = total + objective.nested * (soft * part.weight).sum(1)
        if self.recommender.penalty is not None and shared:
            # Not of padding, nor of a client that has run out of examples: both depend on who else is in the stack.
            real = {
                n: torch.where(like(part.present, t), t, t.detach()) if layout.kind(n) == "touched" else t
                for n, t in leaves.items()
            }
            total = total + self.recommender.penalty(real) * part.heard.any(1)
        gradients = torch.autograd.grad(total.sum(), [*(leaves.values() if shared else ()), *own.values()])
        split = len(leaves) if shared else 0
        return (
            loss.detach(),
            dict(zip(leaves, gradients[:split], strict=False)),
            dict(zip(own, gradients[split:], strict=True)),
        )

    def _taught(
        self, lesson: Lesson, errors: Tensor, scores: Tensor, inputs: Tensors, leaves: Tensors, part: Examples
    ) -> Tensor:
        distillation, activity, effective = self.objective.distillation, self.recommender.activity, self.recommender.effective
        assert distillation is not None
        active = activity(inputs) if activity is not None and distillation.attention else None
        return taught_loss(
            distillation, lesson, errors, scores, part.weight,
            ratings=self.objective.task == "ratings", activity=active,
            embeddings=leaves if effective is None else effective(leaves),
        )  # fmt: skip


def _adam(private: Private, gradient: Tensors, part: Examples, examples: Examples, objective: Objective) -> Private:
    """One Adam step of the users that have examples in this part; others keep values and moments."""
    if part.user_at is None:
        count, active = part.count[:, None], part.heard.any(1, keepdim=True)
    else:
        none = torch.zeros(examples.users.shape)
        count = none.scatter_add(1, part.user_at, part.weight)
        active = none.scatter_add(1, part.user_at, part.heard.float()) > 0
    steps = private.steps + active
    beta1, beta2 = objective.betas
    values, first, second = {}, {}, {}
    for name, value in private.values.items():
        g = gradient[name] / like(count.clamp(min=1), value) + objective.decay_private * value
        m = torch.lerp(g, private.first[name], beta1)
        v = torch.lerp(g * g, private.second[name], beta2)
        corrected = m / like(1 - beta1 ** steps.clamp(min=1), m)
        scale = (v / like(1 - beta2 ** steps.clamp(min=1), v)).sqrt() + 1e-8
        moved = value - objective.lr_private * corrected / scale
        on = like(active, value)
        values[name] = torch.where(on, moved, value)
        first[name] = torch.where(on, m, private.first[name])
        second[name] = torch.where(on, v, private.second[name])
    return Private(values, first, second, steps)


class _Weighted(torch.autograd.Function):
    """Identity whose gradient is multiplied by a weight."""

    @staticmethod
    def forward(ctx, value: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(weight)
        return value.clone()

    @staticmethod
    def backward(ctx, *gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient[0] * ctx.saved_tensors[0], None


def _pick(rows: Tensor, at: Tensor) -> Tensor:
    """`[clients, rows, ...]`, `[clients, batch]` -> `[clients, batch, ...]`."""
    client = torch.arange(len(at), device=at.device)[:, None]
    return rows[client, at]
