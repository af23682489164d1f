"""How does an update travel?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Codec:
    """Which item rows travel, as float32.

    Attributes:
        rows: "table" moves every item row at held width, down and (at trained width) up, so that the size of a message says
            nothing of which items a client has: the default. The server can still tell them from the rows that changed, as
            long as updates are not aggregated securely. "touched" moves just the rows a client trains on, which is cheaper.
            (On Flower's wire the way down always carries the table: a device is not asked what it needs.)
    """

    rows: Literal["table", "touched"] = "table"
