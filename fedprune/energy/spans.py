"""A stopwatch for seconds and joules by part of the work, and the power of a device at rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fedprune.energy.meters import Meter
from fedprune.errors import ConfigError
from fedprune.types import Joules, Seconds


@dataclass(frozen=True)
class Span:
    """What a part of the work took. Joules are raw, the idle share included; None where nothing measures them."""

    seconds: Seconds
    joules: Joules | None


class Spans:
    """Splits a client's work: `with spans("training"): ...`; a part entered again adds up.

    A GPU works on after a kernel was launched: whoever trains on one waits for it (`torch.cuda.synchronize`, or any result
    fetched to the processor) before leaving the part. The clock is read inside the meter's readings, so a slow meter costs
    the client time but does not lengthen the part.

    Args:
        meter: None where there is none; then joules are None.
        clock: seconds that never fall.
    """

    def __init__(self, meter: Meter | None = None, clock: Callable[[], Seconds] = time.perf_counter) -> None:
        self._meter = meter
        self._clock = clock
        self._spans: dict[str, Span] = {}
        self._open: str | None = None

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Account what happens inside to a part, also if it ends in an exception.

        Raises:
            RuntimeError: another part is open; its joules would be counted twice.
        """
        if self._open is not None:
            raise RuntimeError(f'"{part}" begins inside "{self._open}"; parts follow one another, or joules count twice')
        before, joules_before = self.of(part), self._joules()
        self._open, began = part, self._clock()
        try:
            yield
        finally:
            seconds = before.seconds + self._clock() - began
            self._open = None
            self._spans[part] = Span(seconds, self._added(before.joules, joules_before))

    @property
    def parts(self) -> dict[str, Span]:
        """All parts entered so far, in the order of first entry; an open one counts up to its last end."""
        return dict(self._spans)

    def of(self, part: str) -> Span:
        """One part; a part that was never entered took nothing."""
        return self._spans.get(part, Span(0.0, None if self._meter is None else 0.0))

    def _joules(self) -> Joules | None:
        return None if self._meter is None else self._meter.joules()

    def _added(self, so_far: Joules | None, began: Joules | None) -> Joules | None:
        now = self._joules()
        return None if so_far is None or began is None or now is None else so_far + now - began


def idle_watts(
    meter: Meter,
    seconds: Seconds = 2.0,
    clock: Callable[[], Seconds] = time.perf_counter,
    sleep: Callable[[Seconds], object] = time.sleep,
) -> float:
    """Mean power while this process sleeps, to be measured when the device has nothing to do. Blocks for `seconds`.

    A GPU draws more for some seconds after it worked, and once a process has opened it: measure before training, in the
    process that will train.

    Raises:
        ConfigError: no time to measure in, or not a single joule in it: an idle device draws little, but not nothing.
    """
    if not seconds > 0:
        raise ConfigError(f"idle power over {seconds} seconds; it needs more than 0, and about 2 to be steady")
    began, before = clock(), meter.joules()
    sleep(seconds)
    took, joules = clock() - began, meter.joules() - before
    if not joules > 0:
        raise ConfigError(
            f"{meter.source} counted {joules:g} J in {took:.3g} s, which no device draws that is switched on; measure for "
            "about 2 seconds (counters move every 0.1 s), or choose another meter"
        )
    return joules / took


def above_idle(joules: Joules | None, seconds: Seconds, watts_idle: float | None) -> Joules | None:
    """What the work drew on top of what the device draws anyway, `joules - seconds * watts_idle`; None where unknown.

    May be below 0, and is left so. Counters move in steps of up to 0.1 s, so a short part can show fewer joules than idle
    and the next one more; cutting off at 0 would keep the second error only, and parts would add up to more than the
    whole. A total clearly below 0 says that the device was not idle when its idle power was measured.
    """
    return None if joules is None or watts_idle is None else joules - seconds * watts_idle
