"""How does an update travel?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from fedprune.axes import BYTES_PER_ENTRY, Layout
from fedprune.submodel import Submodel, there
from fedprune.types import Bytes


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


@dataclass(frozen=True)
class Sizes:
    """What travels for one order, without framing.

    Attributes:
        parameters: entries sent down.
        down: their bytes, and those of the masks of entries.
        masks: the latter alone.
        up: bytes of the trained entries; the server knows the mask already.
    """

    parameters: int
    down: Bytes
    masks: Bytes
    up: Bytes


@lru_cache(maxsize=8192)
def sizes(layout: Layout, submodel: Submodel, rows: int) -> Sizes:
    """Exact bytes of a submodel with so many item rows: 4 per entry that is there, and one bit per maskable entry going down.

    Where not all rows travel, a masked row is charged with the mean row's entries: the ledger does not ask whose they are.
    """
    down, up, bits = (_entries(layout, submodel, rows, part) for part in ("held", "trained", "masked"))
    masks = -(-bits // 8)
    return Sizes(down, BYTES_PER_ENTRY * down + masks, masks, BYTES_PER_ENTRY * up)


def _entries(layout: Layout, submodel: Submodel, rows: int, what: Literal["held", "trained", "masked"]) -> int:
    """Entries that are held, that are trained, or that the masks speak of."""
    widths = submodel.trained_widths if what == "trained" else submodel.widths
    total = 0
    for name in layout.named("shared", "touched"):
        touched = layout.kind(name) == "touched"
        shape = layout.shape(name, widths)
        count = rows * layout.row_entries(name, widths) if touched else math.prod(shape)
        if what == "masked":
            total += count if name in submodel.entries else 0
        elif (mask := there(layout, submodel, name, what)) is not None:
            total += round(int(mask.sum()) * (rows / shape[0] if touched else 1.0))
        else:
            total += count
    return total
