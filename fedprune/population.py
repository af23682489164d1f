"""Everybody's data and private rows, in a few tensors for the whole population instead of an object per client."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedprune.axes import Layout
from fedprune.data import Interactions
from fedprune.distill import Lesson
from fedprune.errors import DataError
from fedprune.objective import Objective
from fedprune.random import PRIORITIES, drawn, keys, priorities
from fedprune.submodel import Submodel, positions
from fedprune.types import ClientId, IntArray, Tensors

STACK = 24_576
"""Padded examples per stack of clients: large enough to keep the machine busy, small enough to stay near its caches."""


MOMENTS = ("values", "first", "second")
"""What is kept of a private row from order to order, beside its steps."""


@dataclass(frozen=True)
class Examples:
    """What a stack of clients trains on in one order.

    A client with one user (`item_at` None) has one example per touched row; a silo's examples say which of its touched rows
    and which of its users they belong to.

    Attributes:
        users: population rows, int64 `[clients, users]`; padding repeats the first.
        rows, present: touched items and which of them are real, `[clients, rows]`.
        label: 1.0 for positives, or their rating; `[clients, batch]`.
        weight: 1.0, or 0.0 for padding, `[clients, batch]`.
        age: number of the user's later positives (positives only), `[clients, batch]`.
        item_at, user_at: positions in `rows` and `users`, int64 `[clients, batch]`; None for one user per client.
        rank: place in the teacher's list, from 1, of examples that are there to be taught (with weight 0); 0 for the client's
            own; float `[clients, batch]`. None without a list.
        lesson: what the teacher says of them.
    """

    users: Tensor
    rows: Tensor
    present: Tensor
    label: Tensor
    weight: Tensor
    age: Tensor
    item_at: Tensor | None = None
    user_at: Tensor | None = None
    rank: Tensor | None = None
    lesson: Lesson | None = None

    @cached_property
    def heard(self) -> Tensor:
        """Which columns are no padding, bool `[clients, batch]`."""
        return self.weight.bool() if self.rank is None else self.weight.bool() | (self.rank > 0)

    @cached_property
    def count(self) -> Tensor:
        """Examples per client, float32 `[clients]`."""
        return self.weight.sum(1)

    @cached_property
    def real_users(self) -> Tensor:
        """Which users of `[clients, users]` are no padding, which repeats the first; bool."""
        real = self.users != self.users[:, :1]
        real[:, 0] = True
        return real


Lister: TypeAlias = Callable[[IntArray, Tensor], tuple[Tensor, Tensor]]
"""Users `[users]` and the items not to be listed, bool `[users, items]` -> items int64 `[users, top]`, and which are real."""


@dataclass(frozen=True)
class Private:
    """Private rows with their optimiser's moments; `steps` counts the optimiser's steps per user."""

    values: Tensors
    first: Tensors
    second: Tensors
    steps: Tensor


class Population:
    """All clients' interactions (compressed rows: user after user) and private tensors `[users, ...]`.

    Args:
        train: what clients may train on.
        client_of_user: int64 `[users]`; clients are numbered 0..clients-1 and none is empty.
        layout: says which tensors are private.
        private: their initial values.
        held_out: each user's validation item, int64 `[users]`, -1 for none; for tickets that a client draws by it.
    """

    def __init__(
        self,
        train: Interactions,
        client_of_user: IntArray,
        layout: Layout,
        private: Tensors,
        held_out: IntArray | None = None,
    ) -> None:
        self.items = train.items
        self.client_of_user = client_of_user
        self.held_out = np.full(train.users, -1, np.int64) if held_out is None else held_out
        self.ratings = None if train.rating is None else torch.from_numpy(train.rating).float()
        self.teacher: tuple[Tensors, Tensors] | None = None
        """Model and private rows of a teacher from elsewhere (`Distillation.teacher` "given")."""
        self._examples: dict[int, IntArray] = {}
        self.starts = train.starts
        self.positives = torch.from_numpy(train.item)
        self.users_of = [np.flatnonzero(client_of_user == c) for c in range(int(client_of_user.max()) + 1)]
        self.one_user_each = all(len(users) == 1 for users in self.users_of)
        self.layout = layout
        self.private = Private(
            {name: tensor.clone() for name, tensor in private.items()},
            {name: torch.zeros_like(tensor) for name, tensor in private.items()},
            {name: torch.zeros_like(tensor) for name, tensor in private.items()},
            torch.zeros(train.users),
        )

    def copy(self) -> Population:
        """The same data with private rows of its own."""
        other = copy.copy(self)
        kept = {moment: {n: t.clone() for n, t in getattr(self.private, moment).items()} for moment in MOMENTS}
        other.private = Private(**kept, steps=self.private.steps.clone())
        return other

    def restart(self, values: Tensors) -> None:
        """Private rows as given, and an optimiser that remembers nothing."""
        for name, tensor in values.items():
            self.private.values[name].copy_(tensor)
            self.private.first[name].zero_()
            self.private.second[name].zero_()
        self.private.steps.zero_()

    @property
    def clients(self) -> int:
        """How many."""
        return len(self.users_of)

    @cached_property
    def positives_of_client(self) -> IntArray:
        """Training interactions per client."""
        return self._per_client(np.diff(self.starts))

    @cached_property
    def users_of_client(self) -> IntArray:
        """How many each has."""
        return np.array([len(users) for users in self.users_of])

    def examples_of_client(self, objective: Objective) -> IntArray:
        """Examples per client and epoch: positives, and negatives as far as the catalogue has unseen items."""
        negatives = _negatives(objective)
        if negatives not in self._examples:
            counts = np.diff(self.starts)
            per_user = counts + np.minimum(negatives * counts, self.items - counts)
            self._examples[negatives] = self._per_client(per_user)
        return self._examples[negatives]

    def listed_of_client(self, objective: Objective) -> IntArray:
        """Items on the teacher's lists per client (at most: a user who has seen nearly everything has a shorter one)."""
        top = 0 if objective.distillation is None else objective.distillation.top
        return top * self.users_of_client

    def rows_of_client(self, objective: Objective) -> IntArray:
        """Upper bound of the touched rows per client (reached with one user per client)."""
        judged = self.users_of_client if objective.gate else 0
        return np.minimum(self.examples_of_client(objective) + self.listed_of_client(objective) + judged, self.items)

    def stacks(self, clients: Sequence[ClientId], objective: Objective, limit: int) -> list[list[int]]:
        """Positions in `clients`, sorted by examples (so there is little padding) and cut near `limit` padded examples."""
        sizes = (self.examples_of_client(objective) + self.listed_of_client(objective))[np.asarray(clients)]
        stacks: list[list[int]] = []
        for place in np.argsort(sizes, kind="stable").tolist():
            if stacks and (len(stacks[-1]) + 1) * sizes[place] <= limit:
                stacks[-1].append(place)
            else:
                stacks.append([place])
        return stacks

    def _per_client(self, per_user: IntArray) -> IntArray:
        return np.bincount(self.client_of_user, weights=per_user, minlength=self.clients).astype(np.int64)

    # ---- drawing examples --------------------------------------------------------------------------------------------

    def draw(
        self,
        clients: Sequence[ClientId],
        tickets: Sequence[int],
        objective: Objective,
        seed: int,
        work: Sequence[float] | None = None,
        lister: Lister | None = None,
    ) -> Examples:
        """Positives and fresh negatives of a stack of clients.

        Negatives are drawn from everything not in the user's training data, held-out items included: leaving those out
        would tell the model which they are. Chance depends on (seed, ticket, user) alone, not on who is stacked together.

        Args:
            work: share of its positives that each client gets to; all of them if None.
            lister: adds the items that a teacher would list for each user.

        Raises:
            DataError: ratings are asked for and there are none.
        """
        if objective.task == "ratings" and self.ratings is None:
            raise DataError('the task "ratings" needs a column of ratings; this data set has none')
        groups = [self.users_of[c] for c in clients]
        users = np.concatenate(groups)
        key = keys(seed, "negatives", np.repeat(np.asarray(tickets), [len(g) for g in groups])) ^ keys(seed, "user", users)
        share = None if work is None else np.repeat(np.asarray(work, float), [len(g) for g in groups])
        flat = self._draw_users(users, key, objective, share, lister)
        if self.one_user_each:
            items, label, present, age, rank = flat
            weight = present.float() if rank is None else (present & (rank == 0)).float()
            return Examples(torch.from_numpy(users)[:, None], items, present, label, weight, age, rank=rank)
        return _by_silo(groups, *flat)

    def _draw_users(
        self, users: IntArray, key: np.ndarray, objective: Objective, share: np.ndarray | None, lister: Lister | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Items, labels, presence, ages and ranks `[users, batch]`: a user's positives, its negatives, padding, its list."""
        negatives = _negatives(objective)
        counts = self.starts[users + 1] - self.starts[users]
        wanted = np.minimum(negatives * counts, self.items - counts)
        widest = int(counts.max())
        column = torch.arange(widest)
        count = torch.from_numpy(counts)[:, None]
        real = column < count
        place = torch.from_numpy(self.starts[users])[:, None] + column
        seen = self.positives[torch.where(real, place, 0)]
        age = torch.where(real, count - 1 - column, 0).float()

        taken = torch.zeros(len(users), self.items + 1, dtype=torch.bool)
        taken.scatter_(1, torch.where(real, seen, self.items), True)
        unseen = drawn(key, wanted, taken[:, :-1])
        size = unseen.shape[1]
        chosen = torch.arange(size) < torch.from_numpy(wanted)[:, None]

        if share is not None:
            kept = torch.from_numpy(np.ceil(share * counts))[:, None]
            order = priorities(key ^ np.uint64(0x5BF03635), widest)  # which positives come first
            real = real & (_rank_within(order, real) < kept)
            chosen = chosen & (torch.arange(size) < torch.from_numpy(np.ceil(share * wanted))[:, None])
        told = real.float() if objective.task == "implicit" or self.ratings is None else self.ratings[place * real] * real
        label = torch.cat([told, torch.zeros(len(users), size)], 1)
        present = torch.cat([real, chosen], 1)
        # Padding names item 0 with weight 0; clearing it keeps memory access local.
        items = torch.where(present, torch.cat([seen, unseen], 1), 0)
        age = torch.cat([age, torch.zeros(len(users), size)], 1)
        if lister is None:
            return items, label, present, age, None
        taken.scatter_(1, torch.where(chosen, unseen, self.items), True)  # an item is one example, not two
        listed, there = lister(users, taken[:, :-1])
        none = torch.zeros(listed.shape)
        rank = torch.where(there, torch.arange(1.0, 1 + listed.shape[1]), none)
        return (
            torch.cat([items, torch.where(there, listed, 0)], 1),
            torch.cat([label, none], 1),
            torch.cat([present, there], 1),
            torch.cat([age, none], 1),
            torch.cat([torch.zeros(items.shape), rank], 1),
        )

    # ---- private rows ------------------------------------------------------------------------------------------------

    def take(self, users: Tensor, columns: dict[str, tuple[Tensor, ...]]) -> Private:
        """Private rows of a stack `[clients, users, ...]`, cut to the held columns of each tensor."""
        values, first, second = (
            {name: _columns(tensor[users], columns[name]) for name, tensor in part.items()}
            for part in (self.private.values, self.private.first, self.private.second)
        )
        return Private(values, first, second, self.private.steps[users])

    def put(self, users: Tensor, columns: dict[str, tuple[Tensor, ...]], trained: Private, real: Tensor) -> None:
        """Write trained rows back; `real` `[clients, users]` leaves padding out."""
        target = users[real]
        pairs = (
            (self.private.values, trained.values),
            (self.private.first, trained.first),
            (self.private.second, trained.second),
        )
        for into, part in pairs:
            for name, tensor in part.items():
                rows = tensor[real]
                if all(len(c) == into[name].shape[1 + d] for d, c in enumerate(columns[name])):
                    into[name][target] = rows
                else:
                    mesh = torch.meshgrid(target, *columns[name], indexing="ij")
                    into[name][mesh] = rows
        self.private.steps[target] = trained.steps[real]


def private_columns(layout: Layout, submodel: Submodel) -> dict[str, tuple[Tensor, ...]]:
    """Held columns of every private tensor, per dimension after the first."""
    return {
        name: tuple(positions(layout, d, submodel.held) for d in layout.tensors[name][1:]) for name in layout.named("private")
    }


def _columns(rows: Tensor, columns: tuple[Tensor, ...]) -> Tensor:
    for dimension, kept in enumerate(columns):
        if len(kept) < rows.shape[2 + dimension]:
            rows = rows.index_select(2 + dimension, kept)
    return rows


def _rank_within(order: Tensor, real: Tensor) -> Tensor:
    """Rank of each column among the real ones of its row, by `order`."""
    ranked = torch.where(real, order, PRIORITIES)
    return ranked.argsort(1).argsort(1)


def _negatives(objective: Objective) -> int:
    return 0 if objective.task == "ratings" else objective.negatives


def _by_silo(
    groups: list[IntArray], items: Tensor, label: Tensor, present: Tensor, age: Tensor, rank: Tensor | None
) -> Examples:
    """Regroup `[users, batch]` into `[silos, users * batch]`, with the touched items of each silo listed once."""
    most, size = max(len(g) for g in groups), items.shape[1]
    starts = np.cumsum([0, *(len(g) for g in groups)])

    def laid(source: Tensor) -> Tensor:
        """`[users, batch]` -> `[silos, most * batch]`, zero where a silo has fewer users."""
        result = source.new_zeros(len(groups), most * size)
        for silo, group in enumerate(groups):
            result[silo, : len(group) * size] = source[starts[silo] : starts[silo + 1]].flatten()
        return result

    real, item = laid(present), laid(items)
    touched, item_at = [], torch.zeros_like(item)
    for silo in range(len(groups)):
        rows, inverse = torch.unique(item[silo, real[silo]], return_inverse=True)
        touched.append(rows)
        item_at[silo, real[silo]] = inverse
    rows = torch.nn.utils.rnn.pad_sequence(touched, batch_first=True)
    listed = torch.arange(rows.shape[1]) < torch.tensor([len(t) for t in touched])[:, None]
    users = torch.from_numpy(np.stack([np.append(g, np.full(most - len(g), g[0])) for g in groups]))
    user_at = (torch.arange(most * size) // size).expand(len(groups), -1)
    places = None if rank is None else laid(rank)
    weight = real.float() if places is None else (real & (places == 0)).float()
    return Examples(users, rows, listed, laid(label), weight, laid(age), item_at, user_at, places)
