"""Interactions: reading them, splitting them by time, and dividing them among clients."""

from fedprune.data.interactions import Interactions, arrange, core
from fedprune.data.loading import load, load_own
from fedprune.data.partition import one_per_user, silos, tastes
from fedprune.data.sources import DatasetInfo, datasets
from fedprune.data.split import Split, leave_one_out

__all__ = [
    "DatasetInfo",
    "Interactions",
    "Split",
    "arrange",
    "core",
    "datasets",
    "leave_one_out",
    "load",
    "load_own",
    "one_per_user",
    "silos",
    "tastes",
]
