"""What a signal must do to a process that has staged something: take it all down."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def signalled(code: str, number: signal.Signals, seconds: float) -> Iterator[int]:
    """A process that has said "up", for a look at what it has staged; then it gets the signal, and fails within so long."""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process.pid
        process.send_signal(number)
        assert process.wait(seconds) != 0
