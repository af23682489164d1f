"""What a compact model costs where it recommends: bytes on disk, operations, milliseconds, and joules where a meter exists."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedprune.energy import Meter, Spans
from fedprune.errors import ConfigError
from fedprune.export.model import Compact
from fedprune.types import Seconds, Tensors

TOP = 10
"""Items in a recommendation."""


def measure(
    compact: Compact, private: Tensors, meter: Meter | None = None, *, repetitions: int = 7, at_least: Seconds = 0.1
) -> dict[str, Any]:
    """All figures of one model on this machine, as `measure_all`."""
    return measure_all({"": compact}, private, meter, repetitions=repetitions, at_least=at_least)[""]


def measure_all(
    models: Mapping[str, Compact],
    private: Tensors,
    meter: Meter | None = None,
    *,
    repetitions: int = 7,
    at_least: Seconds = 0.1,
) -> dict[str, dict[str, Any]]:
    """Several models side by side.

    A recommendation is the top 10 of the whole catalogue for one user; users come one at a time, on one thread. Latency is
    the median over repetitions, each over all given users, after one to warm up. Models and kernels take turns, so that what
    else this machine does meanwhile slows all of them alike.

    Two kernels are tried: "dense" multiplies the cut tensors with their zeros; "packed" skips the zeros of the item table
    (`Compact.packed`), where there is one. `latency_ms` and `joules` are the faster one's, and `kernel` says which it is.

    Args:
        private: private rows of some users, whole, or at the held widths of all models. Time does not depend on their values.
        meter: joules are raw, the idle share included, and of the whole device.
        at_least: repetitions go on until each kernel has worked this long. Counters move every 0.1 s, so joules want seconds.

    Returns:
        Per model: file_bytes, parameters, flops, flops_dense, kernel, latency_ms, latency_dense_ms, latency_packed_ms (None
        without such a kernel) and joules (None without a meter); latencies and joules per 1,000 recommendations.

    Raises:
        ConfigError: no user, or no repetition.
        LayoutError: rows that fit a model neither whole nor cut.
    """
    users = min((len(rows) for rows in private.values()), default=0)
    if users < 1 or repetitions < 1:
        raise ConfigError(f"{users} users and {repetitions} repetitions; latency needs at least one of each")
    threads, spans = torch.get_num_threads(), Spans(meter)
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            kernels = [kernel for name, model in models.items() for kernel in _kernels(name, model, private)]
            for kernel in kernels:
                kernel.recommend()
            while any(len(kernel.took) < repetitions or sum(kernel.took) < at_least for kernel in kernels):
                for kernel in kernels:
                    with spans(f"{kernel.model}/{kernel.name}"):
                        began = time.perf_counter()
                        kernel.recommend()
                        kernel.took.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return {n: _figures(model, [k for k in kernels if k.model == n], users, spans) for n, model in models.items()}


@dataclass
class _Kernel:
    model: str
    name: str
    score: Callable[[Tensors], Tensor]
    each: list[Tensors]
    top: int
    took: list[Seconds] = field(default_factory=list)

    def recommend(self) -> None:
        for row in self.each:
            self.score(row).topk(self.top)


def _kernels(name: str, model: Compact, private: Tensors) -> list[_Kernel]:
    rows = model.rows(private)
    users = min(len(own) for own in rows.values())
    each = [{tensor: own[user : user + 1] for tensor, own in rows.items()} for user in range(users)]
    packed, top = model.packed(), min(TOP, model.items)
    found = [_Kernel(name, "dense", model.forward, each, top)]
    return found if packed is None else [*found, _Kernel(name, "packed", packed, each, top)]


def _figures(model: Compact, kernels: list[_Kernel], users: int, spans: Spans) -> dict[str, Any]:
    latency = {kernel.name: statistics.median(kernel.took) / users * 1e6 for kernel in kernels}  # 1,000 of them, in ms
    best = min(kernels, key=lambda kernel: latency[kernel.name])
    joules = spans.of(f"{best.model}/{best.name}").joules
    with tempfile.TemporaryDirectory() as folder:
        file_bytes = model.save(Path(folder) / "compact.safetensors")
    return {
        "file_bytes": file_bytes,
        "parameters": model.parameters,
        "flops": model.flops,
        "flops_dense": model.flops_dense,
        "kernel": best.name,
        "latency_ms": latency[best.name],
        "latency_dense_ms": latency["dense"],
        "latency_packed_ms": latency.get("packed"),
        "joules": None if joules is None else joules / (len(best.took) * users) * 1e3,
    }
