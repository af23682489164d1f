"""What a process on a node needs before it can train: the data of a run and its recommender, read once per process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedprune.config import Settings
from fedprune.data import Split, leave_one_out, load_own
from fedprune.errors import DataError
from fedprune.experiment import recommender_of
from fedprune.population import Population
from fedprune.recommenders import Recommender
from fedprune.simulation import clients_of, read_data
from fedprune.types import IntArray


@dataclass(frozen=True)
class World:
    """Data and recommender of a run.

    Attributes:
        settings: of the run's strategy, its table applied.
        population: with its initial private rows. It outlives the message: work on a copy.
    """

    settings: Settings
    split: Split
    recommender: Recommender
    population: Population


@lru_cache(maxsize=4)
def shared_world(text: str) -> World:
    """Of a public data set, with all clients' shares of it.

    Args:
        text: the run's settings, JSON.
    """
    settings = _settings(text)
    split = read_data(settings)
    return _world(settings, split, clients_of(settings, split.train), settings.data)


@lru_cache(maxsize=4)
def own_world(text: str, file: str, items: str) -> World:
    """Of one client's own file.

    Args:
        items: ids of the catalogue, one per line.
    """
    split = leave_one_out(load_own(Path(file), items.split("\n")))
    return _world(_settings(text), split, np.zeros(split.train.users, dtype=np.int64), file)


def _settings(text: str) -> Settings:
    base = Settings.from_json(text)
    return base.of(base.strategy)[0]


def _world(settings: Settings, split: Split, client_of_user: IntArray, source: str) -> World:
    train = split.train
    if not train.rows:
        raise DataError(f"{source} leaves nothing to train on")
    recommender = recommender_of(settings, train.users, train.items)
    private = recommender.initial_private(settings.seed)
    population = Population(train, client_of_user, recommender.layout, private, held_out=split.validation)
    return World(settings, split, recommender, population)
