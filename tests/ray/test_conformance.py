"""Flower's Ray simulation gives what SerialFleet gives, to the last bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.ray
@pytest.mark.real_data
def test_the_committed_study_holds():
    command = [sys.executable, str(ROOT / "simulations" / "flower_conformance.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["identical"] is True
    assert set(result["strategies"]) == {"fedavg", "heterofl", "adaptcl", "skip"}
    assert len({row["there"] for row in result["strategies"].values()}) == 4, "strategies that make no difference prove nothing"
