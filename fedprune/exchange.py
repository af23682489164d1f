"""What passes between server and clients: orders down, reports up, and the five verbs of a fleet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from torch import Tensor

from fedprune.codec import Codec
from fedprune.objective import Objective
from fedprune.submodel import Submodel
from fedprune.types import Bytes, ClientId, FloatArray, IntArray, Rate, Seconds, Tensors, Ticket, Version

PARTS = ("download", "loading", "teacher", "training", "upload")
"""What a client's time and energy go to while it is busy; then it may wait for the others."""


@dataclass(frozen=True)
class Split:
    """Seconds or joules of one client-round by what they went to (`PARTS`); NaN for joules nobody measured.

    Attributes:
        loading: starting the program and reading the data; nothing on simulated devices.
    """

    download: float
    training: float
    teacher: float
    upload: float
    loading: float = 0.0

    @property
    def total(self) -> float:
        """All parts."""
        return self.download + self.loading + self.training + self.teacher + self.upload


@dataclass(frozen=True)
class Cost:
    """What one order cost its client. Unknown joules are None, never 0.

    Attributes:
        watts_waiting: what the device draws while it waits for the others; None where nobody knows.
        source: whether the figures were computed from a device model or measured on a device.
    """

    seconds: Split
    joules: Split | None
    bytes_down: Bytes
    bytes_up: Bytes
    flops: float
    parameters: int
    watts_waiting: float | None = None
    source: Literal["modelled", "measured"] = "modelled"

    def cut_off(self, after: Seconds) -> Cost:
        """What was spent by a client that vanished `after` seconds: download, teacher, training, upload, in this order."""
        left, shares = after, {}
        for part in PARTS:
            seconds = getattr(self.seconds, part)
            shares[part] = min(1.0, left / seconds) if seconds > 0 else 1.0
            left = max(0.0, left - seconds)
        spent = [
            None if split is None else Split(**{part: getattr(split, part) * shares[part] for part in PARTS})
            for split in (self.seconds, self.joules)
        ]
        return replace(
            self,
            seconds=spent[0] or self.seconds,
            joules=spent[1],
            bytes_down=round(self.bytes_down * shares["download"]),
            bytes_up=round(self.bytes_up * shares["upload"]),
            flops=self.flops * _computed(shares, self.seconds),
        )


def _computed(shares: Mapping[str, float], seconds: Split) -> float:
    """Share of the computing that is done."""
    computing = seconds.training + seconds.teacher
    done = shares["training"] * seconds.training + shares["teacher"] * seconds.teacher
    return done / computing if computing > 0 else 1.0


@dataclass(frozen=True)
class Roster:
    """Clients that are connected and not at work.

    Attributes:
        clients: their numbers, ascending.
        population: how many clients there are in all.
        slowness: `[population]`; how many times longer than the fastest device each takes for the full model, as known
            beforehand. For strategies that presume such knowledge; learners must not look at it.
        capacity: `[population]`; the largest rate whose float32 model fits into each device's memory, which a device does know
            beforehand. None: everything fits everywhere.
        busy: how many clients are at work.
    """

    clients: IntArray
    population: int
    slowness: FloatArray
    capacity: FloatArray | None = None
    busy: int = 0


@dataclass(frozen=True)
class Order:
    """Train this submodel of that version, in this way."""

    ticket: Ticket
    client: ClientId
    version: Version
    rate: Rate
    submodel: Submodel
    objective: Objective
    codec: Codec
    model: Tensors
    """The full model of that version, shared by all its orders; a fleet cuts what it sends (`submodel.extract`)."""
    seed: int
    expires: Seconds | None = None
    """A report is worth nothing so long after sending; None: it may come at any time."""
    refill: bool = False
    """Sent while its round was already on its way, to a client that had just become free."""
    age: int = 0
    """Merges since the version that its model is of: above 0 where a client trains on what it has cached (`Codec.refresh`)."""
    rest: Tensors | None = None
    """The full model of which a client keeps what it does not train; None: that is of the order's version as well."""
    cached: bool = False
    """The client has its model already, or all of it but what it trains."""

    @property
    def base(self) -> Version:
        """The version that its client has a copy of afterwards, where downloads are cached; else its own."""
        return self.version - self.version % self.codec.refresh


@dataclass(frozen=True)
class Updates:
    """trained - received of one or several clients whose submodels have equal widths, stacked.

    Attributes:
        submodels: one per client.
        rows: item numbers of the touched rows, int64 `[clients, rows]`.
        present: which of them are real, the others being padding; bool `[clients, rows]`.
        tensors: touched ones `[clients, rows, ...]`, shared ones `[clients, ...]`, at held widths; zero where not trained.
        scales: float16 `[clients, rows]` of those that travel as int8 (`precision`): every entry is a whole number of times its
            row's. For whoever writes them to a wire.
    """

    submodels: tuple[Submodel, ...]
    rows: Tensor
    present: Tensor
    tensors: Tensors
    scales: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A finished order: the update is `position` of a stack that may hold other clients' too.

    Attributes:
        examples: how many it trained on, negatives included.
        loss: mean over the first step's examples (all of them without `batch`), at the received model.
        finished: when it reached the server.
        work: share of the ordered examples that it did (below 1 where a time limit stopped it).
        staleness: merges between the version it trained on and the one it is merged into.
        period: merges from one report of this client to its next, expected: those that its work spans, and those for which it
            is not chosen.
        waited: from then until the merge, while others were still at work.
        gate: how well the received model did on the client's own held-out item (`Objective.gate`); NaN or None: unknown.
    """

    order: Order
    updates: Updates
    position: int
    examples: int
    loss: float
    cost: Cost
    finished: Seconds
    work: float = 1.0
    staleness: int = 0
    period: float = 1.0
    waited: Seconds = 0.0
    gate: float | None = None


@dataclass(frozen=True)
class Lost:
    """An order whose report the server will never use.

    Attributes:
        reason: the device vanished; was too late to be wanted; was still at work when the run ended; said that it could
            not; or answered what the server must not merge.
        cost: what it spent all the same, as far as that is known.
        detail: what exactly was wrong, for the record.
    """

    order: Order
    reason: Literal["dropped out", "too late", "unfinished", "failed", "refused"]
    cost: Cost
    detail: str = ""


class Fleet(Protocol):
    """Clients at work, seen from the server. Below these five verbs may be a heap, a tensor program, Ray or a network."""

    def now(self) -> Seconds:
        """Time since the run began."""
        ...

    def idle(self) -> Roster:
        """Who is connected and not at work."""
        ...

    def send(self, orders: Sequence[Order]) -> None:
        """Start work; each client must be idle."""
        ...

    def next(self, before: Seconds | None = None) -> Report | Lost | None:
        """The next event in order of arrival; None if there is none until then (the clock then stands at `before`)."""
        ...

    def abandon(self, tickets: Iterable[Ticket]) -> list[Lost]:
        """These are no longer wanted. Nothing is cancelled: the client works on, stays busy, and burns its joules."""
        ...
