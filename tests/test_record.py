"""A run that was killed goes on from its last checkpoint and ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import signal
from pathlib import Path

import polars as pl
import pytest
import torch
from files import settings
from reports import NOTHING

from fedprune.codec import Codec
from fedprune.config import read
from fedprune.errors import RecordError
from fedprune.exchange import Cost, Order, Report, Split
from fedprune.objective import Objective
from fedprune.record import RunRecord, ledger_rows, line
from fedprune.simulation import run
from fedprune.strategy import Round
from fedprune.submodel import Submodel

CHANGES = {
    "fedavg": [],
    "skip": ["skip.pace=1.5", "skip.private_steps=1"],
    "window": [],
    "adaptcl": ["adaptcl.interval=1"],
    "deadline": ["deadline.within=25.0"],
    "lth_sad": ["lth_sad.every=3", "lth_sad.rewind=2"],  # pruned and rewound before versions 5, 8 and 11
    "dpf": ["dpf.every=2"],
    "lotteryfl": ["lotteryfl.above=0.2"],
    "masked skip": ["skip.pace=1.2", "entries.kind=feedback", "entries.keep=0.4", "entries.every=1", "entries.through=true"],
}


PRUNED = {
    "lth_sad": lambda said: [round(entry["kept"], 2) for entry in said] == [1.0] * 5 + [0.8] * 3 + [0.64] * 3 + [0.51],
    "dpf": lambda said: said[0]["reactivated"] == 0 < max(entry["reactivated"] for entry in said),
    "lotteryfl": lambda said: said[-1]["kept"] < said[3]["kept"] < 1 and said[-1]["pruned_clients"] > 10,
}
"""What the record says of the masks."""


def _chosen(folder: Path, strategy: str):
    return read(settings(folder), [f"strategy={strategy.split()[-1]}", *CHANGES[strategy]])


def _run_until(folder: str, out: str, strategy: str, version: int) -> None:
    """In a process of its own: run, and be killed right after a round, before anything can be tidied up."""
    torch.set_num_threads(1)

    def watch(event: dict) -> None:
        if event["version"] == version:
            os.kill(os.getpid(), signal.SIGKILL)

    run(_chosen(Path(folder), strategy), Path(out), watch=watch)


def _content(folder: Path) -> dict:
    (run_folder,) = folder.glob("*/seed0")
    parts = sorted((run_folder / "ledger").glob("*.parquet"))
    return {
        "events": (run_folder / "events.jsonl").read_text(),
        "model": (run_folder / "model.safetensors").read_bytes(),
        "summary": (run_folder / "summary.json").read_text(),
        "ledger": pl.concat([pl.read_parquet(part) for part in parts]).rows(),
    }


@pytest.mark.parametrize(
    ("strategy", "kills"),
    [("fedavg", [0]), ("skip", [2, 4]), ("skip", [7]), ("window", [5]), ("adaptcl", [4, 9]), ("deadline", [3, 8]),
     ("lth_sad", [7]), ("dpf", [4]), ("lotteryfl", [7]), ("masked skip", [5])],
)  # fmt: skip
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, strategy: str, kills: list[int]) -> None:
    context = multiprocessing.get_context("spawn")
    for version in kills:
        process = context.Process(target=_run_until, args=(str(tmp_path), str(tmp_path / "killed"), strategy, version))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    resumed = run(_chosen(tmp_path, strategy), tmp_path / "killed")
    straight = run(_chosen(tmp_path, strategy), tmp_path / "straight")
    assert resumed == straight
    assert _content(tmp_path / "killed") == _content(tmp_path / "straight")
    if strategy in PRUNED:
        (folder,) = (tmp_path / "killed").glob("*/seed0")
        said = [event["entries"] for event in RunRecord(folder).events() if event["version"] >= 0]
        assert PRUNED[strategy](said), "nothing was masked"


def test_a_line_cut_in_the_middle_is_dropped(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_run_until, args=(str(tmp_path), str(tmp_path / "cut"), "fedavg", 7))
    process.start()
    process.join(60)
    (folder,) = (tmp_path / "cut").glob("*/seed0")
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"version": 6, "beg')
    resumed = run(_chosen(tmp_path, "fedavg"), tmp_path / "cut")
    assert resumed == run(_chosen(tmp_path, "fedavg"), tmp_path / "straight")


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    first = run(_chosen(tmp_path, "fedavg"), tmp_path / "out")
    assert run(_chosen(tmp_path, "fedavg"), tmp_path / "out", watch=lambda event: pytest.fail("ran again")) == first


def test_other_data_under_the_same_name_is_refused(tmp_path: Path) -> None:
    settings_of_run = _chosen(tmp_path, "fedavg")
    run(settings_of_run, tmp_path / "out")
    data = tmp_path / "mine.csv"
    data.write_text("\n".join(data.read_text().splitlines()[:-20]) + "\n")
    with pytest.raises(RecordError, match="other data"):
        run(settings_of_run, tmp_path / "out")


def test_a_folder_that_does_not_say_on_which_data_is_refused_too(tmp_path: Path) -> None:
    run(_chosen(tmp_path, "fedavg"), tmp_path / "out")
    (about,) = (tmp_path / "out").glob("*/seed*/run.json")
    said = json.loads(about.read_text())
    about.write_text(json.dumps({key: value for key, value in said.items() if key != "data"}))
    with pytest.raises(RecordError, match="does not say on which"):
        run(_chosen(tmp_path, "fedavg"), tmp_path / "out")


def test_rounds_in_which_nobody_can_be_reached_are_recorded(tmp_path: Path) -> None:
    summary = run(read(settings(tmp_path), ["availability=0.01", "checkpoint=1", "rounds=20"]), tmp_path / "out")
    assert summary["rounds"] == 20


def test_ledger_and_events_agree(tmp_path: Path) -> None:
    """Sums of the client-rounds are the rounds' sums: seconds and joules by part, bytes, counts."""
    run(_chosen(tmp_path, "skip"), tmp_path / "out")
    (folder,) = (tmp_path / "out").glob("*/seed0")
    ledger = pl.concat([pl.read_parquet(p) for p in sorted((folder / "ledger").glob("*.parquet"))])
    rounds = [event for event in RunRecord(folder).events() if event["version"] >= 0]
    sent = sum(event["asked"] for event in rounds)
    assert sent == ledger.height, "orders still on their way at the end are in the books too"
    assert len(rounds) == 12
    for event in rounds:
        rows = ledger.filter(pl.col("version") == event["version"])
        assert rows.height == event["reports"] + event["lost"]
        for kind in ("seconds", "joules"):
            for part, total in event[kind].items():
                assert rows[f"{kind}_{part}"].sum() == pytest.approx(total)
        assert rows["bytes_down"].sum() == event["bytes_down"]
        assert rows["discarded"].sum() == event["lost"]
    assert all(a["ended"] <= b["began"] for a, b in itertools.pairwise(rounds))


def test_joules_above_idle_are_those_of_the_measured_parts() -> None:
    seconds, joules = Split(1.0, 2.0, 0.0, 3.0, 4.0), Split(math.nan, 50.0, 0.0, math.nan, 30.0)
    measured = Cost(seconds, joules, 1, 1, 0.0, 0, watts_waiting=5.0, source="measured")
    order = Order(0, 0, 0, 1.0, Submodel({}), Objective(), Codec(), {}, 0)
    unknown = dataclasses.replace(measured, joules=None)
    reports = [Report(order, NOTHING, 0, 1, 0.0, cost, 10.0) for cost in (measured, unknown)]
    rows = ledger_rows(Round(0, 0.0, 10.0, (order,), tuple(reports), ()))
    assert rows["joules_above_idle"] == [80.0 - (2.0 + 0.0 + 4.0) * 5.0, None]
    assert rows["joules_download"] == [None, None] and rows["joules_training"] == [50.0, None]
    event = line(Round(0, 0.0, 10.0, (order,), (reports[0],), ()))
    assert event["joules"] == {
        "download": None, "loading": 30.0, "training": 50.0, "teacher": 0.0, "upload": None, "waiting": 0.0,
    }  # fmt: skip
