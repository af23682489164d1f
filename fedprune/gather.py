"""When does the server stop waiting?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        pause: how long to wait where nobody could be asked, unless somebody reports.
    """

    count: int | None = None
    within: Seconds | None = None
    pace: float | None = None
    late: Literal["drop", "keep"] = "drop"
    pause: Seconds = 60.0

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ConfigError(f"count is {self.count}; it must be at least 1, or left out for everybody")
        if self.within is not None and not self.within > 0:
            raise ConfigError(f"within is {self.within} s; it must be above 0, or left out for no deadline")
        if self.pace is not None and self.pace < 1:
            raise ConfigError(f"pace is {self.pace}; it is a multiple of the first report's time, so at least 1")

    @property
    def expires(self) -> Seconds | None:
        """After how long an order is known beforehand to be no longer wanted."""
        return self.within if self.late == "drop" else None

    def __call__(self, fleet: Fleet, orders: Sequence[Order]) -> tuple[list[Report], list[Lost]]:
        """Collect a round's reports, and what was lost or given up; the clock moves in any case."""
        reports: list[Report] = []
        lost: list[Lost] = []
        sent = fleet.now()
        missing = {order.ticket for order in orders}
        deadline = None if self.within is None else sent + self.within
        if not orders:
            deadline = sent + self.pause
        while not self._enough(len(reports), bool(orders), bool(missing), deadline):
            event = fleet.next(before=deadline)
            if event is None:
                break
            own = event.order.ticket in missing
            missing.discard(event.order.ticket)
            if isinstance(event, Lost):
                lost.append(event)
                continue
            reports.append(event)
            if own and self.pace is not None:
                reached = sent + (1 + HAIR) * self.pace * (event.finished - sent)
                deadline = reached if deadline is None else min(deadline, reached)
        if self.late == "drop":
            lost += fleet.abandon(sorted(missing))
        return reports, lost

    def _enough(self, reports: int, asked: bool, missing: bool, deadline: Seconds | None) -> bool:
        if self.count is not None and reports >= self.count:
            return True
        if not asked and reports:
            return True  # everybody was at work; now somebody can be asked again
        # Who keeps late reports and has a deadline listens until then, whoever the next report is from.
        return asked and not missing and (self.late == "drop" or deadline is None)
