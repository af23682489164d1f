"""Whole runs on devices behind a grid in this process: the real client app with its files, on a clock of the test's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files import settings as settings_file
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from grid import Clock, ClockGrid
from meters import Hand
from safetensors import safe_open
from world import same

from fedprune import teaching
from fedprune.config import Settings, read
from fedprune.energy import Spans
from fedprune.errors import ConfigError
from fedprune.fleet import trainer
from fedprune.flower import client_app, device
from fedprune.flower.deployment import Deployment, catalogue_of, deploy
from fedprune.flower.nodes import Nodes
from fedprune.simulation import prepare, read_data
from fedprune.strategy import one_round

N = 4
EVENTS = "events.jsonl"


@pytest.fixture(autouse=True)
def a_known_speed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "probe", lambda: 1e9)


@dataclass
class Lab:
    """Devices with their folders; a grid for each server that is started.

    Attributes:
        config: further node_config, per client.
        heard: all that any node was sent or answered.
        after: called after every message with the client's number.
    """

    folder: Path
    config: dict[int, dict[str, Any]] = field(default_factory=dict)
    takes: tuple[float, ...] = (2.0, 3.0, 4.0, 5.0)
    clients: int = N
    heard: list[RecordDict] = field(default_factory=list)
    after: Callable[[int], None] = lambda client: None

    def grid(self) -> ClockGrid:
        nodes = range(100, 100 + self.clients)
        grid = ClockGrid(nodes, self.answer, Clock())
        grid.takes = dict(zip(nodes, self.takes, strict=False))
        return grid

    def nodes(self) -> Nodes:
        grid = self.grid()
        return Nodes(grid, clock=grid.clock, sleep=grid.clock.sleep, poll=0.5)

    def answer(self, node: int, message: Message) -> RecordDict | Error:
        client = node - 100
        config = {"partition-id": client, "state": str(self.folder / f"device{client}"), "meter": "none"}
        context = Context(7, node, config | self.config.get(client, {}), RecordDict(), {})
        try:
            answer = client_app.app(message, context).content
        except Exception as error:  # as Flower does
            return Error(2, f"{type(error).__name__}: {error}")
        self.heard += [message.content, answer]
        self.after(client)
        return answer

    def rows(self, client: int) -> dict[str, np.ndarray]:
        """What the client has on its disk of its latest run."""
        (path,) = (self.folder / f"device{client}").glob(f"*/client{client}.safetensors")
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def run(self, settings: Settings, out: str = "out", **more: Any) -> dict[str, Any]:
        nodes = self.nodes()
        return deploy(settings, self.folder / out, nodes.grid, wait_seconds=30.0, nodes=nodes, **more)

    def events(self, out: str = "out") -> list[dict[str, Any]]:
        (path,) = (self.folder / out).glob(f"*/*/{EVENTS}")
        return [json.loads(line) for line in path.read_text().splitlines()]


def settings(folder: Path, *changes: str) -> Settings:
    calm = ("noise=0", "dropout=0", "availability=1", "fleet=serial")
    return read(settings_file(folder), [f"silos={N}", "rounds=4", "evaluations=2", *calm, *changes])


def digests(events: list[dict[str, Any]]) -> list[str]:
    return [event["model"] for event in events if event["version"] >= 0]


# ---- to the end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "rows"),
    [(s, "table") for s in ("fedavg", "heterofl", "adaptcl", "skip", "window", "deadline", "fedprox", "smallest")]
    + [("fedavg", "touched"), ("window", "touched")],
)
def test_every_strategy_runs_to_the_end(tmp_path: Path, strategy: str, rows: str):
    lab = Lab(tmp_path, takes=(2.0, 3.0, 5.0, 9.0))
    changes = [
        "evaluations=1",
        "deadline.within=6",
        "fedprox.within=6",
        "adaptcl.interval=1",
        f"strategy={strategy}",
        f"rows={rows}",
    ]
    summary = lab.run(settings(tmp_path, *changes))
    assert summary["rounds"] == 4 and summary["source"] == "measured" and 0 <= summary["ndcg10_full"] <= 1
    events = lab.events()
    assert [event["version"] for event in events] == [-1, 0, 1, 2, 3]
    assert not any("refused" in event for event in events), [event.get("refused") for event in events]
    assert len(set(digests(events))) == 4 and all(event["bytes_up"] > 0 for event in events)
    if strategy in ("fedavg", "heterofl", "adaptcl", "window", "smallest"):
        assert summary["reports"] == 16 and summary["lost"] == 0
    if strategy in ("deadline", "fedprox"):
        assert summary["lost"] > 0, "client 3 cannot make it"


@pytest.mark.parametrize("strategy", ["fedavg", "heterofl"])
@pytest.mark.parametrize("model", ["mf", "neumf"])
def test_it_is_the_run_that_was_simulated(tmp_path: Path, strategy: str, model: str):
    chosen = settings(tmp_path, f"strategy={strategy}", f"recommender={model}", "hidden=[8,4]").only(strategy)
    simulated = prepare(chosen, read_data(chosen))
    lab = Lab(tmp_path, {c: {"slowness": float(s)} for c, s in enumerate(simulated.fleet.devices.slowness)})
    deployed = Deployment.of(chosen, lab.nodes(), "run", catalogue_of(chosen), 30.0)
    here, (there, event) = simulated.state, deployed.begin()
    assert same(here.model, there.model), "the warm start is another"
    assert event["bytes_down"] > 0 and event["bytes_up"] > 0
    for _ in range(4):
        here, mine = one_round(simulated.strategy, here, simulated.fleet)
        there, theirs = one_round(deployed.strategy, there, deployed.fleet)
        assert [o.rate for o in mine.orders] == [o.rate for o in theirs.orders]
        assert same(here.model, there.model)
    if strategy == "heterofl":
        assert len({order.rate for order in mine.orders}) > 1
    simulated.fleet.settle()
    for client, users in enumerate(simulated.fleet.population.users_of):
        kept = lab.rows(client)
        for name, rows in simulated.fleet.population.private.values.items():
            assert np.array_equal(kept[f"after.values/{name}"], rows[users].numpy())
    central, apart = simulated.evaluate(here), deployed.evaluate(there)
    for split in ("validation", "test"):
        assert apart[split]["users"] == (read_data(chosen).test >= 0).sum()
        for figure in ("hr10_full", "ndcg10_full", "hr10_expected", "ndcg10_expected"):
            assert apart[split][figure] == pytest.approx(central[split][figure], abs=1e-9)


@pytest.mark.parametrize(
    "changes",
    [
        ["strategy=ss_sad", "ss_sad.every=1", "ss_sad.rewind=1"],
        ["strategy=dpf", "dpf.every=1", "dpf.keep=0.5"],
        ["strategy=lotteryfl", "lotteryfl.above=0"],
        ["strategy=dpp"],
        ["strategy=heterofl", 'distillation={teacher="past",weight=0.5}', "epochs=2", "nested=0.2"],
    ],
    ids=["narrow, masked and taught", "masked", "gated", "learned", "past"],
)
@pytest.mark.parametrize("rows", ["table", "touched"])
def test_masks_and_lessons_are_those_that_were_simulated(tmp_path: Path, changes: list[str], rows: str):
    chosen = settings(tmp_path, "recommender=neumf", "hidden=[8,4]", f"rows={rows}", *changes)
    chosen = chosen.only(chosen.strategy)
    simulated = prepare(chosen, read_data(chosen))
    slowness = [float(s) for s in simulated.fleet.devices.slowness]
    lab = Lab(tmp_path, {client: {"slowness": slow} for client, slow in enumerate(slowness)})
    deployed = Deployment.of(chosen, lab.nodes(), "run", catalogue_of(chosen), 30.0)
    here, (there, _) = simulated.state, deployed.begin()
    assert same(here.model, there.model), "the warm start is another"
    for _ in range(4):
        here, mine = one_round(simulated.strategy, here, simulated.fleet)
        there, theirs = one_round(deployed.strategy, there, deployed.fleet)
        assert len(theirs.reports) == N and not theirs.lost
        assert {r.order.client: r.gate for r in mine.reports} == {r.order.client: r.gate for r in theirs.reports}
        assert same(here.model, there.model)
        for report in theirs.reports:
            taught = chosen.strategy == "ss_sad" or bool(chosen.distillation)
            assert (report.cost.seconds.teacher > 0) == taught and report.cost.seconds.training > 0
            (modelled,) = [r.cost for r in mine.reports if r.order.client == report.order.client]
            assert report.cost.parameters == modelled.parameters or rows == "touched"
    assert any(order.submodel.entries for order in mine.orders) == (chosen.strategy in ("ss_sad", "dpf", "lotteryfl"))
    central, apart = simulated.evaluate(here), deployed.evaluate(there)
    for figure in ("hr10_full", "ndcg10_full"):
        assert apart["test"][figure] == pytest.approx(central["test"][figure], abs=1e-9)


@pytest.mark.parametrize("silent", [(), (0, 2)], ids=["nobody listens", "two listen"])
@pytest.mark.parametrize(
    "changes",
    [["dpp"], ["dpf", "dpf.keep=0.5"], ["heterofl"], ["dpf"], ["fedavg_tuned", "fedavg_tuned.negatives=2"]],
    ids=["learned", "masked", "narrow", "by rate", "tuned"],
)
def test_before_the_first_round_users_are_served_alike(tmp_path: Path, changes: list[str], silent: tuple[int, ...]):
    """With masks drawn and logits started, and whoever listens has fitted its rows to the cut it holds."""
    strategy, *more = changes
    chosen = settings(tmp_path, f"strategy={strategy}", "listen_steps=20", *more).only(strategy)
    simulated = prepare(chosen, read_data(chosen))
    slowness = [float(s) for s in simulated.fleet.devices.slowness]
    lab = Lab(tmp_path, {client: {"slowness": slow} for client, slow in enumerate(slowness)})
    deployed = Deployment.of(chosen, lab.nodes(), "run", catalogue_of(chosen), 30.0)
    central, apart = simulated.evaluate(simulated.state, silent), deployed.evaluate(deployed.begin()[0], silent)
    for figure in ("hr10_full", "ndcg10_full", "ndcg10_expected"):
        assert apart["test"][figure] == pytest.approx(central["test"][figure], abs=1e-9)


@pytest.mark.parametrize(("teacher", "why"), [("sent", "these never reach the server"), ("given", "devices have none")])
def test_teachers_that_devices_cannot_have_are_refused_before_anything_begins(tmp_path: Path, teacher: str, why: str):
    lab = Lab(tmp_path)
    chosen = settings(tmp_path, f'distillation={{teacher="{teacher}",weight=0.5}}')
    with pytest.raises(ConfigError, match=f'teacher "{teacher}".*{why}.*"local"'):
        lab.run(chosen)
    assert not (tmp_path / "out").exists() and not lab.heard


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (["strategy=window", "window.refresh=3"], "refresh 3 caches downloads, .* set it to 1"),
        (["strategy=fedprune", "fedprune.refresh=2"], "refresh 2 caches downloads"),
        (["strategy=heterofl", "memory_limited=0.5"], "memory_limited is for simulated devices: .* set it to 0"),
    ],
)
def test_what_devices_cannot_do_yet_is_refused_before_anything_begins(tmp_path: Path, changes: list[str], why: str):
    lab = Lab(tmp_path)
    with pytest.raises(ConfigError, match=why):
        lab.run(settings(tmp_path, *changes))
    assert not (tmp_path / "out").exists() and not lab.heard


def test_the_teacher_s_time_is_measured_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a clock of the test's own: a lesson takes 3 s, a list 2 s, and everything else of the training 5 s."""
    hand = Hand()
    monkeypatch.setattr(device.energy, "Spans", lambda meter: Spans(hand, hand.clock))

    def slowly(original: Callable[..., Any], seconds: float, watts: float) -> Callable[..., Any]:
        def work(*arguments: Any, **named: Any) -> Any:
            hand.work(seconds, watts)
            return original(*arguments, **named)

        return work

    monkeypatch.setattr(teaching.Teacher, "lesson", slowly(teaching.Teacher.lesson, 3.0, 2.0))
    lister = teaching.Teacher.lister
    monkeypatch.setattr(teaching.Teacher, "lister", lambda self, top: slowly(lister(self, top), 2.0, 2.0))
    monkeypatch.setattr(trainer, "train", slowly(trainer.train, 5.0, 10.0))
    lab = Lab(tmp_path, takes=(20.0,) * N)
    deployed = Deployment.of(
        settings(tmp_path, 'distillation={weight=0.5,top=3}', "warm_start=0").only("fedavg"), lab.nodes(), "run",
        catalogue_of(settings(tmp_path)), 30.0,
    )  # fmt: skip
    state, _ = deployed.begin()
    _, done = one_round(deployed.strategy, state, deployed.fleet)
    assert len(done.reports) == N
    for report in done.reports:
        assert (report.cost.seconds.teacher, report.cost.seconds.training) == (5.0, 5.0)
        assert (report.cost.joules.teacher, report.cost.joules.training) == (10.0, 50.0)


def test_private_rows_never_leave_their_device(tmp_path: Path):
    lab, private = Lab(tmp_path), set()

    def note(client: int) -> None:
        if not list((tmp_path / f"device{client}").glob("*/*.safetensors")):
            return
        for name, rows in lab.rows(client).items():
            if "/" not in name:
                continue
            for row in rows.reshape(len(rows), -1):
                pairs = [row[at : at + 2].tobytes() for at in range(0, len(row) - 1, 2)]
                private.update(pair for pair in pairs if any(pair))

    lab.after = note
    lab.run(settings(tmp_path, "recommender=neumf", "hidden=[8,4]", "evaluations=4"))
    arrays = [array for content in lab.heard for record in content.values() if isinstance(record, ArrayRecord)
              for array in record.values()]  # fmt: skip
    assert len(private) > 1000 and len(arrays) > 100
    everything = {}
    for array in arrays:
        everything[array.object_id] = array.numpy()
    for values in everything.values():
        if values.dtype == np.float64:  # the warm start's
            values = values.astype(np.float32)
        if values.dtype == np.float32:
            words = values.tobytes()
            sent = {words[at : at + 8] for at in range(0, len(words) - 7, 4)}
            assert not sent & private, "a piece of a private row was in a message"
    for content in lab.heard:
        assert all(
            not isinstance(v, list) or len(v) == 1 for record in content.metric_records.values() for v in record.values()
        )


# ---- servers that stop, and start again ------------------------------------------------------------------------------


def stopped_after(version: int) -> Callable[[dict[str, Any]], None]:
    def watch(event: dict[str, Any]) -> None:
        if event["version"] == version:
            raise KeyboardInterrupt

    return watch


@pytest.mark.parametrize(("checkpoint", "last"), [(1, 2), (2, 2), (50, 0)])
def test_a_run_whose_server_was_stopped_goes_on_to_the_same_end(tmp_path: Path, checkpoint: int, last: int):
    """Up to one order per device after the last checkpoint is asked again, and begins where it began the first time."""
    chosen = settings(tmp_path, f"checkpoint={checkpoint}", "rounds=5", "evaluations=1", "warm_start=0")
    whole, lab = Lab(tmp_path / "whole"), Lab(tmp_path / "parts")
    whole.run(chosen)
    with pytest.raises(KeyboardInterrupt):
        lab.run(chosen, watch=stopped_after(last))
    summary = lab.run(chosen)
    assert [event["version"] for event in lab.events()] == [-1, 0, 1, 2, 3, 4]
    assert digests(lab.events()) == digests(whole.events())
    assert summary["rounds"] == 5 and summary == lab.run(chosen), "a finished run is not run again"
    for client in range(N):
        ours, theirs = lab.rows(client), whole.rows(client)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    ends = [event["ended"] for event in lab.events()]
    assert ends == sorted(ends)


def test_a_server_that_lost_several_rounds_still_gets_to_the_end(tmp_path: Path):
    chosen, lab = settings(tmp_path, "checkpoint=3", "rounds=6", "evaluations=1"), Lab(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        lab.run(chosen, watch=stopped_after(4))
    assert lab.run(chosen)["rounds"] == 6
    assert [event["version"] for event in lab.events()] == [-1, 0, 1, 2, 3, 4, 5]


def test_a_resumed_run_begins_with_who_is_there(tmp_path: Path):
    chosen, lab = settings(tmp_path, "checkpoint=1"), Lab(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        lab.run(chosen, watch=stopped_after(1))
    lab.clients = 3
    assert lab.run(chosen)["rounds"] == 4
    assert [event["reports"] for event in lab.events()[1:]] == [4, 4, 3, 3]


def test_the_same_ticket_again_gives_the_same_update(tmp_path: Path):
    lab = Lab(tmp_path)
    nodes = lab.nodes()
    deploy(settings(tmp_path), tmp_path / "out", nodes.grid, nodes=nodes, wait_seconds=30.0)
    trained = [m for m in nodes.grid.sent if m.metadata.message_type == "train" and m.metadata.dst_node_id == 102]
    kept = lab.rows(2)
    again = [lab.answer(102, trained[-1]) for _ in range(2)]
    assert {name: a.data for name, a in again[0]["arrays"].items()} == {n: a.data for n, a in again[1]["arrays"].items()}
    assert all(np.array_equal(lab.rows(2)[name], kept[name]) for name in kept)
    first = [c for c in lab.heard if c["config"].get("tickets") == trained[-1].content["config"]["tickets"] and "metrics" in c]
    assert {n: a.data for n, a in first[0]["arrays"].items()} == {n: a.data for n, a in again[0]["arrays"].items()}
    lab.answer(102, trained[-2])
    assert any(not np.array_equal(lab.rows(2)[name], kept[name]) for name in kept), "another ticket goes on from there"


def test_a_new_run_knows_nothing_of_an_old_one(tmp_path: Path):
    chosen, lab = settings(tmp_path), Lab(tmp_path)
    lab.run(chosen, "first")
    lab.run(chosen, "second")
    assert digests(lab.events("first")) == digests(lab.events("second"))


# ---- data of the device's own ----------------------------------------------------------------------------------------
