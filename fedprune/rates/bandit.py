"""FedMP: a bandit per client finds how much of the model pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedprune.errors import ConfigError
from fedprune.exchange import Lost, Report, Roster
from fedprune.random import uniform
from fedprune.rates.base import Forecast, Offer
from fedprune.types import FloatArray, IntArray, Memory, Rate

HAIR = 0.1
"""Of the mean time, added to the distance from it: who is exactly average has no infinite reward."""


@dataclass(frozen=True)
class Bandit:
    """FedMP-style: every client's rate is an arm of a bandit, rewarded for progress in the others' time.

    Arms of client n partition [floor, 1]. The one with the largest upper confidence bound is drawn, a rate uniformly from it;
    an arm that was drawn is halved, down to the width theta, so that the partition is finest where it pays (E-UCB):

    U_n(j) = R_n(j) / N_n(j) + c sqrt(2 ln(sum_j N_n(j)) / N_n(j)),  N, R discounted by lambda per round;  reward =
    (decrease of the loss) / |T_n - mean T|

    A never drawn arm comes first, the larger rates before the smaller. A late report counts for the rate it was ordered at.

    Jiang et al. 2022 (ICDE). Differs from the paper: its text was not to be had. FedMP-style, and ours, are: where an arm is
    halved, that the loss is the received model's on the client's own examples and its decrease since its last report at least
    0, that rewards are divided by the round's largest, as decreases fade, that a tenth of the mean time is added to the
    distance from it, and all numbers.

    Attributes:
        width: theta; arms are not halved below this.
        discount: lambda.
        explore: c.
        floor: smallest rate; the model's own may be larger.
        seed: of the rates drawn.
    """

    width: float = 0.0625
    discount: float = 0.98
    explore: float = 0.3
    floor: Rate = 0.0625
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1 or not 0 < self.discount <= 1:
            raise ConfigError(f"width {self.width} and discount {self.discount} must be in (0, 1]")
        if self.explore < 0:
            raise ConfigError(f"explore is {self.explore}; it must not be negative, and 0 never tries what once did worse")
        if not 0 < self.floor <= 1:
            raise ConfigError(f"floor is {self.floor}; it must be in (0, 1]")

    def propose(self, memory: Memory, clients: IntArray, roster: Roster, offer: Offer) -> FloatArray:
        """A rate from the best arm; the whole model in the first round."""
        if not memory:
            return np.ones(len(clients))
        node = self._best(memory, clients)
        level = np.floor(np.log2(node + 1)).astype(int)
        place = node + 1 - 2**level + uniform(self.seed, f"rate {int(memory['round'])}", clients)
        return np.maximum(self.floor + (1 - self.floor) * place / 2**level, offer.smallest)

    def learn(self, memory: Memory, reports: Sequence[Report], lost: Sequence[Lost], population: int, offer: Offer) -> Memory:
        """Reward the arms that were drawn, and halve them."""
        if not reports:
            return memory
        after = {k: v.copy() for k, v in memory.items()} if memory else self._empty(population)
        clients = np.array([r.order.client for r in reports])
        seconds = np.array([r.cost.seconds.total for r in reports])
        rates = np.array([r.order.rate for r in reports])
        loss = np.array([r.loss for r in reports])
        decrease = np.maximum(np.nan_to_num(after["loss"][clients] - loss), 0.0)  # 0 for who is here for the first time
        reward = decrease / (np.abs(seconds - seconds.mean()) + HAIR * seconds.mean())
        after["drawn"] *= self.discount
        after["reward"] *= self.discount
        if memory:  # before, there was nothing to decrease
            share = (rates - self.floor) / max(1 - self.floor, 1e-12)
            cell = np.clip((share * 2**self._depth).astype(int), 0, 2**self._depth - 1)
            np.add.at(after["drawn"], (clients, cell), 1.0)
            np.add.at(after["reward"], (clients, cell), reward / max(float(reward.max()), 1e-300))
            self._halve(after["halved"], clients, cell)
        after["loss"][clients] = loss
        return after | {"round": np.array(after["round"] + 1)}

    def forecast(self, memory: Memory, population: int) -> Forecast | None:
        """Nothing."""
        return None

    @cached_property
    def _depth(self) -> int:
        """How often the interval is halved; arms of the last depth are cells, and all larger ones are sums of them."""
        return max(0, int(np.ceil(np.log2((1 - self.floor) / self.width) - 1e-9))) if self.floor < 1 else 0

    def _empty(self, population: int) -> Memory:
        return {
            "drawn": np.zeros((population, 2**self._depth)),  # by cell, discounted
            "reward": np.zeros((population, 2**self._depth)),
            "halved": np.zeros((population, 2 ** (self._depth + 1) - 1), bool),  # by arm: a binary tree, level by level
            "loss": np.full(population, np.nan),
            "round": np.array(0),
        }

    def _best(self, memory: Memory, clients: IntArray) -> IntArray:
        """The arm with the largest upper confidence bound, as its number in the tree."""
        halved = memory["halved"][clients]
        drawn, reward = (self._by_arm(memory[name][clients]) for name in ("drawn", "reward"))
        there = np.zeros_like(halved)
        there[:, 0] = True
        for arm in range(2**self._depth - 1):
            there[:, 2 * arm + 1] = there[:, 2 * arm + 2] = there[:, arm] & halved[:, arm]
        known = np.maximum(drawn, 1e-12)
        often = np.log(np.maximum(drawn[:, :1], 1.0))
        bound = reward / known + self.explore * np.sqrt(2 * often / known)
        number = np.arange(1, halved.shape[1] + 1)
        level = 2.0 ** np.floor(np.log2(number))
        bound = np.where(drawn > 0, bound, 1e9 + (number - level) / level)
        return np.where(there & ~halved, bound, -np.inf).argmax(1)

    def _by_arm(self, cells: FloatArray) -> FloatArray:
        return np.concatenate([cells.reshape(len(cells), 2**depth, -1).sum(2) for depth in range(self._depth + 1)], axis=1)

    def _halve(self, halved: np.ndarray, clients: IntArray, cell: IntArray) -> None:
        """The arm that each cell is in now, unless it is a cell."""
        arm = np.zeros(len(clients), np.int64)
        for depth in range(self._depth):
            inside = 2 * arm + 1 + (cell >> (self._depth - 1 - depth)) % 2
            arm = np.where(halved[clients, arm], inside, arm)
        wide = arm < 2**self._depth - 1
        halved[clients[wide], arm[wide]] = True
