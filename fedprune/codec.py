"""How does an update travel?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Codec:
    """Which item rows travel, as float32.

    Attributes:
        rows: "table" moves every item row at held width, down and (at trained width) up, so that neither the server nor the
            network learns which items a client has: the default. "touched" moves just the rows a client trains on; it is
            cheaper and tells the server a superset of the client's interactions.
    """

    rows: Literal["table", "touched"] = "table"
