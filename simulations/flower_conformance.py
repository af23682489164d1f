"""The same settings and seed in process and on Flower's Ray simulation: are the global models equal to the last bit?

    python simulations/flower_conformance.py [--json] [--strategies fedavg,heterofl,adaptcl,skip] [--nodes 3]

For each strategy: five rounds on SerialFleet in this process, and five on Flower's simulation, where a SuperLink of our own
starts Ray and a ServerApp deals the orders out to the nodes. Compared are the whole records: the global model's digest after
every round, and what each round cost. Takes about half a minute, nearly all of it Flower's and Ray's start.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from fedprune.config import read
from fedprune.flower.staging import stage
from fedprune.simulation import run

ROOT = Path(__file__).parent.parent
CHANGES = ["rounds=5", "evaluations=1", "fleet=serial", "warm_start=2", "adaptcl.interval=1", "skip.pace=1.5"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--strategies", default="fedavg,heterofl,adaptcl,skip")
    parser.add_argument("--nodes", type=int, default=3, help="simulated SuperNodes")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "silos.toml")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as the nodes do: sums in several threads round otherwise

    names = arguments.strategies.split(",")
    with tempfile.TemporaryDirectory(prefix="conformance-") as scratch:
        here, there = Path(scratch) / "here", Path(scratch) / "flower"
        for name in names:
            run(read(arguments.config, [*CHANGES, f"strategy={name}"]), here)
        on_flower(arguments.config, names, there, arguments.nodes, Path(scratch))
        rows = {name: compared(name, here, there) for name in names}
    result = {"identical": all(row["identical"] for row in rows.values()), "strategies": rows}
    if arguments.json:
        print(json.dumps(result))
        return
    print("| strategy | rounds | model after the last, in process | on Flower's Ray simulation | equal in every round |")
    print("|---|---:|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['rounds']} | {row['here']} | {row['there']} | {'yes' if row['identical'] else 'NO'} |")


def on_flower(config: Path, names: list[str], out: Path, nodes: int, scratch: Path) -> None:
    """The same strategies as one Flower run."""
    with stage(scratch / "stage") as scene:
        link = scene.superlink(simulation=True)
        settings = {"config": str(config.resolve()), "strategies": ",".join(names), "set": " ".join(CHANGES), "out": str(out)}
        run_ = link.run(ROOT, settings, federation={"num-supernodes": nodes, "client-resources-num-cpus": 1})
        run_.wait(120 + 60 * len(names))
        if not all(any(out.glob(f"{name}-*/seed0/summary.json")) for name in names):
            raise SystemExit(run_.tail())


def compared(name: str, here: Path, there: Path) -> dict[str, Any]:
    """Both records of one strategy, round by round; the warm start too."""
    events = []
    for folder in (here, there):
        (path,) = folder.glob(f"{name}-*/seed0/events.jsonl")
        events.append([json.loads(line) for line in path.read_text().splitlines()])
    mine, theirs = events
    return {
        "rounds": len(mine) - 1,
        "here": mine[-1]["model"],
        "there": theirs[-1]["model"],
        "identical": mine == theirs,
    }


if __name__ == "__main__":
    main()
