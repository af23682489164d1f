"""Joules where neither NVML nor RAPL measure, from the optional package `zeus`: Jetson, AMD GPUs, Apple processors.

Source: zeus 0.16, `zeus.monitor.ZeusMonitor`, whose windows give `Measurement`s; https://ml.energy/zeus.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from fedprune.errors import ConfigError, FedpruneError
from fedprune.types import Joules

WINDOW = "fedprune"
CHIP_PARTS = ("cpu_total_mj", "gpu_mj", "dram_mj", "ane_mj")
"""Of an Apple processor, millijoules. Finer ones (per core, per cluster) are inside these."""
RAILS = ("cpu_energy_mj", "gpu_energy_mj")
"""Of a Jetson without a sensor for the whole board."""


class ZeusMeter:
    """Everything that a ZeusMonitor sees, in windows that follow one another; a reading ends one and begins the next.

    What is drawn between the two (on a Jetson up to 0.1 s) is in neither, so a part is exact and the sum of many is a little
    low. On Jetson and older GPUs zeus samples in a child process: the main script needs `if __name__ == "__main__":`.
    """

    source = "zeus"

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor
        self._total = 0.0
        self._open = False

    def start(self) -> ZeusMeter:
        """Begin the first window."""
        # Waiting for the GPU is the client's business, as it is with the other meters.
        self._monitor.begin_window(WINDOW, sync_execution=False)
        self._open = True
        return self

    def joules(self) -> Joules:
        """Since opening; never falls.

        Raises:
            FedpruneError: the meter was closed, or sees nothing any more; whatever zeus raises.
        """
        if not self._open:
            raise FedpruneError("the zeus meter was closed; find a new one to measure on")
        self._total += self._end()
        self.start()
        return self._total

    def close(self) -> None:
        """End the last window; the meter cannot be read any more."""
        if self._open:
            self._end()

    def _end(self) -> Joules:
        self._open = False  # until the next window begins, also if this one cannot be read
        with warnings.catch_warnings():
            # Zero in a window shorter than the counter's period is no loss here: the next window has it.
            warnings.filterwarnings("ignore", message="The energy consumption of one or more GPUs was measured as zero")
            measured = total(self._monitor.end_window(WINDOW, sync_execution=False))
        if measured is None:
            raise FedpruneError("zeus sees no GPU, processor or chip that it can measure")
        return measured


def open_zeus() -> ZeusMeter:
    """The meter of whatever zeus supports on this machine.

    Raises:
        ConfigError: no package, or nothing it can measure.
    """
    try:
        monitors = importlib.import_module("zeus.monitor")
    except ModuleNotFoundError as error:
        raise ConfigError(f"no zeus: the module {error.name} is missing. pip install zeus (zeus[apple] on a Mac)") from error
    try:
        meter = ZeusMeter(monitors.ZeusMonitor()).start()
        meter.joules()
    except FedpruneError as error:
        raise ConfigError(f"{error}; processors need root for it, NVIDIA and AMD GPUs their driver") from error
    except Exception as error:  # each platform's backend has its own; this only asks what there is
        raise ConfigError(
            f"zeus does not start on this machine ({type(error).__name__}: {error}); see ml.energy/zeus"
        ) from error
    return meter


def total(measured: Any) -> Joules | None:
    """Joules of a Measurement: of the chip where there is one (its GPU may appear a second time as a GPU), else of all GPUs,
    packages and memory; None where nothing was measured."""
    chip = measured.soc_energy
    if chip is not None:
        board = getattr(chip, "total_energy_mj", None)
        parts = [getattr(chip, name, None) for name in (*CHIP_PARTS, *RAILS)] if board is None else [board]
        known = [part / 1e3 for part in parts if part is not None]
    else:
        fields = (measured.gpu_energy, measured.cpu_energy, measured.dram_energy)
        known = [joules for field in fields if field for joules in field.values()]
    return sum(known) if known else None
