"""Joules of the processor packages, from the running average power limit counters (RAPL) that Linux shows in sysfs.

Intel since Sandy Bridge; AMD since Zen shows the same tree under the same name. Source: the kernel's
Documentation/power/powercap and Documentation/ABI/testing/sysfs-class-powercap.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path

from fedprune.energy.watch import Watch
from fedprune.errors import ConfigError, FedpruneError
from fedprune.types import Joules, Seconds

POWERCAP = Path("/sys/class/powercap")
LOOK: Seconds = 30.0
"""A wrap is seen only if the counter is read between it and the next. An AMD counter holds 65 kJ (2^32 steps of 15.3 uJ),
an Intel one 262 kJ: 30 seconds are enough for packages of up to 2 kW."""


@dataclass
class Zone:
    """A counter that starts again at 0 after `range_uj` microjoules."""

    path: Path
    range_uj: int
    last_uj: int
    total_uj: int = 0

    @classmethod
    def at(cls, folder: Path) -> Zone:
        """The zone of a sysfs folder, counting from now."""
        return cls(folder / "energy_uj", _number(folder / "max_energy_range_uj"), _number(folder / "energy_uj"))

    def advance(self) -> int:
        """Microjoules since the beginning."""
        now = _number(self.path)
        self.total_uj += now - self.last_uj + (self.range_uj if now < self.last_uj else 0)
        self.last_uj = now
        return self.total_uj


class RaplMeter:
    """All packages together, from the moment of opening.

    Memory sticks are left out: documents disagree whether a package's counter holds its `dram` sub-zone, and a figure that
    is known to be a little low is better than one that may count memory twice. A machine that slept in the middle restarts
    its counters, which looks like a wrap: do not measure across a suspend.
    """

    source = "rapl"

    def __init__(self, zones: list[Zone]) -> None:
        self._zones = zones
        self._lock = threading.Lock()  # the watch and the reader advance the same zones
        self._watch = Watch(self._advance, LOOK, "RAPL meter")

    def start(self) -> RaplMeter:
        """Begin to look for wraps in the background."""
        self._watch.start()
        return self

    def joules(self) -> Joules:
        """Since opening; never falls.

        Raises:
            OSError, FedpruneError: a counter went away, can no longer be read, or holds no number.
        """
        self._watch.check()
        return self._advance()

    def close(self) -> None:
        """End the background thread; the meter cannot be read any more."""
        self._watch.stop()

    def _advance(self) -> Joules:
        with self._lock:
            return sum(zone.advance() for zone in self._zones) / 1e6


def open_rapl(powercap: Path = POWERCAP) -> RaplMeter:
    """The meter of this machine's processors.

    Raises:
        ConfigError: there are no counters, or this user may not read them.
    """
    try:
        zones = [Zone.at(folder) for folder in packages(powercap)]
    except PermissionError as error:
        # Since 2020 (CVE-2020-8694, "Platypus"): the counters leak secrets to other users of the same processor.
        raise ConfigError(
            f"{error.filename} is there, but only root may read it. Run as root, or allow everybody on this machine to read "
            f"it: sudo chmod a+r {powercap}/intel-rapl:*/energy_uj (until the next boot)."
        ) from error
    except (OSError, FedpruneError) as error:
        raise ConfigError(f"the RAPL counters under {powercap} cannot be read ({error}); measure with another meter") from error
    if not zones:
        raise ConfigError(
            f"no RAPL counters: {powercap} has no intel-rapl:N. They need Linux on an Intel or AMD processor and the kernel "
            "module intel_rapl_msr (modprobe intel_rapl_msr); virtual machines and most containers do not show them."
        )
    return RaplMeter(zones).start()


def packages(powercap: Path) -> list[Path]:
    """Folders of the zones that add up to the processors, each joule once.

    Only top-level zones (`intel-rapl:0`): sub-zones (`intel-rapl:0:0`, the cores) are parts of them. `intel-rapl-mmio:0` is
    another view of the same package, and `psys`, the whole board, contains the packages, so it counts only without them.
    """
    top = sorted(folder for folder in powercap.glob("intel-rapl:*") if re.fullmatch(r"intel-rapl:\d+", folder.name))
    board = [folder for folder in top if (folder / "name").read_text().strip() == "psys"]
    return [folder for folder in top if folder not in board] or board


def _number(path: Path) -> int:
    text = path.read_text().strip()
    if not text.isdecimal():
        raise FedpruneError(f'{path} holds "{text[:40]}", not a number of microjoules')
    return int(text)
