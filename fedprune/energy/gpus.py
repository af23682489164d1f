"""One GPU's joules: counted by itself, or integrated here from its power."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fedprune.energy.watch import Watch
from fedprune.errors import FedpruneError
from fedprune.types import Joules, Seconds

PERIOD: Seconds = 0.05
"""Between two samples of the power, where a GPU does not count energy itself."""


class Counted:
    """A GPU that counts its energy itself: `read` gives its millijoules since the driver was loaded."""

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read
        self._last = self._first = read()

    def joules(self) -> Joules:
        """Since the beginning."""
        now = self._read()
        if now < self._last:
            raise FedpruneError("a GPU's energy counter fell, so its driver was reloaded; find a new meter to measure on")
        self._last = now
        return (now - self._first) / 1e3

    def close(self) -> None:
        """Nothing to end."""


class Sampled:
    """A GPU that only tells its power: `read` gives its milliwatts, integrated by trapezoids every `period` and on reading."""

    def __init__(
        self, read: Callable[[], int], clock: Callable[[], Seconds] = time.monotonic, period: Seconds = PERIOD
    ) -> None:
        self._read = read
        self._clock = clock
        self._total = 0.0
        self._lock = threading.Lock()  # the watch and the reader integrate the same power
        self._milliwatts, self._at = read(), clock()
        self._watch = Watch(self._sample, period, "NVML power sampler")

    def start(self) -> Sampled:
        """Begin to sample in the background."""
        self._watch.start()
        return self

    def joules(self) -> Joules:
        """Since the beginning."""
        self._watch.check()
        return self._sample()

    def close(self) -> None:
        """End the background thread."""
        self._watch.stop()

    def _sample(self) -> Joules:
        with self._lock:
            milliwatts, at = self._read(), self._clock()
            self._total += (self._milliwatts + milliwatts) / 2e3 * (at - self._at)
            self._milliwatts, self._at = milliwatts, at
            return self._total
