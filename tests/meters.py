"""Stand-ins for what measures joules: a meter moved by hand, a sysfs tree, NVML and zeus."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace


@dataclass
class Hand:
    """A meter and a clock that move when told."""

    source: str = "hand"
    now: float = 0.0
    counted: float = 0.0
    closed: bool = False

    def joules(self) -> float:
        return self.counted

    def clock(self) -> float:
        return self.now

    def close(self) -> None:
        self.closed = True

    def work(self, seconds: float, watts: float = 4.0) -> None:
        self.now += seconds
        self.counted += seconds * watts


def zone(root: Path, number: str, name: str, uj: int, range_uj: int = 1_000_000_000) -> Path:
    folder = root / number
    folder.mkdir(parents=True)
    for file, value in (("name", name), ("energy_uj", uj), ("max_energy_range_uj", range_uj)):
        (folder / file).write_text(f"{value}\n")
    return folder / "energy_uj"


class NVMLError(Exception):
    pass


@dataclass
class FakeNvml:
    """GPUs as dicts of what they tell: `mj`, `mw`; what is not there is not supported."""

    gpus: dict[str, dict[str, int]] = field(default_factory=lambda: {"GPU-a": {"mj": 10_000}, "GPU-b": {"mj": 500}})
    driver: bool = True
    opened: int = 0

    def module(self) -> ModuleType:
        module = ModuleType("pynvml")
        for name in (name for name in dir(self) if name.startswith("nvml")):
            setattr(module, name, getattr(self, name))
        module.NVMLError = NVMLError  # pyright: ignore[reportAttributeAccessIssue]
        return module

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError("Driver Not Loaded")
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return list(self.gpus)[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.gpus:
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: str) -> int:
        return self._tells(gpu, "mj")

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        return self._tells(gpu, "mw")

    def _tells(self, gpu: str, what: str) -> int:
        if what not in self.gpus[gpu]:
            raise NVMLError("Not Supported")
        return self.gpus[gpu][what]


@dataclass
class FakeMonitor:
    """A ZeusMonitor whose windows return the measurements that were put into `ahead`, or else `empty`."""

    ahead: list[SimpleNamespace] = field(default_factory=list)
    empty: SimpleNamespace = field(default_factory=lambda: measurement(gpu_energy={0: 0.0}))
    windows: list[str] = field(default_factory=list)

    def begin_window(self, key: str, sync_execution: bool = True) -> None:
        assert key not in self.windows
        assert not sync_execution
        self.windows.append(key)

    def end_window(self, key: str, sync_execution: bool = True) -> SimpleNamespace:
        self.windows.remove(key)
        return self.ahead.pop(0) if self.ahead else self.empty


def measurement(**fields) -> SimpleNamespace:
    return SimpleNamespace(**({"gpu_energy": {}, "cpu_energy": None, "dram_energy": None, "soc_energy": None} | fields))
