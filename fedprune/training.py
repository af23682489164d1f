"""Local training: the same steps for a stack of clients as for one, which is a stack of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprune.axes import Layout
from fedprune.objective import Objective
from fedprune.population import Examples, Private
from fedprune.random import PRIORITIES, priorities
from fedprune.submodel import Submodel, positions
from fedprune.types import Tensors


@dataclass(frozen=True)
class Trained:
    """What comes out of local training: `update` = trained - received, private rows, and each client's first loss."""

    update: Tensors
    private: Private
    loss: Tensor


def train(
    score: Callable[[Tensors], Tensor],
    layout: Layout,
    received: Tensors,
    private: Private,
    examples: Examples,
    objective: Objective,
    trained: Tensors | None = None,
    key: np.ndarray | None = None,
    frozen: bool = False,
) -> Trained:
    """Minimise the objective on a stack of clients.

    Args:
        received: touched tensors `[clients, rows, ...]`, shared ones `[clients, ...]`, at held widths.
        private: rows `[clients, users, ...]`.
        trained: per tensor a mask of its trained entries, broadcastable to it; None trains all that is held.
        key: uint64 `[clients]`, shuffles the examples where `objective.batch` is set.
        frozen: train the private rows alone, one step on all examples.
    """
    torch.set_flush_denormal(True)  # masked training meets denormals, which slow a CPU down many times over
    if frozen:
        loss, _, of_private = _gradients(score, layout, received, private, examples, examples, objective, shared=False)
        return Trained({}, _adam(private, of_private, examples, examples, objective), loss / examples.count)
    update: Tensors = {}
    first_loss = torch.zeros(0)
    for epoch in range(objective.epochs):
        for part in _batches(examples, objective.batch, key, epoch):
            current = {n: t + update[n] if n in update else t for n, t in received.items()}
            loss, gradient, of_private = _gradients(score, layout, current, private, examples, part, objective)
            if not len(first_loss):
                first_loss = loss / part.count
            for name, step in gradient.items():
                if layout.kind(name) == "shared":
                    step = step / _like(part.count.clamp(min=1), step)
                if objective.proximal and name in update:
                    at_work = (part.count > 0).float()  # who has run out of examples takes no step, not even back
                    step = step + objective.proximal * _like(at_work, step) * update[name]
                if trained is not None:
                    step = step * trained[name]
                update[name] = update[name] - objective.lr * step if name in update else step.mul_(-objective.lr)
            private = _adam(private, of_private, part, examples, objective)
        for _ in range(objective.private_steps):
            current = {n: t + update[n] for n, t in received.items()}
            _, _, of_private = _gradients(score, layout, current, private, examples, examples, objective, shared=False)
            private = _adam(private, of_private, examples, examples, objective)
    return Trained(update, private, first_loss)


def received(layout: Layout, cut: Tensors, examples: Examples) -> Tensors:
    """A cut model as each client of a stack receives it: its own touched rows, and views of what all share."""
    rows = examples.rows
    return {
        name: tensor.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        if layout.kind(name) == "touched"
        else tensor.expand(len(rows), *tensor.shape)
        for name, tensor in cut.items()
    }


def masks(layout: Layout, submodels: tuple[Submodel, ...]) -> Tensors | None:
    """Masks of the trained entries of a stack that holds the same units; None if everybody trains all it holds."""
    if not any(s.is_window for s in submodels):
        return None
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
        result[name] = factor
    return result


def _batches(examples: Examples, size: int | None, key: np.ndarray | None, epoch: int) -> list[Examples]:
    """Parts of the examples, one per step; each client's own order of them follows from its key alone."""
    total = examples.label.shape[1]
    if size is None:
        return [examples]
    if key is None:
        raise ValueError("minibatches need a key per client to shuffle by")
    # By a client's own numbering of its examples: columns depend on who else is in the stack.
    present = examples.weight.bool()
    number = (present.cumsum(1) - 1).clamp(min=0)
    priority = priorities(key + np.uint64(epoch), total).gather(1, number)
    order = torch.where(present, priority, PRIORITIES).argsort(dim=1, stable=True)  # padding last
    steps = -(-int(examples.count.max()) // size)
    rows = torch.arange(examples.rows.shape[1]).expand_as(examples.rows) if examples.item_at is None else None
    parts = []
    for step in range(steps):
        chosen = order[:, step * size : (step + 1) * size]
        item_at = (rows if examples.item_at is None else examples.item_at).gather(1, chosen)  # type: ignore[union-attr]
        user_at = None if examples.user_at is None else examples.user_at.gather(1, chosen)
        label, weight, age = (t.gather(1, chosen) for t in (examples.label, examples.weight, examples.age))
        parts.append(Examples(examples.users, examples.rows, examples.present, label, weight, age, item_at, user_at))
    return parts


def _gradients(
    score: Callable[[Tensors], Tensor],
    layout: Layout,
    model: Tensors,
    private: Private,
    examples: Examples,
    part: Examples,
    objective: Objective,
    shared: bool = True,
) -> tuple[Tensor, Tensors, Tensors]:
    """Summed loss per client, and the gradients of what is shared and of what is private."""
    leaves = {n: t.detach().requires_grad_(shared) for n, t in model.items()}
    own = {n: t.detach().requires_grad_() for n, t in private.values.items()}
    inputs: Tensors = {}
    for name, leaf in leaves.items():
        touched = layout.kind(name) == "touched"
        inputs[name] = leaf if not touched or part.item_at is None else _pick(leaf, part.item_at)
    weights = objective.recency_weights(part.age, part.label)
    for name, leaf in own.items():
        rows = leaf if part.user_at is None else _pick(leaf, part.user_at)
        if weights is not None:
            rows = _Weighted.apply(rows.expand(-1, part.label.shape[1], *rows.shape[2:]), _like(weights, rows))
        inputs[name] = rows
    logits = score(inputs)
    loss = F.binary_cross_entropy_with_logits(logits, part.label, part.weight, reduction="none").sum(1)
    wanted = [*(leaves.values() if shared else ()), *own.values()]
    gradients = torch.autograd.grad(loss.sum(), wanted)
    split = len(leaves) if shared else 0
    return (
        loss.detach(),
        dict(zip(leaves, gradients[:split], strict=False)),
        dict(zip(own, gradients[split:], strict=True)),
    )


def _adam(private: Private, gradient: Tensors, part: Examples, examples: Examples, objective: Objective) -> Private:
    """One Adam step of the users that have examples in this part; others keep values and moments."""
    if part.user_at is None:
        count = part.count[:, None]
    else:
        count = torch.zeros(examples.users.shape).scatter_add_(1, part.user_at, part.weight)
    active = count > 0
    steps = private.steps + active
    beta1, beta2 = objective.betas
    values, first, second = {}, {}, {}
    for name, value in private.values.items():
        g = gradient[name] / _like(count.clamp(min=1), value) + objective.decay_private * value
        m = torch.lerp(g, private.first[name], beta1)
        v = torch.lerp(g * g, private.second[name], beta2)
        corrected = m / _like(1 - beta1 ** steps.clamp(min=1), m)
        scale = (v / _like(1 - beta2 ** steps.clamp(min=1), v)).sqrt() + 1e-8
        moved = value - objective.lr_private * corrected / scale
        on = _like(active, value)
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


def _like(factor: Tensor, tensor: Tensor) -> Tensor:
    """Append axes of length 1 until a factor broadcasts along a tensor's leading axes."""
    return factor.reshape(*factor.shape, *[1] * (tensor.dim() - factor.dim()))
