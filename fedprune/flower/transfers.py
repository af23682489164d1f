"""How long messages took to travel, noted by the SuperNode for the client's processes, which cannot time it themselves."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Literal

VARIABLE = "FEDPRUNE_TRANSFERS"
"""Environment variable with the file's path, inherited by the client's processes."""
POLLING_SECONDS = 6.0
"""What Flower's own waiting can add to an exchange: a SuperNode asks for work every 3 s and for replies every 0.5 s, its
executor looks for a task every second, transfers are retried after one."""
TELLING_BYTES = 65_536
"""A shorter upload is mostly latency, and says little of how fast a long one would be."""


@dataclass(frozen=True)
class Transfer:
    """The last one of its kind: when it began (Unix time), seconds, and bytes."""

    kind: Literal["download", "upload"]
    began: float
    seconds: float
    bytes: int


@dataclass
class Notebook:
    """The SuperNode's side: a file that always holds the last download and the last upload."""

    path: Path

    def __post_init__(self) -> None:
        self._latest: dict[str, Transfer] = {}
        self._lock = Lock()  # Flower pushes the objects of one message from several threads

    def note(self, kind: Literal["download", "upload"], began: float, seconds: float, moved: int) -> None:
        """Replace the last one of this kind; an upload only by one that tells its speed."""
        if kind == "upload" and moved < TELLING_BYTES:
            return
        with self._lock:
            self._latest[kind] = Transfer(kind, began, seconds, moved)
            new = self.path.with_suffix(".new")
            new.write_text("".join(json.dumps(asdict(transfer)) + "\n" for transfer in self._latest.values()))
            os.replace(new, self.path)


def last_transfers() -> dict[str, Transfer]:
    """The client's side: by kind; empty where no SuperNode takes notes."""
    path = os.environ.get(VARIABLE)
    if not path or not Path(path).exists():
        return {}
    transfers = [Transfer(**json.loads(line)) for line in Path(path).read_text().splitlines()]
    return {transfer.kind: transfer for transfer in transfers}
