"""The ServerApp's run-config."""

from __future__ import annotations

import tomllib
from pathlib import Path

from fedprune.flower.server_app import DEFAULTS


def test_the_defaults_are_those_of_our_own_app():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["tool"]["flwr"]["app"]["config"] == DEFAULTS
