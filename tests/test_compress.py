"""Compression on one machine: shares, tickets, teachers, files, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from files import interactions
from typer.testing import CliRunner, Result
from world import same

from fedprune.cli import app
from fedprune.compress import METHODS, Bench, Fitted, Recipe, compress, rate_for
from fedprune.compress.cutting import share, tickets, units
from fedprune.config import Settings
from fedprune.data import Split
from fedprune.errors import ConfigError, RecordError
from fedprune.export import load
from fedprune.recommenders import build
from fedprune.record import RunRecord
from fedprune.simulation import prepare, read_data
from fedprune.simulation import run as run_once
from fedprune.submodel import Submodel, extract

QUICK = Recipe(dense=6, rounds=6, retrain=3, prunings=2, early=2, evaluations=3)


def rated(folder: Path) -> Path:
    """The users' own file with ratings: a taste's items get 4 or 5."""
    rng = np.random.default_rng(5)
    header, *lines = interactions(folder).read_text().splitlines()
    path = folder / "rated.csv"
    path.write_text("\n".join([header + ",rating", *(f"{line},{rng.integers(3, 6)}" for line in lines)]) + "\n")
    return path


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(data=str(rated(tmp_path_factory.mktemp("data"))), latent=12, warm_start=2, negatives=3)


@pytest.fixture(scope="module")
def split(settings: Settings) -> Split:
    return read_data(settings)


@pytest.fixture(scope="module")
def bench(settings: Settings, split: Split) -> Bench:
    return Bench.of(settings, split, "implicit", QUICK)


@pytest.fixture(scope="module")
def dense(bench: Bench) -> Fitted:
    return bench.dense()


@pytest.mark.parametrize("keep", [0.5, 1 / 3, 0.2])
@pytest.mark.parametrize("name", ["mf", "gmf", "mlp", "neumf"])
def test_shares_are_kept_to(name: str, keep: float):
    hidden = {"hidden": (16, 8)} if name in ("mlp", "neumf") else {}
    what = build(name, users=5, items=40, latent=16, **hidden)
    layout, model = what.layout, what.initial(0)
    dense = layout.parameters(layout.full, 40)
    cut = units(model, layout, keep)
    assert share(layout, cut) <= keep
    assert layout.work(cut.widths, cut.widths).forward <= keep * layout.work(layout.full, layout.full).forward
    wider = rate_for(layout, keep) + 1 / max(layout.full.values())
    widths = layout.widths(min(1.0, wider))
    more = layout.work(widths, widths).forward / layout.work(layout.full, layout.full).forward
    assert max(layout.parameters(widths, 40) / dense, more) > keep, "a wider one would have been allowed"
    masked = tickets(model, layout, Submodel.full(layout), keep)
    left = sum(int((tensor != 0).sum()) for n, tensor in extract(model, layout, masked).items() if n in masked.entries)
    biases = sum(model[n].numel() for n in model if n not in masked.entries)
    assert left + biases == pytest.approx(keep * dense, abs=2 * len(masked.entries))


def test_a_ticket_within_a_ticket_within_units():
    what = build("mf", users=5, items=40, latent=16)
    layout, model = what.layout, what.initial(0)
    cut = units(model, layout, 0.5)
    first = tickets(model, layout, cut, 0.4)
    second = tickets(model, layout, first, 0.2)
    outside = np.setdiff1d(np.arange(16), cut.held["latent"])
    assert not first.entries["item_embedding"][:, outside].any()
    assert (second.entries["item_embedding"] <= first.entries["item_embedding"]).all()
    assert second.entries["item_embedding"].sum() + 40 == pytest.approx(0.2 * 40 * 17, abs=2)
    size = model["item_embedding"].abs().numpy()
    inside = first.entries["item_embedding"]
    assert size[second.entries["item_embedding"]].min() >= size[inside & ~second.entries["item_embedding"]].max()


def test_shares_that_cannot_be():
    layout = build("mf", users=5, items=40, latent=4).layout
    model = {"item_embedding": torch.ones(40, 4), "item_bias": torch.ones(40)}
    with pytest.raises(ConfigError, match=r"smallest submodel, which has 0\.400"):
        rate_for(layout, 0.3)
    with pytest.raises(ConfigError, match="40 that are never masked"):
        tickets(model, layout, Submodel.full(layout), 0.1)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_what_it_says(bench: Bench, dense: Fitted, method: str):
    student = bench.student(method, 0.4, dense)
    cut = extract(student.model, bench.layout, student.submodel)
    assert sum(int((t != 0).sum()) for t in cut.values()) <= 0.4 * bench.layout.parameters(bench.layout.full, 60) + 2
    masked, narrow = bool(student.submodel.entries), student.submodel.widths["latent"] < 12
    assert (narrow, masked) == {
        "sp-sad": (True, False), "lth-sad": (False, True), "ss-sad": (True, True), "magnitude": (False, True),
    }[method]  # fmt: skip
    assert 0 < student.test["ndcg10_full"] <= 1 and student.validation.keys() == student.test.keys()


def test_the_teacher_is_heard(bench: Bench, dense: Fitted):
    deaf = replace(QUICK.implicit, weight=0.0, attention=0.0, relation=0.0)
    taught = bench.student("sp-sad", 0.4, dense)
    bench.recipe = replace(QUICK, implicit=deaf)
    alone = bench.student("sp-sad", 0.4, dense)
    bench.recipe = QUICK
    assert not same(taught.private, alone.private)
    scores = [
        (f.private["user_embedding"][:, f.submodel.held["latent"]] @ f.model["item_embedding"][:, f.submodel.held["latent"]].T)
        for f in (taught, alone)
    ]
    target = dense.private["user_embedding"] @ dense.model["item_embedding"].T
    bias = [f.model["item_bias"] for f in (taught, alone, dense)]
    far = [
        float((torch.sigmoid(s + b) - torch.sigmoid(target + bias[2])).abs().mean()) for s, b in zip(scores, bias, strict=False)
    ]
    assert far[0] < far[1], "with its teacher it ends nearer to the teacher's scores"


def test_training_again_gives_the_same(settings: Settings, split: Split, dense: Fitted):
    other = Bench.of(settings, split, "implicit", QUICK)
    again = other.dense()
    assert same(again.model, dense.model) and same(again.private, dense.private)
    one, two = other.student("lth-sad", 0.4, again), other.student("lth-sad", 0.4, again)
    assert same(one.model, two.model)


def test_ratings_are_learned(settings: Settings, split: Split):
    bench = Bench.of(settings, split, "ratings", QUICK)
    dense = bench.dense()
    assert dense.test.keys() == {"mse", "mae"}
    assert split.train.rating is not None and split.test_rating is not None
    error = float(((split.train.rating.mean() - split.test_rating) ** 2).mean())
    assert dense.test["mse"] < 1.5 * error
    assert bench.student("ss-sad", 0.5, dense).test["mse"] < 2 * error


def test_ratings_that_are_not_there(tmp_path: Path):
    plain = Settings(data=str(interactions(tmp_path)), latent=8)
    with pytest.raises(ConfigError, match="has no ratings"):
        Bench.of(plain, read_data(plain), "ratings", QUICK)


def test_goes_on_where_it_was_stopped(settings: Settings, split: Split, tmp_path: Path):
    trained: list[str] = []

    class Stopped(Exception):
        """Ctrl-C, at a place of our choice."""

    def watch(name: str, number: int, of: int) -> None:
        if number == 1:
            trained.append(name)
        if name == "sp-sad" and number == 2 and len(trained) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        compress(settings, "sp-sad", 0.4, tmp_path, split=split, recipe=QUICK, watch=watch)
    result = compress(settings, "sp-sad", 0.4, tmp_path, split=split, recipe=QUICK, watch=watch)
    assert trained == ["dense", "sp-sad", "sp-sad", "dense", "sp-sad"], "implicit and ratings; only sp-sad was begun again"
    trained.clear()
    assert (
        compress(settings, "sp-sad", 0.4, tmp_path, split=split, recipe=QUICK, watch=watch)["pruned"]["mse"]
        == (result["pruned"]["mse"])
    )
    assert not trained
    small = load(Path(result["file"]))
    assert small.parameters == result["pruned"]["parameters"] < 0.4 * result["dense"]["parameters"]
    assert result["pruned"]["file_bytes"] < result["dense"]["file_bytes"]
    assert result["pruned"]["joules"] < result["dense"]["joules"] and "modelled" in result["pruned"]["joules_source"]


def test_refuses_models_of_other_data(settings: Settings, split: Split, tmp_path: Path):
    compress(settings, "magnitude", 0.5, tmp_path, split=split, recipe=QUICK)
    other = replace(split, test=np.where(split.test >= 0, (split.test + 1) % split.train.items, -1))
    with pytest.raises(RecordError, match="of other data"):
        compress(settings, "magnitude", 0.5, tmp_path, split=other, recipe=QUICK)


UNTAUGHT = {"entries": {}, "distillation": {}, "nested": 0.0, "dropout": 0.0, "availability": 1.0, "noise": 0.0}
TAUGHT = {
    "entries": {"kind": "feedback", "keep": 0.4, "every": 1}, "distillation": {"teacher": "local", "weight": 0.5, "top": 5},
    "nested": 0.4, "dropout": 0.4, "availability": 0.6, "noise": 0.3,
}  # fmt: skip
"""What a federation's settings may say, and one machine does not do."""


def test_the_bench_trains_one_plain_model(settings: Settings, split: Split, dense: Fitted):
    assert TAUGHT.keys() == UNTAUGHT.keys() and all(getattr(settings, name) == value for name, value in UNTAUGHT.items())
    other = Bench.of(settings.model_copy(update=TAUGHT), split, "implicit", QUICK)
    assert same(other.dense().model, dense.model)


def test_the_start_is_a_checkpoint_too(settings: Settings, split: Split, dense: Fitted, tmp_path: Path):
    bench = Bench.of(settings, split, "implicit", replace(QUICK, early=0))
    start = {name: tensor.clone() for name, tensor in bench.start[0].items()}
    rows = {name: tensor.clone() for name, tensor in bench.start[1].items()}
    first = bench.dense()
    assert same(first.model, dense.model), "only the checkpoint is another"
    assert first.early is not None and same(first.early[0], start) and same(first.early[1], rows)
    bench.student("lth-sad", 0.4, first)
    assert same(first.early[0], start) and same(first.early[1], rows), "rewound to, and not trained"
    assert dense.early is not None and not same(dense.early[1], rows)
    compress(settings, "ss-sad", 0.4, tmp_path, split=split, recipe=replace(QUICK, early=0))


def federated(settings: Settings, folder: Path, **changes: object) -> tuple[Settings, Path]:
    """A run of a few rounds."""
    chosen = settings.model_copy(update={"rounds": 4, "evaluations": 2, **changes})
    run_once(chosen, folder)
    (made,) = folder.glob("*/seed0")
    return chosen, made


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "lth_sad", "tables": {"lth_sad": {"every": 1}}},
        {"strategy": "dpp"},
        {"strategy": "fedavg", "entries": {"kind": "feedback", "keep": 0.5}},
        {"strategy": "fedavg", "tables": {"fedavg": {"entries": {"kind": "personal", "keep": 0.5}}}},
    ],
)
def test_runs_inside_masks_are_refused(settings: Settings, split: Split, tmp_path: Path, changes: dict):
    chosen, made = federated(settings, tmp_path / "runs", **changes)
    with pytest.raises(ConfigError, match="inside masks of entries already; `fedprune export`"):
        compress(chosen, "magnitude", 0.5, tmp_path / "out", split=split, run=made, recipe=QUICK)
    assert not (tmp_path / "out").exists()


def test_a_run_that_went_on_is_compressed_anew(settings: Settings, split: Split, tmp_path: Path):
    """What is kept follows from the run's model, not from where it lies; and a run's own teacher and dropout are its own."""
    chosen, made = federated(settings, tmp_path / "runs", nested=0.3, dropout=0.2, distillation=TAUGHT["distillation"])
    trained: list[str] = []

    def pruned() -> dict:
        trained.clear()

        def watch(name: str, number: int, of: int) -> None:
            trained.extend([name] * (number == 1))

        return compress(chosen, "magnitude", 0.5, tmp_path / "out", split=split, run=made, recipe=QUICK, watch=watch)

    first = pruned()
    assert trained == ["magnitude", "dense", "magnitude"]
    again = pruned()
    assert not trained and again["file"] == first["file"]
    assert all(again[side]["ndcg10_full"] == first[side]["ndcg10_full"] for side in ("dense", "pruned"))
    record = RunRecord(made)
    model, state = record.kept_model().model, prepare(chosen, split).state
    record.keep_model(replace(state, model={name: tensor * 1.5 for name, tensor in model.items()}, version=4))
    second = pruned()
    assert trained == ["magnitude", "dense", "magnitude"] and second["file"] != first["file"]
    small = [load(Path(result["file"])) for result in (first, second)]
    assert small[0].parameters == small[1].parameters
    assert first["dense"]["ndcg10_full"] != second["dense"]["ndcg10_full"]


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command(tmp_path: Path):
    words = ("--set", "latent=8", "--set", "warm_start=1", "--rounds", 4, "--out", tmp_path / "out")
    made = call("compress", "--data", rated(tmp_path), "--method", "sp-sad", "--keep", 0.4, *words, "--json")
    assert made.exit_code == 0, made.output
    answer = json.loads(made.stdout)
    for side in ("dense", "pruned"):
        assert answer[side].keys() >= {
            "parameters", "flops", "file_bytes", "latency_ms", "joules", "mse", "mae", "hr10_full", "ndcg10_full",
        }  # fmt: skip
    shown = call("compress", "--data", rated(tmp_path), "--method", "sp-sad", "--keep", 0.4, *words)
    assert shown.exit_code == 0 and "NDCG@10, full ranking" in shown.stdout and "sp-sad" in shown.stdout


def test_the_command_on_a_run(tmp_path: Path):
    config = tmp_path / "run.toml"
    config.write_text(f'data = "{rated(tmp_path)}"\nlatent = 8\nrounds = 4\nwarm_start = 1\n')
    ran = call("run", config, "--out", tmp_path / "runs", "--json")
    assert ran.exit_code == 0, ran.output
    (folder,) = (tmp_path / "runs").glob("fedavg-*/seed0")
    made = call("compress", folder, "--keep", 0.5, "--rounds", 4, "--out", tmp_path / "out", "--json")
    assert made.exit_code == 0, made.output
    answer = json.loads(made.stdout)
    assert answer["run"] == str(folder) and answer["pruned"]["parameters"] < answer["dense"]["parameters"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--method", "sp-sed"), "sp-sad"),
        (("--keep", "1.5"), "must be in (0, 1]"),
        (("--keep", "0.01"), "smallest submodel"),
        (("nowhere.toml",), "no settings file nowhere.toml"),
        (("--data", "nothing.csv"), "nothing.csv"),
        (("--set", "latnt=3"), "latent"),
    ],
)
def test_the_command_wrong(tmp_path: Path, words: tuple[str, ...], says: str):
    data = () if "--data" in words else ("--data", rated(tmp_path))
    result = call("compress", *data, *words, "--rounds", 4, "--out", tmp_path / "out")
    assert result.exit_code == 2 and says in result.stderr.replace("\n", ""), result.output
    assert "Traceback" not in result.stderr


def test_the_command_on_a_folder_that_is_no_run(tmp_path: Path):
    result = call("compress", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "no run's folder" in result.stderr
