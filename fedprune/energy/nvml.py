"""Joules of NVIDIA GPUs, from the NVIDIA management library (NVML) through the package `nvidia-ml-py` (module `pynvml`).

Source: NVML API reference, nvmlDeviceGetTotalEnergyConsumption (millijoules since the driver was loaded, Volta and newer)
and nvmlDeviceGetPowerUsage (milliwatts; the mean of the last second on Ampere and newer).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fedprune.energy.gpus import Counted, Sampled
from fedprune.errors import ConfigError, FedpruneError
from fedprune.types import Joules


class NvmlMeter:
    """All GPUs of this process together, from the moment of opening.

    A GPU updates its counter every 20 to 100 ms: parts that are shorter than that are not resolved one by one, only in sum.
    """

    source = "nvml"

    def __init__(self, gpus: list[Counted | Sampled], shutdown: Callable[[], object]) -> None:
        self._gpus = gpus
        self._shutdown = shutdown
        self._closed = False

    def joules(self) -> Joules:
        """Since opening; never falls.

        Raises:
            pynvml.NVMLError, FedpruneError: a GPU or the driver went away, or the meter was closed.
        """
        if self._closed:
            raise FedpruneError("the NVML meter was closed; find a new one to measure on")
        return sum(gpu.joules() for gpu in self._gpus)

    def close(self) -> None:
        """End background threads and let go of the driver; the meter cannot be read any more."""
        if self._closed:
            return
        self._closed = True
        for gpu in self._gpus:
            gpu.close()
        self._shutdown()


def open_nvml() -> NvmlMeter:
    """The meter of the GPUs that this process may use.

    Raises:
        ConfigError: no package, no driver, no GPU, or a GPU that tells neither energy nor power.
    """
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError as error:
        raise ConfigError('no NVML: the package nvidia-ml-py is missing. pip install "fedprune[flower]"') from error
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise ConfigError(f"NVML does not start ({error}); it needs the NVIDIA driver, with which nvidia-smi works") from error
    gpus: list[Counted | Sampled] = []
    try:
        for handle in visible(nvml, os.environ.get("CUDA_VISIBLE_DEVICES")):
            gpus.append(_gpu(nvml, handle))
        if not gpus:
            raise ConfigError("NVML shows no GPU to this process; see nvidia-smi, and CUDA_VISIBLE_DEVICES if it is set")
    except (nvml.NVMLError, ConfigError) as error:
        NvmlMeter(gpus, nvml.nvmlShutdown).close()
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"a GPU tells neither its energy nor its power ({error}), and a sum without it would be too low. Name only the "
            "others in CUDA_VISIBLE_DEVICES, or measure with zeus: NVML cannot on a Jetson, nor on slices of a GPU (MIG)."
        ) from error
    return NvmlMeter(gpus, nvml.nvmlShutdown)


def visible(nvml: ModuleType, named: str | None) -> list[Any]:
    """Handles of the GPUs that CUDA_VISIBLE_DEVICES names, or of all where it is None, so that two clients on one machine
    do not both pay for both GPUs.

    As in CUDA, the first entry that names no GPU ends the list. NVML numbers GPUs by PCI bus; where they are of different
    kinds, CUDA does the same only with CUDA_DEVICE_ORDER=PCI_BUS_ID, or name them as GPU-<uuid>.
    """
    count = nvml.nvmlDeviceGetCount()
    if named is None:
        return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
    handles: list[Any] = []
    for entry in dict.fromkeys(part.strip() for part in named.split(",")):
        if entry.startswith(("GPU-", "MIG-")):
            handles.append(nvml.nvmlDeviceGetHandleByUUID(entry))
        elif entry.isdecimal() and int(entry) < count:
            handles.append(nvml.nvmlDeviceGetHandleByIndex(int(entry)))
        else:
            break
    return handles


def _gpu(nvml: ModuleType, handle: Any) -> Counted | Sampled:
    try:
        return Counted(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
    except nvml.NVMLError:  # older than Volta, or a virtual GPU
        return Sampled(lambda: nvml.nvmlDeviceGetPowerUsage(handle)).start()
