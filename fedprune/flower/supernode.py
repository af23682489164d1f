"""`fedprune-supernode`: Flower's SuperNode that also notes how long its messages take to travel.

    fedprune-supernode --superlink 192.168.1.10:9092 --root-certificates ca.crt ...      # the arguments of flower-supernode

A client's process starts when its order is there and ends before its report leaves, so it cannot time either; the SuperNode
can (`transfers`). It also keeps a process with everything loaded (`resident`), so that not every order begins with importing
PyTorch. With a plain `flower-supernode` everything works too, slower, and the server estimates the network's share.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

from fedprune.flower import resident
from fedprune.flower.compat import timed_transfers
from fedprune.flower.transfers import VARIABLE, Notebook


def main() -> None:
    """Run flower-supernode in this process, with its transfers timed."""
    from flwr.supernode.cli import flower_supernode

    folder = Path(tempfile.mkdtemp(prefix="fedprune-supernode-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[VARIABLE] = str(folder / "transfers.jsonl")
    if "resident=false" not in " ".join(sys.argv).replace(" ", ""):
        resident.keep(folder / "resident.socket")
    sys.argv[0] = "flower-supernode"
    with timed_transfers(Notebook(folder / "transfers.jsonl").note):
        flower_supernode()


if __name__ == "__main__":
    main()
