"""The process that stays beside a SuperNode, and the notes that the SuperNode takes of its transfers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from files import settings as settings_file

from fedprune.config import read
from fedprune.errors import FleetError
from fedprune.flower import resident, wire
from fedprune.flower.compat import timed_transfers
from fedprune.flower.transfers import TELLING_BYTES, VARIABLE, Notebook, last_transfers


@contextlib.contextmanager
def process(folder: Path):
    """A resident process that listens."""
    path = folder / "socket"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = subprocess.Popen([sys.executable, "-m", resident.__name__, str(path), str(os.getpid())], env=environment)
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until and started.poll() is None, "it does not listen"
        time.sleep(0.05)
    try:
        yield path, started
    finally:
        started.kill()
        started.wait()


def test_it_works_message_after_message_and_says_what_goes_wrong(tmp_path: Path):
    text = read(settings_file(tmp_path), ["silos=3"]).only("fedavg").to_json()
    config = {"partition-id": 1, "state": str(tmp_path / "state"), "meter": "none"}
    with process(tmp_path) as (path, started):
        assert path.stat().st_mode & 0o077 == 0, "another user could connect"
        for _ in range(2):
            answer = resident.hand_over(path, "hello", wire.write_numbers("run", text), config, 0.0)
            assert wire.read_config(answer, "client", int) == 1
        with pytest.raises(FleetError, match="partition-id is 7"):
            resident.hand_over(path, "hello", wire.write_numbers("run", text), config | {"partition-id": 7}, 0.0)
        with pytest.raises(resident.Away):
            resident.hand_over(tmp_path / "nobody", "hello", wire.write_numbers("run", text), config, 0.0)
        started.send_signal(signal.SIGSTOP)
        threading.Timer(0.5, started.kill).start()
        with pytest.raises(FleetError, match="died"):
            resident.hand_over(path, "hello", wire.write_numbers("run", text), config, 0.0)
        started.wait()
        with pytest.raises(resident.Away):  # its socket is still there
            resident.hand_over(path, "hello", wire.write_numbers("run", text), config, 0.0)


def test_the_notebook_keeps_the_last_download_and_the_last_upload_that_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert last_transfers() == {}
    monkeypatch.setenv(VARIABLE, str(tmp_path / "transfers.jsonl"))
    assert last_transfers() == {}
    book = Notebook(tmp_path / "transfers.jsonl")
    book.note("upload", 1.0, 2.0, TELLING_BYTES)
    book.note("download", 5.0, 0.5, 100)
    book.note("download", 7.0, 0.25, 50)
    book.note("upload", 8.0, 3.0, TELLING_BYTES - 1)
    found = last_transfers()
    assert (found["download"].seconds, found["download"].bytes) == (0.25, 50)
    assert (found["upload"].seconds, found["upload"].bytes) == (2.0, TELLING_BYTES)


def test_notes_from_several_threads_leave_a_readable_book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "transfers.jsonl"))
    book = Notebook(tmp_path / "transfers.jsonl")
    threads = [threading.Thread(target=lambda: [book.note("upload", 0.0, 1.0, 10**6) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        last_transfers()
    for thread in threads:
        thread.join()
    assert last_transfers()["upload"].bytes == 10**6


def test_transfers_of_a_supernode_are_timed_whole(monkeypatch: pytest.MonkeyPatch):
    """Against Flower's private connection, which both admitted releases must still have in this shape."""
    from flwr.supernode import start_client_internal as internal

    calls, notes = [], []

    @contextlib.contextmanager
    def connection(*arguments, **named):
        def slow(*given):
            time.sleep(0.02)
            calls.append(given)
            return b"x" * 10

        yield 7, lambda: ("message", "tree"), slow, None, None, slow, slow, slow

    monkeypatch.setattr(internal, "_init_connection", connection)
    with timed_transfers(lambda *note: notes.append(note)), internal._init_connection() as verbs:
        node, receive, send, _, _, pull, push, confirm = verbs
        assert (node, receive()) == (7, ("message", "tree"))
        pull(1, "a"), pull(1, "b"), confirm(1, "m")
        send("reply", "tree", 0.0)
        push(1, "s", "a", b"12345"), push(1, "s", "b", b"123")
    assert internal._init_connection is connection, "patched for good"
    assert [note[0] for note in notes] == ["download", "upload", "upload"]
    assert (notes[0][3], notes[1][3], notes[2][3]) == (20, 5, 8)
    assert notes[0][2] >= 0.04 and notes[2][2] >= 0.06, "the header's way belongs to it"
    assert len(calls) == 6
