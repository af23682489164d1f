"""Seconds and joules are split exactly by part, and unknown joules stay unknown."""

from __future__ import annotations

import pytest
from meters import Hand

from fedprune.energy import Span, Spans, above_idle, idle_watts
from fedprune.errors import ConfigError


def test_spans_split_seconds_and_joules_exactly():
    hand = Hand()
    spans = Spans(hand, hand.clock)
    with spans("loading"):
        hand.work(2.0, watts=1.0)
    hand.work(100.0)  # nobody's
    with spans("training"):
        hand.work(3.0, watts=8.0)
    with spans("loading"):
        hand.work(0.5, watts=2.0)
    assert spans.parts == {"loading": Span(2.5, 3.0), "training": Span(3.0, 24.0)}
    assert spans.of("training") == Span(3.0, 24.0)
    assert spans.of("upload") == Span(0.0, 0.0)


def test_without_a_meter_joules_are_unknown():
    hand = Hand()
    spans = Spans(clock=hand.clock)
    with spans("training"):
        hand.work(3.0)
    assert spans.parts == {"training": Span(3.0, None)}
    assert spans.of("upload") == Span(0.0, None)


def test_work_that_fails_is_accounted_too():
    hand = Hand()
    spans = Spans(hand, hand.clock)
    with pytest.raises(KeyError), spans("training"):
        hand.work(1.5)
        raise KeyError
    with spans("training"):
        hand.work(0.5)
    assert spans.of("training") == Span(2.0, 8.0)


def test_parts_do_not_nest():
    hand = Hand()
    spans = Spans(hand, hand.clock)
    with spans("training"):
        hand.work(1.0)
        for part in ("loading", "training"):
            with pytest.raises(RuntimeError, match=f'"{part}" begins inside "training"'), spans(part):
                hand.work(99.0)
    assert spans.parts == {"training": Span(1.0, 4.0)}


def test_a_slow_meter_does_not_lengthen_a_part():
    hand = Hand()

    class Slow(Hand):
        def joules(self) -> float:
            hand.now += 0.1
            return hand.counted

    spans = Spans(Slow(), hand.clock)
    with spans("training"):
        hand.work(1.0)
    assert spans.of("training") == Span(1.0, 4.0)


def test_a_meter_that_fails_in_the_middle_is_not_hidden():
    hand = Hand()
    readings = iter([1.0])

    class Dying(Hand):
        def joules(self) -> float:
            return next(readings, None) or self.gone()

        def gone(self) -> float:
            raise OSError("gone")

    spans = Spans(Dying(), hand.clock)
    with pytest.raises(OSError, match="gone"), spans("training"):
        hand.work(1.0)
    assert spans.parts == {}


def test_idle_power_is_joules_per_second():
    hand = Hand()
    assert idle_watts(hand, 2.0, hand.clock, lambda seconds: hand.work(seconds + 0.5, watts=3.0)) == 3.0
    assert hand.now == 2.5


def test_no_idle_power_without_joules_or_time():
    hand = Hand()
    with pytest.raises(ConfigError, match="hand counted 0 J in 2 s"):
        idle_watts(hand, 2.0, hand.clock, lambda seconds: hand.work(seconds, watts=0.0))
    with pytest.raises(ConfigError, match="needs more than 0"):
        idle_watts(hand, 0.0)


def test_above_idle_is_signed_so_that_parts_add_up_and_unknown_stays_unknown():
    assert above_idle(10.0, 2.0, 3.0) == 4.0
    assert above_idle(1.0, 2.0, 3.0) == -5.0
    assert above_idle(None, 2.0, 3.0) is None
    assert above_idle(10.0, 2.0, None) is None
