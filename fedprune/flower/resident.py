"""A process that stays: it has PyTorch and the data loaded, and works on one message after another for the client's processes.

Flower starts a fresh process per message. Importing PyTorch and reading the data takes such a process seconds on a laptop and
much longer on a slow device, whatever share of the model it was given. `fedprune-supernode` therefore keeps this process beside
the SuperNode; a client's process hands its message over through a socket that only the same user can open. Without it (a
plain `flower-supernode`, or `resident=false` in --node-config), the client's process does the work itself.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from fedprune.errors import FleetError

VARIABLE = "FEDPRUNE_RESIDENT"
"""Environment variable with the socket's path, inherited by the client's processes."""
log = logging.getLogger(__name__)


class Away(Exception):
    """Nobody listens at the socket: the process has just died, and is about to be started again."""


def address() -> Path | None:
    """Where the resident process listens; None if there is none, or it is just being started again."""
    path = os.environ.get(VARIABLE)
    return Path(path) if path and Path(path).exists() else None


def hand_over(to: Path, action: str, content: RecordDict, node_config: Mapping[str, Any], starting: float) -> RecordDict:
    """Let the resident process do it.

    Raises:
        Away: it is not there (any more); nothing has begun.
        FleetError: what went wrong there, or that the process died over it.
    """
    try:
        connected = Client(str(to), "AF_UNIX")
    except (ConnectionRefusedError, FileNotFoundError) as error:
        raise Away(str(error)) from None
    try:
        with connected as connection:
            connection.send((action, content, dict(node_config), starting))
            answer, failure = connection.recv()
    except (EOFError, ConnectionError) as error:
        raise FleetError(f"the resident process died while it worked on this ({type(error).__name__})") from None
    if failure is not None:
        raise FleetError(failure)
    return answer


def keep(path: Path) -> None:
    """Start the resident process, and start it again whenever it ends, as long as this process lives."""
    os.environ[VARIABLE] = str(path)

    def watch() -> None:
        while True:
            subprocess.run([sys.executable, "-m", __name__, str(path), str(os.getpid())], check=False)
            path.unlink(missing_ok=True)
            time.sleep(1.0)  # not at full speed if it cannot start at all

    threading.Thread(target=watch, daemon=True).start()


def main(path: str, parent: int) -> None:
    """Listen, until the SuperNode is gone."""
    from fedprune.flower.device import perform

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        Path(path).unlink(missing_ok=True)
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()
    Path(path).unlink(missing_ok=True)
    os.umask(0o077)
    with Listener(path, "AF_UNIX") as listener:
        while True:
            with listener.accept() as connection:
                try:
                    request = connection.recv()
                except EOFError:
                    continue
                try:
                    answer = perform(*request), None
                except Exception as error:  # told to the client's process, which raises it there
                    log.exception("the order failed")
                    answer = None, f"{type(error).__name__}: {error}"
                try:
                    connection.send(answer)
                except (BrokenPipeError, ConnectionResetError):
                    log.warning("the client's process is gone; its answer is thrown away")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
