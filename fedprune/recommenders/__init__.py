"""Recommenders by name. Adding one is one file: a layout and a score."""

from __future__ import annotations

from collections.abc import Callable

from fedprune.errors import ConfigError, unknown
from fedprune.recommenders.base import Recommender as Recommender
from fedprune.recommenders.mf import mf as mf
from fedprune.recommenders.ncf import gmf as gmf
from fedprune.recommenders.ncf import mlp as mlp
from fedprune.recommenders.ncf import neumf as neumf

RECOMMENDERS: dict[str, Callable[..., Recommender]] = {"mf": mf, "gmf": gmf, "mlp": mlp, "neumf": neumf}


def build(name: str, **settings: object) -> Recommender:
    """A recommender by its name.

    Raises:
        ConfigError: no such recommender.
    """
    if name not in RECOMMENDERS:
        raise ConfigError(unknown("recommender", name, RECOMMENDERS))
    return RECOMMENDERS[name](**settings)
