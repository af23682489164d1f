"""How does an update travel?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from fedprune.axes import BYTES_PER_ENTRY, Layout
from fedprune.errors import ConfigError
from fedprune.submodel import Submodel, there
from fedprune.types import Bytes, Rate

BYTES_PER_HALF = 2
"""float16: a row's scale, and an entry of a vector beside int8 matrices."""


@dataclass(frozen=True)
class Codec:
    """Which item rows travel, and how exactly.

    Attributes:
        rows: "table" moves every item row at held width, down and (at trained width) up, so that the size of a message says
            nothing of which items a client has: the default. The server can still tell them from the rows that changed, as
            long as updates are not aggregated securely. "touched" moves just the rows a client trains on, which is cheaper.
            (On Flower's wire the way down always carries the table: a device is not asked what it needs.)
        precision: "float32", or "int8": matrices as int8 with a float16 scale per row, vectors as float16, both ways
            (`precision.py`). The client trains from what it received; what it reports is rounded without bias.
        sampled: share of the touched rows whose update goes up, drawn anew for every order and weighted by 1/chance
            (`thinning.py`); 1.0: all of them. The server learns the numbers of the others too, for the merge counts who
            touched a row and not who reported it; item numbers are not in the books, with or without this.
        refresh: the model is downloaded in versions that are multiples of this; in between a client works with what it has
            cached, and downloads of a window (`pruning.Window`) just what it trains. A client whose copy is of an earlier
            refreshing downloads all. Simulated only.
    """

    rows: Literal["table", "touched"] = "table"
    precision: Literal["float32", "int8"] = "float32"
    sampled: float = 1.0
    refresh: int = 1

    def __post_init__(self) -> None:
        if self.rows not in ("table", "touched"):
            raise ConfigError(f'rows "{self.rows}"; it is table or touched')
        if self.precision not in ("float32", "int8"):
            raise ConfigError(f'precision "{self.precision}"; it is float32 or int8')
        if not 0 < self.sampled <= 1:
            raise ConfigError(f"sampled is {self.sampled}; it is a share in (0, 1], with 1 for all touched rows")
        if self.refresh < 1:
            raise ConfigError(f"refresh is {self.refresh}; it must be at least 1, which downloads anew for every order")
        if self.sampled < 1 and self.rows != "touched":
            raise ConfigError(
                f'sampled {self.sampled} draws among the touched rows, and rows "{self.rows}" moves all there are; set rows to '
                f'"touched", or sampled to 1'
            )


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
def sizes(layout: Layout, submodel: Submodel, rows: int, codec: Codec = Codec()) -> Sizes:
    """Exact bytes of a submodel with so many item rows, and one bit per maskable entry going down.

    As float32 an entry that is there takes 4 bytes. As int8 an entry of a matrix takes 1, and each of its rows 2 more, masked
    or not; an entry of a vector takes 2. Of sampled rows, as many are charged as are expected.

    Where not all rows travel, a masked row is charged with the mean row's entries: the ledger does not ask whose they are.
    """
    down, up, masks = 0, 0, 0
    parameters, reported = 0, round(codec.sampled * rows)
    for name in layout.named("shared", "touched"):
        held = _entries(layout, submodel, name, rows, "held")
        trained = _entries(layout, submodel, name, reported, "trained")
        parameters += held
        masks += math.prod(_shape(layout, name, submodel, rows, "held")) if name in submodel.entries else 0
        if codec.precision == "float32":
            down, up = down + BYTES_PER_ENTRY * held, up + BYTES_PER_ENTRY * trained
        elif len(layout.tensors[name]) == 1:
            down, up = down + BYTES_PER_HALF * held, up + BYTES_PER_HALF * trained
        else:
            down += held + BYTES_PER_HALF * _shape(layout, name, submodel, rows, "held")[0]
            up += trained + BYTES_PER_HALF * _shape(layout, name, submodel, reported, "trained")[0]
    masks = -(-masks // 8)
    return Sizes(parameters, down + masks, masks, up)


@lru_cache(maxsize=1024)
def fitting(layout: Layout, room: Rate, precision: Literal["float32", "int8"]) -> Rate:
    """Of the rates with whole units of the widest axis, the largest one whose parameters at this precision take no more memory
    than those at rate `room` as float32; `room` itself, if none does.

    What a step needs beside them (the touched rows as float32, and their change) is not counted, at either precision.
    """
    if precision == "float32":
        return room
    memory, most = layout.bytes(layout.widths(room), layout.items), max(layout.full.values())
    for units in range(most, 0, -1):
        rate = max(units / most, layout.smallest_rate)
        kept = Submodel({axis: np.arange(width) for axis, width in layout.widths(rate).items()})
        if rate <= room or sizes(layout, kept, layout.items, Codec(precision=precision)).down <= memory:
            return max(rate, room)
    return room


Part = Literal["held", "trained"]


def _shape(layout: Layout, name: str, submodel: Submodel, rows: int, part: Part) -> tuple[int, ...]:
    """Of a tensor's held or trained units, with so many item rows."""
    shape = layout.shape(name, submodel.widths if part == "held" else submodel.trained_widths)
    return (rows, *shape[1:]) if layout.kind(name) == "touched" else shape


def _entries(layout: Layout, submodel: Submodel, name: str, rows: int, part: Part) -> int:
    """Those of them that are there."""
    if (mask := there(layout, submodel, name, part)) is None:
        return math.prod(_shape(layout, name, submodel, rows, part))
    return round(int(mask.sum()) * (rows / len(mask) if layout.kind(name) == "touched" else 1.0))
