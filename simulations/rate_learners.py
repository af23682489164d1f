"""Which learner finds everybody's rate? AdaptCL-style, FedMP-style, by known speeds, and ours, on simulated times alone.

    python simulations/rate_learners.py             the whole grid, 20 seeds: about ten minutes on one core
    python simulations/rate_learners.py --quick     one seed of a corner of it, half a minute; writes nothing
    python simulations/rate_learners.py --json      every cell as one line of JSON

Nothing is trained. Slowness is spread evenly over 1..sigma; 5 % of a full report are spent whatever the rate, the rest is
split as `devices.CLASSES["balanced"]` says and shrinks with the rate; noise multiplies an order's whole time (lognormal). A
round lasts until the last report is in. Learners are called as `strategy.one_round` calls them. The bound knows all speeds at
any time and chooses its target by the rule of `Learned`. Writes `simulations/tables/rate_learners.md` and
`simulations/figures/rate_learners.png`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from fedprune.codec import Codec
from fedprune.devices import CLASSES
from fedprune.exchange import PARTS, Cost, Lost, Order, Report, Roster, Split, Updates
from fedprune.objective import Objective
from fedprune.random import stream
from fedprune.rates import Bandit, ByCapability, EqualTime, Learned, Offer, RateLearner, targets
from fedprune.submodel import Submodel
from fedprune.types import FloatArray

HERE = Path(__file__).parent
OVERHEAD, FLOOR = 0.05, 0.0625
DOWN, TRAINING, UP = (share * (1 - OVERHEAD) for share in CLASSES["balanced"])
SPLIT = np.array([{"download": DOWN, "loading": OVERHEAD, "training": TRAINING, "upload": UP}.get(part, 0.0) for part in PARTS])
LEVELS = np.linspace(FLOOR, 1.0, 33)
OFFER = Offer(LEVELS, np.stack([np.ones(33) if p == "loading" else (p != "teacher") * LEVELS for p in PARTS], axis=-1))
SIGMAS, NOISES = (1, 2, 5, 10, 20), (0.0, 0.03, 0.1, 0.3)
KINDS = ("stationary", "drift", "sudden", "cohort", "dropout")
SLOWER, FASTER, AFTER = 50, 100, 5  # rounds of the sudden changes, and how many reports later they should be followed
LEARNERS: dict[str, RateLearner] = {
    "EqualTime": EqualTime(floor=FLOOR),
    "EqualTime, moving": EqualTime(floor=FLOOR, anchor="moving"),
    "Bandit": Bandit(floor=FLOOR),
    "ByCapability": ByCapability(16),
    "Learned": Learned(floor=FLOOR),
}
NOTHING = Updates((), torch.zeros(0, 0).long(), torch.zeros(0, 0).bool(), {})
WHOLE, TASK, CODEC = Submodel({}), Objective(), Codec()
ROUND_SECONDS, ROUND_BYTES = (
    943 / 7759,
    943 * 2 * 1682 * 33 * 4,
)  # the vector fleet's round (tables/fleet_speed.md); its float32 MF


@dataclass(frozen=True)
class World:
    """What devices do over time, whoever asks them; everything that is drawn follows from the seed."""

    sigma: float
    noise: float
    kind: str = "stationary"
    seed: int = 0
    rounds: int = 150

    @property
    def clients(self) -> int:
        """How many."""
        return 40 if self.kind == "cohort" else 10

    @cached_property
    def slowness(self) -> FloatArray:
        """`[rounds, clients]`."""
        start = np.linspace(1.0, self.sigma, self.clients)[stream(self.seed, "deal").permutation(self.clients)]
        path = np.repeat(start[None], self.rounds, 0)
        if self.kind == "drift":  # a random walk of 1 % a round
            path *= np.exp(0.01 * stream(self.seed, "drift").normal(size=path.shape).cumsum(0))
        if self.kind == "sudden":
            slower, faster = self.changing
            path[SLOWER:, slower] *= 4
            path[FASTER:, faster] /= 4
        return path

    @cached_property
    def changing(self) -> tuple[int, int]:
        """A device of middling speed, and the slowest but one."""
        base = np.linspace(1.0, self.sigma, self.clients)[stream(self.seed, "deal").permutation(self.clients)]
        ranks = np.argsort(base, kind="stable")
        return int(ranks[len(ranks) // 2]), int(ranks[-2])

    @cached_property
    def factor(self) -> FloatArray:
        """Timing noise, `[rounds, clients]`."""
        return np.exp(self.noise * stream(self.seed, "noise").normal(size=(self.rounds, self.clients)))

    @cached_property
    def asked(self) -> list[np.ndarray]:
        """Who is, round by round."""
        rng, everybody = stream(self.seed, "cohort"), np.arange(self.clients)
        if self.kind != "cohort":
            return [everybody] * self.rounds
        return [np.sort(rng.choice(self.clients, 10, replace=False)) for _ in range(self.rounds)]

    @cached_property
    def vanishes(self) -> FloatArray:
        """`[rounds, clients]`: after which share of its order a client does; above 1: it does not. One in ten does."""
        chance = 0.1 if self.kind == "dropout" else 0.0
        return stream(self.seed, "dropout").uniform(size=(self.rounds, self.clients)) / max(chance, 1e-9)

    @cached_property
    def ideal(self) -> FloatArray:
        """`[rounds, clients]`: the bound's rates."""
        found: list[FloatArray] = []
        for number, slowness in enumerate(self.slowness):
            if number and (slowness == self.slowness[number - 1]).all():
                found.append(found[-1])
                continue
            seconds = slowness[:, None] * SPLIT
            target = targets.equal(seconds, OFFER, lowest=FLOOR, asked=len(self.asked[number]))
            found.append(targets.largest(targets.times(seconds, OFFER), np.array([target]), OFFER, FLOOR)[0])
        return np.array(found)

    def masked(self, rates: FloatArray) -> FloatArray:
        """Of those asked; NaN else."""
        there = np.zeros(rates.shape, bool)
        for row, asked in zip(there, self.asked, strict=True):
            row[asked] = True
        return np.where(there, rates, np.nan)

    def lasts(self, rates: FloatArray) -> FloatArray:
        """Seconds of each round at these rates, `[rounds, clients]`."""
        taken = self.slowness * self.factor * (OVERHEAD + (1 - OVERHEAD) * rates) * np.minimum(self.vanishes, 1.0)
        return np.array([row[asked].max() for row, asked in zip(taken, self.asked, strict=True)])

    def run(self, learner: RateLearner) -> FloatArray:
        """The learner's rates, `[rounds, clients]`; NaN for who was not asked."""
        memory, rates, clock, ticket, progress = {}, np.full((self.rounds, self.clients), np.nan), 0.0, 0, 0.0
        known = self.slowness[0] / self.slowness[0].min()
        for number, clients in enumerate(self.asked):
            roster = Roster(clients, self.clients, known)
            proposed = learner.propose(memory, clients, roster, OFFER)
            rates[number, clients] = proposed
            scale = self.slowness[number, clients] * self.factor[number, clients]
            reports: list[Report] = []
            lost: list[Lost] = []
            loss = 1 / (1 + 0.02 * progress)
            for client, rate, s, share in zip(
                clients.tolist(), proposed.tolist(), scale.tolist(), self.vanishes[number, clients].tolist(), strict=True
            ):
                order = Order(ticket, client, number, rate, WHOLE, TASK, CODEC, {}, 0)
                seconds = Split(s * DOWN * rate, s * TRAINING * rate, 0.0, s * UP * rate, s * OVERHEAD)
                cost, ticket = Cost(seconds, None, 0, 0, 0.0, 0), ticket + 1
                if share < 1:
                    lost.append(Lost(order, "dropped out", cost.cut_off(share * seconds.total)))
                else:
                    reports.append(Report(order, NOTHING, 0, 1, loss, cost, clock + seconds.total))
            reports.sort(key=lambda report: report.finished)
            memory = learner.learn(memory, reports, lost, self.clients, OFFER)
            clock, progress = max(r.finished for r in reports) if reports else clock, progress + float(proposed.mean())
        return rates

    def measured(self, rates: FloatArray) -> dict[str, float]:
        """Speed-ups over everybody at rate 1, from the second round on and over all, beside the bound's; and rates."""
        waiting, bound, own = self.lasts(np.ones_like(self.ideal)), self.lasts(self.ideal), self.lasts(rates)
        there = ~np.isnan(rates)
        ideal = np.where(there, self.ideal, np.nan)
        late = slice(self.rounds * 4 // 5, None)
        result = {
            "speedup": waiting[1:].sum() / own[1:].sum(),
            "whole": waiting.sum() / own.sum(),
            "of_bound": bound[1:].sum() / own[1:].sum(),
            "retention": float(np.nanmean(rates[1:]) / np.nanmean(ideal[1:])),
            "smallest": float(np.nanmin(rates[1:])),
            "last": float(np.nanmean(rates[late])),
            "last_ideal": float(np.nanmean(ideal[late])),
            "last_smallest": float(np.nanmin(rates[late])),
        }
        if self.kind == "sudden":
            for name, begin, client in zip(("slower", "faster"), (SLOWER, FASTER), self.changing, strict=True):
                off = np.abs(rates[begin:, client] / self.ideal[begin:, client] - 1)
                near = np.flatnonzero(off <= 0.1)
                result[f"rounds_{name}"] = float(near[0]) if len(near) else float(len(off))
                result[f"back_{name}"] = float(off[AFTER] <= 0.1)
                result[f"off_{name}"] = float(off[AFTER])
                result[f"told_{name}"] = float(self.told(begin, client) <= 0.1)
        return result

    def told(self, begin: int, client: int) -> float:
        """How far off somebody is who was told of the change, and takes the mean of the times that were measured since."""
        ideal, seconds = self.ideal[begin, client], self.slowness[begin, client]
        target = seconds * (OVERHEAD + (1 - OVERHEAD) * ideal)
        measured = seconds * np.exp(np.log(self.factor[begin : begin + AFTER, client]).mean())
        rate = np.clip((target / measured - OVERHEAD) / (1 - OVERHEAD), FLOOR, 1.0)
        return float(abs(rate / ideal - 1))


def cells(seeds: int, grid: Sequence[tuple[str, float, float]], rounds: int = 150) -> Iterator[dict[str, Any]]:
    """Mean over seeds per kind, sigma, noise and learner."""
    for kind, sigma, noise in grid:
        rows: dict[str, list[dict[str, float]]] = defaultdict(list)
        for seed in range(seeds):
            world = World(sigma, noise, kind, seed, rounds)
            for name, learner in LEARNERS.items():
                rows[name].append(world.measured(world.run(learner)))
            rows["bound"].append(world.measured(world.masked(world.ideal)))
        for name, found in rows.items():
            means = {key: float(np.mean([row[key] for row in found])) for key in found[0]}
            least = {"smallest_of_all": min(row["smallest"] for row in found)}
            worst = {"of_bound_worst": min(row["of_bound"] for row in found)}
            yield {"kind": kind, "sigma": sigma, "noise": noise, "rounds": rounds, "learner": name} | means | least | worst


def cost(learner: RateLearner, rounds: int = 20) -> tuple[float, int]:
    """Median milliseconds per round of 943 clients, and bytes of memory, all calls of a round together."""
    clients, memory, took = np.arange(943), {}, []
    slowness, rng = np.linspace(1.0, 10.0, 943), stream(0, "cost")
    roster = Roster(clients, 943, slowness)
    for number in range(rounds):
        begin = time.perf_counter()
        rates = learner.propose(memory, clients, roster, OFFER)
        learner.forecast(memory, 943)
        learner.forecast(memory, 0)
        between = time.perf_counter()
        reports = []
        for client, (s, rate) in enumerate(
            zip((slowness * np.exp(0.1 * rng.normal(size=943))).tolist(), rates.tolist(), strict=True)
        ):
            order = Order(943 * number + client, client, number, rate, WHOLE, TASK, CODEC, {}, 0)
            split = Split(s * DOWN * rate, s * TRAINING * rate, 0.0, s * UP * rate, s * OVERHEAD)
            reports.append(Report(order, NOTHING, 0, 1, 1 / (1 + number), Cost(split, None, 0, 0, 0.0, 0), s))
        again = time.perf_counter()
        memory = learner.learn(memory, reports, [], 943, OFFER)
        took.append(between - begin + time.perf_counter() - again)
    return float(np.median(took[3:])) * 1000, sum(value.nbytes for value in memory.values())


Rows = Mapping[tuple[str, float, float, int], Mapping[str, Mapping[str, Any]]]


def percent(noise: float) -> str:
    return f"{100 * noise:.0f} %"


def tables(rows: Rows, costs: Mapping[str, tuple[float, int]], seeds: int) -> str:
    """All of them, as text."""
    names = list(LEARNERS)
    head, rule = " | ".join(names), "|---" * len(names) + "|"
    lines = [
        f"Share of the bound's speed-up from the second round on (in brackets: mean rate beside ideal); {seeds} seeds. The\n"
        "product of the two is the share of the model trained per second. Speed-ups are over waiting for all: the bound's\n"
        "from the second round on, `Learned`'s with the first round, in which everybody trains the whole model.\n"
    ]
    lines += [f"| devices | sigma | noise | speed-up: bound, Learned | {head} |", f"|---|---|---|---{rule}"]
    long = [key for key in rows if key[3] != 150]
    for key in (key for key in rows if key[3] == 150):
        kind, sigma, noise, _ = key
        if kind != "stationary" and noise != 0.1:
            continue
        found = [f"{rows[key][n]['of_bound']:.2f} ({rows[key][n]['retention']:.2f})" for n in names]
        speeds = f"{rows[key]['bound']['speedup']:.2f}, {rows[key]['Learned']['whole']:.2f}"
        lines.append(f"| {kind} | {sigma:g} | {percent(noise)} | {speeds} | {' | '.join(found)} |")
    lines.append(
        "\nOne device fourfold slower, later another fourfold faster: rounds until its rate is within 10 % of ideal, slower and"
    )
    lines.append(
        "faster (share of seeds where it is so five reports later). Told: by the mean of these five reports, knowing when.\n"
    )
    lines += [f"| sigma | noise | told | {head} |", f"|---|---|---{rule}"]
    for key in (key for key in rows if key[0] == "sudden" and key[2] in (0.03, 0.1)):
        row = [rows[key][n] for n in names]
        found = [
            f"{r['rounds_slower']:.0f}, {r['rounds_faster']:.0f} ({r['back_slower']:.2f}, {r['back_faster']:.2f})" for r in row
        ]
        told = f"{row[0]['told_slower']:.2f}, {row[0]['told_faster']:.2f}"
        lines.append(f"| {key[1]:g} | {percent(key[2])} | {told} | {' | '.join(found)} |")
    lines.append(
        "\n500 rounds: smallest rate in the last hundred, and mean beside ideal; in brackets the smallest ever, of all seeds.\n"
    )
    lines += [f"| sigma | noise | bound | {head} |", f"|---|---|---{rule}"]
    for key in long:
        found = [
            f"{r['last_smallest']:.2f}, {r['last'] / r['last_ideal']:.2f} ({r['smallest_of_all']:.2f})"
            for r in (rows[key][n] for n in ("bound", *names))
        ]
        lines.append(f"| {key[1]:g} | {percent(key[2])} | {' | '.join(found)} |")
    fleet = f"a round of the vector fleet takes {1000 * ROUND_SECONDS:.0f} ms and moves {ROUND_BYTES / 1e6:.0f} MB"
    lines.append(f"\n943 clients, 10 % noise; {fleet}.\n")
    lines += ["| | " + head + " |", f"|---{rule}"]
    lines.append("| ms per round | " + " | ".join(f"{costs[n][0]:.2f}" for n in names) + " |")
    lines.append("| share of that round | " + " | ".join(f"{costs[n][0] / 1000 / ROUND_SECONDS:.1%}" for n in names) + " |")
    lines.append("| memory, bytes | " + " | ".join(f"{costs[n][1]:,}" for n in names) + " |")
    lines.append(
        "\nA share above 1 with a mean rate far below is no success: it is bought with the model. `ByCapability` knows the\n"
        "speeds of the first round. Cohort: 10 of 40 clients; dropout: one order in ten; drift: a random walk of 1 % a round.\n"
        "`python simulations/rate_learners.py`; nothing is trained."
    )
    return "\n".join(lines) + "\n"


def whole_grid(rows: Rows) -> str:
    """Every cell of the grid as CSV: per learner the share of the bound's speed-up, and the mean rate beside ideal."""
    heads = [f"{name.replace(',', '')} {what}" for name in LEARNERS for what in ("speed-up", "rate")]
    lines = [",".join(["devices", "sigma", "noise", "rounds", *heads])]
    for (kind, sigma, noise, rounds), found in rows.items():
        values = [f"{found[name][key]:.3f}" for name in LEARNERS for key in ("of_bound", "retention")]
        lines.append(",".join([kind, f"{sigma:g}", f"{noise:g}", str(rounds), *values]))
    return "\n".join(lines) + "\n"


def draw(rows: Rows, path: Path) -> None:
    """Mean rates over sigma and over rounds, and the rates of one device that is suddenly slower and one that is faster."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    colours = dict(zip(LEARNERS, ("C0", "C3", "C7", "C1", "C2"), strict=True))
    steady = [World(2, 0.1, seed=seed) for seed in range(10)]
    worlds = [World(5, 0.1, "sudden", seed=seed) for seed in range(10)]
    for name, colour in colours.items():
        keys = [key for key in rows if key[0] == "stationary" and key[2] == 0.1 and key[3] == 150]
        axes[0].plot(
            [k[1] for k in keys], [rows[k][name]["retention"] for k in keys], "o-", color=colour, markersize=4, label=name
        )
        axes[1].plot(np.mean([w.run(LEARNERS[name]).mean(1) for w in steady], axis=0), color=colour)
        slower, faster = zip(*(w.run(LEARNERS[name])[:, w.changing].T for w in worlds), strict=True)
        axes[2].plot(np.mean(slower, axis=0), color=colour)
        axes[2].plot(np.mean(faster, axis=0), color=colour, linestyle=":")
    axes[1].axhline(World(2, 0.1).ideal[0].mean(), color="black", linewidth=1, linestyle="--")
    for place, style in ((0, "-"), (1, ":")):
        axes[2].plot(
            np.mean([w.ideal[:, w.changing[place]] for w in worlds], axis=0), color="black", linewidth=1, linestyle=style
        )
    axes[0].axhline(1, color="black", linewidth=1, linestyle="--", label="bound")
    axes[0].set(title="Mean rate beside ideal, 10 % noise", xlabel="sigma", xscale="log", ylabel="mean rate / ideal")
    axes[0].set_xticks(SIGMAS, [str(sigma) for sigma in SIGMAS])
    axes[0].minorticks_off()
    axes[1].set(title="Slowness 1..2, 10 % noise", xlabel="round", ylabel="mean rate", ylim=(0, 1.05))
    axes[2].set(
        title="One fourfold slower (line), one faster (dots)",
        xlabel="round",
        ylabel="its rate; 1..5, 10 % noise",
        ylim=(0, 1.05),
    )
    for axis in axes:
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    seeds = 1 if arguments.quick else arguments.seeds
    sigmas, noises = ((2, 10, 20), (0.03, 0.1)) if arguments.quick else (SIGMAS, NOISES)
    grid = [(kind, float(sigma), noise) for kind in KINDS for sigma in sigmas for noise in noises]
    long = [("stationary", float(sigma), noise) for sigma in (1, 10) for noise in (0.1, 0.3)]
    rows: dict[tuple[str, float, float, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for part, rounds in ((grid, 150), (long, 500)):
        for cell in cells(seeds, part, rounds):
            rows[cell["kind"], cell["sigma"], cell["noise"], rounds][cell["learner"]] = cell
            if arguments.json:
                print(json.dumps(cell), flush=True)
    costs = {name: cost(learner) for name, learner in LEARNERS.items()}
    if arguments.json:
        print(json.dumps({name: {"ms": ms, "bytes": size} for name, (ms, size) in costs.items()}))
    text = tables(rows, costs, seeds)
    if arguments.quick:
        if not arguments.json:
            print(text)
        return
    (HERE / "tables" / "rate_learners.md").write_text(text)
    (HERE / "tables" / "rate_learners.csv").write_text(whole_grid(rows))
    draw(rows, HERE / "figures" / "rate_learners.png")


if __name__ == "__main__":
    main()
