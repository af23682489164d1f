"""Device tables: how fast, how well connected and how hungry each client's device is, and what an order costs on it.

Everything here is modelled. Time follows from the FLOPs and bytes of the submodel, so a smaller model is a faster one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal

import numpy as np

from fedprune.errors import ConfigError, unknown
from fedprune.exchange import Cost, Split
from fedprune.random import stream, uniform
from fedprune.types import FloatArray, IntArray, Rate, Seconds


@dataclass(frozen=True)
class Device:
    """One kind of device: floating-point operations, bytes and watts, all per second."""

    name: str
    flops: float
    bytes_down: float
    bytes_up: float
    watts_idle: float
    watts_training: float
    watts_radio: float
    source: str = ""


MBIT = 1e6 / 8
PHONE_WATTS = {"watts_idle": 1.0, "watts_training": 3.2, "watts_radio": 1.4}
"""Idle and all-core training of a small network on a phone, from the logs of Benchmark-On-Device-Training; WiFi at
2-5 Mbit/s from the Aalborg measurements (2.2-5.2 J/MB). Orders of magnitude, not a promise about any one phone."""

DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        Device("phone-fast", 30e9, 14 * MBIT, 14 * MBIT, **PHONE_WATTS, source="upper quartile of the phone table"),
        Device("phone-slow", 4.1e9, 2.9 * MBIT, 2.9 * MBIT, **PHONE_WATTS, source="lower quartile of the phone table"),
        Device("raspberry-pi-4", 13e9, 40 * MBIT, 20 * MBIT, 2.7, 6.4, 3.2, source="5 V meter readings; 0.013 TFLOP/s"),
        Device("jetson-nano", 472e9, 40 * MBIT, 20 * MBIT, 1.9, 6.8, 2.4, source="a SoC power budget; 0.472 TFLOP/s fp16"),
        Device("jetson-orin-nano", 1280e9, 40 * MBIT, 20 * MBIT, 2.9, 13.8, 3.4, source="a SoC power budget; fp32 peak"),
        Device("laptop", 100e9, 50 * MBIT, 20 * MBIT, 8.0, 28.0, 9.0, source="assumed"),
    )
}

CLASSES: dict[str, tuple[float, float, float]] = {
    "compute_bound": (0.02, 0.96, 0.02),
    "balanced": (0.25, 0.50, 0.25),
    "slow_uplink": (0.10, 0.20, 0.70),
}
"""Share of a full report that the reference device spends on download, training and upload."""


@dataclass(frozen=True)
class DeviceTable:
    """The devices of all clients, one entry each.

    Attributes:
        flops, bytes_down, bytes_up: per second.
        slowness: time for the full model relative to the fastest device's.
        noise: standard deviation of the logarithm of an order's duration.
        availability: share of the time that a client can be reached, in slots of `slot` seconds.
        dropout: probability that a client vanishes in the middle of an order.
        capacity: largest rate whose float32 model fits into each device's memory; None: everything fits.
    """

    name: str
    flops: FloatArray
    bytes_down: FloatArray
    bytes_up: FloatArray
    watts_idle: FloatArray
    watts_training: FloatArray
    watts_radio: FloatArray
    slowness: FloatArray
    noise: float = 0.0
    availability: float = 1.0
    dropout: float = 0.0
    slot: Seconds = 60.0
    seed: int = 0
    capacity: FloatArray | None = None

    def __post_init__(self) -> None:
        if not 0 < self.availability <= 1:
            raise ConfigError(f"availability is {self.availability}; it must be in (0, 1]")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}; it must be in [0, 1)")
        if not 0 <= self.noise <= 2:
            raise ConfigError(f"noise is {self.noise}; it must be in [0, 2] (0.1 is about 10 %)")

    @property
    def clients(self) -> int:
        """How many."""
        return len(self.flops)

    def reachable(self, clients: IntArray, now: Seconds) -> IntArray:
        """Those of the clients that are online in the current slot."""
        if self.availability == 1.0:
            return clients
        slot = int(now // self.slot)
        return clients[uniform(self.seed, f"available {slot}", clients) < self.availability]

    def costs(
        self,
        clients: IntArray,
        tickets: Sequence[int],
        flops: FloatArray,
        bytes_down: FloatArray,
        bytes_up: FloatArray,
        parameters: Sequence[int],
        teaching: FloatArray | None = None,
    ) -> list[Cost]:
        """What orders cost, one per client; timing noise multiplies an order's whole duration.

        Args:
            flops: of training.
            teaching: of a teacher on the device.
        """
        taught = np.zeros(len(clients)) if teaching is None else teaching
        factor = np.exp(self.noise * self._normal(tickets)) if self.noise else np.ones(len(clients))
        download = factor * bytes_down / self.bytes_down[clients]
        training = factor * flops / self.flops[clients]
        teacher = factor * taught / self.flops[clients]
        upload = factor * bytes_up / self.bytes_up[clients]
        radio, busy, idle = self.watts_radio[clients], self.watts_training[clients], self.watts_idle[clients]
        return [
            Cost(
                Split(float(download[i]), float(training[i]), float(teacher[i]), float(upload[i])),
                Split(
                    float(download[i] * radio[i]),
                    float(training[i] * busy[i]),
                    float(teacher[i] * busy[i]),
                    float(upload[i] * radio[i]),
                ),
                int(bytes_down[i]),
                int(bytes_up[i]),
                float(flops[i] + taught[i]),
                parameters[i],
                float(idle[i]),
            )
            for i in range(len(clients))
        ]

    def drops_out(self, tickets: Sequence[int]) -> list[float | None]:
        """Per order, the share of it after which the client vanishes; None if it does not."""
        if not self.dropout:
            return [None] * len(tickets)
        share = uniform(self.seed, "drops out", tickets) / self.dropout
        return [float(s) if s < 1 else None for s in share]

    def _normal(self, tickets: Sequence[int]) -> FloatArray:
        radius = np.sqrt(-2 * np.log1p(-uniform(self.seed, "noise radius", tickets)))
        return radius * np.cos(2 * np.pi * uniform(self.seed, "noise angle", tickets))


@dataclass(frozen=True)
class FullReport:
    """A full-model report of an average client: what a reference device is sized by."""

    flops: float
    bytes_down: float
    bytes_up: float


def linear(
    clients: int,
    sigma: float,
    average: FullReport,
    *,
    device_class: str = "balanced",
    report_seconds: float = 10.0,
    seed: int = 0,
) -> DeviceTable:
    """Slowness spread evenly over 1..sigma and dealt out at random: the spread of AdaptCL's and most other experiments.

    The fastest device takes `report_seconds` for an average client's full report, split between download, training and
    upload as its class says; slowness divides all three speeds. Powers are a phone's.

    Raises:
        ConfigError: sigma below 1, or an unknown class.
    """
    if sigma < 1:
        raise ConfigError(f"sigma is {sigma}; it is slowest over fastest, so at least 1")
    if device_class not in CLASSES:
        raise ConfigError(unknown("device class", device_class, CLASSES))
    slowness = np.linspace(1.0, sigma, clients) if clients > 1 else np.ones(1)
    slowness = slowness[stream(seed, "slowness").permutation(clients)]
    watts: dict[str, Any] = {name: np.full(clients, value) for name, value in PHONE_WATTS.items()}
    down, training, up = (share * report_seconds for share in CLASSES[device_class])
    return DeviceTable(
        f"linear 1..{sigma:g}, {device_class}",
        average.flops / training / slowness,
        average.bytes_down / down / slowness,
        average.bytes_up / up / slowness,
        **watts,
        slowness=slowness,
        seed=seed,
    )


PHONE_SAMPLE_FLOPS = 0.6e9
"""FLOPs behind one "sample" of the phone table: a MobileNet-V2 inference at 224x224, which its benchmark resembles. An
assumption of ours that sets the absolute scale of compute and cancels in every ratio between phones."""


def phones(clients: int, average: FullReport, *, seed: int = 0) -> DeviceTable:
    """Phones drawn from the inverse CDFs of 500,000 capacities (compute ms per sample, bandwidth kbit/s; independent).

    Digitised from the plots of FedScale's device table (Lai et al. 2022): compute is bimodal, 47 % below 32 ms and 35 %
    above 130 ms, so a lognormal would be the wrong shape.
    """
    table = json.loads((resources.files("fedprune") / "phones.json").read_text())
    rng = stream(seed, "phones")
    milliseconds = np.interp(rng.uniform(size=clients), table["p"], table["computation_ms"])
    bandwidth = np.interp(rng.uniform(size=clients), table["p"], table["communication_kbps"]) * 1e3 / 8
    flops = PHONE_SAMPLE_FLOPS / (milliseconds / 1e3)
    watts: dict[str, Any] = {name: np.full(clients, value) for name, value in PHONE_WATTS.items()}
    return _with_slowness("phones", flops, bandwidth, bandwidth, watts, average, seed)


def named(mix: Mapping[str, int], clients: int, average: FullReport, *, seed: int = 0) -> DeviceTable:
    """Known devices in the proportions of a mix, e.g. `{"raspberry-pi-4": 3, "jetson-nano": 1}`, dealt out at random.

    Raises:
        ConfigError: an unknown device, or a mix without devices.
    """
    if not mix or sum(mix.values()) < 1:
        raise ConfigError(f"a mix needs at least one device; there is: {', '.join(sorted(DEVICES))}")
    for name in mix:
        if name not in DEVICES:
            raise ConfigError(unknown("device", name, DEVICES))
    deck = [DEVICES[name] for name, count in mix.items() for _ in range(count)]
    order = stream(seed, "named").permutation(clients)
    devices = [deck[i % len(deck)] for i in order]
    values = {field: np.array([getattr(d, field) for d in devices]) for field in PHONE_WATTS}
    flops, down, up = (np.array([getattr(d, f) for d in devices]) for f in ("flops", "bytes_down", "bytes_up"))
    return _with_slowness("named", flops, down, up, values, average, seed)


def _with_slowness(
    name: str,
    flops: FloatArray,
    down: FloatArray,
    up: FloatArray,
    watts: dict[str, Any],
    average: FullReport,
    seed: int,
) -> DeviceTable:
    seconds = average.flops / flops + average.bytes_down / down + average.bytes_up / up
    return DeviceTable(name, flops, down, up, **watts, slowness=seconds / seconds.min(), seed=seed)


def limited(
    table: DeviceTable, share: float, rate: Rate, *, who: Literal["slowest", "random"] = "slowest", seed: int = 0
) -> DeviceTable:
    """The same devices, of which a share (at least one) has memory for no more than the model at this rate.

    Args:
        who: those that are slowest anyhow (of equals, the first), or any.
    """
    if share == 0:
        return table
    order = (
        np.argsort(-table.slowness, kind="stable") if who == "slowest" else stream(seed, "memory").permutation(table.clients)
    )
    capacity = np.ones(table.clients)
    capacity[order[: max(1, round(share * table.clients))]] = rate
    return replace(table, capacity=capacity)


def disturbed(table: DeviceTable, *, noise: float = 0.0, availability: float = 1.0, dropout: float = 0.0) -> DeviceTable:
    """The same devices with timing noise, gaps of availability, and clients that vanish in the middle of an order."""
    return replace(table, noise=noise, availability=availability, dropout=dropout)
