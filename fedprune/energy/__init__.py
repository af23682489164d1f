"""A real device measures its own joules: meters, idle power, and a stopwatch that splits work into parts.

Meters are whole-device: a GPU's or a processor's counter does not know which process drew the power. So measured energy is
for a device that hosts one client; simulated clients get modelled joules (`fedprune.devices`).
"""

from fedprune.energy.meters import METERS as METERS
from fedprune.energy.meters import Meter as Meter
from fedprune.energy.meters import Sum as Sum
from fedprune.energy.meters import find as find
from fedprune.energy.spans import Span as Span
from fedprune.energy.spans import Spans as Spans
from fedprune.energy.spans import above_idle as above_idle
from fedprune.energy.spans import idle_watts as idle_watts
