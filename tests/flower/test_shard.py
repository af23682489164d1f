"""Virtual time with Flower's nodes as trainers: bit for bit the run of one process, private rows and all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files import settings as settings_file
from flwr.app import Array, Context, Error, Message, RecordDict
from grid import HereGrid
from world import close, same

from fedprune.config import Settings, read
from fedprune.errors import ConfigError, FleetError
from fedprune.flower import client_app
from fedprune.flower.nodes import Nodes
from fedprune.flower.shard import OnNodes, serve
from fedprune.simulation import Simulation, prepare, read_data, run
from fedprune.strategy import ServerState, one_round

WITHIN = ["deadline.within=60", "fedprox.within=40", "adaptcl.interval=1"]


def settings(folder: Path, *changes: str) -> Settings:
    chosen = read(settings_file(folder), ["hidden=[8,4]", "fleet=serial", *WITHIN, *changes])
    return chosen.only(chosen.strategy)


def client(node: int, message: Message) -> RecordDict | Error:
    """What a simulated node of Flower runs."""
    return client_app.app(message, Context(7, node, {"partition-id": node}, RecordDict(), {})).content


def on_nodes(chosen: Settings, answer: Callable[[int, Message], Any] = client, nodes: int = 3) -> OnNodes:
    return OnNodes(Nodes(HereGrid(range(11, 11 + nodes), answer), sleep=lambda seconds: None), chosen)


def went(experiment: Simulation, rounds: int) -> ServerState:
    state = experiment.state
    for _ in range(rounds):
        state, _ = one_round(experiment.strategy, state, experiment.fleet)
    experiment.fleet.settle()
    return state


@pytest.mark.parametrize("silos", ["silos=none", "silos=4"])
@pytest.mark.parametrize(
    ("strategy", "model"),
    [(s, "mf") for s in ("heterofl", "window", "skip", "fedprox", "adaptcl")] + [("heterofl", "neumf"), ("window", "neumf")],
)
def test_nodes_train_as_one_process_does(tmp_path: Path, strategy: str, silos: str, model: str):
    chosen = settings(tmp_path, f"strategy={strategy}", f"recommender={model}", *([] if silos == "silos=none" else [silos]))
    split = read_data(chosen)
    here, there = prepare(chosen, split), prepare(chosen, split, on_nodes(chosen))
    assert same(went(here, 2).model, went(there, 2).model)
    mine, theirs = here.fleet.population.private, there.fleet.population.private
    assert same(mine.values, theirs.values) and same(mine.first, theirs.first) and same(mine.second, theirs.second)
    assert mine.steps.equal(theirs.steps) and here.fleet.now() == there.fleet.now()
    assert not same(mine.values, here.listeners.private.values), "nothing was trained"


MASKED = {
    "tickets": ["strategy=lth_sad", "lth_sad.every=1", "lth_sad.rewind=1"],
    "tickets in narrower units": ["strategy=ss_sad", "ss_sad.every=1", "ss_sad.rewind=1"],
    "feedback": ["strategy=dpf", "dpf.every=1"],
    "gradients of all entries": ["strategy=dpf", "dpf.every=1", "dpf.keep=0.4", "dpf.through=true"],
    "own tickets": ["strategy=lotteryfl", "lotteryfl.above=0"],
    "own columns": ["strategy=hermes", "hermes.above=0"],
    "salient": ["strategy=prunefl", "prunefl.every=2"],
}
TAUGHT = {
    "taught": ["strategy=sp_sad"],
    "learned": ["strategy=dpp"],
    "by what the server sent": ['distillation={teacher="sent",weight=0.5,top=4,ranking=0.1,attention=0.1,relation=0.1}'],
    "by its past": ['distillation={teacher="past",weight=0.5}', "epochs=2", "strategy=heterofl"],
    "by its narrower self": ["nested=0.5", "strategy=heterofl"],
}


@pytest.mark.parametrize("model", ["mf", "neumf"])
@pytest.mark.parametrize("kind", MASKED | TAUGHT)
def test_masks_teachers_and_gates_make_no_difference(tmp_path: Path, kind: str, model: str):
    silos = ["silos=4"] if kind in ("taught", "feedback", "own tickets") else []
    chosen = settings(tmp_path, *(MASKED | TAUGHT)[kind], f"recommender={model}", *silos)
    split = read_data(chosen)
    here, there = prepare(chosen, split), prepare(chosen, split, on_nodes(chosen))
    one, other = here.state, there.state
    for _ in range(4):
        one, mine = one_round(here.strategy, one, here.fleet)
        other, theirs = one_round(there.strategy, other, there.fleet)
        assert [o.submodel for o in mine.orders] == [o.submodel for o in theirs.orders]
        gates = [[r.gate for r in sorted(done.reports, key=lambda r: r.order.ticket)] for done in (mine, theirs)]
        assert np.array_equal(np.array(gates[0], float), np.array(gates[1], float), equal_nan=True)
    assert any(o.submodel.entries for o in mine.orders) == (kind in MASKED)
    assert any(gate is not None for gate in gates[0]) == kind.startswith("own")
    here.fleet.settle()
    there.fleet.settle()
    assert same(one.model, other.model)
    assert same(here.fleet.population.private.values, there.fleet.population.private.values)


@pytest.mark.parametrize("kind", ["feedback", "gradients of all entries", *(kind for kind in TAUGHT if kind != "learned")])
def test_nodes_that_stack_masked_and_taught_clients_are_close(tmp_path: Path, kind: str):
    chosen = settings(tmp_path, *(MASKED | TAUGHT)[kind], "recommender=neumf", "fleet=vector")
    split = read_data(chosen)
    here, there = prepare(chosen, split), prepare(chosen, split, on_nodes(chosen))
    assert close(went(here, 1).model, went(there, 1).model)  # later masks, and those that are learned, depend on the last digit
    assert close(here.fleet.population.private.values, there.fleet.population.private.values)


def test_a_teacher_from_elsewhere_is_not_on_the_nodes(tmp_path: Path):
    chosen = settings(tmp_path, 'distillation={teacher="given",weight=0.5}')
    there = prepare(chosen, read_data(chosen), on_nodes(chosen))
    with pytest.raises(ConfigError, match='teacher "given" is a model from elsewhere'):
        went(there, 1)


def test_a_window_over_a_cached_rest_is_not_on_the_nodes(tmp_path: Path):
    """Whole models are, whichever version they are of."""
    chosen = settings(tmp_path, "strategy=window", "window.refresh=2")
    there = prepare(chosen, read_data(chosen), on_nodes(chosen))
    with pytest.raises(ConfigError, match=r"windows over a cached rest are not sent .* set refresh to 1"):
        went(there, 1)
    chosen = settings(tmp_path, "strategy=fedavg_tuned", "fedavg_tuned.refresh=2", "fedavg_tuned.precision=float32")
    split = read_data(chosen)
    here, there = prepare(chosen, split), prepare(chosen, split, on_nodes(chosen))
    assert same(went(here, 3).model, went(there, 3).model)


@pytest.mark.parametrize("nodes", [1, 2, 50])
def test_the_number_of_nodes_makes_no_difference(tmp_path: Path, nodes: int):
    chosen = settings(tmp_path, "strategy=window", "rows=touched")
    split = read_data(chosen)
    here, there = prepare(chosen, split), prepare(chosen, split, on_nodes(chosen, nodes=nodes))
    assert same(went(here, 2).model, went(there, 2).model)


@pytest.mark.parametrize("strategy", ["fedavg", "window"])
def test_nodes_that_stack_their_clients_are_close(tmp_path: Path, strategy: str):
    chosen = settings(tmp_path, f"strategy={strategy}", "fleet=vector", "silos=8")
    split = read_data(chosen)
    here, there = prepare(chosen, split), prepare(chosen, split, on_nodes(chosen))
    assert close(went(here, 3).model, went(there, 3).model)
    assert close(here.fleet.population.private.values, there.fleet.population.private.values)


def test_a_whole_run_is_the_same_run(tmp_path: Path):
    chosen = settings(tmp_path, "strategy=heterofl", "rounds=4", "evaluations=2")
    alone = run(chosen, tmp_path / "alone")
    assert run(chosen, tmp_path / "nodes", trainer=on_nodes(chosen)) == alone


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda content: Error(2, "out of memory"), "node 12, asked for training: the client raised: out of memory"),
        (lambda content: Error(5, ""), "node 12, asked for training: the node is gone"),
    ],
)
def test_a_node_that_fails_is_named(tmp_path: Path, wrong: Callable[[RecordDict], Any], why: str):
    chosen = settings(tmp_path, "strategy=fedavg")

    def answer(node: int, message: Message) -> RecordDict | Error:
        return wrong(message.content) if node == 12 else serve(message.content)

    there = prepare(chosen, read_data(chosen), on_nodes(chosen, answer))
    with pytest.raises(FleetError, match=why):
        went(there, 1)


@pytest.mark.parametrize("name", ["private", "update", "present"])
def test_a_node_that_answers_too_little_is_refused(tmp_path: Path, name: str):
    chosen = settings(tmp_path, "strategy=fedavg")

    def answer(node: int, message: Message) -> RecordDict | Error:
        content = serve(message.content)
        if node == 12:
            content["arrays"][name] = Array(content["arrays"][name].numpy()[:-1])
        return content

    there = prepare(chosen, read_data(chosen), on_nodes(chosen, answer))
    with pytest.raises(FleetError, match=f'node 12.*field "{name}" has'):
        went(there, 1)


def test_without_nodes_it_says_so(tmp_path: Path):
    chosen = settings(tmp_path, "strategy=fedavg")
    there = prepare(chosen, read_data(chosen), on_nodes(chosen, nodes=0))
    ticks = iter(range(10**6))
    there.fleet._trainer.nodes.clock = lambda: float(next(ticks))
    with pytest.raises(FleetError, match="0 of 1 nodes are online after 60 s"):
        went(there, 1)
