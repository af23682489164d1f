"""What a meter is, and which one this device has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from fedprune.energy.nvml import open_nvml
from fedprune.energy.rapl import POWERCAP, open_rapl
from fedprune.energy.zeus import open_zeus
from fedprune.errors import ConfigError, unknown
from fedprune.types import Joules

METERS = ("auto", "nvml", "rapl", "zeus", "none")

log = logging.getLogger(__name__)


class Meter(Protocol):
    """Counts the joules of this device, whoever draws them."""

    @property
    def source(self) -> str:
        """What counts: `nvml`, `rapl`, `zeus`, or several joined by `+`."""
        ...

    def joules(self) -> Joules:
        """Since the meter was opened; never falls. A meter that went away raises: it has no old figure to offer."""
        ...

    def close(self) -> None:
        """End what runs in the background; afterwards the meter cannot be read."""
        ...


class Sum:
    """Several meters of different parts of the device as one; fails as soon as one of them does."""

    def __init__(self, meters: Sequence[Meter]) -> None:
        self._meters = meters

    @property
    def source(self) -> str:
        """E.g. `nvml+rapl`."""
        return "+".join(meter.source for meter in self._meters)

    def joules(self) -> Joules:
        """Of all."""
        return sum(meter.joules() for meter in self._meters)

    def close(self) -> None:
        """All."""
        for meter in self._meters:
            meter.close()


def find(name: str = "auto", *, powercap: Path = POWERCAP) -> Meter | None:
    """The meter of that name. `auto`: GPUs and processors together, as far as each can be read; zeus where neither can;
    None where nothing can (the log says why, at level INFO). `none`: None.

    Joules of `auto` are those of the parts in its `source`: with `nvml` alone, the processor's are missing.

    Args:
        name: one of `METERS`.
        powercap: the sysfs folder of RAPL.

    Raises:
        ConfigError: an unknown name, or a meter asked for by name that is not usable here, with the reason and the cure.
    """
    openers: dict[str, Callable[[], Meter]] = {"nvml": open_nvml, "rapl": lambda: open_rapl(powercap), "zeus": open_zeus}
    if name not in METERS:
        raise ConfigError(unknown("meter", name, METERS))
    if name == "none":
        return None
    if name != "auto":
        return openers[name]()
    for names in (("nvml", "rapl"), ("zeus",)):
        found = [meter for one in names if (meter := _probe(one, openers[one])) is not None]
        if found:
            return found[0] if len(found) == 1 else Sum(found)
    return None


def _probe(name: str, opener: Callable[[], Meter]) -> Meter | None:
    try:
        return opener()
    except ConfigError as error:
        log.info("no %s meter: %s", name, error)
        return None
