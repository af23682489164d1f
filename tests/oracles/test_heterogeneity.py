"""How unequal clients are, before and after: by hand, from a ledger, and where both must be the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from files import settings
from reports import NOTHING, report
from world import world

from fedprune.config import read
from fedprune.exchange import Lost, Report
from fedprune.experiment import settled, spread
from fedprune.record import RunRecord, Snapshot, ledger_rows
from fedprune.report.tables import terminal, unequal
from fedprune.simulation import prepare, read_data, run
from fedprune.strategy import Round

MEASURES = ("slowest_over_fastest", "mean_shortfall", "variation", "ceiling")


def test_measures_by_hand():
    """s = 1, 2, 4: mean(1/s) = 7/12; mean 7/3, standard deviation sqrt(14)/3."""
    found = spread(np.array([1.0, 2.0, 4.0]))
    assert tuple(found) == MEASURES
    assert found == pytest.approx(
        {"slowest_over_fastest": 4.0, "mean_shortfall": 5 / 12, "variation": 14**0.5 / 7, "ceiling": 7 / 3}
    )


@pytest.mark.parametrize(("sigma", "shortfall"), [(1, 0.0), (2, 0.30), (5, 0.57), (10, 0.71), (20, 0.79)])
def test_ten_clients_spread_evenly(sigma: float, shortfall: float):
    """H of the usual experiment, as `1 - (1/W) sum 1 / (1 + (sigma - 1)(w - 1) / (W - 1))` gives it."""
    assert spread(np.linspace(1, sigma, 10))["mean_shortfall"] == pytest.approx(shortfall, abs=0.01)


# ---- from a ledger ---------------------------------------------------------------------------------------------------


def recorded(folder: Path, rounds: list[list[tuple[int, float, bool]]]) -> RunRecord:
    """A record of rounds: (client, seconds, discarded); half of the seconds go to the upload, and waiting does not count."""
    record, here = RunRecord(folder), world()
    folder.mkdir(exist_ok=True)
    for version, entries in enumerate(rounds):
        reports: list[Report] = []
        lost: list[Lost] = []
        for client, seconds, discarded in entries:
            done = report(NOTHING, client=client, seconds=seconds)
            cost = replace(done.cost, seconds=replace(done.cost.seconds, training=seconds / 2, upload=seconds / 2))
            if discarded:
                lost.append(Lost(done.order, "too late", cost))
            else:
                reports.append(replace(done, cost=cost, waited=100.0))
        happened = Round(version, float(version), version + 1.0, (), tuple(reports), tuple(lost))
        record.add({"version": version}, ledger_rows(happened))
        record.checkpoint(replace(here.state, version=version + 1), Snapshot({}, {}), {})
    return record


def test_medians_of_what_was_merged_late_in_the_run(tmp_path: Path):
    first = [[(0, 1.0, False), (1, 50.0, False), (2, 60.0, False)]] * 6
    last = [[(0, 1.0, False), (1, 4.0, False)], [(0, 2.0, False), (1, 6.0, False), (2, 9.0, True)]]
    record = recorded(tmp_path / "run", [*first, *last])
    assert record.report_seconds(6).tolist() == [1.5, 5.0], "neither the discarded report nor the early ones"
    assert record.report_seconds(0).tolist() == [1.0, 50.0, 60.0]
    found = settled(record, 8, 4)
    assert found["clients_after"] == 0.5
    expected = spread(np.array([1.0, 5.0 / 1.5]))
    assert {name: found[f"{name}_after"] for name in MEASURES} == pytest.approx(expected)


def test_nobody_reported(tmp_path: Path):
    empty = settled(recorded(tmp_path / "none", [[], []]), 2, 4)
    late = settled(recorded(tmp_path / "late", [[(0, 1.0, False)], *[[(0, 1.0, True)]] * 7]), 8, 4)
    for found in (empty, late, settled(recorded(tmp_path / "fresh", []), 0, 4)):
        assert json.loads(json.dumps(found)) == {f"{name}_after": None for name in MEASURES} | {"clients_after": 0.0}


# ---- whole runs ------------------------------------------------------------------------------------------------------

QUIET = ["noise=0.0", "dropout=0.0", "availability=1.0"]


@pytest.mark.parametrize(
    "changes",
    [["workload=equal"], ["workload=own"], ["rows=touched", "epochs=2", "negatives=2"], ["silos=6", "silos_by=quantity"]],
    ids=str,
)
def test_whoever_always_trains_everything_stays_as_unequal(tmp_path: Path, changes: list[str]):
    summary = run(read(settings(tmp_path), ["rounds=4", *QUIET, *changes]), tmp_path / "out")
    assert summary["clients_after"] == 1.0
    for name in MEASURES:
        assert summary[f"{name}_after"] == pytest.approx(summary[name], rel=1e-6)


def test_before_is_the_device_table_or_its_data_too(tmp_path: Path):
    chosen = read(settings(tmp_path), ["noise=0.5"])
    split = read_data(chosen)
    equal, own = (prepare(chosen.model_copy(update={"workload": kind}), split) for kind in ("equal", "own"))
    assert equal.heterogeneity() == spread(equal.fleet.devices.slowness)
    assert equal.heterogeneity()["slowest_over_fastest"] == pytest.approx(4.0)
    assert own.heterogeneity()["slowest_over_fastest"] != pytest.approx(4.0, rel=0.01)
    assert own.heterogeneity() == prepare(chosen.model_copy(update={"strategy": "adaptcl"}), split).heterogeneity()


def test_narrower_models_make_them_more_alike(tmp_path: Path):
    changes = ["strategy=adaptcl", "adaptcl.interval=1", "workload=equal", "rounds=16", *QUIET]
    summary = run(read(settings(tmp_path), changes), tmp_path / "out")
    for name in MEASURES:
        assert summary[f"{name}_after"] < summary[name]


# ---- on the screen ---------------------------------------------------------------------------------------------------


def test_a_run_alone_says_it(tmp_path: Path):
    summary = run(read(settings(tmp_path), ["rounds=4", "workload=equal", *QUIET]), tmp_path / "out")
    assert "slowest over fastest 4.00 → 4.00" in str(terminal([summary], {}).caption)
    assert "→" not in str(terminal([summary, summary], {}).caption)
    assert "reports of 100% of the clients" in unequal(summary)
    nobody = summary | {f"{name}_after": None for name in MEASURES} | {"clients_after": 0.0}
    assert "4.00 → –" in unequal(nobody)
    earlier = {key: value for key, value in summary.items() if not key.endswith("_after")}
    assert "mean shortfall H" in unequal(earlier)
    assert unequal({"strategy": "fedavg"}) == ""
