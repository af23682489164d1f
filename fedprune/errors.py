"""What can go wrong, each with the fact, the range and the cure in its text."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedpruneError(Exception):
    """The family: whatever fedprune refuses, and nothing else."""


class LayoutError(FedpruneError):
    """A tensor, an axis or a submodel does not fit the declared layout."""


class DataError(FedpruneError):
    """Interactions that cannot be read, or leave nothing to train on."""


class ConfigError(FedpruneError):
    """A setting that does not exist or lies outside its range."""


class FleetError(FedpruneError):
    """A client answered something other than what its order asked for."""


class RecordError(FedpruneError):
    """A run folder that cannot be resumed or reported."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Sentence for an unknown name: what it was, what there is, and the nearest of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f'unknown {kind} "{name}"; there is: {", ".join(names)}.' + (f' Did you mean "{near[0]}"?' if near else "")
