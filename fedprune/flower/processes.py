"""Child processes with everything under them: started, known, and stopped or killed as a whole.

Every started process carries a mark in its environment that its children inherit, and only marked processes are ever
signalled, so neither a recycled pid nor a child that outlives its parent goes wrong. Linux (/proc, pidfd).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedprune.errors import FleetError

MARK = "FEDPRUNE_STAGED"
STOP_SECONDS = 10.0


@dataclass(kw_only=True)
class Staged:
    """A process that we start, and everything that it starts in turn; `environment` must hold a MARK of its own."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _logged: int = field(default=0, repr=False)

    @property
    def log(self) -> Path:
        """What it and its children printed, over all its starts."""
        return self.folder / "log.txt"

    @property
    def code(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs or has not been started."""
        return None if self._process is None else self._process.poll()

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._process is not None and self.code is None

    def start(self) -> None:
        """Start it; the log goes on where it was.

        Raises:
            FleetError: it runs already.
        """
        if self.running:
            raise FleetError(f"{self.name} runs already; stop or kill it first.")
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._logged = log.tell()
            self._process = subprocess.Popen(
                list(self.command),
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C at the terminal is for us, who then stop them in order
            )

    def processes(self) -> dict[int, list[str]]:
        """Command lines by pid of everything alive in its tree, itself included, also of what outlived its parent."""
        return marked(self.environment[MARK])

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """SIGTERM and a time limit, then SIGKILL for whatever of the tree is left a moment later."""
        if self._process is not None and self.running:
            send_signal(self._process.pid, signal.SIGTERM, self.environment[MARK])
        until(lambda: not self.running, seconds)
        if not until(lambda: not self.processes(), min(2.0, seconds)):  # they may be trying to reach what is gone
            self.kill()

    def kill(self) -> list[int]:
        """SIGKILL for the whole tree at once, like a power failure; the pids that were killed."""
        killed: set[int] = set()
        # again until nothing is left: one that we have not seen yet may just be starting another
        while left := self.processes():
            for pid in left:
                send_signal(pid, signal.SIGKILL, self.environment[MARK])
            killed |= left.keys()
            time.sleep(0.01)
        # a dead child that nobody waits for still counts as alive with flwr's children, who watch for its pid
        until(lambda: not self.running, 1, every=0.01)
        return sorted(killed)

    def wait(self, seconds: float) -> int:
        """Its exit status.

        Raises:
            FleetError: it has not ended within `seconds`.
        """
        if not until(lambda: not self.running, seconds):
            raise FleetError(f"{self.name} has not ended within {seconds:g} s; {self.tail()}")
        return self.code or 0

    def printed(self) -> str:
        """What it and its children printed since it was last started."""
        return self.log.read_bytes()[self._logged :].decode(errors="replace") if self.log.exists() else ""

    def tail(self, lines: int = 30) -> str:
        """The end of that, as an error message needs it."""
        return f"the end of {self.log}:\n" + "\n".join(self.printed().splitlines()[-lines:])

    def await_ready(self, ready: Callable[[], bool], seconds: float, what: str) -> None:
        """Return when `ready`.

        Raises:
            FleetError: it ended, or has not `what` within `seconds`; with the end of its log.
        """
        if not until(lambda: not self.running or ready(), seconds, every=0.2):
            raise FleetError(f"{self.name} has not {what} within {seconds:g} s; {self.tail()}")
        if not self.running:
            raise FleetError(f"{self.name} ended with {self.code} before it had {what}; {self.tail()}")


@contextlib.contextmanager
def orderly_exit() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Make SIGTERM raise SystemExit, as SIGINT raises KeyboardInterrupt; and within what it yields, hold both back.

    Elsewhere than in the main thread, where Python handles no signals, it changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield contextlib.nullcontext
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    @contextlib.contextmanager
    def hold_signals() -> Iterator[None]:
        came: list[int] = []
        handlers = {n: signal.signal(n, lambda number, frame: came.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if came:
                signal.raise_signal(came[0])

    try:
        yield hold_signals
    finally:
        signal.signal(signal.SIGTERM, before)


def until(true: Callable[[], bool], seconds: float, every: float = 0.05) -> bool:
    """Ask until it is true, or for `seconds`; whether it became so."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() >= end:
            return False
        time.sleep(every)
    return True


def marked(mark: str) -> dict[int, list[str]]:
    """Command lines by pid of the living processes that carry a mark."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _carries(int(entry.name), mark):
            with contextlib.suppress(OSError):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    return found


def _carries(pid: int, mark: str) -> bool:
    """Whether that process was started with the mark; no for the dead and for other users' processes."""
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def send_signal(pid: int, number: signal.Signals, mark: str) -> None:
    """Send a signal to a marked process and to no other, even if the pid is handed on in this very moment."""
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            if _carries(pid, mark):
                signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)
