"""The commands as a user types them, right and wrong."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from files import interactions, settings
from typer.testing import CliRunner, Result

from fedprune import cli
from fedprune.cli import app

KEYS = {
    "strategy", "seed", "rounds", "virtual_seconds", "joules", "bytes_down", "bytes_up", "waiting_share", "mean_rate",
    "hr10_full", "ndcg10_full", "hr10_expected", "ndcg10_expected", "hr10_full_slow", "ndcg10_full_slow",
    "hr10_expected_slow", "ndcg10_expected_slow", "seconds_to_target",
}  # fmt: skip


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(*words: str | Path) -> str:
    """What the command says on standard error when it refuses; nothing else may come out."""
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


def test_run_prints_one_json_object(tmp_path: Path) -> None:
    result = call("run", settings(tmp_path), "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary.keys() >= KEYS
    assert summary["rounds"] == 12
    assert 0 < summary["ndcg10_expected"] <= 1
    assert summary["virtual_seconds"] > 0


def test_compare_writes_table_figure_and_json(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call("compare", settings(tmp_path), "--seeds", "2", "--out", out, "--json", "--jobs", "1")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert [(r["strategy"], r["seed"]) for r in answer["runs"]] == [
        ("fedavg", 0),
        ("fedavg", 1),
        ("skip", 0),
        ("skip", 1),
    ]
    assert set(answer["baselines"]) == {"popularity", "item-kNN", "EASE", "PureSVD"}
    for name in ("table.md", "runs.csv", "figure.png", "figure.svg", "baselines.json"):
        assert (out / name).stat().st_size > 0
    again = call("report", out, "--json")
    assert again.exit_code == 0
    assert sorted(json.loads(again.stdout)["runs"], key=str) == sorted(answer["runs"], key=str)


def test_parallel_processes_give_the_same_numbers(tmp_path: Path) -> None:
    path = settings(tmp_path)
    answers = [
        json.loads(call("compare", path, "--out", tmp_path / jobs, "--jobs", jobs, "--json").stdout) for jobs in ("1", "2")
    ]
    assert answers[0] == answers[1]


def test_a_users_own_file_by_set(tmp_path: Path) -> None:
    path = tmp_path / "plain.toml"
    path.write_text("rounds = 2\nlatent = 4\nwarm_start = 0\n")
    data = interactions(tmp_path)
    result = call("run", path, "--set", f"data={data}", "--set", "silos=3", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["reports"] == 6


@pytest.mark.parametrize("what", ["strategies", "recommenders", "datasets", "devices"])
def test_list(what: str) -> None:
    shown = call("list", what)
    assert shown.exit_code == 0
    assert shown.stdout.strip()
    assert json.loads(call("list", what, "--json").stdout)


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (["--set", "sigmo=3"], 'Did you mean "sigma"?'),
        (["--set", "sigma=0.5"], "greater than or equal to 1"),
        (["--set", "sigma"], "key=value"),
        (["--set", "strategy=fedavgg"], 'Did you mean "fedavg"?'),
        (["--set", "strategy=deadline"], "deadline.within"),
        (["--set", "fedavg.within=3"], "unknown setting"),
        (["--set", "recommender=mff"], "unknown recommender"),
        (["--set", "device_class=fast"], "unknown device class"),
        (["--set", "data=nowhere.csv"], "nowhere.csv"),
        (["--set", "silos=4000"], "4000"),
        (["--set", "latent=0"], "latent"),
        (["--set", "strategy=lth_sad", "--set", "lth_sad.keep=abc"], "strategy lth_sad: keep is 'abc'; it must be a number"),
    ],
)
def test_refusals_name_fact_and_cure(tmp_path: Path, words: list[str], saying: str) -> None:
    assert saying in refused("run", settings(tmp_path), *words, "--out", tmp_path / "out")


def test_it_runs_as_a_script() -> None:
    """By its name, everything that a command uses must be there before it starts."""
    tree = ast.parse(Path(cli.__file__).read_text())
    assert isinstance(tree.body[-1], ast.If), "what stands below is missing when the file is run"
    assert not any(isinstance(part, ast.If) for part in tree.body[:-1])


def test_other_wrong_input(tmp_path: Path) -> None:
    assert "no settings file" in refused("run", tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("sigma = = 3")
    assert "not valid TOML" in refused("run", broken)
    assert "nothing to compare" in refused("compare", settings(tmp_path, "rounds = 1"))
    assert 'unknown strategy "fedawg"' in refused("compare", settings(tmp_path), "--strategies", "fedavg,fedawg")
    assert "no folder" in refused("report", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no finished run" in refused("report", tmp_path / "empty")
    assert "unknown list" in refused("list", "strategy")
