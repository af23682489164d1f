"""The committed tables that are plain comparisons of a settings file over several seeds.

    python simulations/comparisons.py accuracy            full-width quality, against popularity, item-kNN, EASE and PureSVD
    python simulations/comparisons.py accuracy_recency    the same with recency weights on the private gradient
    python simulations/comparisons.py stragglers          every strategy at sigma 10

Each writes `simulations/tables/NAME.md`; runs are kept under `results/NAME` and go on where they were stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fedprune.comparison import compare
from fedprune.config import read
from fedprune.report import tables

HERE = Path(__file__).parent
TABLES = {
    "accuracy": ("ml100k-mf.toml", []),
    "accuracy_recency": ("ml100k-mf.toml", ["recency=true"]),
    "stragglers": (
        "quickstart.toml",
        [
            'strategies=["fedavg","drop_weak","smallest","skip","deadline","fedprox","heterofl","window","adaptcl","fedmp",'
            '"learned_width","fedprune"]'
        ],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=TABLES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    config, changes = TABLES[arguments.name]
    settings = read(HERE.parent / "configs" / config, changes)
    several = [
        settings.model_copy(update={"strategy": name, "seed": seed})
        for name in settings.strategies
        for seed in range(arguments.seeds)
    ]
    result = compare(several, arguments.out or Path("results") / arguments.name)
    (HERE / "tables").mkdir(exist_ok=True)
    words = " ".join(f"`--set {change}`" for change in changes if not change.startswith("strategies"))
    note = f"`configs/{config}` {words}, {arguments.seeds} seeds; ± is the standard deviation over seeds.\n"
    (HERE / "tables" / f"{arguments.name}.md").write_text(tables.markdown(result.runs, result.baselines) + note)


if __name__ == "__main__":
    main()
