"""How many client updates per second the two in-process fleets reach on the same 943-client round.

    python simulations/fleet_speed.py [--json] [--repeats 5] [--recommender mf]

Serial and vector rounds alternate in one process, so that the machine's mood falls on both; the median of the ratios counts.
Both get the same orders, draw the same negatives, and end in the same model up to rounding, which is checked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from fedprune.config import validated
from fedprune.simulation import prepare, read_data
from fedprune.strategy import one_round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--recommender", default="mf")
    arguments = parser.parse_args()

    settings = validated({"recommender": arguments.recommender, "workload": "equal"})
    split = read_data(settings)
    fleets = {name: prepare(settings.model_copy(update={"fleet": name}), split) for name in ("serial", "vector")}
    states = {name: experiment.state for name, experiment in fleets.items()}
    seconds: dict[str, list[float]] = {name: [] for name in fleets}
    for repeat in range(arguments.repeats + 1):
        for name, experiment in fleets.items():
            start = time.perf_counter()
            states[name], happened = one_round(experiment.strategy, states[name], experiment.fleet)
            if repeat > 0:  # the first round of each is a warm-up
                seconds[name].append(time.perf_counter() - start)
    clients = len(happened.reports)
    apart = max(float((states["serial"].model[n] - t).abs().max()) for n, t in states["vector"].model.items())
    ratios = [s / v for s, v in zip(seconds["serial"], seconds["vector"], strict=True)]
    result = {
        "clients": clients,
        "recommender": arguments.recommender,
        "serial_updates_per_second": clients / statistics.median(seconds["serial"]),
        "vector_updates_per_second": clients / statistics.median(seconds["vector"]),
        "vector_over_serial": statistics.median(ratios),
        "vector_over_serial_range": [min(ratios), max(ratios)],
        "largest_difference": apart,
    }
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
