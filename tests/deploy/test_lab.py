"""Namespaces, rates and quotas: that the limits bite, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from signalled import signalled

from fedprune.errors import ConfigError, FleetError
from fedprune.flower.processes import until

sys.path.insert(0, str(Path(__file__).parents[2]))
from simulations import lab as laboratory
from simulations.lab import Limits, lab

LACKING = laboratory.missing()
pytestmark = [pytest.mark.deploy, pytest.mark.skipif(bool(LACKING), reason=" ".join(LACKING))]

BUSY = """
import sys, time
end = time.monotonic() + 2
while time.monotonic() < end:
    pass
print(time.process_time() / 2)
"""
RECEIVE = """
import socket, sys, time
with socket.create_server((sys.argv[1], 5000)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    size, first = 0, None
    while part := connection.recv(65536):
        first = first or time.monotonic()
        size += len(part)
    print(size * 8 / (time.monotonic() - first))
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 5000)) as connection:
    connection.sendall(bytes(int(sys.argv[2])))
"""


def traces(name: str = f"fedprune-{os.getpid()}-") -> list[str]:
    """Whatever of a lab can be seen on this machine."""
    found = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.split()
    found += [name for _, name in socket.if_nameindex() if name.startswith(("port", "uplink", "bridge"))]
    root = laboratory._quota_root()
    assert isinstance(root, Path)
    return [trace for trace in [*found, *(entry.name for entry in root.iterdir())] if name in trace]


def script(place, code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*place.prefix, sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def rate(sender, receiver, size: int) -> float:
    """bit/s of a TCP transfer of `size` bytes, as the receiver sees it."""
    with script(receiver, RECEIVE, receiver.address) as receiving:
        assert receiving.stdout is not None
        assert receiving.stdout.readline() == "ready\n"
        with script(sender, SEND, receiver.address, size) as sending:
            assert sending.wait(20) == 0
        return float(receiving.communicate(timeout=20)[0])


def test_a_busy_loop_gets_its_share_of_a_cpu():
    with lab({"slow": Limits(cpus=0.2), "free": Limits()}) as place:
        shares = {}
        for name, device in place.devices.items():
            with script(device, BUSY) as busy:
                shares[name] = float(busy.communicate(timeout=20)[0])
    assert 0.1 < shares["slow"] < 0.32
    assert shares["free"] > 0.35


def test_what_a_device_starts_shares_its_quota():
    two = """
import subprocess, sys
for child in [subprocess.Popen([sys.executable, "-c", sys.argv[1]]) for _ in "ab"]:
    child.wait()
"""
    with lab({"slow": Limits(cpus=0.2)}) as place, script(place.devices["slow"], two, BUSY) as both:
        shares = [float(line) for line in both.communicate(timeout=30)[0].split()]
    assert len(shares) == 2
    assert sum(shares) < 0.5  # 0.2 if they run at the same time, 0.4 if one after the other, 2 without a quota


def test_uploads_and_downloads_have_their_own_rates():
    with lab({"phone": Limits(upload=1e6, download=4e6), "free": Limits()}) as place:
        phone, free = place.devices["phone"], place.devices["free"]
        assert 0.6e6 < rate(phone, place.server, 200_000) < 1.4e6
        assert 2.4e6 < rate(place.server, phone, 800_000) < 5.6e6
        assert rate(free, place.server, 5_000_000) > 20e6


def test_a_device_sees_the_lab_and_nothing_else():
    with lab({"phone": Limits()}) as place:
        shown = subprocess.run([*place.devices["phone"].prefix, "ip", "route"], capture_output=True, text=True).stdout
        assert shown.split()[0] == "10.73.0.0/24"
        assert len(shown.splitlines()) == 1  # no default route: no way out
        assert not [name for _, name in socket.if_nameindex() if name in ("bridge", "port0", "uplink")]


def test_two_labs_do_not_meet():
    with lab({"a": Limits(cpus=0.5)}) as one, lab({"a": Limits(cpus=0.5)}) as other:
        assert one.server.namespace != other.server.namespace
        assert len(traces()) == 6  # two namespaces and a cgroup each
    assert traces() == []


def test_nothing_stays_and_what_ran_in_it_is_ended():
    left = []
    with pytest.raises(ZeroDivisionError), lab({"phone": Limits(cpus=0.5), "free": Limits()}) as place:
        left += [script(device, "import time; print(1, flush=True); time.sleep(600)") for device in place.devices.values()]
        for process in left:
            assert process.stdout is not None
            process.stdout.readline()
        raise ZeroDivisionError
    for process in left:
        with process:
            assert process.wait(5) == -signal.SIGKILL
    assert traces() == []


def test_a_failure_half_way_leaves_nothing(monkeypatch):
    limit = laboratory._limit_rate

    def fails_on_the_second(namespace: str, interface: str, bits: float | None) -> None:
        if interface == "port1":
            raise FleetError("no more")
        limit(namespace, interface, bits)

    monkeypatch.setattr(laboratory, "_limit_rate", fails_on_the_second)
    with pytest.raises(FleetError, match="no more"), lab({"a": Limits(cpus=0.5), "b": Limits(cpus=0.5), "c": Limits()}):
        raise AssertionError("not reached")
    assert traces() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_takes_the_lab_down(number):
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from simulations.lab import Limits, lab
with lab({{"phone": Limits(cpus=0.5)}}):
    print("up", flush=True)
    time.sleep(60)
"""
    with signalled(code, number, 10) as pid:
        name = f"fedprune-{pid}-"
        assert len(traces(name)) == 3
    assert traces(name) == []


@pytest.mark.parametrize("limits", [Limits(cpus=0), Limits(cpus=0.001), Limits(upload=10), Limits(download=float("nan"))])
def test_limits_out_of_range_are_refused(limits):
    with pytest.raises(ConfigError, match=r"lies outside .* None is no limit"), lab({"phone": limits}):
        raise AssertionError("not reached")
    assert traces() == []


def test_too_many_devices_are_refused():
    with pytest.raises(ConfigError, match="use fewer"), lab({str(number): Limits() for number in range(251)}):
        raise AssertionError("not reached")


def test_a_process_that_ends_late_does_not_keep_the_lab():
    with lab({"phone": Limits(cpus=0.5)}) as place:
        forking = """
import os, time
for _ in range(20):
    if os.fork() == 0:
        time.sleep(600)
print(1, flush=True)
time.sleep(600)
"""
        with script(place.devices["phone"], forking) as parent:
            assert parent.stdout is not None
            parent.stdout.readline()
            parent.kill()
        begun = time.monotonic()
    assert time.monotonic() - begun < 5
    assert until(lambda: traces() == [], 1)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_version_1_cgroups_are_found_beside_version_2(tmp_path):
    (tmp_path / "cpu" / "docker" / "abc").mkdir(parents=True)
    mounts = write(
        tmp_path / "mounts",
        f"cgroup {tmp_path}/cpu cgroup rw,relatime,cpu,cpuacct 0 0\ncgroup2 {tmp_path}/unified cgroup2 rw 0 0\n",
    )
    inside = write(tmp_path / "own", "12:cpuset:/\n4:cpu,cpuacct:/docker/abc\n0::/\n")
    assert laboratory._quota_root(mounts, inside) == tmp_path / "cpu/docker/abc"
    hidden = write(tmp_path / "hidden", "4:cpu,cpuacct:/docker/of-the-host\n")
    assert laboratory._quota_root(mounts, hidden) == tmp_path / "cpu"


def test_version_2_gets_its_controller_switched_on(tmp_path):
    root = tmp_path / "cgroup"
    write(root / "cgroup.controllers", "cpuset cpu io memory\n")
    switch = write(root / "cgroup.subtree_control", "memory\n")
    mounts, own = write(tmp_path / "mounts", f"cgroup2 {root} cgroup2 rw 0 0\n"), write(tmp_path / "own", "0::/\n")
    assert laboratory._quota_root(mounts, own) == root
    assert switch.read_text() == "+cpu"


def test_without_a_cpu_controller_the_cure_is_named(tmp_path):
    mounts, own = write(tmp_path / "mounts", "tmpfs /tmp tmpfs rw 0 0\n"), write(tmp_path / "own", "")
    assert "mount -t cgroup2" in str(laboratory._quota_root(mounts, own))
