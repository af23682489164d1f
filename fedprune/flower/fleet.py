"""Real devices behind a Flower grid, on the wall clock."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from flwr.app import MetricRecord, RecordDict

from fedprune.axes import Layout
from fedprune.errors import FleetError
from fedprune.exchange import Cost, Lost, Order, Report, Roster, Split, Updates
from fedprune.flower import wire
from fedprune.flower.compat import wire_bytes
from fedprune.flower.crew import Crew
from fedprune.flower.nodes import PATIENCE_SECONDS, Answer
from fedprune.flower.transfers import POLLING_SECONDS
from fedprune.submodel import Submodel
from fedprune.types import ClientId, Seconds, Ticket
from fedprune.workload import Workload, workload

log = logging.getLogger(__name__)
SLACK_SECONDS = 5.0
"""By so much a device's clock may disagree with ours before we disbelieve it."""


@dataclass(frozen=True)
class Guard:
    """Refuses updates out of all proportion, so that one device cannot wreck the model.

    Attributes:
        largest: no entry may change by more.
        factor: the root mean square of an update, and its largest entry, may be so many times the median of the last
            accepted ones'.
        known: how many of those must be known first.
    """

    largest: float = 100.0
    factor: float = 30.0
    known: int = 5

    def size(self, updates: Updates, sizes: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """Root mean square of an update's changed entries, and its largest entry.

        Args:
            sizes: of the last accepted ones.

        Raises:
            FleetError: it is too large.
        """
        entries = torch.cat([tensor.flatten() for tensor in updates.tensors.values()])
        largest = float(entries.abs().max())
        if not largest <= self.largest:
            raise FleetError(f'field "update" changes an entry by {largest:.3g}; {self.largest:g} is the most that is believed')
        changed = entries[entries != 0]
        size = (float(changed.double().square().mean().sqrt()) if len(changed) else 0.0, largest)
        if len(sizes) >= self.known:
            for found, usual, what in zip(size, np.median(sizes, axis=0), ("update", "largest entry"), strict=True):
                if found > self.factor * usual:
                    raise FleetError(
                        f'field "update": its {what} is {found / usual:.0f} times the usual; {self.factor:g} is the most'
                    )
        return size


@dataclass
class Job:
    """An order on its way.

    Attributes:
        sent: on the fleet's clock.
        posted: on the wall clock, which goes on while we evaluate, as the device does.
    """

    order: Order
    sent: Seconds
    posted: Seconds
    bytes_down: int
    wanted: bool = True


@dataclass
class FlowerFleet:
    """The five verbs on real devices.

    Messages of orders carry the time after which nobody wants the report, so that devices do not work through a queue of the
    past. A device that is given up stays busy: it is idle again when it answers, and where the SuperLink has already thrown the
    message away, when it answers a question that has queued up behind its work.

    Attributes:
        crew: which client is which node.
        run: name of the run, which every reply repeats.
        settings: of the run, JSON; devices need them.
        began: wall clock at which the fleet's clock stood at 0.
    """

    crew: Crew
    layout: Layout
    run: str
    settings: str
    guard: Guard = field(default_factory=Guard)
    order_seconds: Seconds = PATIENCE_SECONDS
    began: Seconds = math.nan
    _jobs: dict[str, Job] = field(default_factory=dict)
    _pings: dict[str, ClientId] = field(default_factory=dict)
    _arrived: list[Report | Lost] = field(default_factory=list)
    _sizes: list[tuple[float, float]] = field(default_factory=list)
    _stopped: Seconds | None = None
    full_seconds: dict[ClientId, Seconds] = field(default_factory=dict)
    """How long each client's first report took, scaled to the full model."""

    # ---- the five verbs ----------------------------------------------------------------------------------------------

    def now(self) -> Seconds:
        """Wall-clock seconds since the run began, evaluations aside."""
        if math.isnan(self.began):
            self.began = self.crew.nodes.clock()
        return (self.crew.nodes.clock() if self._stopped is None else self._stopped) - self.began

    def idle(self) -> Roster:
        """Clients whose node is online and not at work. Waits for one, if nobody is there and nothing is on its way."""
        told = self.crew.nodes.clock()
        while True:
            self.crew.enrol()
            self._listen()
            busy = self._busy()
            there = [client for client in self.crew.present() if client not in busy]
            if there or any(job.wanted for job in self._jobs.values()) or self._arrived:
                return Roster(np.array(there, np.int64), self.crew.clients, self.crew.slowness(), busy=len(busy))
            if self.crew.nodes.clock() - told > 60:
                told = self.crew.nodes.clock()
                log.warning("nobody can be asked: %s of %s clients are online", len(self.crew.present()), self.crew.clients)
            self.crew.nodes.pause()

    def send(self, orders: Sequence[Order]) -> None:
        """Start work now.

        Raises:
            FleetError: a client is already at work.
        """
        busy = self._busy()
        for order in orders:
            if order.client in busy:
                raise FleetError(f"client {order.client} is still at work; order {order.ticket} cannot be sent")
            busy.add(order.client)
        for order in orders:
            job, content = self.letter(order)
            node = self.crew.node_of(order.client)
            seconds = self.order_seconds if order.expires is None else order.expires
            identifier = None
            if node is not None:
                (identifier,) = self.crew.nodes.push([(node, content)], "train", group=str(order.version), seconds=seconds)
            if identifier is None:
                self._lose(job, "failed", "the order could not be sent; the node is gone")
            else:
                self._jobs[identifier] = job

    def next(self, before: Seconds | None = None) -> Report | Lost | None:
        """The next report or loss; None at `before`, or when nothing wanted is on its way."""
        while True:
            if self._arrived:
                return self._arrived.pop(0)
            if before is None and not any(job.wanted for job in self._jobs.values()):
                return None
            if before is not None and self.now() >= before:
                return None
            self._listen()
            if not self._arrived:
                self.crew.nodes.pause()

    def abandon(self, tickets: Iterable[Ticket]) -> list[Lost]:
        """Mark orders as unwanted; their devices work on, and are busy until they answer.

        What has come in but was not asked for yet (a gather that wants only so many) is given up too.
        """
        unwanted = set(tickets)
        lost = [_unmerged(event, "too late") for event in self._arrived if event.order.ticket in unwanted]
        self._arrived = [event for event in self._arrived if event.order.ticket not in unwanted]
        for job in self._jobs.values():
            if job.order.ticket in unwanted:
                job.wanted = False
                lost.append(self.given_up(job, "too late"))
        return lost

    # ---- beyond the verbs --------------------------------------------------------------------------------------------

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Time inside does not count (evaluation)."""
        self.now()
        self._stopped = self.crew.nodes.clock()
        try:
            yield
        finally:
            self.began += self.crew.nodes.clock() - self._stopped
            self._stopped = None

    def letter(self, order: Order) -> tuple[Job, RecordDict]:
        """An order as it is sent, and the note that we keep of it."""
        content = wire.write_orders([order], self.layout, run=self.run, settings=self.settings)
        return Job(order, self.now(), self.crew.nodes.clock(), wire_bytes(content)), content

    def report(self, job: Job, answer: Answer, polled: bool = True) -> Report | Lost:
        """What an answer comes to, once it has been checked.

        Args:
            polled: it is just in; else it lay there while others were waited for, and when it came nobody knows.
        """
        arrived, order = self.now(), job.order
        if answer.content is None:
            return self.given_up(job, "failed", answer.error)
        try:
            (stack,) = wire.read_reply(answer.content, [order], self.layout, self.run)
            self._credible(order, stack)
            size = self.guard.size(stack.updates, self._sizes)
            cost = self._cost(job, answer.content, stack, arrived if polled else None)
        except FleetError as error:
            return self.given_up(job, "refused", str(error))
        if size[0] > 0:  # updates of nothing say nothing of what is usual
            self._sizes = [*self._sizes[-49:], size]
        share = self._share(order, stack.examples[0])
        self.full_seconds.setdefault(order.client, cost.seconds.total / max(1e-9, share))
        gate = None if stack.gates is None else stack.gates[0]
        return Report(order, stack.updates, 0, stack.examples[0], stack.losses[0], cost, arrived, stack.work[0], gate=gate)

    def expect(self, message_id: str, client: ClientId) -> None:
        """A client owes an answer that nobody waits for any longer; it is busy until then."""
        self._pings[message_id] = client

    def go_on_from(self, now: Seconds) -> None:
        """Set the clock, after a restart."""
        self.began = self.crew.nodes.clock() - now

    def unfinished(self) -> list[Lost]:
        """Wanted orders still on their way, or not merged yet."""
        waiting = [_unmerged(event, "unfinished") for event in self._arrived]
        return waiting + [self.given_up(job, "unfinished") for job in self._jobs.values() if job.wanted]

    def wait_until_idle(self, seconds: Seconds) -> None:
        """Let devices finish what they are at, but no longer than this."""
        until = self.crew.nodes.clock() + seconds
        while (self._jobs or self._pings) and self.crew.nodes.clock() < until:
            self._listen()
            self.crew.nodes.pause()

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _busy(self) -> set[ClientId]:
        """Clients at work, as far as we know."""
        return {job.order.client for job in self._jobs.values()} | set(self._pings.values())

    def _passed(self, job: Job) -> Seconds:
        """Since the order was sent, evaluations included."""
        return self.crew.nodes.clock() - job.posted

    def _listen(self) -> None:
        """Take in what has come, in the order of arrival."""
        nodes = self.crew.nodes
        for answer in nodes.pull([*self._jobs, *self._pings]):
            if answer.message_id in self._pings:
                del self._pings[answer.message_id]
                continue
            job = self._jobs.pop(answer.message_id)
            expires = job.order.expires
            expired = answer.content is None and expires is not None and self._passed(job) > expires - 1.0
            if job.wanted and expired:
                self._lose(job, "too late", answer.error)
            elif job.wanted:
                self._arrived.append(self.report(job, answer))
            if (expired or not job.wanted) and answer.content is None:
                self._ping(job.order.client)
        for identifier, job in list(self._jobs.items()):
            patience = self.order_seconds if job.order.expires is None else job.order.expires + self.order_seconds
            if self._passed(job) > patience:
                del self._jobs[identifier]
                self._ping(job.order.client)
                if job.wanted:
                    self._lose(job, "failed", f"no answer within {patience:g} s")

    def _credible(self, order: Order, stack: wire.Stacked) -> None:
        """Examples beyond what the client said it has would weigh too much."""
        most = self.crew.facts[order.client].interactions * (1 + order.objective.negatives)
        if stack.examples[0] > most:
            raise FleetError(f'field "examples" is {stack.examples[0]}; this client has at most {most}')
        if stack.losses[0] > 1e6:
            raise FleetError(f'field "losses" is {stack.losses[0]:.3g}, which is not credible')

    def _ping(self, client: ClientId) -> None:
        """Its message was thrown away unread, and the device may still be at it: it answers this when it is done."""
        node = self.crew.node_of(client)
        if node is not None:
            (ping,) = self.crew.nodes.push([(node, self.crew.greeting())], "query.hello", seconds=self.order_seconds)
            if ping is not None:
                self._pings[ping] = client

    def _load(self, order: Order, examples: int) -> Workload:
        """What an order asked of its device, which has trained on so many examples."""
        distillation, facts = order.objective.distillation, self.crew.facts[order.client]
        return workload(
            self.layout, order.submodel, order.objective, order.codec, examples=examples,
            rows=self.layout.items, items=self.layout.items,
            listed=0 if distillation is None else distillation.top * facts.users,
        )  # fmt: skip

    def _share(self, order: Order, examples: int) -> float:
        """Of the FLOPs of the full model, which needs no teacher."""
        whole = replace(
            order, submodel=Submodel.full(self.layout), objective=replace(order.objective, distillation=None, nested=0.0)
        )
        own = self._load(order, examples)
        return (own.training + own.teacher) / self._load(whole, examples).training

    def _cost(self, job: Job, content: RecordDict, stack: wire.Stacked, arrived: Seconds | None) -> Cost:
        """Measured by the device where it can, by the server where only it can."""
        figures, order = content["metrics"], job.order
        assert isinstance(figures, MetricRecord)
        seconds = {part: _measure(figures, f"seconds-{part}") for part in ("loading", "training", "teacher")}
        passed, own, bytes_up = self._passed(job), sum(seconds.values()), wire_bytes(content)
        if own > passed + SLACK_SECONDS:
            raise FleetError(f"reports {own:.1f} s of work within {passed:.1f} s")
        # What neither the work nor Flower's polling explains is the network's; both directions by their bytes. By the
        # fleet's clock, since a report may have lain there while we evaluated.
        elapsed = 0.0 if arrived is None else arrived - job.sent - POLLING_SECONDS
        network = max(0.0, elapsed - own)
        download = network * job.bytes_down / (job.bytes_down + bytes_up)
        upload = network - download
        if "seconds-download" in figures:
            download = min(_measure(figures, "seconds-download"), passed)
            upload = max(0.0, network - download)
        if "upload-bytes-per-second" in figures:
            upload = min(bytes_up / max(_measure(figures, "upload-bytes-per-second"), 1.0), passed)
            if "seconds-download" not in figures:
                download = max(0.0, network - upload)
        # Silence must not make a device look fast: who explains less than half of the time answers for the rest too. (Above
        # that we believe it. A report can lie behind another one's slow upload, since Flower pulls them one by one.)
        explained = own + download + upload
        if explained < elapsed / 2:
            upload += elapsed - explained
        joules = None
        if "joules-training" in figures:
            known = {part: _measure(figures, f"joules-{part}") for part in ("loading", "training", "teacher")}
            joules = Split(download=math.nan, upload=math.nan, **known)
        load = self._load(order, stack.examples[0])
        return Cost(
            Split(download=download, upload=upload, **seconds),
            joules,
            job.bytes_down,
            bytes_up,
            load.training + load.teacher,
            load.parameters,
            _measure(figures, "watts-idle") if "watts-idle" in figures else None,
            "measured",
        )

    def _spent(self, job: Job) -> Cost:
        """Of an order without a report we know what was sent and how long ago."""
        parts = Split(0.0, self._passed(job), 0.0, 0.0)
        return Cost(parts, None, job.bytes_down, 0, 0.0, 0, source="measured")

    def given_up(self, job: Job, reason: Any, why: str | None = None) -> Lost:
        """An order that nobody waits for any longer."""
        detail = "" if why is None else f"client {job.order.client}: {why}"
        return Lost(job.order, reason, self._spent(job), detail)

    def _lose(self, job: Job, reason: Any, why: str) -> None:
        self._arrived.append(self.given_up(job, reason, why))


def _unmerged(event: Report | Lost, reason: Any) -> Lost:
    """What has come in, but is not to be merged."""
    return event if isinstance(event, Lost) else Lost(event.order, reason, event.cost)


def _measure(figures: Mapping[str, Any], name: str) -> float:
    """A device's own figure: finite and not negative."""
    if name not in figures:
        raise FleetError(f'field "{name}" is missing')
    value = figures[name]
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise FleetError(f'field "{name}" is {value!r}; it must be finite and not negative')
    return float(value)
