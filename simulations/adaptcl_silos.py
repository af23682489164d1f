"""Does AdaptCL-style rate learning make ten silos with tenfold speed differences as fast as the fastest?

    python simulations/adaptcl_silos.py [--json] [--seeds 3] [--out results/silos]

Runs `configs/silos.toml` and compares the mean round time after alignment (the last half of the rounds) with the fastest silo's
time for the whole model (its first update, before anything is pruned). Times are modelled, with 3 % noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from fedprune.comparison import compare
from fedprune.config import read
from fedprune.record import RunRecord

CONFIG = Path(__file__).parent.parent / "configs" / "silos.toml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/silos"))
    arguments = parser.parse_args()

    settings = read(CONFIG)
    several = [
        settings.model_copy(update={"strategy": name, "seed": seed})
        for name in settings.strategies
        for seed in range(arguments.seeds)
    ]
    runs = compare(several, arguments.out, quiet=True).runs
    rows = []
    for own, summary in zip(several, runs, strict=True):
        rounds = [
            event
            for event in RunRecord(arguments.out / own.only(own.strategy).identity() / f"seed{own.seed}").events()
            if event["version"] >= 0
        ]
        fastest = rounds[0]["fastest_update"]
        lengths = np.array([event["ended"] - event["began"] for event in rounds])
        late = rounds[len(rounds) // 2 :]
        rows.append(
            {
                "strategy": own.strategy,
                "seed": own.seed,
                "fastest_full_seconds": fastest,
                "first_round_over_fastest": float(lengths[0] / fastest),
                "aligned_round_over_fastest": float(lengths[len(lengths) // 2 :].mean() / fastest),
                "aligned_after_rounds": int(np.argmax(lengths <= 1.2 * fastest)) if (lengths <= 1.2 * fastest).any() else None,
                "aligned_spread": float(np.mean([e["slowest_update"] / e["fastest_update"] for e in late])),
                "aligned_mean_rate": float(np.mean([e["mean_rate"] for e in late])),
                "waiting_share": summary["waiting_share"],
                "virtual_seconds": summary["virtual_seconds"],
                "ndcg10_full": summary["ndcg10_full"],
                "ndcg10_expected": summary["ndcg10_expected"],
                "ndcg10_expected_slow": summary["ndcg10_expected_slow"],
            }
        )
    if arguments.json:
        print(json.dumps(rows))
        return
    heads = (
        "strategy",
        "first round",
        "aligned round",
        "after",
        "spread",
        "mean rate",
        "150 rounds",
        "NDCG@10",
        "1+99",
        "slow users'",
    )
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        own_rows = [row for row in rows if row["strategy"] == strategy]

        def mean(key: str, own_rows: list = own_rows) -> float:
            return float(np.mean([row[key] for row in own_rows if row[key] is not None] or [np.nan]))

        def spread(key: str, own_rows: list = own_rows) -> float:
            return float(np.std([row[key] for row in own_rows], ddof=1)) if len(own_rows) > 1 else float("nan")

        after = mean("aligned_after_rounds")
        lines.append(
            f"| {strategy} | {mean('first_round_over_fastest'):.2f} | {mean('aligned_round_over_fastest'):.2f} | "
            f"{'never' if np.isnan(after) else f'{after:.0f} rounds'} | {mean('aligned_spread'):.2f} | "
            f"{mean('aligned_mean_rate'):.2f} | "
            f"{mean('virtual_seconds'):,.0f} s | {mean('ndcg10_full'):.4f} | {mean('ndcg10_expected'):.4f} "
            f"±{spread('ndcg10_expected'):.4f} | {mean('ndcg10_expected_slow'):.4f} |"
        )
    lines += [
        "",
        f"{arguments.seeds} seeds. Round times in units of the fastest silo's time for the whole model; aligned: mean over "
        "the last half of the rounds; spread: slowest over fastest update then. Modelled, 3 % timing noise.",
        "",
    ]
    table = "\n".join(lines)
    (Path(__file__).parent / "tables").mkdir(exist_ok=True)
    (Path(__file__).parent / "tables" / "adaptcl_silos.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
