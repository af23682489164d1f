"""A task that repeats in the background, for counters that must be looked at more often than their readers ask."""

from __future__ import annotations

import threading
from collections.abc import Callable

from fedprune.errors import FedpruneError
from fedprune.types import Seconds


class Watch:
    """Runs a task every `period` seconds on a daemon thread.

    A failure ends the watch and is raised at the reader's next `check`: what the task should have seen meanwhile is lost, so
    a later success of the same task must not hide it.
    """

    def __init__(self, task: Callable[[], object], period: Seconds, name: str) -> None:
        self._task = task
        self._period = period
        self._name = name
        self._stopped = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"fedprune {name}", daemon=True)

    def start(self) -> None:
        """Begin; the task runs first after one period."""
        self._thread.start()

    def check(self) -> None:
        """Nothing while the task succeeds.

        Raises:
            FedpruneError: the task failed, which is the cause of the error, or the watch was stopped.
        """
        if self._failure is not None:
            raise FedpruneError(f"the {self._name} failed in between; the joules since then are lost") from self._failure
        if self._stopped.is_set():
            raise FedpruneError(f"the {self._name} was closed; find a new one to measure on")

    def stop(self) -> None:
        """End the thread, and wait until it has ended."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._period):
            try:
                self._task()
            except Exception as failure:  # not hidden: `check` raises it on the reader's thread
                self._failure = failure
                return
