"""A SuperLink and SuperNodes as child processes: who is let in, what is stopped, what survives a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from signalled import signalled

from fedprune.errors import FleetError
from fedprune.flower import processes
from fedprune.flower.keys import Keys, write_keys
from fedprune.flower.processes import MARK, Staged, until
from fedprune.flower.staging import Scene, SuperLink, SuperNode, stage

sys.path.insert(0, str(Path(__file__).parents[2]))
from simulations import lab as laboratory
from simulations.lab import Limits, lab

LACKING = laboratory.missing()
needs_lab = pytest.mark.skipif(bool(LACKING), reason=" ".join(LACKING))

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "echo"
version = "1.0.0"
description = "Each node says who it is."
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedprune"
[tool.flwr.app.components]
serverapp = "echo.server_app:app"
clientapp = "echo.client_app:app"
[tool.flwr.app.config]
rounds = 2
nodes = 3
work = 0.0
"""
SERVER = """
import time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    config = context.run_config
    while len(list(grid.get_node_ids())) < config["nodes"]:
        time.sleep(0.2)
    for number in range(config["rounds"]):
        content = RecordDict({"config": ConfigRecord({"work": config["work"]})})
        waiting = set(grid.push_messages([Message(content, node, "train") for node in grid.get_node_ids()]))
        while waiting:
            for reply in grid.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                print("echo", number, reply.error.code if reply.has_error() else reply.content["config"]["name"], flush=True)
            time.sleep(0.1)
"""
CLIENT = """
import time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    time.sleep(message.content["config"]["work"])
    return Message(RecordDict({"config": ConfigRecord({"name": context.node_config["name"]})}), reply_to=message)
"""


@pytest.fixture(scope="session")
def app(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("app")
    (folder / "echo").mkdir()
    for name, text in {"__init__": "", "server_app": SERVER, "client_app": CLIENT}.items():
        (folder / "echo" / f"{name}.py").write_text(text)
    (folder / "pyproject.toml").write_text(PROJECT)
    return folder


def echoes(run: Staged) -> list[str]:
    return sorted(line.removeprefix("echo ") for line in run.printed().splitlines() if line.startswith("echo "))


def nothing_left(scene: Scene) -> bool:
    return not any(staged.processes() for staged in scene.started)


def sleeper(scene: Scene, code: str) -> Staged:
    environment = {MARK: f"{scene.mark}/sleeper-{len(scene.started)}"}
    staged = Staged(
        name="sleeper", command=[sys.executable, "-c", code], environment=environment, folder=scene.folder / "sleeper"
    )
    scene.started.append(staged)
    staged.start()
    assert until(lambda: "up" in staged.printed(), 10)
    return staged


FAMILY = """
import os, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"])
print("up", child.pid, flush=True)
time.sleep(600)
"""


def test_a_tree_is_killed_at_once_and_a_child_that_outlived_its_parent_is_known(tmp_path):
    with stage(tmp_path) as scene:
        staged = sleeper(scene, FAMILY)
        child = int(staged.printed().split()[1])
        tree = set(staged.processes())
        assert child in tree
        assert len(tree) == 2
        os.kill(min(tree - {child}), signal.SIGKILL)
        assert until(lambda: staged.code == -signal.SIGKILL, 5)
        assert set(staged.processes()) == {child}
        assert staged.kill() == [child]
        assert staged.processes() == {}
        staged.start()
        assert until(lambda: "up" in staged.printed(), 10)
        assert set(staged.kill()).isdisjoint(tree)


def test_nothing_else_is_touched_and_what_ignores_sigterm_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as stranger:
        with pytest.raises(ZeroDivisionError), stage(tmp_path) as scene:
            staged = sleeper(scene, FAMILY)
            processes.send_signal(stranger.pid, signal.SIGKILL, staged.environment[MARK])  # a pid that has been handed on
            staged.stop(0.2)
            sleeper(scene, "import time; print('up', flush=True); time.sleep(600)")
            raise ZeroDivisionError
        assert nothing_left(scene)
        assert stranger.poll() is None
        stranger.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_everything(tmp_path, number):
    code = f"""
import sys, time
from pathlib import Path
from fedprune.flower.processes import MARK, Staged
from fedprune.flower.staging import stage
with stage(Path({str(tmp_path)!r})) as scene:
    words = [sys.executable, "-c", "import time; time.sleep(600)"]
    scene.started.append(Staged(name="a", command=words, environment={{MARK: "signalled"}}, folder=scene.folder / "a"))
    scene.started[0].start()
    print("up", flush=True)
    time.sleep(60)
"""
    with signalled(code, number, 15):
        assert until(lambda: len(processes.marked("signalled")) == 1, 5)
    assert processes.marked("signalled") == {}


def test_signals_are_left_alone_in_other_threads(tmp_path):
    done = []

    def work() -> None:
        with stage(tmp_path) as scene:
            sleeper(scene, "import time; print('up', flush=True); time.sleep(600)")
        done.append(nothing_left(scene))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert done == [True]


def test_starting_twice_and_waiting_in_vain_are_errors(tmp_path):
    with stage(tmp_path) as scene:
        staged = sleeper(scene, "import time; print('up', flush=True); time.sleep(600)")
        with pytest.raises(FleetError, match="runs already"):
            staged.start()
        with pytest.raises(FleetError, match=r"not ended within 0.1 s; the end of .*log.txt:\nup"):
            staged.wait(0.1)


@pytest.mark.deploy
def test_a_superlink_that_does_not_come_up_shows_its_log(tmp_path):
    with stage(tmp_path) as scene:
        link = scene.superlink()
        with pytest.raises(FleetError, match=r"(?s)second ended with .* before it had answered.*the end of .*second/log\.txt"):
            scene.superlink("second", port=link.port, host="192.0.2.1")  # an address that this machine does not have
        with pytest.raises(FleetError, match="auth=True needs TLS"):
            scene.superlink("third", auth=True)
    assert nothing_left(scene)


def deployment(scene: Scene, keys: Keys, *names: str, **settings) -> tuple[SuperLink, list[SuperNode]]:
    """A SuperLink with TLS and authentication, and registered SuperNodes that are online."""
    link = scene.superlink(keys=keys, auth=True, **settings)
    for name in names:
        link.register(keys.public(name), name)
    nodes = [scene.supernode(link, name, {"name": name}, key=keys.private(name)) for name in names]
    link.wait_online(len(nodes))
    return link, nodes


@pytest.mark.deploy
def test_only_registered_devices_that_know_the_server_take_part(tmp_path, app):
    keys = write_keys(tmp_path / "keys", [], ["a", "b", "stranger"])
    elsewhere = write_keys(tmp_path / "elsewhere", [], [])
    with stage(tmp_path) as scene:
        link, _ = deployment(scene, keys, "a", "b")
        stranger = scene.supernode(link, "stranger", {"name": "stranger"}, key=keys.private("stranger"))
        misled = scene.supernode(link, "misled", {"name": "misled"}, key=keys.private("stranger"), ca=elsewhere.ca)
        bare = scene.supernode(link, "bare", {"name": "bare"}, insecure=True)  # no certificate at all
        run = link.run(app, {"nodes": 2, "rounds": 2})
        assert stranger.wait(30) != 0
        assert "Failed to activate SuperNode" in stranger.printed()
        assert misled.wait(30) != 0
        assert "SuperNode ID" not in misled.printed()
        with pytest.raises(FleetError, match="stranger ended with 1 before it had been let in"):
            stranger.wait_connected()
        assert run.wait(40) == 0
        assert echoes(run) == ["0 a", "0 b", "1 a", "1 b"]
        assert "SuperNode ID" not in bare.printed(), "it keeps trying, and is not let in"
        assert [node["status"] for node in link.nodes()] == ["online", "online"]
    assert nothing_left(scene)


@pytest.mark.deploy
@needs_lab
def test_three_unequal_devices_run_two_rounds_with_tls_and_authentication(tmp_path, app):
    limits = {"fast": Limits(), "slow": Limits(cpus=0.8, upload=4e6, download=8e6), "far": Limits(upload=2e6, download=2e6)}
    with lab(limits) as place, stage(tmp_path) as scene:
        keys = write_keys(tmp_path / "keys", [place.server.address], list(limits))
        link = scene.superlink(host=place.server.address, keys=keys, auth=True, prefix=place.server.prefix)
        for name in limits:
            link.register(keys.public(name), name)
        nodes = {
            name: scene.supernode(link, name, {"name": name}, key=keys.private(name), prefix=device.prefix)
            for name, device in place.devices.items()
        }
        link.wait_online(3)
        run = link.run(app, {"nodes": 3, "rounds": 2})
        root = laboratory._quota_root()
        assert isinstance(root, Path)
        group = root / place.devices["slow"].namespace / "cgroup.procs"
        assert until(lambda: bool(nodes["slow"].client_processes()), 40)
        tree = set(nodes["slow"].processes())
        assert len(tree) >= 3  # supernode, superexec, clientapp
        limited = {int(pid) for pid in group.read_text().split()}
        assert tree & set(nodes["slow"].processes()) <= limited  # those that ended in between are in neither
        assert run.wait(60) == 0
        assert echoes(run) == sorted(f"{number} {name}" for number in (0, 1) for name in limits)
    assert nothing_left(scene)


@pytest.mark.deploy
def test_a_superlink_that_was_killed_comes_back_and_its_nodes_go_on(tmp_path, app):
    keys = write_keys(tmp_path / "keys", [], ["a"])
    with stage(tmp_path) as scene:
        link, nodes = deployment(scene, keys, "a", database=True)
        before = [node["node-id"] for node in link.nodes()]
        assert len(link.kill()) >= 2
        assert nodes[0].running
        link.start()
        assert [node["node-id"] for node in link.nodes()] == before
        run = link.run(app, {"nodes": 1, "rounds": 1})
        assert run.wait(40) == 0
        assert echoes(run) == ["0 a"]
    assert nothing_left(scene)


@pytest.mark.deploy
def test_a_run_apart_outlives_its_superlink(tmp_path, app):
    keys = write_keys(tmp_path / "keys", [], ["a"])
    with stage(tmp_path) as scene:
        link, nodes = deployment(scene, keys, "a", database=True, apart=True)
        link.run(app, {"nodes": 1, "rounds": 2, "work": 1.0})
        assert until(lambda: bool(nodes[0].client_processes()), 30)
        link.kill()
        link.start()

        def log() -> str:
            number = link.flwr("list", link.connection, "--format", "json").split('"run-id": "')[1].split('"')[0]
            return link.flwr("log", number, link.connection, "--show")

        assert until(lambda: "echo 1 a" in log(), 40, every=1)
    assert nothing_left(scene)
