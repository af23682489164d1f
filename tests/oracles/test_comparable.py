"""What a run is judged by: only rounds with its final ticket, and what its users are really served with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files import settings

from fedprune import experiment
from fedprune.config import read
from fedprune.exchange import Roster
from fedprune.experiment import conduct, open_record
from fedprune.recommenders.base import LOGITS
from fedprune.record import RunRecord
from fedprune.report.summary import summarise
from fedprune.serving import listen
from fedprune.simulation import Simulation, prepare, read_data
from fedprune.strategy import one_round, prepared
from fedprune.submodel import extract

NO_TIME = {"download": 0.0, "training": 1.0, "upload": 0.0, "waiting": 0.0}


def event(version: int, value: float | None, **entries: float) -> dict[str, Any]:
    """A round's line with what a summary reads of it; test quality is half of validation's."""
    told: dict[str, Any] = {
        "version": version, "began": float(version), "ended": version + 1.0, "flops": 1.0, "bytes_down": 1, "bytes_up": 1,
        "seconds": NO_TIME, "joules": NO_TIME, "reports": 1, "lost": 0, "mean_rate": 1.0, "source": "modelled",
    }  # fmt: skip
    if value is not None:
        told["evaluation"] = {"validation": {"ndcg10_expected": value}, "test": {"ndcg10_full": value / 2}}
    return told | ({"entries": entries} if entries else {})


def summary(events: Sequence[dict[str, Any]], target: float | None = None) -> tuple[Any, ...]:
    said = summarise(events, {"strategy": "lth_sad", "seed": 0, "target": target})
    return said["best_round"], said["ndcg10_full"], said["kept_entries"], said["seconds_to_target"]


SHRINKING = [
    event(-1, 0.5),
    event(0, 0.9, kept=1.0, ticket=1.0),
    event(1, 0.8, kept=0.5, ticket=0.5),
    event(2, 0.2, kept=0.25, ticket=0.25),
    event(3, 0.7, kept=0.25, ticket=0.25 + 1e-9),
    event(4, None, kept=0.25, ticket=0.25),
    event(5, 0.4, kept=0.25, ticket=0.25),
]


def test_the_best_round_is_one_with_the_final_ticket():
    assert summary(SHRINKING, 0.6) == (4, 0.35, 0.25, 4.0)
    assert summary(SHRINKING, 0.75) == (4, 0.35, 0.25, None), "what larger tickets reached does not count"
    assert summary(SHRINKING, 0.1) == (4, 0.35, 0.25, 3.0)
    assert summary(SHRINKING[:3], 0.85) == (2, 0.4, 0.5, None)
    assert summary([*SHRINKING[:3], event(3, None, ticket=0.25)])[0] == 2, "a ticket nobody looked at is not the final one"


def test_without_a_ticket_every_round_counts():
    """Shares that go up and down (Hermes, PruneFL, DPF) tell nothing of what came later."""
    wandering = [event(-1, 0.3), event(0, 0.5, kept=1.0), event(1, 0.9, kept=0.8), event(2, 0.6, kept=0.4)]
    assert summary(wandering, 0.4) == (2, 0.45, 0.8, 1.0), "the share of the best round, not the smallest"
    plain = [event(0, 0.5), event(1, 0.3)]
    assert summary(plain, 0.5) == (1, 0.25, None, 1.0)
    assert summary([event(-1, 0.7), *plain])[:3] == (0, 0.35, None)


def scripted(monkeypatch: pytest.MonkeyPatch, folder: Path, rounds: Sequence[tuple[float, float]], *changes: str):
    """A run whose rounds have these tickets and values."""
    chosen = read(settings(folder), [f"rounds={len(rounds)}", f"evaluations={len(rounds)}", "dropout=0", *changes])
    chosen = chosen.only("fedavg")
    data, line = read_data(chosen), experiment.line

    def evaluate(self: Simulation, state: Any, silent: Sequence[int] = (), final: bool = False) -> dict:
        value = rounds[state.version - 1][1] if state.version else 0.01
        return {"validation": {"ndcg10_expected": value}, "test": {"ndcg10_full": value}}

    def told(happened: Any) -> dict[str, Any]:
        return line(happened) | {"entries": {"ticket": rounds[happened.version][0], "kept": rounds[happened.version][0]}}

    monkeypatch.setattr(Simulation, "evaluate", evaluate)
    monkeypatch.setattr("fedprune.experiment.line", told)
    record = open_record(chosen, folder / "out", "data")
    return conduct(prepare(chosen, data), record), RunRecord(record.folder)


def test_the_kept_model_is_the_summarys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where a larger ticket comes later, which no published choice of entries does: it is refused."""
    rounds = [(1.0, 0.9), (0.5, 0.2), (0.5, 0.4), (1.0, 0.8), (0.5, 0.3), (0.7, 0.95)]
    said, record = scripted(monkeypatch, tmp_path, rounds)
    assert said["best_round"] == 3 and said["kept_entries"] == 0.5
    assert record.kept_model().version == 3
    assert len(record.events()) == 7


def test_patience_starts_anew_with_a_ticket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rounds = [(1.0, 0.9), (1.0, 0.8), (0.5, 0.1), (0.5, 0.05), (0.5, 0.3), (0.5, 0.2), (0.5, 0.1), (0.5, 0.9)]
    said, _ = scripted(monkeypatch, tmp_path, rounds, "patience=2")
    assert said["rounds"] == 7 and said["best_round"] == 5


def begun(folder: Path, strategy: str, *changes: str) -> Simulation:
    chosen = read(settings(folder), [f"strategy={strategy}", "dropout=0", "availability=1", "listen_steps=4", *changes])
    return prepare(chosen.only(strategy), read_data(chosen))


def test_dpp_is_judged_with_its_logits_started(tmp_path: Path):
    """Before the first round too, or a warm start's largest entries would be gone: logits begin at nothing."""
    here = begun(tmp_path, "dpp", "dpp.keep=0.4")
    ready = prepared(here.strategy, here.state)
    logits = {name for name in ready.model if name.endswith(LOGITS)}
    assert logits and not any(torch.equal(ready.model[name], here.state.model[name]) for name in logits)
    got = here.evaluate(here.state)
    assert got == here.evaluate(ready)
    turned = {name: -tensor if name in logits else tensor for name, tensor in ready.model.items()}
    worse = here.evaluate(type(ready)(**(vars(ready) | {"model": turned})))
    assert got["validation"]["ndcg10_full"] > worse["validation"]["ndcg10_full"], "the largest entries are there"


def test_who_is_never_asked_listens_as_the_others_train(tmp_path: Path):
    """To the negatives and at the rate that the strategy spends, not the experiment's."""
    tuned = begun(tmp_path, "fedavg_tuned", "fedavg_tuned.lr_private=0.2", "fedavg_tuned.negatives=2")
    alike, other = (begun(tmp_path, "fedavg", *more) for more in (("lr_private=0.2", "negatives=2"), ()))
    assert tuned.strategy.served == alike.strategy.objective != tuned.strategy.objective
    for here in (tuned, alike, other):
        here.evaluate(alike.state, [3, 4, 11])
    rows = [here.listeners.private.values["user_embedding"] for here in (tuned, alike, other)]
    assert torch.equal(rows[0], rows[1]) and not torch.allclose(rows[0], rows[2], atol=1e-4)


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [("lth_sad", ("lth_sad.keep=0.4", "lth_sad.every=1", "lth_sad.rewind=0")), ("dpf", ("dpf.keep=0.4",)), ("dpf", ())],
)
def test_who_is_never_asked_listens_through_the_mask(tmp_path: Path, strategy: str, changes: tuple[str, ...]):
    """As if each had received its cut and nothing else."""
    here, silent = begun(tmp_path, strategy, *changes), [3, 4, 11]
    state = here.state
    for _ in range(4):
        state, _ = one_round(here.strategy, state, here.fleet)
    clients = np.arange(here.clients)
    held, _ = here.strategy.held(state, clients, Roster(clients, here.clients, here.fleet.devices.slowness))
    assert all(submodel.entries for submodel in (held[3], held[4])), "nothing is masked"
    expected, unmasked = here.listeners.copy(), here.listeners.copy()
    told, steps, version = here.strategy.objective, here.settings.listen_steps, state.version
    for client in silent:
        cut = extract(state.model, state.layout, held[client])
        for population, model, submodels in ((expected, cut, None), (unmasked, state.model, None)):
            listen(
                here.recommender, population, model, [client], told,
                steps=steps, seed=here.settings.seed, version=version, submodels=submodels,
            )  # fmt: skip
    here.evaluate(state, silent)
    for name, rows in here.listeners.private.values.items():
        torch.testing.assert_close(rows, expected.private.values[name], atol=1e-6, rtol=1e-5)
        assert not torch.allclose(rows[silent], unmasked.private.values[name][silent], atol=1e-4)
