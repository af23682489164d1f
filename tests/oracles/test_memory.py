"""Devices whose memory cannot hold the full model: who they are, what they get, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from files import SETTINGS, settings
from world import world

from fedprune.codec import Codec, fitting, sizes
from fedprune.config import Settings, read
from fedprune.devices import limited
from fedprune.errors import ConfigError
from fedprune.evaluation import average, quality, rank_held_out
from fedprune.experiment import digest
from fedprune.precision import nearest
from fedprune.pruning import Leading
from fedprune.recommenders import mf, neumf
from fedprune.record import RunRecord
from fedprune.serving import own_submodels, scorer
from fedprune.simulation import Simulation, check_memory, prepare, read_data, run
from fedprune.strategy import one_round
from fedprune.submodel import Submodel

TABLE = replace(world().fleet.devices, slowness=np.array([1.0, 3.0, 2.0, 3.0]), flops=np.ones(4))


def tight(share: float, **how: object) -> list[int]:
    capacity = limited(TABLE, share, 0.25, **how).capacity  # type: ignore[arg-type]
    assert capacity is not None and set(capacity.tolist()) <= {0.25, 1.0}
    return np.flatnonzero(capacity < 1).tolist()


def test_the_slowest_are_limited():
    assert tight(0.5) == [1, 3]
    assert tight(0.25) == [1], "of equals the first"
    assert tight(0.75) == [1, 2, 3]
    assert tight(0.01) == [1], "at least one"
    assert tight(1.0) == [0, 1, 2, 3]
    assert limited(TABLE, 0.0, 0.25) is TABLE


def test_or_any():
    drawn = [tuple(tight(0.5, who="random", seed=seed)) for seed in range(20)]
    assert {len(them) for them in drawn} == {2} and len(set(drawn)) > 2
    assert drawn[3] == tuple(tight(0.5, who="random", seed=3))


# ---- what they get ---------------------------------------------------------------------------------------------------

FITTING = {
    "fedavg": [],
    "skip": ["skip.pace=1.5"],
    "deadline": ["deadline.within=25.0"],
    "smallest": ["smallest.rate=0.75"],
    "heterofl": ["sigma=2"],
    "adaptcl": ["adaptcl.interval=1"],
    "fedbuff": ["fedbuff.buffer=5"],
    "ss_sad": ["ss_sad.taught=false", "ss_sad.rate=1.0"],
    "sp_sad": ["distillation.teacher=sent", "distillation.weight=0.5"],
}


def chosen(folder: Path, strategy: str, *changes: str) -> Settings:
    memory = ["memory_limited=0.4", "memory_rate=0.375", f"strategy={strategy}"]
    return read(settings(folder), [*memory, *changes]).only(strategy)


def simulated(of: Settings) -> Simulation:
    return prepare(of, read_data(of))


def check(here: Simulation, clients: Iterable[int], submodels: Iterable[Submodel]) -> set[int]:
    """Which of the clients were limited; none of them has more than its room."""
    capacity, layout = here.fleet.devices.capacity, here.state.layout
    assert capacity is not None
    found = set()
    for client, submodel in zip(clients, submodels, strict=True):
        if capacity[client] < 1:
            found.add(client)
            assert all(submodel.widths[axis] <= most for axis, most in layout.widths(capacity[client]).items())
    return found


@pytest.mark.parametrize("recommender", ["mf", "neumf"])
@pytest.mark.parametrize("strategy", FITTING)
def test_limited_devices_never_get_more(tmp_path: Path, strategy: str, recommender: str):
    """Neither to train nor to serve from, whatever the rate learner thinks of them."""
    here = simulated(chosen(tmp_path, strategy, *FITTING[strategy], f"recommender={recommender}"))
    capacity = here.fleet.devices.capacity
    assert capacity is not None and (capacity < 1).sum() == 12
    state, _ = here.begin()
    everybody, trained, free = list(range(here.clients)), set(), False
    for _ in range(5):
        state, happened = one_round(here.strategy, state, here.fleet)
        trained |= check(here, [o.client for o in happened.orders], [o.submodel for o in happened.orders])
        wide = [o.submodel.widths["latent"] > 3 for o in happened.orders if capacity[o.client] == 1]
        free = free or any(wide)
        assert check(here, everybody, here._held(state)[0]) == set(np.flatnonzero(capacity < 1))
    assert trained and free, "limited and free devices took part"


@pytest.mark.parametrize(
    ("strategy", "changes", "text"),
    [
        ("window", [], 'window has devices hold 8 of 8 units of "latent", and memory_rate 0.375 leaves room for 3 as float32'),
        ("lth_sad", [], "masks do not make a model smaller"),
        ("lth_sad", ["lth_sad.taught=false"], "masks do not make a model smaller"),
        ("dpf", [], "masks do not make a model smaller"),
        ("sp_sad", [], 'the whole model teach on the device .*set distillation.teacher to "sent"'),
        ("fedavg", ["distillation.teacher=local", "distillation.weight=0.5"], "the whole model teach on the device"),
        ("fedavg", ["memory_rate=0.01"], "memory_rate is 0.01; the smallest rate for this model is 0.125"),
        ("fedavg", ["memory_rate=1.0"], "memory_rate = 1.0"),
        ("fedavg", ["memory_limited=1.5"], "memory_limited = 1.5"),
        ("fedavg", ["memory_who=poorest"], "memory_who = 'poorest'"),
        ("fedavg", ["fedavg.memory_limited=0.2"], "the same for all that is compared"),
    ],
)
def test_refused_before_anything_runs(tmp_path: Path, strategy: str, changes: list[str], text: str):
    with pytest.raises(ConfigError, match=text):
        run(chosen(tmp_path, strategy, *changes), tmp_path / "out")


@pytest.mark.parametrize("strategy", ["window", "lth_sad", "sp_sad"])
def test_without_limits_they_run(tmp_path: Path, strategy: str):
    assert simulated(chosen(tmp_path, strategy, "memory_limited=0")).fleet.devices.capacity is None


# ---- what travels as int8 stays so -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("latent", "room", "units"), [(32, 0.25, 32), (32, 0.125, 16), (8, 0.375, 8), (8, 0.125, 4)])
def test_more_units_fit_as_int8(latent: int, room: float, units: int):
    """An item takes 4 bytes a unit and 4 for its bias; as int8 1 a unit, 2 for the row's scale and 2 for its bias."""
    layout = mf(users=500, items=700, latent=latent).layout
    assert fitting(layout, room, "float32") == room
    assert fitting(layout, room, "int8") == units / latent and layout.widths(units / latent)["latent"] == units
    assert 4 * (room * latent + 1) >= units + 4 and (units == latent or 4 * (room * latent + 1) < units + 5)


def test_an_int8_table_is_never_smaller():
    """Nor wider than memory allows, where towers shrink with the square of the rate."""
    layout = neumf(users=5, items=40, latent=16, hidden=(32, 16)).layout
    for room in np.linspace(layout.smallest_rate, 1.0, 9).tolist():
        rate = fitting(layout, room, "int8")
        assert rate >= room
        submodel = Leading().carve({}, layout, 0, 0, rate)
        assert sizes(layout, submodel, 40, Codec(precision="int8")).down <= layout.bytes(layout.widths(room), 40)


def test_limited_devices_keep_what_has_travelled_as_int8(tmp_path: Path):
    """All 8 dimensions in the memory of 3; their users are served with the rounded table, the others with it as it is."""
    here = simulated(chosen(tmp_path, "skip", "skip.precision=int8", "memory_who=random"))
    state, happened = one_round(here.strategy, here.state, here.fleet)
    assert all(order.submodel.widths["latent"] == 8 for order in happened.orders)
    capacity, private = here.fleet.devices.capacity, here.fleet.population.private.values
    assert capacity is not None
    held, rounded = here._held(state)
    assert {submodel.widths["latent"] for submodel in held} == {8}
    np.testing.assert_array_equal(rounded, capacity < 1)
    users = rounded[here.client_of_user]
    seen, held_out, found = here.split.seen_before_test(), here.split.test, here.evaluate(state)["test"]
    model = nearest(here.recommender.layout, state.model).tensors
    assert any(not torch.equal(model[name], state.model[name]) for name in model)
    short, whole = scorer(here.recommender, model, private), scorer(here.recommender, state.model, private)
    everybody = np.arange(len(users))
    mixed = scorer(here.recommender, state.model, private, own_submodels(here.client_of_user, held), users)(everybody)
    expected = torch.where(torch.from_numpy(users)[:, None], short(everybody), whole(everybody))
    torch.testing.assert_close(mixed, expected, rtol=0, atol=0)
    limited_users = average(quality(rank_held_out(short, seen, held_out)), users)
    assert found["ndcg10_expected_limited"] == limited_users["ndcg10_expected"]


def test_a_window_fits_where_int8_does(tmp_path: Path):
    here = simulated(chosen(tmp_path, "window", "memory_limited=0"))
    devices = limited(here.fleet.devices, 0.4, 0.375)
    with pytest.raises(ConfigError, match="leaves room for 3 as float32"):
        check_memory(here.strategy, here.state, devices)
    check_memory(replace(here.strategy, codec=replace(here.strategy.codec, precision="int8")), here.state, devices)


def test_a_teacher_fits_where_the_whole_model_does(tmp_path: Path):
    """It is what has travelled, once more to score with."""
    here = simulated(chosen(tmp_path, "skip", "memory_limited=0", "distillation.teacher=local", "distillation.weight=0.5"))
    devices = limited(here.fleet.devices, 0.4, 0.375)
    with pytest.raises(ConfigError, match="the whole model teach on the device"):
        check_memory(here.strategy, here.state, devices)
    spending = replace(here.strategy.spending, precision="int8")
    check_memory(replace(here.strategy, spending=spending), here.state, devices)


def test_auto_is_int8_where_memory_is_short(tmp_path: Path):
    """Whatever a device spends its time on."""
    here = simulated(chosen(tmp_path, "fedprune", "device_class=compute_bound", "fedprune.precision=auto"))
    strategy = replace(here.strategy, spending=replace(here.strategy.spending, worth=1.0))  # moving is never worth it
    capacity, state, seen = here.fleet.devices.capacity, here.state, set()
    assert capacity is not None
    for _ in range(6):
        state, happened = one_round(strategy, state, here.fleet)
        seen |= {(capacity[o.client] < 1, o.codec.precision) for o in happened.orders if state.version > 3}
    assert (True, "int8") in seen and (False, "float32") in seen and (True, "float32") not in seen


# ---- what is said of them --------------------------------------------------------------------------------------------


def test_a_figure_of_their_users(tmp_path: Path):
    """Each scored by its own device's submodel; `_global` by the whole model."""
    here = simulated(chosen(tmp_path, "fedavg", "memory_who=random", *["noise=0.0", "dropout=0.0"]))
    state, capacity = one_round(here.strategy, here.state, here.fleet)[0], here.fleet.devices.capacity
    assert capacity is not None
    found, private = here.evaluate(state)["test"], here.fleet.population.private.values
    users = (capacity < 1)[here.client_of_user]
    own = own_submodels(here.client_of_user, here._held(state)[0])
    seen, held_out = here.split.seen_before_test(), here.split.test
    for suffix, score in {
        "": scorer(here.recommender, state.model, private, own),
        "_global": scorer(here.recommender, state.model, private),
    }.items():
        for key, value in average(quality(rank_held_out(score, seen, held_out)), users).items():
            assert found[f"{key}_limited{suffix}"] == value
    assert found["ndcg10_expected_limited"] != found["ndcg10_expected_slow"]


def test_summaries_say_it_where_there_are_any(tmp_path: Path):
    some = run(chosen(tmp_path, "fedavg"), tmp_path / "some")
    none = run(chosen(tmp_path, "fedavg", "memory_limited=0"), tmp_path / "none")
    for key in ("hr10_full", "ndcg10_full", "hr10_expected", "ndcg10_expected"):
        assert none[f"{key}_limited"] is None and 0 <= some[f"{key}_limited"] <= 1
    (folder,) = (tmp_path / "none").glob("*/seed0")
    for event in RunRecord(folder).events():
        assert not any("_limited" in key for key in event.get("evaluation", {}).get("test", {}))


def test_no_limits_change_nothing(tmp_path: Path):
    """Bit for bit, whatever else would hold if there were any."""
    plain = simulated(read(settings(tmp_path, SETTINGS)).only("fedavg"))
    named = simulated(chosen(tmp_path, "fedavg", "memory_limited=0", "memory_who=random"))
    ends = []
    for here in (plain, named):
        state = here.state
        for _ in range(3):
            state, _ = one_round(here.strategy, state, here.fleet)
        ends.append((digest(state.model), here.evaluate(state)))
    assert ends[0] == ends[1]
