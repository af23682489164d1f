"""A user's own file and settings, small enough for a test to run end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SETTINGS = """
strategies = ["fedavg", "skip"]
latent = 8
sigma = 4
rounds = 12
evaluations = 4
checkpoint = 3
warm_start = 2
target = 0.1
noise = 0.05
dropout = 0.1
availability = 0.9
"""


def interactions(folder: Path) -> Path:
    """30 users, 60 items, two tastes, as CSV."""
    rng = np.random.default_rng(3)
    lines = ["user,item,timestamp"]
    for user in range(30):
        for age, item in enumerate(rng.permutation(30)[: 8 + user % 7]):
            lines.append(f"u{user},i{item + 30 * (user % 2)},{1000 + age}")
    path = folder / "mine.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def settings(folder: Path, text: str = SETTINGS) -> Path:
    """Settings that name the user's own file."""
    path = folder / "mine.toml"
    path.write_text(f'data = "{interactions(folder)}"\n{text}')
    return path
