"""A whole deployment on one machine, as child processes: a SuperLink, SuperNodes and runs, for tests and for the testbed.

    with stage(folder) as scene:
        link = scene.superlink()
        nodes = [scene.supernode(link, f"phone-{i}", {"partition-id": i}) for i in range(3)]
        link.wait_online(3)
        link.run(app_folder, {"num-server-rounds": 2}).wait(60)

What is started is stopped on leaving, also after an exception, SIGINT or SIGTERM: SuperNodes first, then the SuperLink, each
with everything under it, and nothing else is ever signalled (`fedprune.flower.processes`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedprune.errors import FleetError
from fedprune.flower.keys import Keys
from fedprune.flower.processes import MARK, Staged, orderly_exit, until

SCRIPTS = Path(sys.executable).parent
CONNECTION = "staging"
START_SECONDS = 60.0
FORGET_SECONDS = 120.0  # a SuperLink takes a dead node for alive until two heartbeats of 30 s are missing
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    # seconds, 0.01 to 60, how often a SuperExec looks for work: Flower's 1 adds half a second to each exchange, while 0.02
    # keeps an idle device 16 % busy, 0.1 4 %
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",  # logs are read while the process runs
}

Settings = Mapping[str, str | int | float | bool]
NONE: Mapping[str, str] = {}


@dataclass(kw_only=True)
class SuperLink(Staged):
    """The server's side.

    After `kill`, `start` brings it back at its address. With a database it then knows its nodes and runs again, and SuperNodes
    that still live go on with it by themselves; a run that was under way has died, unless its ServerApp ran `apart`.
    """

    host: str
    port: int
    keys: Keys | None
    prefix: Sequence[str]
    runs: list[Staged] = field(default_factory=list)

    @property
    def address(self) -> str:
        """host:port, for SuperNodes and users."""
        return f"{self.host}:{self.port}"

    @property
    def connection(self) -> str:
        """The name of this SuperLink in `home/config.toml`, as `flwr` takes it."""
        return CONNECTION

    @property
    def home(self) -> Path:
        """The FLWR_HOME of the user who talks to this SuperLink."""
        return self.folder / "user"

    def start(self) -> None:
        """Start it, and return when it answers.

        Raises:
            FleetError: it runs already, ended, or did not answer in time; with the end of its log.
        """
        super().start()
        self.home.mkdir(exist_ok=True)
        trust = "insecure = true" if self.keys is None else f"root-certificates = {json.dumps(str(self.keys.ca))}"
        text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{self.address}"\n{trust}\n'
        (self.home / "config.toml").write_text(text)
        self.await_ready(self._answers, START_SECONDS, f"answered at {self.address}")

    def flwr(self, *arguments: str, seconds: float = 60) -> str:
        """The standard output of a `flwr` command about this SuperLink.

        Raises:
            FleetError: it failed, or took longer than `seconds`.
        """
        said = f"flwr {' '.join(arguments)}"
        environment = {**os.environ, **_environment({"FLWR_HOME": str(self.home), MARK: self.environment[MARK]})}
        command = [*self.prefix, str(SCRIPTS / "flwr"), *arguments]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            raise FleetError(f"{said} took longer than {seconds:g} s; {self.tail()}") from None
        if done.returncode:
            raise FleetError(f"{said} failed ({done.returncode}): {done.stdout}{done.stderr}; {self.tail()}")
        return done.stdout

    def register(self, public_key: Path, name: str | None = None) -> None:
        """Let the SuperNode with this key in; needed where the SuperLink was started with `auth`."""
        self.flwr("supernode", "register", str(public_key), CONNECTION, *(() if name is None else ("--name", name)))

    def nodes(self) -> list[dict[str, str]]:
        """What `flwr supernode list` says of each node: "node-id", "status" (online, offline, registered), ..."""
        return json.loads(self.flwr("supernode", "list", CONNECTION, "--format", "json"))["nodes"]

    def wait_online(self, count: int, seconds: float = START_SECONDS) -> None:
        """Return when `count` SuperNodes are online.

        Raises:
            FleetError: there are fewer after `seconds`.
        """
        seen: list[str] = []

        def online() -> bool:
            seen[:] = [node["status"] for node in self.nodes()]
            return seen.count("online") >= count

        if not until(online, seconds, every=0.5):
            raise FleetError(f"not {count} SuperNodes are online after {seconds:g} s, they are {seen}; {self.tail()}")

    def run(self, app: Path, config: Settings = NONE, federation: Settings = NONE) -> Staged:
        """`flwr run --stream` of the app in a folder; the process ends when the run has, and its log is the run's.

        `federation` is --federation-config, for a SuperLink that simulates its nodes.
        """
        name = f"run-{len(self.runs)}"
        command = [*self.prefix, str(SCRIPTS / "flwr"), "run", str(app), CONNECTION, "--stream"]
        command += ["--run-config", _toml(config)] if config else []
        command += ["--federation-config", _toml(federation)] if federation else []
        environment = _environment({"FLWR_HOME": str(self.home), MARK: f"{self.environment[MARK]}/{name}"})
        self.runs.append(Staged(name=name, command=command, environment=environment, folder=self.folder / name))
        self.runs[-1].start()
        return self.runs[-1]

    def _answers(self) -> bool:
        # through the prefix: it may be in another network namespace than we are
        code = f"import socket; socket.create_connection(({self.host!r}, {self.port}), 1)"
        return not subprocess.run([*self.prefix, sys.executable, "-SEc", code], capture_output=True).returncode


@dataclass(kw_only=True)
class SuperNode(Staged):
    """A device's side."""

    def restart(self, seconds: float = FORGET_SECONDS) -> None:
        """Stop it if it runs, and start it with the same key until it is let in; its clients' `Context.state` is gone.

        After `kill` that takes up to a minute: a SuperLink refuses a known key as long as it takes its old node for alive,
        and a refused SuperNode ends. A real device needs the same (systemd's Restart=always).

        Raises:
            FleetError: it was not let in within `seconds`.
        """
        end = time.monotonic() + seconds
        self.stop()
        while True:
            self.start()
            try:
                return self.wait_connected(max(1, end - time.monotonic()))
            except FleetError:
                if self.running or time.monotonic() > end:
                    raise
            time.sleep(2)

    def client_processes(self) -> list[int]:
        """The pids of the client at work, normally one or none: each message has a process of its own."""
        return [pid for pid, words in self.processes().items() if any(Path(w).name == "flwr-clientapp" for w in words[:2])]

    def wait_connected(self, seconds: float = START_SECONDS) -> None:
        """Return when its log says that the SuperLink let it in.

        Raises:
            FleetError: it ended, or was not let in within `seconds`; with the end of its log.
        """
        self.await_ready(lambda: "SuperNode ID:" in self.printed(), seconds, "been let in")


@dataclass(frozen=True)
class Scene:
    """What has been started in one folder; for each, `prefix` are words before its command, `environment` is on top of ours."""

    folder: Path
    mark: str
    started: list[Staged]

    def superlink(
        self,
        name: str = "superlink",
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        keys: Keys | None = None,
        auth: bool = False,
        database: bool = False,
        apart: bool = False,
        simulation: bool = False,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] = NONE,
    ) -> SuperLink:
        """A SuperLink that answers at host:port (a free one if None), over TLS where there are keys.

        With `auth`, only registered SuperNodes are let in; with `database`, nodes and runs are kept in a file for `start`
        after `kill`; with `apart`, ServerApps run under a SuperExec of their own (`scene.started[-1]`), not under the
        SuperLink: together with `database`, a run then outlives the SuperLink and goes on after its `start`. With
        `simulation`, its nodes are simulated on Ray.

        Raises:
            FleetError: it did not come up, with the end of its log; or auth without keys.
        """
        if auth and keys is None:
            raise FleetError("auth=True needs TLS: give the keys that write_keys made.")
        folder, port = self.folder / name, port or free_port()
        command = [*prefix, str(SCRIPTS / "flower-superlink"), "--host", host, "--port", str(port)]
        command += ["--disable-runtime-dependency-installation"]
        command += ["--database", str(folder / "state.db")] if database else []
        command += ["--enable-supernode-auth"] if auth else []
        command += ["--isolation", "process"] if apart else []
        command += ["--simulation"] if simulation else []
        command += ["--insecure"] if keys is None else ["--ssl-ca-certfile", str(keys.ca)]
        command += (
            [] if keys is None else ["--ssl-certfile", str(keys.server_certificate), "--ssl-keyfile", str(keys.server_key)]
        )
        marked = self._marked(folder, environment)
        at = {"host": host, "port": port, "keys": keys, "prefix": prefix}
        link = SuperLink(name=name, command=command, environment=marked, folder=folder, **at)
        self.started.append(link)
        link.start()
        if apart:
            command = [*prefix, str(SCRIPTS / "flower-superexec"), "--runtime-api-address", link.address]
            command += ["--insecure"] if keys is None else ["--root-certificates", str(keys.ca)]
            beside = self.folder / f"{name}-apps"
            marked = self._marked(beside, environment)
            self.started.append(Staged(name=beside.name, command=command, environment=marked, folder=beside))
            self.started[-1].start()
        return link

    def supernode(
        self,
        link: SuperLink,
        name: str,
        config: Settings = NONE,
        *,
        key: Path | None = None,
        ca: Path | None = None,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] = NONE,
        script: str = "flower-supernode",
        insecure: bool = False,
    ) -> SuperNode:
        """A SuperNode that has been started; `link.wait_online` or its `wait_connected` tells when it is in.

        `config` becomes its clients' `Context.node_config`; `key` is a device's private key, where the SuperLink
        authenticates; `ca` is the certificate by which it knows the SuperLink, the right one by default and none if
        `insecure`.
        """
        folder = self.folder / name
        ca = None if insecure else ca or (link.keys.ca if link.keys else None)
        command = [*prefix, str(SCRIPTS / script), "--superlink", link.address]
        command += ["--host", "127.0.0.1", "--port", str(free_port())]
        command += ["--insecure"] if ca is None else ["--root-certificates", str(ca)]
        command += ["--auth-supernode-private-key", str(key)] if key else []
        command += ["--node-config", _toml(config)] if config else []
        node = SuperNode(name=name, command=command, environment=self._marked(folder, environment), folder=folder)
        self.started.append(node)
        node.start()
        return node

    def _marked(self, folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
        # its own FLWR_HOME: a device's processes unpack the app there, and two devices would do so over each other
        mark = f"{self.mark}/{folder.name}-{len(self.started)}"
        return _environment({"FLWR_HOME": str(folder / "home"), **environment, MARK: mark})


@contextlib.contextmanager
def stage(folder: Path) -> Iterator[Scene]:
    """A folder to start SuperLinks and SuperNodes in; all of them are stopped on leaving, in reverse order."""
    folder.mkdir(parents=True, exist_ok=True)
    scene = Scene(folder.resolve(), uuid.uuid4().hex, [])
    with orderly_exit() as hold_signals:
        try:
            yield scene
        finally:
            with hold_signals(), contextlib.ExitStack() as each:  # one that cannot be stopped does not keep the others
                for staged in scene.started:
                    each.callback(staged.stop)
                    for run in staged.runs if isinstance(staged, SuperLink) else []:
                        each.callback(run.stop, 1)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listened at just now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _toml(settings: Settings) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())


def _environment(own: Mapping[str, str]) -> dict[str, str]:
    # flwr starts its own children by bare name, so its scripts have to be found first on the path
    return {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', os.defpath)}", **ENVIRONMENT, **own}
