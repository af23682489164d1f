"""Things that go wrong with real devices and a real server, each done for real; the run goes on and its books are right.

What "right" is, a run in this process says, in which the same orders come to nothing (`Ordeal.retold`): the models are equal to
the last bit, so no good update was left out, none was counted twice, and private rows went on where they were.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from ordeal import DEVICES, HOSTILE, Ordeal, ordeal

from fedprune.flower.keys import write_keys
from fedprune.flower.processes import MARK, send_signal

pytestmark = pytest.mark.deploy
EVERYBODY = list(range(DEVICES))


def models(trial: Ordeal) -> list[str]:
    """Digests, round by round."""
    return [event["model"] for event in trial.events()[1:]]


def words(trial: Ordeal, version: int, client: int) -> str:
    """Why an order came to nothing."""
    return ": ".join(trial.lost()[version, client])


def test_lies_are_refused_with_their_reason(tmp_path):
    with ordeal(tmp_path, rounds=7, online=False) as trial:
        for client in EVERYBODY:
            trial.start_device(client, hostile=client == 2)
        trial.await_end(trial.run(HOSTILE))
        trial.check_books(7)
        said = [words(trial, version, 2).partition(": client 2: ") for version in range(6)]
        assert [(reason, detail) for reason, _, detail in said] == [
            ("refused", 'field "tickets" answers [3]; asked was [2]'),
            ("refused", 'field "server-round" is not 1, the version that was sent'),
            ("refused", 'field "update" has 299 entries, not 300'),
            ("refused", 'field "update" holds a NaN or an infinite value'),
            ("refused", 'field "update" holds a NaN or an infinite value'),
            ("refused", 'field "update" changes an entry by 1e+06; 100 is the most that is believed'),
        ]
        assert trial.merged() == {version: EVERYBODY[: 2 if version < 6 else 3] for version in range(7)}
        assert models(trial) == trial.retold(tmp_path / "again", trained={(version, 2) for version in range(6)})


def test_processes_that_die_and_disks_that_cannot_be_written(tmp_path):
    with ordeal(tmp_path, rounds=4) as trial:
        run = trial.run()
        trial.await_rounds(1)
        with trial.at_work(0, 1) as (_, process):
            resident = trial.resident(0)
            trial.signal(0, resident, signal.SIGKILL)
            trial.signal(1, process, signal.SIGKILL)
        trial.await_rounds(2)
        with trial.at_work(1):
            shutil.move(trial.state(1), tmp_path / "kept")
            trial.state(1).write_text("not a folder")
        trial.await_rounds(3)
        with trial.at_work(1):
            trial.state(1).unlink()
            shutil.move(tmp_path / "kept", trial.state(1))
        trial.await_end(run)
        trial.check_books(4)
        assert trial.resident(0) != resident
        assert trial.merged() == {0: EVERYBODY, 1: [2], 2: [0, 2], 3: EVERYBODY}
        assert "failed: client 0: the client raised" in words(trial, 1, 0)
        assert "the resident process died while it worked on this" in words(trial, 1, 0)
        assert "failed: client 1: the client process died" in words(trial, 1, 1)
        assert "Not a directory" in words(trial, 2, 1)
        assert trial.steps(0) == [3]
        # The resident process of device 1 knew nothing of the death of the one that had asked it.
        assert models(trial) == trial.retold(tmp_path / "again", trained={(1, 1)})


def test_a_device_without_its_data_is_named_and_may_come_later(tmp_path):
    with ordeal(tmp_path, rounds=2, online=False) as trial:
        for client in EVERYBODY:
            trial.start_device(client, **({"data": "/nowhere/mine.csv"} if client == 2 else {}))
        run = trial.run(**{"wait-seconds": 20.0})
        run.wait(120)
        assert "2 of 3 clients are there after 20 s, missing: [2]; node " in run.printed()
        assert "/nowhere/mine.csv" in run.printed().partition("missing: [2]")[2]
        assert not trial.events()
        trial.nodes[2].stop()
        trial.start_device(2).wait_connected()
        trial.await_end(trial.run())
        trial.check_books(2)
        assert trial.merged() == {0: EVERYBODY, 1: EVERYBODY}


def test_a_device_that_loses_power_comes_back_with_its_private_rows(tmp_path):
    keys = write_keys(tmp_path / "keys", [], [f"d{client}" for client in EVERYBODY])
    with ordeal(tmp_path, rounds=5, keys=keys) as trial:
        run = trial.run()
        trial.await_rounds(1)
        with trial.at_work(1):
            trial.nodes[1].kill()
        trial.await_rounds(2)
        assert trial.steps(1) == [1]
        with trial.at_work(0):
            trial.nodes[1].restart()
        trial.await_end(run)
        trial.check_books(5)
        assert trial.merged() == {0: EVERYBODY, 1: [0, 2], 2: [0, 2], 3: EVERYBODY, 4: EVERYBODY}
        assert "failed: client 1: the node is gone" in words(trial, 1, 1)
        assert trial.steps(1) == [3]
        assert models(trial) == trial.retold(tmp_path / "again")


def test_a_server_that_dies_goes_on_from_its_last_round(tmp_path):
    """First the ServerApp alone is killed, then the SuperLink with everything under it."""
    with ordeal(tmp_path, rounds=5, database=True) as trial:
        trial.run()
        trial.await_rounds(1)
        with trial.at_work(0):
            (server,) = [pid for pid, said in trial.link.processes().items() if Path(said[1]).name == "flwr-serverapp"]
            send_signal(server, signal.SIGKILL, trial.link.environment[MARK])
        first = trial.events()
        trial.run()
        trial.await_rounds(3)
        with trial.at_work(1):
            trial.link.kill()
            trial.link.start()
        second = trial.events()
        assert second[: len(first)] == first
        trial.await_end(trial.run())
        assert trial.events()[: len(second)] == second
        trial.check_books(5)
        assert trial.merged() == dict.fromkeys(range(5), EVERYBODY)
        assert [trial.steps(client) for client in EVERYBODY] == [[5]] * DEVICES
        assert models(trial) == trial.retold(tmp_path / "again")


def test_a_run_apart_loses_nothing_when_its_superlink_dies(tmp_path):
    """One of the devices is a plain `flower-supernode`."""
    with ordeal(tmp_path, rounds=4, online=False, database=True, apart=True) as trial:
        for client in EVERYBODY:
            trial.start_device(client, script="flower-supernode" if client == 2 else "fedprune-supernode")
        trial.run()
        trial.await_rounds(1)
        with trial.at_work(0):
            trial.link.kill()
            trial.link.start()
        trial.await_that(lambda: trial.finished, "the run's end")
        trial.check_books(4)
        assert trial.merged() == dict.fromkeys(range(4), EVERYBODY)
        assert models(trial) == trial.retold(tmp_path / "again")


def test_a_late_report_is_dropped_and_its_device_left_to_finish(tmp_path):
    deadline = 'strategy = "deadline"\n[deadline]\nwithin = 20\n'
    with ordeal(tmp_path, rounds=8, more=deadline) as trial:
        run = trial.run()
        trial.await_rounds(1)
        trial.await_that(lambda: bool(trial.working(2)), "an order at device 2")
        process = trial.working(2)[-1]
        trial.signal(2, process, signal.SIGSTOP)
        trial.await_rounds(3)
        trial.signal(2, process, signal.SIGCONT)
        trial.await_end(run)
        trial.check_books(8)
        assert trial.merged()[0] == EVERYBODY
        assert trial.lost().keys() == {(1, 2)}
        assert trial.lost()[1, 2][0] == "too late"
        asked = [2 in trial.merged()[version] for version in range(2, 8)]
        assert not asked[0]
        assert asked == sorted(asked)
        assert asked[-1]
        assert trial.steps(2) == [2 + sum(asked)]
        assert models(trial) == trial.retold(tmp_path / "again", trained={(1, 2)})
