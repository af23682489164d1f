"""Virtual time with Flower's nodes as trainers: bit for bit the run of one process, private rows and all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from files import settings as settings_file
from flwr.app import Array, Context, Error, Message, RecordDict
from grid import HereGrid
from world import close, same

from fedprune.config import Settings, read
from fedprune.errors import FleetError
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
