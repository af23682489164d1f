"""A fleet in virtual time: a heap of arrivals, computed from the device table and never from this machine's speed."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fedprune.codec import Codec
from fedprune.devices import DeviceTable
from fedprune.errors import FleetError
from fedprune.exchange import Cost, Lost, Order, Report, Roster, Split
from fedprune.fleet.trainer import Result, Stack, Stacked, Trainer, one_by_one
from fedprune.objective import Objective
from fedprune.population import Population
from fedprune.recommenders import Recommender
from fedprune.submodel import Submodel
from fedprune.types import ClientId, FloatArray, Seconds, Ticket
from fedprune.workload import Workload, workload

PREFETCH = 1024
"""Orders trained together when the first of them is asked for."""


@dataclass
class Job:
    """An order on its way."""

    order: Order
    arrives: Seconds
    cost: Cost
    work: float
    vanishes: bool
    wanted: bool = True


class VirtualFleet:
    """Simulated clients on a virtual clock.

    Orders are trained when their arrival is asked for; a client's private rows change when it has finished, and a client is
    busy until then, wanted or not. The trainer decides how (`SerialFleet`, `VectorFleet`), never when.

    Args:
        workload: "own" charges each client for its own examples and rows; "equal" charges everybody for the average
            client's, so that time differs by device alone (the setting of most papers on stragglers).
    """

    def __init__(
        self,
        recommender: Recommender,
        population: Population,
        devices: DeviceTable,
        *,
        trainer: Trainer,
        workload: Literal["own", "equal"] = "own",
    ) -> None:
        if devices.clients != population.clients:
            raise FleetError(f"the device table has {devices.clients} devices for {population.clients} clients")
        self.recommender = recommender
        self.population = population
        self.devices = devices
        self.workload = workload
        self._trainer = trainer
        self._clock: Seconds = 0.0
        self._heap: list[tuple[Seconds, Ticket]] = []
        self._jobs: dict[Ticket, Job] = {}
        self._idle = np.ones(population.clients, bool)
        self._results: dict[Ticket, Result] = {}
        self._finished: list[Result] = []
        self._counts: dict[Objective, tuple[FloatArray, FloatArray]] = {}

    # ---- the five verbs ----------------------------------------------------------------------------------------------

    def now(self) -> Seconds:
        """Virtual seconds since the run began."""
        return self._clock

    def idle(self) -> Roster:
        """Clients that are online and not at work, abandoned work included."""
        self._finish_unwanted(self._clock)
        reachable = self.devices.reachable(np.flatnonzero(self._idle), self._clock)
        return Roster(reachable, self.population.clients, self.devices.slowness, self.devices.capacity, len(self._jobs))

    def send(self, orders: Sequence[Order]) -> None:
        """Start work now.

        Raises:
            FleetError: a client is already at work.
        """
        for order in orders:
            if not self._idle[order.client]:
                raise FleetError(f"client {order.client} is still at work; order {order.ticket} cannot be sent")
            self._idle[order.client] = False
        work, costs = self._charge(orders)
        vanishing = self.devices.drops_out([o.ticket for o in orders])
        for order, share, cost, vanishes in zip(orders, work, costs, vanishing, strict=True):
            if vanishes is not None:
                cost = cost.cut_off(vanishes * cost.seconds.total)
            job = Job(order, self._clock + cost.seconds.total, cost, share, vanishes is not None)
            self._jobs[order.ticket] = job
            heapq.heappush(self._heap, (job.arrives, order.ticket))

    def next(self, before: Seconds | None = None) -> Report | Lost | None:
        """The next wanted arrival; unwanted work that ends earlier frees its client on the way."""
        while self._heap:
            arrives, ticket = self._heap[0]
            if before is not None and arrives > before:
                break
            job = self._jobs[ticket]
            if before is None and not job.wanted and not any(other.wanted for other in self._jobs.values()):
                break  # nobody is waited for, so no time passes, and the unwanted are not done yet
            result = self._train(ticket, before)
            heapq.heappop(self._heap)
            del self._jobs[ticket]
            self._idle[job.order.client] = True
            if job.wanted:
                self._clock = max(self._clock, arrives)
            if result is None:
                if job.wanted:
                    return Lost(job.order, "dropped out", job.cost)
                continue
            self._finished.append(result)
            if job.wanted:
                return Report(
                    job.order,
                    result.updates,
                    result.position,
                    result.examples,
                    result.loss,
                    job.cost,
                    arrives,
                    job.work,
                    gate=result.gate,
                )
        if before is not None:
            self._clock = max(self._clock, before)
        return None

    def abandon(self, tickets: Iterable[Ticket]) -> list[Lost]:
        """Mark orders as unwanted; their clients work on."""
        lost = []
        for ticket in tickets:
            job = self._jobs[ticket]
            job.wanted = False
            lost.append(Lost(job.order, "too late", job.cost))
        return lost

    # ---- for checkpoints ---------------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[Seconds, list[Job]]:
        """Clock and orders on their way. Work done ahead is forgotten here too, so that a resumed run repeats it alike."""
        self.settle()
        self._results.clear()
        return self._clock, [replace(self._jobs[ticket]) for ticket in sorted(self._jobs)]

    def restore(self, clock: Seconds, jobs: Iterable[Job]) -> None:
        """Continue from a snapshot."""
        self._clock = clock
        for job in jobs:
            self._jobs[job.order.ticket] = replace(job)
            self._idle[job.order.client] = False
            heapq.heappush(self._heap, (job.arrives, job.order.ticket))

    def unfinished(self) -> list[Lost]:
        """Wanted orders still on their way, with what they have cost so far: for the books of a run that ends here."""
        jobs = [job for job in self._jobs.values() if job.wanted]
        begun = [self._clock - (job.arrives - job.cost.seconds.total) for job in jobs]
        return [Lost(j.order, "unfinished", j.cost.cut_off(t)) for j, t in zip(jobs, begun, strict=True)]

    def settle(self) -> None:
        """Write back the private rows of all who have finished; to be called before reading the population's."""
        stacks: dict[int, tuple[Stack, list[int]]] = {}
        for result in self._finished:
            stacks.setdefault(id(result.stack), (result.stack, []))[1].append(result.position)
        self._finished.clear()
        for stack, places in stacks.values():
            stack.settle(sorted(places))

    def advance(self, seconds: Seconds) -> None:
        """Let time pass before the first round (a warm start that everybody takes part in)."""
        self._clock += seconds

    def workload_of(
        self, client: ClientId | None, submodel: Submodel, objective: Objective, codec: Codec, cached: bool = False
    ) -> Workload:
        """What an order asks of a client; of the average one if none is named."""
        if objective not in self._counts:
            population = self.population
            each = (population.examples_of_client, population.rows_of_client, population.listed_of_client)
            counts = np.stack([count(objective) for count in each]).astype(float)
            self._counts[objective] = counts, counts.mean(1)
        own, average = self._counts[objective]
        examples, rows, listed = (average if client is None else own[:, client]).tolist()
        items = self.population.items
        return workload(
            self.recommender.layout, submodel, objective, codec, examples=examples, listed=round(listed),
            rows=round(rows) if codec.rows == "touched" else items, items=items, cached=cached,
        )  # fmt: skip

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _finish_unwanted(self, until: Seconds) -> None:
        """Free clients whose unwanted work has ended by now; their private rows did change."""
        while self._heap and self._heap[0][0] <= until and not self._jobs[self._heap[0][1]].wanted:
            _, ticket = self._heap[0]
            result = self._train(ticket, until)
            heapq.heappop(self._heap)
            self._idle[self._jobs.pop(ticket).order.client] = True
            if result is not None:
                self._finished.append(result)

    def _train(self, ticket: Ticket, before: Seconds | None) -> Result | None:
        """This order's result; None if its client vanishes. Trains others that arrive soon in the same go."""
        if self._jobs[ticket].vanishes:
            return None
        if ticket not in self._results:
            due = heapq.nsmallest(PREFETCH, (
                (arrives, t)
                for arrives, t in self._heap
                if t not in self._results and not self._jobs[t].vanishes and (before is None or arrives <= before)
            ))  # fmt: skip
            jobs = [self._jobs[t] for _, t in due]
            self.settle()
            results = self._trainer(self.recommender, self.population, [j.order for j in jobs], [j.work for j in jobs])
            self._results.update(zip((t for _, t in due), results, strict=True))
        return self._results.pop(ticket)

    def _charge(self, orders: Sequence[Order]) -> tuple[list[float], list[Cost]]:
        """Share of its work that each client gets to, and what that costs it."""
        if not orders:
            return [], []
        clients = np.array([order.client for order in orders])
        tickets = [order.ticket for order in orders]
        known: dict[tuple[bytes, Objective, Codec, bool, ClientId | None], Workload] = {}
        loads = []
        for order in orders:
            client = None if self.workload == "equal" else order.client
            key = (order.submodel.key, order.objective, order.codec, order.cached, client)
            if key not in known:
                known[key] = self.workload_of(client, order.submodel, order.objective, order.codec, order.cached)
            loads.append(known[key])
        flops, teaching, down, up = (
            np.array([getattr(load, name) for load in loads], float) for name in ("training", "teacher", "down", "up")
        )
        sizes = [load.parameters for load in loads]
        costs = self.devices.costs(clients, tickets, flops, down, up, sizes, teaching)
        if all(order.objective.until is None for order in orders):
            return [1.0] * len(orders), costs
        share = np.array([_in_time(order.objective.until, cost.seconds) for order, cost in zip(orders, costs, strict=True)])
        return share.tolist(), self.devices.costs(clients, tickets, flops * share, down, up, sizes, teaching)


def _in_time(until: Seconds | None, seconds: Split) -> float:
    """Share of its examples that a client gets to before a time limit."""
    if until is None:
        return 1.0
    until *= 1 - 1e-9  # so that rounding does not make it late for a deadline that is the same
    left = until - seconds.download - seconds.teacher - seconds.upload
    return float(np.clip(left / max(seconds.training, 1e-12), 0.05, 1.0))


def SerialFleet(
    recommender: Recommender,
    population: Population,
    devices: DeviceTable,
    *,
    workload: Literal["own", "equal"] = "own",
) -> VirtualFleet:
    """One client after another: the reference that every other fleet is compared with."""
    return VirtualFleet(recommender, population, devices, trainer=one_by_one, workload=workload)


def VectorFleet(
    recommender: Recommender,
    population: Population,
    devices: DeviceTable,
    *,
    workload: Literal["own", "equal"] = "own",
    stack: int = Stacked().examples,
) -> VirtualFleet:
    """Clients of equal width stacked and trained together: the fast one, and the default."""
    return VirtualFleet(recommender, population, devices, trainer=Stacked(stack), workload=workload)
