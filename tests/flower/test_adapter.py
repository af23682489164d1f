"""Our strategies under Flower's own loop, `strategy.start(grid=...)`, give what ours gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from files import settings as settings_file
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from grid import HereGrid
from world import same

from fedprune.config import Settings, read
from fedprune.errors import ConfigError, FleetError
from fedprune.flower import client_app, device
from fedprune.flower.adapter import FlowerStrategy
from fedprune.simulation import prepare, read_data
from fedprune.strategy import one_round

N = 3


@pytest.fixture(autouse=True)
def a_known_speed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "probe", lambda: 1e9)


def settings(folder: Path, strategy: str) -> Settings:
    changes = [
        f"strategy={strategy}",
        f"silos={N}",
        "fleet=serial",
        "noise=0",
        "dropout=0",
        "availability=1",
        "deadline.within=60.0",
    ]
    return read(settings_file(folder), changes).only(strategy)


class Answering:
    """The real client app, but for what a test spoils."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spoilt: set[int] = set()
        self.slowness = [1.0, 2.0, 3.0]

    def __call__(self, node: int, message: Message) -> RecordDict | Error:
        config = {
            "partition-id": node - 100,
            "state": str(self.folder / f"device{node}"),
            "meter": "none",
            "slowness": self.slowness[node - 100],
        }
        if message.metadata.message_type == "train" and node in self.spoilt:
            return Error(code=2, reason="out of battery")
        return client_app.app(message, Context(7, node, config, RecordDict(), {})).content


def grid(folder: Path) -> tuple[HereGrid, Answering]:
    answering = Answering(folder)
    return HereGrid(range(100, 100 + N), answering), answering


@pytest.mark.parametrize("name", ["fedavg", "window"])
def test_start_equals_our_own_rounds(tmp_path: Path, name: str):
    own = settings(tmp_path, name)
    simulation = prepare(own, read_data(own))
    strategy, (here, answering) = FlowerStrategy(own), grid(tmp_path)
    answering.slowness = simulation.fleet.devices.slowness.tolist()
    result = strategy.start(here, strategy.initial_arrays(here), num_rounds=4)
    state = simulation.state
    for _ in range(4):
        state, _ = one_round(simulation.strategy, state, simulation.fleet)
    assert same(dict(result.arrays.to_torch_state_dict()), state.model)
    assert result.train_metrics_clientapp[4]["reports"] == N
    quality = simulation.evaluate(state)
    for split in ("validation", "test"):
        found = result.evaluate_metrics_clientapp[4][f"{split}-ndcg10_full"]
        assert found == pytest.approx(quality[split]["ndcg10_full"], abs=1e-6)


@pytest.mark.parametrize("name", ["heterofl", "adaptcl", "deadline", "smallest", "drop_weak"])
def test_every_synchronous_strategy_runs(tmp_path: Path, name: str):
    strategy, (here, _) = FlowerStrategy(settings(tmp_path, name)), grid(tmp_path)
    result = strategy.start(here, strategy.initial_arrays(here), num_rounds=3)
    assert all(result.train_metrics_clientapp[number]["reports"] > 0 for number in (1, 2, 3))


def test_a_client_that_fails_costs_its_own_report_only(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    strategy, (here, answering) = FlowerStrategy(settings(tmp_path, "fedavg")), grid(tmp_path)
    arrays = strategy.initial_arrays(here)
    answering.spoilt = {101}
    result = strategy.start(here, arrays, num_rounds=2)
    assert (result.train_metrics_clientapp[2]["reports"], result.train_metrics_clientapp[2]["lost"]) == (N - 1, 1)
    assert "out of battery" in caplog.text


def test_what_does_not_wait_is_refused(tmp_path: Path):
    strategy, (here, _) = FlowerStrategy(settings(tmp_path, "skip")), grid(tmp_path)
    with pytest.raises(ConfigError, match="does not wait for late reports"):
        strategy.initial_arrays(here)


def test_silos_must_say_how_many_there_are():
    with pytest.raises(ConfigError, match="silos is not set"):
        FlowerStrategy(Settings())


def test_arrays_of_another_model_are_refused(tmp_path: Path):
    strategy, (here, _) = FlowerStrategy(settings(tmp_path, "fedavg")), grid(tmp_path)
    first = strategy.initial_arrays(here)
    wrong = ArrayRecord({name: Array(array.numpy()[:1]) for name, array in first.items()})
    with pytest.raises(FleetError, match="item_embedding"):
        strategy.start(here, wrong, num_rounds=1)
