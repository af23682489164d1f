"""What the studies compute from their runs, on runs made up here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import curves
import drawings
import memory
import numpy as np
import pytest
import rate_learners
import spending
import spending_grid
import widths
from files import interactions

from fedprune.errors import DataError


def result(*curve: tuple[float, float], up: float = 100.0, flops: float = 100.0, **more: float) -> dict[str, Any]:
    """A run whose (seconds, validation) are these."""
    figures = dict.fromkeys(curves.FIGURES, 0.4)
    points = [{"seconds": s, "joules": 2 * s, "validation": v, "reports": 1} | figures for s, v in curve]
    return {
        "curve": points,
        "bytes_up": up,
        "bytes_down": up,
        "flops": flops,
        "ceiling": 2.5,
        "rounds": 9,
        "reports": 90,
    } | more


SLOW, FAST, LOW = result((10, 0.2), (110, 0.4)), result((5, 0.3), (15, 0.4), up=25, flops=50), result((5, 0.1), (9, 0.3))


def test_time_to_a_target_is_linear_between_evaluations():
    assert curves.reached(SLOW, 0.3) == pytest.approx(60.0)
    assert curves.reached(SLOW, 0.3, "joules") == pytest.approx(120.0)
    assert curves.reached(SLOW, 0.1) == 10, "the first evaluation is the earliest time known"
    assert curves.reached(SLOW, 0.41) is None


def test_another_class_of_devices_is_another_clock():
    """Shares .25, .5, .25 on balanced devices, .1, .2, .7 on a slow uplink: (.8 * .25 + .2 * .5) / (.5 * .25 + .5 * .5)."""
    assert curves.stretch(SLOW, SLOW, "slow_uplink") == pytest.approx(1.0)
    assert curves.stretch(FAST, SLOW, "slow_uplink") == pytest.approx(0.3 / 0.375)
    assert curves.stretch(FAST, SLOW, "balanced") == pytest.approx(1.0)


WARM = {"seconds": 20.0, "bytes_down": 50.0, "bytes_up": 50.0, "flops": 0.0}


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(curves, "full_report", lambda changes: {key: SLOW[key] for key in ("bytes_down", "bytes_up", "flops")})
    monkeypatch.setattr(curves, "warm_start", lambda changes: WARM)


def test_the_warm_start_has_a_clock_of_its_own(shared: None):
    """It moves bytes alone, so that (.5 * .8) / (.5 * .5) = 1.6 of its seconds pass on a slow uplink, where orders take .8."""
    job = curves.Job("fedprune", ("strategy=fedprune", "sigma=5", "silos=10", "fedprune.share=0.6"), 0)
    points = curves.clocked(job, FAST, "slow_uplink", 2.0)["curve"]
    assert [point["seconds"] for point in points] == pytest.approx([2 * (16 + (5 - 10) * 0.8), 2 * (16 + (15 - 10) * 0.8)])
    assert curves.clocked(job, FAST, "balanced")["curve"] == [pytest.approx(point) for point in FAST["curve"]]


@pytest.mark.parametrize("fleet", [(), ("silos=5",)], ids=["users", "silos"])
def test_a_run_on_another_class_is_the_same_run_on_another_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fleet: tuple[str, ...]
):
    """Simulated on a slow uplink, and computed from balanced devices."""
    monkeypatch.setattr(curves, "OUT", tmp_path)
    data = (f"data={interactions(tmp_path)}", "latent=8", "warm_start=2", *fleet)
    own = ("strategy=fedprune", "fedprune.precision=int8", "sigma=4", *data)
    jobs = {c: curves.Job("x", (*own, f"device_class={c}"), 0, every=5.0, until=40.0) for c in ("balanced", "slow_uplink")}
    runs = {device_class: curves.learn(job) for device_class, job in jobs.items()}
    computed = curves.clocked(curves.Job("x", own, 0), runs["balanced"], "slow_uplink")
    one, two = ({point["reports"]: point["seconds"] for point in r["curve"]} for r in (computed, runs["slow_uplink"]))
    common = one.keys() & two.keys()  # they evaluate by their own clocks
    assert len(common) >= 3
    assert [one[reports] for reports in common] == pytest.approx([two[reports] for reports in common], rel=1e-4)


@pytest.mark.real_data
def test_a_full_report_is_what_fedavg_sends():
    """And its time on the reference device is the setting's."""
    try:
        full, warm = curves.full_report(()), curves.warm_start(("strategy=fedavg",))
    except DataError as error:
        pytest.skip(str(error))
    assert full["bytes_up"] == full["bytes_down"] == pytest.approx(103356, rel=0.01)
    assert curves.stretch(warm, full, "slow_uplink") > 1 > curves.stretch(warm, full, "compute_bound")
    wide = curves.warm_start(("strategy=fedavg_tuned", "fedavg_tuned.latent=64"))
    assert wide["seconds"] == pytest.approx(2 * warm["seconds"], rel=0.01), "the same devices have twice as much to move"


def test_ratios_are_of_the_same_seed():
    runs = {"fedavg": {0: SLOW, 1: SLOW}, "fedavg_tuned": {0: FAST, 1: LOW}, "skip": {0: FAST, 1: FAST}, "fedprune": {1: FAST}}
    rows = {row["strategy"]: row for row in spending.compared(runs, {"fleet": "x", "sigma": 1, "class": "balanced"})}
    assert rows["fedavg"]["seconds_95%"] == pytest.approx([100.0, 100.0])
    assert rows["fedprune"]["seconds_95%"] == pytest.approx([13.0])
    assert rows["fedprune"]["fedavg_95%"] == pytest.approx([100 / 13])
    assert rows["fedprune"]["fedavg_tuned_95%"] == [None], "its rival never got there with that seed"
    text = spending.main_table(list(rows.values()))
    assert "| fedprune (1 seed) | 13 | 15 | 0.1 |" in text and "7.7 /" in text


def test_the_grid_scales_who_waits_to_smaller_differences(shared: None, tmp_path: Path):
    arms = {"fedavg": SLOW, "fedavg_tuned": FAST, "narrower for good, learned": LOW}
    found = {
        curves.Job(arm, (*spending_grid.ARMS[arm][0], "sigma=10"), 0, spending_grid.ARMS[arm][1]): r for arm, r in arms.items()
    }
    rows = {(row["sigma"], row["arm"]): row for row in spending_grid.rows(found)}
    assert rows[10, "fedavg"]["balanced"] == pytest.approx([100.0]) and rows[2, "fedavg"]["balanced"] == pytest.approx([20.0])
    assert rows[2, "fedavg"]["joules"] == [] and rows[10, "fedavg"]["joules"] == pytest.approx([200.0])
    assert (2, "narrower for good, learned") not in rows and rows[10, "narrower for good, learned"]["balanced"] == [None]
    assert "| narrower for good, learned | never | never | never | never | 0.4000 |" in spending_grid.table(list(rows.values()))
    drawings.grid(list(rows.values()), tmp_path / "grid.png")
    drawings.over_time({"x": {"a": [SLOW, FAST], "b": [LOW]}}, tmp_path / "time.png", (0.0, 0.5))
    own = {"own": {"all": 0.4, "0.25": 0.3, "1": 0.5}}
    drawings.widths({"x": {"a": [own], "b": [own, own]}}, tmp_path / "widths.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("grid", "time", "widths"))


def test_every_job_is_a_run_of_its_own():
    jobs = [
        *spending.main_jobs(5, ("users", "silos"), (2, 10)),
        *spending_grid.jobs(1),
        *spending.tafeng_jobs(3),
        *memory.jobs(3),
    ]
    same = {(job.changes, job.variant, job.seed, job.every, job.until, job.patience, job.arm) for job in jobs}
    assert len({job.file for job in jobs}) == len(same)
    files = [widths.file_of(arm, seed, Path("x")) for arm, seed in widths.work(3)]
    assert len(files) == len(set(files))


def test_being_told_of_a_change_leaves_the_noise_of_five_reports():
    """Equally fast devices: what a reports' mean misses by, the rate does 1 / .8 times as much, for 5 % of it stays."""
    off = [rate_learners.World(1.0, 0.1, "sudden", seed=seed).told(50, 0) for seed in range(400)]
    one = rate_learners.World(1.0, 0.1, "sudden", seed=0)
    assert one.told(50, one.changing[0]) >= 0
    own = [w.told(50, w.changing[0]) for w in (rate_learners.World(1.0, 0.1, "sudden", seed=seed) for seed in range(400))]
    assert np.sqrt(np.mean(np.square(own))) == pytest.approx(0.1 / 5**0.5 / 0.8, rel=0.15)
    assert np.mean(off) < np.mean(own)
