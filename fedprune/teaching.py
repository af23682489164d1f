"""What a teacher says of a stack's examples, and how a client judges what it received: scores without gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedprune.distill import Distillation, Lesson, cosines
from fedprune.population import Examples, Lister, Population, private_columns
from fedprune.recommenders import Recommender
from fedprune.submodel import Submodel
from fedprune.training import entry_masks, gathered, received
from fedprune.types import IntArray, Tensors

LISTED = 256
"""Users whose whole catalogue is scored at once."""


@dataclass(frozen=True)
class Teacher:
    """A model with the private rows that belong to it.

    Attributes:
        model: shared and touched tensors, at the units of `submodel`.
        private: rows of the whole population, all columns.
        entries: masks of the clients' own entries (`training.entry_masks`), for lessons by what they hold themselves.
    """

    recommender: Recommender
    model: Tensors
    private: Tensors
    submodel: Submodel
    entries: Mapping[str, Tensor] = field(default_factory=dict)

    def lister(self, top: int) -> Lister:
        """Its first `top` items for each user, best first, of those that are not barred."""

        def listed(users: IntArray, barred: Tensor) -> tuple[Tensor, Tensor]:
            parts = []
            for start in range(0, len(users), LISTED):  # memory grows with users x items, and x width where there is a tower
                scores = self._scores(users[start : start + LISTED])
                parts.append(scores.masked_fill(barred[start : start + LISTED], -torch.inf).topk(min(top, scores.shape[1])))
            best, items = (torch.cat([part[place] for part in parts]) for place in (0, 1))
            return items, best > -torch.inf

        return listed

    def lesson(self, distillation: Distillation, examples: Examples) -> Lesson:
        """What it says of these examples."""
        layout, rows = self.recommender.layout, received(self.recommender.layout, self.model, examples, self.entries)
        own = self._rows(examples.users)
        with torch.no_grad():
            inputs = gathered(layout, rows, own, examples)
            scores = self.recommender.score(inputs)
            attention = None
            if distillation.attention and self.recommender.activity is not None:
                attention = self.recommender.activity(inputs)
            compared, similarity = None, None
            if distillation.relation:
                compared = _spread(examples, distillation.compared)
                seen = rows if self.recommender.effective is None else self.recommender.effective(rows)
                names = [name for name in layout.named("touched") if name in seen and seen[name].dim() == 3]
                similarity = {name: cosines(seen[name], compared) for name in names}
        rank = torch.zeros_like(examples.weight) if examples.rank is None else examples.rank
        return Lesson(scores, rank, _listed(distillation, examples, rank), attention, compared, similarity)

    def _rows(self, users: Tensor) -> Tensors:
        columns = private_columns(self.recommender.layout, self.submodel)
        result: Tensors = {}
        for name, table in self.private.items():
            rows = table[users]
            for dimension, kept in enumerate(columns[name], start=users.dim()):
                rows = rows.index_select(dimension, kept)
            result[name] = rows
        return result

    def _scores(self, users: IntArray) -> Tensor:
        """Of the whole catalogue, `[users, items]`."""
        own = {name: rows[:, None] for name, rows in self._rows(torch.from_numpy(users)).items()}
        with torch.no_grad():
            return self.recommender.score({name: tensor[None] for name, tensor in self.model.items()} | own)


def gates(
    recommender: Recommender,
    population: Population,
    submodels: Sequence[Submodel],
    cut: Tensors,
    model: Tensors,
    private: Tensors,
    examples: Examples,
) -> Tensor:
    """How well each client's held-out items do among the other negatives of the order: the share they outscore (ties half).

    A sampled AUC of the received model. It is LotteryFL's accuracy on a client's own validation data (Li et al. 2020,
    arXiv:2008.03371, algorithm 1) for a ranking, and costs one item row.

    Args:
        cut: at the units that all of them hold.
        model, private: what they train from, stacked.

    Returns:
        `[clients]`, NaN for a client without a validation item or without negatives.
    """
    layout = recommender.layout
    items = torch.from_numpy(population.held_out)[examples.users]
    there = (items >= 0) & examples.real_users
    places = torch.arange(items.shape[1]).expand_as(items)
    own = replace(
        examples, rows=items.clamp(min=0), present=there, label=there.float(), weight=there.float(), age=there.float(),
        item_at=None, user_at=None if examples.user_at is None else places, rank=None, lesson=None,
    )  # fmt: skip
    held = received(layout, cut, own, entry_masks(layout, submodels, own.rows))
    with torch.no_grad():
        theirs = recommender.score(gathered(layout, held, private, own))
        scores = recommender.score(gathered(layout, model, private, examples))
    user = torch.zeros_like(examples.rows) if examples.user_at is None else examples.user_at
    beaten, counts = theirs.gather(1, user), there.gather(1, user)
    listed = examples.rows if examples.item_at is None else examples.rows.gather(1, examples.item_at)
    other = listed != items.gather(1, user)  # the held-out item is drawn too at times: a tie but for rounding
    negative = examples.weight.bool() & (examples.label == 0) & counts & other  # a rating of 4 is none
    won = (beaten > scores).float() + 0.5 * (beaten == scores).float()
    return (won * negative).sum(1) / negative.sum(1)


def _listed(distillation: Distillation, examples: Examples, rank: Tensor) -> Tensor:
    """What each place of a list weighs, times the positives of its own user; `[clients, batch]`."""
    positive = examples.weight * (examples.label > 0)
    user = torch.zeros_like(rank, dtype=torch.int64) if examples.user_at is None else examples.user_at
    positives = torch.zeros(examples.users.shape).scatter_add_(1, user, positive).gather(1, user)
    whole = torch.exp(-torch.arange(1, distillation.top + 1) / distillation.decay).sum()
    return torch.where(rank > 0, torch.exp(-rank / distillation.decay) / whole, 0.0) * positives


def _spread(examples: Examples, most: int) -> Tensor:
    """Up to `most` positions spread evenly over each client's real rows, int64 `[clients, most]`; short ones repeat some."""
    count = examples.present.sum(1, keepdim=True).clamp(min=1)
    order = examples.present.float().argsort(dim=1, descending=True, stable=True)  # real rows first
    at = (torch.arange(most)[None] * count) // most
    return order.gather(1, at.clamp(max=order.shape[1] - 1))
