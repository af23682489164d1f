"""fedprune: federated training of recommenders in which every device gets as much of the model as it can carry."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedprune.catalog import CATALOG as CATALOG
    from fedprune.config import Settings as Settings
    from fedprune.errors import FedpruneError as FedpruneError
    from fedprune.experiment import Experiment as Experiment
    from fedprune.fleet import SerialFleet as SerialFleet
    from fedprune.fleet import VectorFleet as VectorFleet
    from fedprune.simulation import prepare as prepare
    from fedprune.simulation import read_data as read_data
    from fedprune.simulation import run as run
    from fedprune.strategy import ServerState as ServerState
    from fedprune.strategy import Strategy as Strategy
    from fedprune.strategy import one_round as one_round

HOMES = {
    "CATALOG": "catalog", "Settings": "config", "FedpruneError": "errors", "Experiment": "experiment", "SerialFleet": "fleet",
    "VectorFleet": "fleet", "prepare": "simulation", "read_data": "simulation", "run": "simulation",
    "ServerState": "strategy", "Strategy": "strategy", "one_round": "strategy",
}  # fmt: skip
"""Imported when first asked for: a device's SuperNode needs some of the package, and not PyTorch's 200 MB."""
__all__ = list(HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *HOMES]
