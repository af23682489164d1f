"""A run of fedprune on three real devices, for tests that do something to it: servers, SuperNodes, processes by pid."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import files
import polars as pl
from flwr.app import Error, Message, RecordDict
from grid import HereGrid
from safetensors import safe_open

from fedprune.config import read
from fedprune.flower.deployment import deploy
from fedprune.flower.device import perform
from fedprune.flower.keys import Keys
from fedprune.flower.nodes import Nodes
from fedprune.flower.processes import MARK, Staged, send_signal, until
from fedprune.flower.staging import Scene, SuperLink, SuperNode, stage

APP = Path(__file__).parents[2]
HOSTILE = Path(__file__).parent / "hostile_app"
DEVICES = 3
SETTINGS = """
silos = 3
latent = 4
warm_start = 0
evaluations = 1
checkpoint = 1
rounds = {rounds}
"""
SECONDS = 180.0
"""Anything that is waited for comes within that or fails the test; Flower takes 60 s to notice that a process is dead."""


@dataclass
class Ordeal:
    """A deployment and its run; clients are numbered 0 to 2."""

    scene: Scene
    link: SuperLink
    settings: Path
    keys: Keys | None
    nodes: dict[int, SuperNode] = field(default_factory=dict)

    # ---- starting --------------------------------------------------------------------------------------------------

    def start_device(self, client: int, script: str = "fedprune-supernode", **config: str | int | bool) -> SuperNode:
        """A SuperNode that reads its share of the settings' data, and keeps its rows in a folder of its own."""
        key = None if self.keys is None else self.keys.private(f"d{client}")
        settings = {"partition-id": client, "state": str(self.state(client)), "meter": "none", **config}
        self.nodes[client] = self.scene.supernode(self.link, f"d{client}", settings, key=key, script=script)
        return self.nodes[client]

    def run(self, app: Path = APP, **config: str | float) -> Staged:
        """Start the run, or go on with it."""
        return self.link.run(app, {"config": str(self.settings), "out": str(self.out), "wait-seconds": SECONDS, **config})

    # ---- what there is on disk -------------------------------------------------------------------------------------

    @property
    def out(self) -> Path:
        """Where the run folder is."""
        return self.scene.folder / "runs"

    def state(self, client: int) -> Path:
        """Where a device keeps its private rows."""
        return self.scene.folder / f"state{client}"

    def steps(self, client: int) -> list[int]:
        """How many steps a device's private rows have been trained, as its disk has it; one number per user that differs."""
        (path,) = self.state(client).rglob("*.safetensors")
        with safe_open(path, "pt") as file:
            counts = file.get_tensor("after.steps")
        return sorted({int(count) for count in counts.flatten() if count})

    def ticket(self, client: int) -> int:
        """The last order that a device's private rows were trained for."""
        (path,) = self.state(client).rglob("*.safetensors")
        with safe_open(path, "pt") as file:
            return int(file.metadata()["ticket"])

    @property
    def record(self) -> Path | None:
        """The run's folder, once there is one."""
        return next(iter(self.out.glob("*/seed0")), None)

    def events(self) -> list[dict]:
        """Rounds that are in the record, the beginning (version -1) first."""
        path = None if self.record is None else self.record / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path is not None and path.exists() else []

    def ledger(self) -> list[dict]:
        """One row per order."""
        assert self.record is not None
        return [row for part in sorted(self.record.glob("ledger/*.parquet")) for row in pl.read_parquet(part).to_dicts()]

    def merged(self) -> dict[int, list[int]]:
        """By version, whose updates were merged."""
        rows = self.ledger()
        return {
            version: sorted(row["client"] for row in rows if row["version"] == version and not row["discarded"])
            for version in sorted({row["version"] for row in rows})
        }

    def lost(self) -> dict[tuple[int, int], tuple[str, str]]:
        """By version and client, why an order came to nothing: reason and detail."""
        rows = self.ledger()
        return {(r["version"], r["client"]): (r["reason"], r["detail"] or "") for r in rows if r["discarded"]}

    # ---- waiting ---------------------------------------------------------------------------------------------------

    def await_that(self, true: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
        """Fail, with the server's log, if it is not true in time."""
        assert until(true, seconds), f"not within {seconds:g} s: {what}\n{self.tails()}"

    def await_rounds(self, count: int, seconds: float = SECONDS) -> None:
        """Until so many rounds are in the record."""
        running = self.link.runs[-1]
        until(lambda: len(self.events()) > count or not running.running, seconds)
        there = len(self.events()) - 1
        assert there >= count, f"{there} rounds, not {count}, within {seconds:g} s\n{self.tails()}"

    def await_end(self, run: Staged, seconds: float = SECONDS) -> None:
        """Until the run has written its summary."""
        self.await_that(lambda: self.finished or not run.running, "the run's end", seconds)
        assert self.finished, f"the run ended without a summary\n{self.tails()}"

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return self.record is not None and (self.record / "summary.json").exists()

    def tails(self) -> str:
        """The ends of the server's logs; what it says of every HTTP request left out."""
        said = []
        for staged in [*self.link.runs[-1:], self.link]:
            lines = [line for line in staged.printed().splitlines() if "uvicorn.access" not in line]
            said += [f"the end of {staged.log}:", *lines[-40:]]
        return "\n".join(said)

    # ---- doing something to it -------------------------------------------------------------------------------------

    def resident(self, client: int) -> int:
        """The pid of a device's resident process."""
        found: list[int] = []

        def there() -> bool:
            found[:] = [pid for pid, words in self.nodes[client].processes().items() if "fedprune.flower.resident" in words]
            return len(found) == 1

        self.await_that(there, f"one resident process of device {client}")
        return found[0]

    def signal(self, client: int, pid: int, number: signal.Signals) -> None:
        """To one process of a device."""
        send_signal(pid, number, self.nodes[client].environment[MARK])

    @contextmanager
    def at_work(self, *clients: int) -> Iterator[list[int]]:
        """Inside, these devices are in the middle of an order; the pids of their clients' processes.

        Their resident processes stand still meanwhile, so that the middle lasts as long as it is needed and takes no CPU.
        """
        residents = {client: self.resident(client) for client in clients}
        for client, pid in residents.items():
            self.signal(client, pid, signal.SIGSTOP)
        try:
            for client, pid in residents.items():
                # The end that the resident process has not taken up yet is listed with the path of its socket.
                socket = self.nodes[client].processes()[pid][-2]
                self.await_that(partial(self._waits, client, socket), f"an order at device {client}")
            yield [self.working(client)[-1] for client in clients]
        finally:
            for client, pid in residents.items():
                self.signal(client, pid, signal.SIGCONT)

    def _waits(self, client: int, socket: str) -> bool:
        return bool(self.working(client)) and Path("/proc/net/unix").read_text().count(socket) > 1

    def working(self, client: int) -> list[int]:
        """Pids of a device's client processes of the present round; one of the last may just be leaving."""
        assert self.record is not None
        since, pids = (self.record / "events.jsonl").stat().st_mtime, []
        for pid in self.nodes[client].client_processes():
            with contextlib.suppress(OSError):
                ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
                age = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
                if time.time() - age > since:
                    pids.append(pid)
        return pids

    # ---- what it should have come to -------------------------------------------------------------------------------

    def retold(self, folder: Path, trained: Collection[tuple[int, int]] = ()) -> list[str]:
        """Digests of the models, round by round, of the same run in this process, where the same orders come to nothing.

        Args:
            trained: (version, client) of lost orders that the device did work on, so that its private rows moved.
        """
        settings = read(self.settings, [])
        rows = self.ledger()
        asked = {version: sorted(r["client"] for r in rows if r["version"] == version) for version in range(settings.rounds)}
        lost = self.lost()
        begun = [0]

        def client(node: int, message: Message) -> RecordDict | Error:
            action = message.metadata.message_type.removeprefix("query.")
            fails = action == "train" and (begun[0], node) in lost
            if fails and (begun[0], node) not in trained:
                return Error(2, "lost")
            answer = perform(action, message.content, config(node), 0.0)
            return Error(2, "lost") if fails else answer

        def config(node: int) -> Mapping[str, str | int]:
            return {"partition-id": node, "state": str(folder / "state"), "meter": "none"}

        def watch(event: dict) -> None:
            begun[0] = event["version"] + 1
            grid.nodes = asked.get(begun[0], list(range(DEVICES)))

        grid = HereGrid(range(DEVICES), client)
        deploy(settings, folder / "runs", grid, watch=watch, nodes=Nodes(grid, sleep=lambda seconds: None))
        (events,) = (folder / "runs").glob("*/seed0/events.jsonl")
        return [json.loads(line)["model"] for line in events.read_text().splitlines()[1:]]

    def check_books(self, rounds: int) -> None:
        """No round twice or left out, no order twice, and what is counted is what was merged."""
        events, rows = self.events(), self.ledger()
        assert [event["version"] for event in events] == list(range(-1, rounds))
        assert len({(row["version"], row["client"]) for row in rows}) == len(rows)
        assert len({row["ticket"] for row in rows}) == len(rows)
        for event in events[1:]:
            own = [row for row in rows if row["version"] == event["version"]]
            good = [row for row in own if not row["discarded"]]
            assert (event["asked"], event["reports"], event["lost"]) == (len(own), len(good), len(own) - len(good))
            assert event["examples"] == sum(row["examples"] for row in good)
            said = [row["detail"] for row in own if row["reason"] in ("refused", "failed")]
            assert sorted(event.get("refused", [])) == sorted(said)
            assert all(said)


@contextmanager
def ordeal(
    folder: Path, rounds: int, *, more: str = "", keys: Keys | None = None, online: bool = True, **link: bool
) -> Iterator[Ordeal]:
    """A SuperLink and, if `online`, three devices on their way to it; what fails inside comes with the server's logs."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = files.settings(folder, SETTINGS.format(rounds=rounds) + more)
    with stage(folder / "scene") as scene:
        server = scene.superlink(keys=keys, auth=keys is not None, **link)
        trial = Ordeal(scene, server, settings, keys)
        for client in range(DEVICES) if keys else []:
            server.register(keys.public(f"d{client}"))
        for client in range(DEVICES) if online else []:
            trial.start_device(client)
        try:
            yield trial
        except Exception as error:
            error.add_note(trial.tails())
            raise
        finally:
            for staged in [*scene.started, *server.runs]:
                staged.kill()  # an orderly end would take half a minute, in which they look for each other
