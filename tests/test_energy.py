"""Meters count every joule once and never invent one.

No test waits for a clock: sysfs is a folder of files, NVML and zeus are modules made here, and times are arguments.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from meters import FakeMonitor, FakeNvml, Hand, NVMLError, measurement, zone

from fedprune.energy import METERS, Spans, Sum, find, idle_watts
from fedprune.energy.gpus import Counted, Sampled
from fedprune.energy.meters import Meter
from fedprune.energy.rapl import RaplMeter, packages
from fedprune.energy.watch import Watch
from fedprune.errors import ConfigError, FedpruneError

# ---- RAPL


@pytest.fixture
def opened():
    """Meters that are closed after the test, so that no thread outlives it."""
    meters: list[Meter] = []
    yield lambda meter: meters.append(meter) or meter
    for meter in meters:
        meter.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("fedprune")]


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch):
    """A machine with neither package."""
    for name in ("pynvml", "zeus", "zeus.monitor"):
        monkeypatch.setitem(sys.modules, name, None)


def test_packages_add_up_and_their_parts_do_not_count_twice(tmp_path: Path, opened: Callable):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 7_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 900_000_000)
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core", 5),
        zone(tmp_path, "intel-rapl:0:1", "dram", 5),
        zone(tmp_path, "intel-rapl:2", "psys", 5),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5),
    ]
    (tmp_path / "intel-rapl").mkdir()
    meter = opened(find("rapl", powercap=tmp_path))
    assert meter.source == "rapl"
    assert meter.joules() == 0.0, "joules count from the opening of the meter"
    first.write_text("9500000\n")
    second.write_text("900000001\n")
    for other in others:
        other.write_text("999999999\n")
    assert meter.joules() == pytest.approx(2.500001, abs=1e-12)


def test_the_whole_board_counts_where_packages_do_not(tmp_path: Path):
    zone(tmp_path, "intel-rapl:0", "psys", 5)
    assert [folder.name for folder in packages(tmp_path)] == ["intel-rapl:0"]


def test_a_counter_that_starts_again_goes_on_counting(tmp_path: Path, opened: Callable):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 59_000_000, range_uj=65_000_000)
    meter = opened(find("rapl", powercap=tmp_path))
    total = []
    for uj in (64_000_000, 1_000_000, 60_000_000, 60_000_000, 2_000_000):
        counter.write_text(str(uj))
        total.append(meter.joules())
    assert total == [5.0, 7.0, 66.0, 66.0, 73.0]


def test_a_wrap_that_nobody_asked_about_is_seen_by_the_watch(tmp_path: Path, opened: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fedprune.energy.rapl.LOOK", 0.001)
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0, range_uj=65_000_000)
    looked, advance = threading.Semaphore(0), RaplMeter._advance

    def counted(self: RaplMeter) -> float:
        joules = advance(self)
        looked.release()
        return joules

    monkeypatch.setattr(RaplMeter, "_advance", counted)
    meter = opened(find("rapl", powercap=tmp_path))
    for uj in (40_000_000, 10_000_000, 50_000_000):
        (tmp_path / "next").write_text(str(uj))
        (tmp_path / "next").replace(counter)  # at once, or the watch might read an empty file
        for _ in range(2):  # the first look may have begun before
            while looked.acquire(blocking=False):
                pass
            assert looked.acquire(timeout=60)
    assert meter.joules() == 40 + 35 + 40


def test_a_counter_for_root_only_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing: None):
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    read = Path.read_text

    def refuse(self: Path, *args, **kwargs) -> str:  # root, who may run the tests, reads whatever its mode
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(self))
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(ConfigError, match=r"energy_uj is there, but only root may read it\. Run as root, or .*sudo chmod a\+r"):
        find("rapl", powercap=tmp_path)
    assert find(powercap=tmp_path) is None


@pytest.mark.parametrize("content", ["", "12.5", "-3"])
def test_a_counter_that_holds_no_number_is_no_meter(tmp_path: Path, content: str):
    zone(tmp_path, "intel-rapl:0", "package-0", 1).write_text(content)
    with pytest.raises(ConfigError, match="not a number of microjoules"):
        find("rapl", powercap=tmp_path)


def test_a_zone_without_a_range_is_no_meter(tmp_path: Path):
    (zone(tmp_path, "intel-rapl:0", "package-0", 1).parent / "max_energy_range_uj").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        find("rapl", powercap=tmp_path)


def test_a_counter_that_vanishes_raises(tmp_path: Path, opened: Callable):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    meter = opened(find("rapl", powercap=tmp_path))
    counter.unlink()
    with pytest.raises(FileNotFoundError):
        meter.joules()


def test_a_closed_meter_is_refused(tmp_path: Path, nvml: FakeNvml):
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    for name in ("rapl", "nvml"):
        meter = find(name, powercap=tmp_path)
        assert meter is not None
        meter.close()
        meter.close()
        with pytest.raises(FedpruneError, match="was closed"):
            meter.joules()
    assert nvml.opened == 0


# ---- the watch


def test_a_failure_in_the_background_is_raised_at_the_next_reading():
    failed = threading.Event()

    def task() -> None:
        failed.set()
        raise OSError("gone")

    watch = Watch(task, 0.001, "test meter")
    watch.start()
    assert failed.wait(60)
    watch.stop()
    with pytest.raises(FedpruneError, match="test meter failed") as error:
        watch.check()
    assert isinstance(error.value.__cause__, OSError)


# ---- NVML


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake.module())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_gpus_add_up(nvml: FakeNvml, opened: Callable):
    meter = opened(find("nvml"))
    assert (meter.source, meter.joules()) == ("nvml", 0.0)
    nvml.gpus["GPU-a"]["mj"] += 1500
    nvml.gpus["GPU-b"]["mj"] += 250
    assert meter.joules() == 1.75


@pytest.mark.parametrize(
    "named, joules", [("0", 1.0), ("1", 2.0), ("1, 0", 3.0), ("1,1", 2.0), ("GPU-b", 2.0), ("0,-1,1", 1.0), ("0,7,1", 1.0)]
)
def test_only_gpus_of_this_process_count(
    nvml: FakeNvml, opened: Callable, monkeypatch: pytest.MonkeyPatch, named: str, joules: float
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    meter = opened(find("nvml"))
    nvml.gpus["GPU-a"]["mj"] += 1000
    nvml.gpus["GPU-b"]["mj"] += 2000
    assert meter.joules() == joules


@pytest.mark.parametrize("named", ["", "-1"])
def test_without_a_visible_gpu_there_is_no_meter(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, named: str):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    with pytest.raises(ConfigError, match=r"no GPU to this process.*CUDA_VISIBLE_DEVICES"):
        find("nvml")
    assert nvml.opened == 0, "what was opened for the probe is closed again"


def test_power_is_integrated_by_trapezoids():
    hand, watts = Hand(), [10.0]
    gpu = Sampled(lambda: round(watts[0] * 1e3), hand.clock, period=3600)
    for seconds, then in ((2.0, 30.0), (1.0, 30.0), (0.5, 0.0)):
        hand.now += seconds
        watts[0] = then
        gpu.joules()
    assert gpu.joules() == 2.0 * 20 + 1.0 * 30 + 0.5 * 15


def test_a_gpu_that_tells_only_its_power_is_sampled(nvml: FakeNvml, opened: Callable, monkeypatch: pytest.MonkeyPatch):
    nvml.gpus["GPU-b"] = {"mw": 50_000}
    sampled, tells = threading.Semaphore(0), nvml.nvmlDeviceGetPowerUsage

    def counted(gpu: str) -> int:
        sampled.release()
        return tells(gpu)

    monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetPowerUsage", counted)
    meter = opened(find("nvml"))
    nvml.gpus["GPU-a"]["mj"] += 1000
    for _ in range(4):  # one at opening, the others by the thread alone
        assert sampled.acquire(timeout=60)
    first = meter.joules()
    assert first > 1.0
    assert meter.joules() > first
    del nvml.gpus["GPU-b"]["mw"]
    with pytest.raises((NVMLError, FedpruneError)):
        meter.joules()


def test_a_gpu_that_tells_nothing_spoils_the_sum(nvml: FakeNvml, opened: Callable):
    nvml.gpus = {"GPU-a": {"mw": 1}, "GPU-b": {}}
    with pytest.raises(ConfigError, match=r"neither its energy nor its power \(Not Supported\)"):
        find("nvml")
    assert nvml.opened == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fedprune")]


def test_a_gpu_that_is_lost_raises(nvml: FakeNvml, opened: Callable):
    meter = opened(find("nvml"))
    nvml.gpus["GPU-a"].clear()
    with pytest.raises(NVMLError):
        meter.joules()


def test_a_counter_of_a_gpu_that_falls_raises():
    values = iter([5000, 6000, 10])
    gpu = Counted(lambda: next(values))
    assert gpu.joules() == 1.0
    with pytest.raises(FedpruneError, match="driver was reloaded"):
        gpu.joules()


def test_without_a_driver_there_is_no_meter(nvml: FakeNvml):
    nvml.driver = False
    with pytest.raises(ConfigError, match=r"NVML does not start \(Driver Not Loaded\).*nvidia-smi"):
        find("nvml")


# ---- zeus


@pytest.fixture
def zeus(monkeypatch: pytest.MonkeyPatch, nothing: None) -> FakeMonitor:
    fake = FakeMonitor()
    module = ModuleType("zeus.monitor")
    module.ZeusMonitor = lambda: fake  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "zeus", ModuleType("zeus"))
    monkeypatch.setitem(sys.modules, "zeus.monitor", module)
    return fake


@pytest.mark.parametrize(
    "measured, joules",
    [
        (measurement(gpu_energy={0: 1.0, 1: 2.5}), 3.5),
        (measurement(gpu_energy={0: 1.0}, cpu_energy={0: 2.0}, dram_energy={0: 0.5}), 3.5),
        (measurement(gpu_energy={0: 9.0}, soc_energy=SimpleNamespace(total_energy_mj=4000.0, gpu_energy_mj=1000.0)), 4.0),
        (measurement(soc_energy=SimpleNamespace(total_energy_mj=None, cpu_energy_mj=500.0, gpu_energy_mj=1000.0)), 1.5),
        (measurement(soc_energy=SimpleNamespace(cpu_total_mj=700, gpu_mj=200, dram_mj=None, efficiency_cores_mj=[9])), 0.9),
    ],
    ids=["gpus", "gpu and processor", "jetson", "jetson without total", "apple"],
)
def test_zeus_adds_up_what_it_sees(zeus: FakeMonitor, opened: Callable, measured: SimpleNamespace, joules: float):
    meter = opened(find("zeus"))
    assert (meter.source, meter.joules()) == ("zeus", 0.0)
    zeus.ahead += [measured, measured]
    assert meter.joules() == pytest.approx(joules)
    assert meter.joules() == pytest.approx(2 * joules)


def test_zeus_that_sees_nothing_is_no_meter(zeus: FakeMonitor, tmp_path: Path):
    zeus.empty = measurement()
    with pytest.raises(ConfigError, match="zeus sees no GPU"):
        find("zeus")
    assert not zeus.windows
    assert find(powercap=tmp_path) is None


def test_zeus_that_goes_blind_raises_from_then_on(zeus: FakeMonitor, opened: Callable):
    meter = opened(find("zeus"))
    zeus.ahead.append(measurement())
    with pytest.raises(FedpruneError, match="sees no GPU"):
        meter.joules()
    with pytest.raises(FedpruneError, match="was closed"):
        meter.joules()


# ---- which one


def test_auto_adds_gpus_and_processors(tmp_path: Path, nvml: FakeNvml, opened: Callable):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = opened(find(powercap=tmp_path))
    counter.write_text("2000000")
    nvml.gpus["GPU-a"]["mj"] += 1000
    assert (meter.source, meter.joules()) == ("nvml+rapl", 3.0)
    counter.unlink()
    with pytest.raises(FileNotFoundError):
        meter.joules()


def test_auto_takes_what_there_is(tmp_path: Path, nvml: FakeNvml, zeus: FakeMonitor, opened: Callable, monkeypatch):
    assert opened(find(powercap=tmp_path)).source == "zeus"
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    assert opened(find(powercap=tmp_path)).source == "rapl"
    monkeypatch.setitem(sys.modules, "pynvml", nvml.module())
    assert opened(find(powercap=tmp_path / "elsewhere")).source == "nvml"


def test_auto_says_in_the_log_why_there_is_no_meter(tmp_path: Path, nothing: None, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", "fedprune.energy"):
        assert find(powercap=tmp_path) is None
    assert [message.split(":")[0] for message in caplog.messages] == ["no nvml meter", "no rapl meter", "no zeus meter"]


@pytest.mark.parametrize(
    "name, cure", [("nvml", "pip install"), ("rapl", "modprobe intel_rapl_msr"), ("zeus", "pip install zeus")]
)
def test_a_meter_asked_for_by_name_must_be_there(tmp_path: Path, nothing: None, name: str, cure: str):
    with pytest.raises(ConfigError, match=cure):
        find(name, powercap=tmp_path)


def test_none_is_none_and_an_unknown_name_is_refused():
    assert find("none") is None
    with pytest.raises(ConfigError, match=r'unknown meter "rappl".*Did you mean "rapl"'):
        find("rappl")
    assert METERS[0] == "auto"


def test_a_sum_closes_all():
    meters = [Hand("a"), Hand("b")]
    Sum(meters).close()
    assert all(meter.closed for meter in meters)


# ---- a real GPU


@pytest.mark.gpu
def test_a_real_gpu_counts_its_work(opened: Callable):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    try:
        meter = opened(find("nvml"))
    except ConfigError as error:
        pytest.skip(f"no NVML: {error}")
    watts = idle_watts(meter, 1.0)
    spans = Spans(meter)
    with spans("training"):
        matrix = torch.randn(4096, 4096, device="cuda")
        for _ in range(200):
            matrix = torch.nn.functional.normalize(matrix @ matrix)
        torch.cuda.synchronize()
    span = spans.of("training")
    assert watts > 1.0
    assert span.joules is not None
    assert span.joules > 0.0
