"""When does the server stop waiting?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedprune.errors import ConfigError
from fedprune.exchange import Fleet, Lost, Order, Report
from fedprune.types import Seconds

HAIR = 1e-9
"""Of a waiting time: who is due at its very end must not miss it by a rounding error."""


@dataclass(frozen=True)
class Gather:
    """Wait for everybody who was asked, or less long.

    Attributes:
        count: this many reports are enough; None: as many as were asked.
        within: stop this long after sending; None: never.
        pace: stop once this multiple of the round's first own report time has passed; None: never. The deadline for those
            who know no times beforehand.
        late: what becomes of the rest: "drop" (no longer wanted) or "keep" (still expected, merged into a later version).
        beat: stop when the rate learner's target has passed (`rates.Forecast`), as soon as it knows one; `count`, `within` and
            `pace` hold until then.
        refill: after so many reports (a tenth of the orders, if that is fewer), ask those again who have become free and have
            not had an order of this round yet, so that nobody waits for the round's end; 0: never.
        pause: how long to wait where nobody could be asked, unless somebody reports.
    """

    count: int | None = None
    within: Seconds | None = None
    pace: float | None = None
    late: Literal["drop", "keep"] = "drop"
    beat: bool = False
    refill: int = 0
    pause: Seconds = 60.0

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ConfigError(f"count is {self.count}; it must be at least 1, or left out for everybody")
        if self.within is not None and not self.within > 0:
            raise ConfigError(f"within is {self.within} s; it must be above 0, or left out for no deadline")
        if self.pace is not None and self.pace < 1:
            raise ConfigError(f"pace is {self.pace}; it is a multiple of the first report's time, so at least 1")
        if self.refill < 0:
            raise ConfigError(f"refill is {self.refill}; it must not be negative")
        if self.refill and self.late == "drop":
            raise ConfigError('who is asked again in the middle of a round reports after it; refill needs late = "keep"')

    @property
    def expires(self) -> Seconds | None:
        """After how long an order is known beforehand to be no longer wanted."""
        return self.within if self.late == "drop" else None

    def __call__(
        self,
        fleet: Fleet,
        orders: Sequence[Order],
        target: Seconds | None = None,
        again: Callable[[Sequence[Lost]], Sequence[Order]] = lambda lost: (),
    ) -> tuple[list[Report], list[Lost]]:
        """Collect a round's reports, and what was lost or given up; the clock moves in any case.

        Args:
            target: how long the rate learner thinks that a round should take; infinity: until the last report is in.
            again: sends orders to who has become free, and says which; it is told who has been lost.
        """
        if self.beat and target is not None:
            beats = math.isfinite(target)
            within, refill = (target, self.refill) if beats else (None, 0)
            gather = replace(self, within=within, count=None, pace=None, beat=False, refill=refill)
            return gather(fleet, orders, again=again)
        reports: list[Report] = []
        lost: list[Lost] = []
        sent = fleet.now()
        missing = {order.ticket for order in orders}
        few = min(self.refill, max(1, len(orders) // 10))
        deadline = None if self.within is None else sent + self.within
        if not orders and not (self._listens and fleet.idle().busy):
            deadline = sent + self.pause
        while not self._enough(fleet, len(reports), bool(orders), bool(missing), deadline):
            event = fleet.next(before=deadline)
            if event is None and self._listens and not (orders or reports or lost):
                event = fleet.next(before=sent + self.pause)  # nobody could be asked, nobody was heard: the clock must move
            if event is None:
                break
            own = event.order.ticket in missing
            missing.discard(event.order.ticket)
            if isinstance(event, Lost):
                lost.append(event)
                continue
            reports.append(event)
            full = self.count is not None and len(reports) >= self.count  # the next version is about to come
            if self.refill and len(reports) % few == 0 and not full:
                missing |= {order.ticket for order in again(lost)}
            if own and self.pace is not None:
                reached = sent + (1 + HAIR) * self.pace * (event.finished - sent)
                deadline = reached if deadline is None else min(deadline, reached)
        if self.late == "drop":
            lost += fleet.abandon(sorted(missing))
        return reports, lost

    def _enough(self, fleet: Fleet, reports: int, asked: bool, missing: bool, deadline: Seconds | None) -> bool:
        if self.count is not None and reports >= self.count:
            return True
        if not asked and not self._listens:
            return reports > 0  # everybody was at work; now somebody can be asked again
        if missing or (not asked and not reports):
            return False
        # Who keeps late reports and has a deadline or a number to reach listens until then, if there is anybody to listen to.
        return self.late == "drop" or (deadline is None and self.count is None) or not fleet.idle().busy

    @property
    def _listens(self) -> bool:
        """Whether a round in which nobody could be asked goes on until it has what it is for."""
        return self.late == "keep" and (self.count is not None or self.refill > 0)
