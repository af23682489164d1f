"""Fleets: who does the work, and on which clock."""

from fedprune.fleet.virtual import SerialFleet as SerialFleet
from fedprune.fleet.virtual import VectorFleet as VectorFleet
from fedprune.fleet.virtual import VirtualFleet as VirtualFleet
