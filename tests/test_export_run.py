"""`fedprune export`: a run's folder in, a device's model out; right, wrong, and with the disk full."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from files import settings
from typer.testing import CliRunner, Result
from world import same

from fedprune import experiment
from fedprune.cli import app
from fedprune.config import read
from fedprune.experiment import recommender_of, strategy_of
from fedprune.export import load
from fedprune.record import RunRecord, save
from fedprune.serving import scorer
from fedprune.simulation import run
from fedprune.strategy import ServerState

MASKS = {
    "whole": [],
    "importance": ["strategy=adaptcl", "recommender=neumf", "hidden=[8, 4]"],
    "lottery": ['entries.kind="lottery"', "entries.keep=0.3", "entries.every=2"],
    "feedback": ['entries.kind="feedback"'],
    "salient": ['entries.kind="salient"', "entries.every=3"],
    "k_of_n": ['entries.kind="k_of_n"', "entries.keep=0.25", "recommender=gmf"],
    "personal": ['entries.kind="personal"', "entries.above=0.0"],
}


def finished(tmp_path: Path, *changes: str) -> Path:
    """The folder of a small run."""
    run(read(settings(tmp_path), ["rounds=6", "evaluations=3", *changes]), tmp_path / "out")
    (folder,) = (tmp_path / "out").glob("*/seed0")
    return folder


def call(*words: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, words)])


def refused(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.parametrize("kind", MASKS)
def test_a_run_is_exported_as_its_devices_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    best: list[ServerState] = []
    keep = RunRecord.keep_model
    rank = experiment._evaluated
    monkeypatch.setattr(experiment, "_evaluated", lambda *said: rank(*said) or True)  # the last is best: masks are drawn
    monkeypatch.setattr(RunRecord, "keep_model", lambda self, state: (best.append(state), keep(self, state))[1])
    folder, rate = finished(tmp_path, *MASKS[kind]), 0.75
    words = ["--client", "3"] if kind == "personal" else []
    result = call(folder, "--out", tmp_path / "device", "--width", rate, *words, "--json")
    assert result.exit_code == 0, result.output
    said, exported = json.loads(result.stdout), load(tmp_path / "device" / "compact.safetensors")
    own, arguments = (values := read(tmp_path / "mine.toml", MASKS[kind])).of(values.strategy)
    strategy, what = strategy_of(own, arguments), recommender_of(own, 30, 60)
    submodel = strategy.carve(best[-1], 3 if kind == "personal" else 0, rate)
    assert submodel.entries or kind in ("whole", "importance", "k_of_n"), "the kept model has no masks"
    private = what.initial_private(3)
    expected = scorer(what, best[-1].model, private, [submodel] * 30)(np.arange(30))
    assert torch.allclose(exported.score(private), expected, atol=1e-5)
    assert said["version"] == best[-1].version and said["item_ids"] and len(exported.item_ids) == 60
    assert said["exported"]["parameters"] == exported.parameters
    assert said["exported"]["file_bytes"] == (tmp_path / "device" / "compact.safetensors").stat().st_size
    assert json.loads((tmp_path / "device" / "export.json").read_text()) == said
    assert exported.parameters < said["dense"]["parameters"]
    assert same(RunRecord(folder).kept_model().model, best[-1].model)


def test_an_unfinished_run_is_exported_and_an_earlier_export_replaced(tmp_path: Path):
    folder, out = finished(tmp_path), tmp_path / "a" / "b"
    (folder / "summary.json").unlink()
    assert call(folder, "--out", out, "--width", "0.5").exit_code == 0
    assert load(out / "compact.safetensors").widths == {"latent": 4}
    (out / "compact.onnx").write_text("of another model")
    (tmp_path / "mine.csv").unlink()  # as on a server that has never had the data
    shown = call(folder, "--out", out)
    assert shown.exit_code == 0, shown.output
    assert "parameters" in shown.stdout and "compact.safetensors" in shown.stdout
    assert load(out / "compact.safetensors").widths == {"latent": 8}
    assert load(out / "compact.safetensors").item_ids == ()
    assert sorted(path.name for path in out.iterdir()) == ["compact.safetensors", "export.json"]


def test_wrong_words_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, out = finished(tmp_path), tmp_path / "device"
    assert "no run.json" in refused(tmp_path / "nowhere", "--out", out)
    assert f"there is {folder}" in refused(tmp_path / "out", "--out", out)
    assert "below its floor 1; the smallest rate" in refused(folder, "--out", out, "--width", "0.01")
    assert "not in (0, 1]" in refused(folder, "--out", out, "--width", "1.5")
    assert "client 30 is not in 0..29" in refused(folder, "--out", out, "--client", "30")
    assert "is a file; name another" in refused(folder, "--out", tmp_path / "mine.csv")
    assert "is a file; name another" in refused(folder, "--out", tmp_path / "mine.csv" / "deeper")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install 'fedprune[onnx]'" in refused(folder, "--out", out, "--onnx")
    model = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(model[:-1])
    assert "is damaged" in refused(folder, "--out", out)
    save(folder / "model.safetensors", {"item_bias": torch.zeros(60)}, {})
    assert "without its masks, by an earlier fedprune" in refused(folder, "--out", out)
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors yet" in refused(folder, "--out", out)
    (folder / "run.json").write_text("{")
    assert "run.json" in refused(folder, "--out", out)
    (folder / "run.json").write_text("{}")
    assert "run.json" in refused(folder, "--out", out)
    assert not out.exists() and not list(tmp_path.glob(".export-*"))


def test_what_fails_while_writing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, out = finished(tmp_path), tmp_path / "device"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedprune.export.folder.portable.require", lambda: None)
    monkeypatch.setattr("fedprune.export.folder.portable.to_onnx", full)
    assert "No space left on device" in refused(folder, "--out", out, "--onnx")
    assert not out.exists() and not list(tmp_path.glob(".export-*"))


def test_masks_that_nothing_has_taught_yet_follow_the_weights(tmp_path: Path):
    """A best model from before the first round has random logits: the first round would start them from the weights."""
    folder = finished(tmp_path, *MASKS["k_of_n"])
    what = recommender_of(read(tmp_path / "mine.toml", MASKS["k_of_n"]).of("fedavg")[0], 30, 60)
    fresh = ServerState(what.initial(0), what.layout, 0)
    RunRecord(folder).keep_model(fresh)
    assert call(folder, "--out", tmp_path / "device").exit_code == 0
    table, weights = load(tmp_path / "device" / "compact.safetensors").tensors["item_embedding"], fresh.model["item_embedding"]
    largest = weights.abs() >= weights.abs().topk(2, -1).values[:, -1:]
    assert torch.equal(table, weights * largest)


def test_masks_of_ones_own_need_a_client(tmp_path: Path):
    folder = finished(tmp_path, *MASKS["personal"])
    assert "--client" in refused(folder, "--out", tmp_path / "device")
