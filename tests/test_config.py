"""Settings of masks and teachers: tables that become parts of a strategy, and mistakes that are told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from files import settings

from fedprune import catalog, entries
from fedprune.config import Settings, read
from fedprune.distill import Distillation
from fedprune.entries import KINDS, All, Feedback, KOfN, Lottery
from fedprune.errors import ConfigError
from fedprune.experiment import objective_of, recommender_of, strategy_of
from fedprune.merge import Merge
from fedprune.objective import Objective
from fedprune.selection import KeepBusy
from fedprune.simulation import read_data, run
from fedprune.strategy import Strategy

TABLES = """
strategies = ["fedavg", "window"]
rounds = 3
evaluations = 1
latent = 4
nested = 0.25

[entries]
kind = "lottery"
keep = 0.4
every = 2

[distillation]
teacher = "local"
weight = 0.25
temperature = 2
top = 3

[window]
entries = { kind = "feedback", keep = 0.6 }
distillation = { teacher = "sent", attention = 0.5 }
"""


def strategy(chosen: Settings, name: str = "fedavg") -> Strategy:
    own, arguments = chosen.of(name)
    return strategy_of(own, arguments)


def test_tables_become_parts_of_the_strategy(tmp_path: Path):
    chosen = read(settings(tmp_path, TABLES))
    row = strategy(chosen)
    assert row.entries == Lottery(0.4, every=2)
    assert row.objective.distillation == Distillation("local", 0.25, 2, 3) and row.objective.nested == 0.25
    other = strategy(chosen, "window")
    assert other.entries == Feedback(0.6) and other.objective.distillation == Distillation("sent", attention=0.5)
    assert Settings.from_json(chosen.to_json()) == chosen
    plain = read(settings(tmp_path, "latent = 4"))
    assert strategy(plain).entries == All() and strategy(plain).objective.distillation is None
    assert plain.only("fedavg").identity() != chosen.only("fedavg").identity()


def test_a_strategys_own_stay_unless_others_are_given(tmp_path: Path):
    plain = read(settings(tmp_path, "latent = 4"))
    assert isinstance(strategy(plain, "lth_sad").entries, Lottery)
    assert strategy(plain, "lth_sad").objective.distillation is not None
    changed = read(settings(tmp_path, TABLES), ["lth_sad.entries.kind=k_of_n", "lth_sad.entries.keep=0.5", "lth_sad.nested=0"])
    assert strategy(changed, "lth_sad").entries == KOfN(0.5)
    assert "item_embedding_logits" in recommender_of(changed.of("lth_sad")[0], 9, 9).layout.tensors
    assert strategy(changed, "dpf").entries == Lottery(0.4, every=2)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_can_be_set(kind: str):
    assert isinstance(entries.from_settings({"kind": kind, "keep": 0.5}), KINDS[kind])
    with pytest.raises(ConfigError, match="keep"):
        entries.from_settings({"kind": kind, "keep": 1.5})
    with pytest.raises(ConfigError, match=f'entries {kind}: unknown setting "kep".*Did you mean "keep"'):
        entries.from_settings({"kind": kind, "kep": 0.5})
    with pytest.raises(ConfigError, match=f"entries {kind}: "):
        entries.from_settings({"kind": kind, "keep": "half"})


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_a_kind_is_cannot_be_set(kind: str):
    for name in ("gate", "through") if kind != "feedback" else ("gate",):
        with pytest.raises(ConfigError, match=f'entries {kind}: unknown setting "{name}"'):
            entries.from_settings({"kind": kind, "keep": 0.5, name: True})
    with pytest.raises(ConfigError, match="through is 'yes'; it must be true or false"):
        entries.from_settings({"kind": "feedback", "through": "yes"})


def test_every_strategys_settings_have_types(tmp_path: Path):
    plain = read(settings(tmp_path, "latent = 4"), ["deadline.within=9", "fedprox.within=9"])
    for name, row in catalog.CATALOG.items():
        for key, kind in get_type_hints(row).items():
            if key == "return":
                continue
            wrong = 3.5 if kind is str else "abc"
            word = {bool: "true or false", str: "a text"}.get(kind, "a whole number" if "int" in str(kind) else "a number")
            with pytest.raises(ConfigError, match=f"strategy {name}: {key} is {wrong!r}; it must be {word}"):
                catalog.build(name, **plain.tables.get(name, {}) | {key: wrong})
            if kind is str:  # any text is one, and which there are is for the part itself to say
                with pytest.raises(ConfigError, match=f'{key} "abc"; it is .* or '):
                    catalog.build(name, **plain.tables.get(name, {}) | {key: "abc"})
    assert catalog.build("dpf", keep=1, until=None, every=np.int64(3)).entries == Feedback(1, every=3)
    for key, value in (("taught", 1), ("every", 2.5), ("keep", True), ("keep", None), ("keep", [0.5])):
        with pytest.raises(ConfigError, match=f"strategy lth_sad: {key} is "):
            catalog.build("lth_sad", **{key: value})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("entries.kind=lotery", 'unknown kind of entries "lotery".*Did you mean "lottery"'),
        ("entries.evry=3", 'entries lottery: unknown setting "evry".*Did you mean "every"'),
        ("entries.step=2.0", r"step is 2.0; it must be in \(0, 1\)"),
        ("entries.every=soon", "entries lottery: "),
        ("distillation.teacher=lokal", 'unknown teacher "lokal".*Did you mean "local"'),
        ("distillation.atention=0.5", 'distillation: unknown setting "atention".*Did you mean "attention"'),
        ("distillation.weight=2.0", r"distillation weight is 2.0; it must be in \[0, 1\]"),
        ("distillation.weight=much", "distillation: "),
        ("entry.kind=lottery", 'unknown setting "entry".*Did you mean "entries"'),
        ("entries=lottery", "entries = 'lottery'"),
        ("distillation=local", "distillation = 'local'"),
        ("nested=-1", "nested = -1"),
        ("entries=[1]", "entries = "),
        ("entries.kind=[1]", r'unknown kind of entries "\[1\]"'),
        ("lth_sad.keep=abc", "strategy lth_sad: keep is 'abc'; it must be a number"),
        ("lth_sad.keep=1.5", r"strategy lth_sad: keep is 1.5; it must be in \(0, 1\]"),
        ("lth_sad.kep=0.5", r'\[lth_sad\]: unknown setting "kep".*Did you mean "keep"'),
    ],
)
def test_mistakes_name_the_nearest(tmp_path: Path, change: str, text: str):
    path = settings(tmp_path, TABLES)
    name = change.split(".")[0] if change.startswith("lth") else "fedavg"
    with pytest.raises(ConfigError, match=text):
        strategy(read(path, [change]), name)


@pytest.mark.parametrize(
    ("name", "bad", "text"),
    [
        ("fedasync", {"mixing": 0.0}, r"mixing is 0.0; it must be in \(0, 1\]"),
        ("fedasync", {"mixing": 1.5}, r"mixing is 1.5; it must be in \(0, 1\]"),
        ("fedbuff", {"cohort": 0}, "concurrency is 0; it must be at least 1"),
        ("fedbuff", {"concurrency": 5}, 'unknown setting "concurrency"; there is: buffer, cohort'),
        ("fedavg_tuned", {"server_lr": 0.0}, "the server's rate is 0.0; it must be above 0"),
        ("fedprune", {"server_lr": -0.1}, "the server's rate is -0.1; it must be above 0"),
        ("fedprune", {"worth": 0.5}, "worth is 0.5; it must be at least 1"),
        ("adaptcl", {"degree": 3}, "degree is 3; it must be 1 or 2"),
        ("learned_width", {"floor": 0.0}, "floor is 0.0"),
        ("fedmp", {"explore": -1.0}, "explore is -1.0"),
    ],
)
def test_whose_setting_it_is_stands_before_what_is_wrong_with_it(name: str, bad: dict, text: str):
    with pytest.raises(ConfigError, match=f"^strategy {name}: {text}"):
        catalog.build(name, **bad)


@pytest.mark.parametrize("name", ["fedbuff", "fedasync"])
def test_the_cohort_of_all_is_the_asynchronous_ones_too(tmp_path: Path, name: str):
    chosen = read(settings(tmp_path, "cohort = 5"))
    assert strategy(chosen, name).selector == KeepBusy(5)
    with pytest.raises(ConfigError, match=rf'\[{name}\]: unknown setting "cohor".* Did you mean "cohort"') as refused:
        strategy(read(settings(tmp_path, "cohort = 5"), [f"{name}.cohor=3"]), name)
    assert str(refused.value).count("cohort,") == 1, "it is one setting, whichever list it is on"


def test_sparse_training_is_the_experiments(tmp_path: Path):
    chosen = read(settings(tmp_path, "sparse = 0.5"))
    assert strategy(chosen, "adaptcl").objective.sparse == 0.5
    own = replace(catalog.build("adaptcl"), objective=Objective(sparse=0.5))
    assert catalog.trained_with(own, Objective(), Merge()).objective.sparse == 0.0, "0 switches it off"


def test_what_a_kind_needs_is_said():
    with pytest.raises(ConfigError, match=r'entries lottery needs "keep"; set it as entries\.keep='):
        entries.from_settings({"kind": "lottery"})
    with pytest.raises(ConfigError, match="unknown kind of entries"):
        entries.from_settings({"keep": 0.5})


def test_a_run_reads_them(tmp_path: Path):
    """End to end: a teacher's time and a ticket's share stand in the summary's events."""
    chosen = read(settings(tmp_path, TABLES)).only("fedavg")
    seen: list[dict] = []
    run(chosen, tmp_path / "out", split=read_data(chosen), watch=seen.append)
    assert all(event["seconds"]["teacher"] > 0 for event in seen)
    assert [round(event["entries"]["kept"], 1) for event in seen] == [1.0, 1.0, 0.8]


def test_another_kind_leaves_nothing_of_the_files(tmp_path: Path):
    """The header of configs/tickets.toml does that."""
    here = settings(tmp_path, "[entries]\nkind = 'lottery'\nkeep = 0.5\nrewind = 2\n")
    assert read(here, ["entries.kind=feedback", "entries.keep=0.2"]).entries == {"kind": "feedback", "keep": 0.2}
    assert read(here, ["entries.kind=lottery", "entries.every=3"]).entries["rewind"] == 2


def test_a_teacher_that_says_nothing_is_not_paid_for(tmp_path: Path):
    silent = read(settings(tmp_path, "[distillation]\nteacher = 'local'\nweight = 0.0\n"))
    assert objective_of(silent).distillation is None


def test_k_of_n_has_no_narrower_self(tmp_path: Path):
    both = read(settings(tmp_path, "nested = 0.5\n[entries]\nkind = 'k_of_n'\nkeep = 0.5\n"))
    with pytest.raises(ConfigError, match="do not go together"):
        strategy(both, "fedavg")
