"""Unequal devices on one machine: a network namespace each, with the bandwidth and the share of a CPU that we say.

    with lab({"phone": Limits(cpus=0.2, upload=1e6, download=4e6), "laptop": Limits()}) as place:
        link = scene.superlink(host=place.server.address, prefix=place.server.prefix, ...)
        scene.supernode(link, "phone", prefix=place.devices["phone"].prefix, ...)

One namespace is the server's, with a bridge in it; each device's namespace hangs on that bridge by a virtual cable with a token
bucket filter at both ends. Nothing of it is visible in the machine's own network, there is no way out of it, and no packet is
forwarded, so firewalls, routes and a second lab do not matter. The CPU quota is a cgroup's, version 1 or 2. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedprune.errors import ConfigError, FleetError
from fedprune.flower.processes import orderly_exit, until

NETWORK = "10.73.0."  # the same in every lab: each has a network of its own
MOST = 250
PERIOD_MICROSECONDS = 100_000
LEAST_CPUS = 0.01  # a quota under 1 ms per period is refused by the kernel
LEAST_BITS = 8_000.0


@dataclass(frozen=True)
class Limits:
    """What a device has; None is as much as there is.

    Args:
        cpus: CPU seconds per second, 0.01 or more, for everything that runs on the device together.
        upload: bit/s from the device, 8000 or more.
        download: bit/s to the device, 8000 or more.
    """

    cpus: float | None = None
    upload: float | None = None
    download: float | None = None


@dataclass(frozen=True)
class Place:
    """A namespace to start processes in, with `prefix` before their command; `address` is where the others find them."""

    namespace: str
    address: str
    prefix: tuple[str, ...]


@dataclass(frozen=True)
class Lab:
    """The server and the devices."""

    server: Place
    devices: Mapping[str, Place]


@contextlib.contextmanager
def lab(devices: Mapping[str, Limits]) -> Iterator[Lab]:
    """Build it; on leaving, also by an exception, SIGINT or SIGTERM, end what still runs in it and take it down.

    Raises:
        ConfigError: limits out of range.
        FleetError: something is missing, or a step failed; what had been built is gone again.
    """
    _check(devices)
    if lacking := missing():
        raise FleetError("no lab on this machine: " + " ".join(lacking))
    name = f"fedprune-{os.getpid()}-{secrets.token_hex(2)}"
    with orderly_exit() as clean_up, contextlib.ExitStack() as built:
        undo = contextlib.ExitStack()

        def take_down() -> None:
            with clean_up():
                undo.close()

        built.callback(take_down)
        server = _namespace(undo, f"{name}-server", f"{NETWORK}1", None)
        _ip("-n", server.namespace, "link", "add", "bridge", "type", "bridge")
        _ip("-n", server.namespace, "addr", "add", f"{server.address}/24", "dev", "bridge")
        _ip("-n", server.namespace, "link", "set", "bridge", "up")
        places = {}
        for number, (device, limits) in enumerate(devices.items()):
            places[device] = _device(undo, f"{name}-{number}", number, server, limits)
        yield Lab(server, places)


def missing() -> list[str]:
    """What keeps this machine from having a lab, each with its cure; empty if nothing does."""
    if os.name != "posix" or os.geteuid() != 0:
        return ["not root, and network namespaces, traffic control and cgroups need it: use sudo, or a privileged container."]
    if absent := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return [f"no {' and no '.join(absent)} on the path: install iproute2."]
    lacking = []
    try:
        with contextlib.ExitStack() as undo:
            probe = _namespace(undo, f"fedprune-{os.getpid()}-{secrets.token_hex(2)}-probe", "", None).namespace
            _ip("-n", probe, "link", "add", "bridge", "type", "bridge")
            _ip("-n", probe, "link", "add", "one", "type", "veth", "peer", "name", "two")
            _limit_rate(probe, "one", 1e6)
    except FleetError as error:
        lacking.append(f"{error} (the kernel needs namespaces, bridge, veth and sch_tbf; a container needs --privileged).")
    if isinstance(root := _quota_root(), str):
        lacking.append(root)
    return lacking


def _check(devices: Mapping[str, Limits]) -> None:
    if len(devices) > MOST:
        raise ConfigError(f"{len(devices)} devices, and a lab has addresses for {MOST}; use fewer.")
    for device, limits in devices.items():
        if limits.cpus is not None and not LEAST_CPUS <= limits.cpus <= 1024:
            raise ConfigError(f'"{device}": cpus = {limits.cpus} lies outside {LEAST_CPUS}..1024; None is no limit.')
        for name, rate in (("upload", limits.upload), ("download", limits.download)):
            if rate is not None and not LEAST_BITS <= rate <= 1e11:
                raise ConfigError(f'"{device}": {name} = {rate} bit/s lies outside {LEAST_BITS:.0f}..1e11; None is no limit.')


def _device(undo: contextlib.ExitStack, name: str, number: int, server: Place, limits: Limits) -> Place:
    group = None if limits.cpus is None else _quota(undo, name, limits.cpus)
    device = _namespace(undo, name, f"{NETWORK}{number + 2}", group)
    port = f"port{number}"
    # both ends are made where they belong: neither is ever in the machine's own network
    _ip("link", "add", "uplink", "netns", name, "type", "veth", "peer", "name", port, "netns", server.namespace)
    _ip("-n", server.namespace, "link", "set", port, "master", "bridge", "up")
    _ip("-n", name, "addr", "add", f"{device.address}/24", "dev", "uplink")
    _ip("-n", name, "link", "set", "uplink", "up")
    _limit_rate(name, "uplink", limits.upload)
    _limit_rate(server.namespace, port, limits.download)
    return device


def _namespace(undo: contextlib.ExitStack, name: str, address: str, group: Path | None) -> Place:
    undo.callback(_remove_namespace, name)  # before it is there: we may be interrupted in between
    _ip("netns", "add", name)
    _ip("-n", name, "link", "set", "lo", "up")
    # the cgroup first: inside, `ip netns exec` mounts its own /sys, where the cgroups cannot be seen
    join = () if group is None else ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")
    return Place(name, address, (*join, "ip", "netns", "exec", name))


def _remove_namespace(name: str) -> None:
    path = Path("/run/netns") / name
    if not path.exists():
        return
    network = path.stat().st_ino
    _end_all(lambda: _within(network), f"network namespace {name}")
    _ip("netns", "delete", name)


def _within(network: int) -> set[int]:
    """The processes in a network namespace."""
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "ns/net").stat().st_ino == network:
                found.add(int(entry.name))
    return found


def _end_all(members: Callable[[], set[int]], where: str) -> None:
    """SIGKILL for everything that runs there; a pid that was handed on in between is seen not to be a member."""

    def nobody() -> bool:
        for pid in members():
            with contextlib.suppress(ProcessLookupError):
                handle = os.pidfd_open(pid)
                try:
                    if pid in members():
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                finally:
                    os.close(handle)
        return not members()

    if not until(nobody, 5):
        raise FleetError(f"processes {sorted(members())} in {where} do not end; it stays, remove it by hand.")


def _limit_rate(namespace: str, interface: str, bits: float | None) -> None:
    """A token bucket on what leaves through an interface, with 10 ms of it (at least two packets) as the bucket."""
    if bits is not None:
        bucket = max(4000, round(bits / 8 * 0.01))
        words = ("rate", f"{round(bits)}bit", "burst", f"{bucket}b", "latency", "400ms")
        _ip("netns", "exec", namespace, "tc", "qdisc", "add", "dev", interface, "root", "tbf", *words)


def _quota(undo: contextlib.ExitStack, name: str, cpus: float) -> Path:
    root = _quota_root()
    if isinstance(root, str):
        raise FleetError(root)
    group = root / name
    undo.callback(_remove_group, group)
    quota = round(cpus * PERIOD_MICROSECONDS)
    try:
        group.mkdir()
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text(f"{quota} {PERIOD_MICROSECONDS}")
            (group / "cpu.weight").write_text("10000")  # a quota is a limit; the weight makes it a promise on a busy machine
        else:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_MICROSECONDS))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
            (group / "cpu.shares").write_text("262144")
    except OSError as error:
        raise FleetError(f"no CPU quota of {cpus} for {group}: {error}.") from error
    return group


def _remove_group(group: Path) -> None:
    if group.exists():
        _end_all(lambda: {int(pid) for pid in (group / "cgroup.procs").read_text().split()}, f"cgroup {group}")

        def gone() -> bool:
            with contextlib.suppress(OSError):  # busy for a moment after its last process
                group.rmdir()
            return not group.exists()

        if not until(gone, 5):
            raise FleetError(f"cgroup {group} cannot be removed; try rmdir by hand.")


def _quota_root(mounts: Path = Path("/proc/self/mounts"), own: Path = Path("/proc/self/cgroup")) -> Path | str:
    """The folder in which a cgroup with a CPU quota can be made, or a sentence why there is none."""
    rows = [line.split() for line in mounts.read_text().splitlines()]
    for _, point, kind, options, *_ in rows:
        if kind == "cgroup" and "cpu" in options.split(","):
            # inside a container the path of our own group may be that of the host
            path = re.search(r"^\d+:(?:[^:]*,)?cpu(?:,[^:]*)?:(.*)$", own.read_text(), re.MULTILINE)
            inner = Path(point + path[1]) if path else Path(point)
            return _writable(inner if inner.is_dir() else Path(point))
    for _, point, kind, *_ in rows:
        root = Path(point)
        if kind == "cgroup2" and "cpu" in (root / "cgroup.controllers").read_text().split():
            if "cpu" not in (root / "cgroup.subtree_control").read_text().split():
                try:
                    (root / "cgroup.subtree_control").write_text("+cpu")
                except OSError as error:
                    return f"the CPU controller cannot be switched on in {root} ({error}): a container needs --cgroupns=host."
            return _writable(root)
    return "no cgroup with a CPU controller is mounted: mount -t cgroup2 none /sys/fs/cgroup."


def _writable(root: Path) -> Path | str:
    return root if os.access(root, os.W_OK) else f"{root} is not writable: a container needs --privileged."


def _ip(*words: str) -> None:
    command: Sequence[str] = ("ip", *words)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise FleetError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()}")
