"""Why mixed widths lose where one narrow width for all does not, and what mends it: tables/widths.md.

    python simulations/widths.py                     every arm, three seeds
    python simulations/widths.py --only "mf 32"      the arms of one model; also part of an arm's name
    python simulations/widths.py --quick             one seed, a few rounds: does it run?
    python simulations/widths.py --finished          trains nothing: the table of what has been run so far

Rounds and not seconds: everybody takes part in each, and validation chooses the round. Results are kept in `results/widths`
and go on where they were stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import drawings
import numpy as np
import torch
from torch import Tensor

from fedprune.axes import Layout
from fedprune.config import read
from fedprune.data import Split
from fedprune.evaluation import quality, rank_held_out
from fedprune.exchange import Roster
from fedprune.merge import Adam, Merge
from fedprune.objective import Objective
from fedprune.population import STACK, Population, private_columns
from fedprune.pruning import Leading, Pruning, Window
from fedprune.random import stream
from fedprune.ranking import Scorer
from fedprune.rates import Fixed, Offer
from fedprune.recommenders import Recommender
from fedprune.recommenders.base import dot
from fedprune.serving import scorer
from fedprune.simulation import prepare, read_data
from fedprune.strategy import one_round
from fedprune.submodel import Submodel, extract
from fedprune.training import received, train
from fedprune.types import ClientId, FloatArray, IntArray, Memory, Rate, Tensors, Version

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "ml100k-mf.toml"
SEEDS = 3
STEPS = 20
"""Private Adam steps of a refit, each with fresh negatives."""
EVERY, PATIENCE = 5, 15
"""Rounds between evaluations, and without a better one before a run ends."""


# ---- parts: what an arm answers differently --------------------------------------------------------------------------


def widths(kind: str, clients: int, seed: int) -> FloatArray:
    """Each device's share of the full width: by memory, by speed at sigma 10, or one for all."""
    rng = stream(seed, "widths")
    if kind == "memory":
        return rng.permutation(np.array([0.25, 0.5, 1.0, 1.0])[np.arange(clients) % 4])
    if kind == "speed":
        levels = np.array([1 / 8, 1 / 4, 1 / 2, 1.0])
        share = np.maximum(1 / 8, 1 / np.linspace(1, 10, clients))
        return rng.permutation(levels[np.abs(np.log(share)[:, None] - np.log(levels)).argmin(1)])
    return np.full(clients, float(kind))


@dataclass(frozen=True)
class Given(Fixed):
    """Everybody's own rate, known beforehand."""

    own: tuple[Rate, ...] = ()

    def propose(self, memory: Memory, clients: IntArray, roster: Roster, offer: Offer) -> FloatArray:
        """By number."""
        return np.array(self.own)[clients]


@dataclass(frozen=True)
class Core(Leading):
    """Hold the leading units, train the first `core` of the model's at most: the rest stays as the warm start left it."""

    core: Rate = 0.125

    def carve(self, memory: Memory, layout: Layout, client: ClientId, version: Version, rate: Rate) -> Submodel:
        """The smaller prefix is the trained one."""
        held = super().carve(memory, layout, client, version, rate).held
        trained = super().carve(memory, layout, client, version, min(rate, self.core)).held
        return Submodel(held, trained)


class Staged(torch.autograd.Function):
    """The sum of the blocks' scores, where each block's gradient is that of the cross-entropy of narrower scores.

    A stage is the sum of the first blocks. `shares[b][s]`: how much block b learns from the error that stage s makes. The
    gradient that arrives is sigmoid(sum) - label, or 0 for padding; another stage's error differs by its sigmoid.
    """

    @staticmethod
    def forward(ctx, shares: list[list[float]], *blocks: Tensor) -> Tensor:  # type: ignore[override]
        """The whole sum."""
        stages = torch.stack(blocks).cumsum(0)
        ctx.shares = shares
        ctx.save_for_backward(stages)
        return stages[-1].clone()

    @staticmethod
    def backward(ctx, *gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Each block's share of the stages' errors."""
        (stages,), (error,) = ctx.saved_tensors, gradient
        errors = error + (torch.sigmoid(stages) - torch.sigmoid(stages[-1])) * (error != 0)
        return None, *torch.einsum("bs,s...->b...", torch.tensor(ctx.shares), errors).unbind()


def staged(recommender: Recommender, cuts: Sequence[int], alone: bool) -> Recommender:
    """A matrix factorisation whose prefixes are tasks of their own.

    Args:
        cuts: where blocks of the latent axis end.
        alone: a block learns from the scores up to itself, given those before it (boosting: what lies beyond it changes
            nothing for it); else from all stages from its own on, with equal weights (every prefix is a task with labels).
    """

    def score(tensors: Tensors) -> Tensor:
        user, item = tensors["user_embedding"], tensors["item_embedding"]
        if not torch.is_grad_enabled():
            return recommender.score(tensors)
        ends = [*(c for c in cuts if c < item.shape[-1]), item.shape[-1]]
        blocks = [dot(user[..., a:b], item[..., a:b]) for a, b in zip([0, *ends], ends, strict=False)]
        blocks[0] = blocks[0] + tensors["item_bias"]
        shares = np.eye(len(ends)) if alone else np.triu(np.ones((len(ends), len(ends)))) / len(ends)
        return Staged.apply(shares.astype(np.float32).tolist(), *blocks)

    return replace(recommender, score=score)


def scaled(recommender: Recommender) -> Recommender:
    """A sum over fewer inputs counts as if all were there: HeteroFL's scaler (Diao et al. 2021, section 3)."""
    layout = recommender.layout
    names = [name for name in layout.named("shared") if name.endswith("_weight")] or ["item_embedding"]

    def score(tensors: Tensors) -> Tensor:
        larger = {name: tensors[name] * (layout.shape(name)[-1] / tensors[name].shape[-1]) for name in names}
        return recommender.score(tensors | larger)

    return replace(recommender, score=score)


# ---- arms ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        widths: see `widths`.
        groups: by which widths its users are reported, so that arms compare the same users.
        lr: of the server.
        tasks: "alone" or "each": see `staged`; "scaled": see `scaled`.
        cuts: where stages end, as shares.
        merge: with Adam at `lr` as its optimiser.
        seeds: at most so many.
    """

    model: str
    name: str
    widths: str
    groups: str
    lr: float
    pruning: Pruning = field(default_factory=Leading)
    tasks: str = "together"
    cuts: tuple[float, ...] = ()
    merge: Merge = field(default_factory=Merge)
    seeds: int | None = None


MODELS: dict[str, list[str]] = {
    "mf 128": ["latent=128"],
    "mf 32": ["latent=32"],
    "neumf 64": ["recommender=neumf", "latent=64", "hidden=[256, 128]"],
}


def arms() -> list[Arm]:
    fast = Arm("mf 128", "prefix by speed", "speed", "speed", 0.008, cuts=(1 / 8, 1 / 4, 1 / 2))
    small = Arm("mf 32", "prefix by memory", "memory", "memory", 0.01, cuts=(1 / 4, 1 / 2))
    tower = Arm("neumf 64", "prefix by speed", "speed", "speed", 0.006, seeds=1)
    both = "prefix, alone and damped"
    return [
        replace(fast, name="everybody whole", widths="1"),
        replace(fast, name="everybody 1/4", widths="0.25", lr=0.01),
        replace(fast, name="everybody 1/8", widths="0.125", lr=0.015),
        fast,
        replace(fast, name="prefix, scaled by width", tasks="scaled", seeds=1),
        replace(fast, name="prefix, damped", lr=0.01, merge=Merge(damp=1.0)),
        replace(fast, name="prefix, alone", lr=0.01, tasks="alone"),
        replace(fast, name=both, lr=0.015, tasks="alone", merge=Merge(damp=2.0)),
        replace(fast, name="prefix, every prefix a task", lr=0.01, tasks="each"),
        replace(fast, name="prefix, the first 1/8 trained, alone", lr=0.015, pruning=Core(core=1 / 8), tasks="alone"),
        replace(small, name="everybody whole", widths="1"),
        replace(small, name="everybody 1/4", widths="0.25", lr=0.015),
        small,
        replace(small, name="prefix, damped", merge=Merge(damp=1.0)),
        replace(small, name="prefix, alone", tasks="alone"),
        replace(small, name=both, lr=0.015, tasks="alone", merge=Merge(damp=2.0)),
        replace(small, name="window", pruning=Window(), merge=Merge(weights="coverage")),
        replace(tower, name="everybody whole", widths="1"),
        replace(tower, name="everybody 1/4", widths="0.25"),
        tower,
        replace(tower, name="prefix, scaled by width", tasks="scaled"),
        replace(tower, name="prefix, damped", merge=Merge(damp=1.0)),
    ]


NOTE = """
MovieLens-100K, one client per user, everybody in every round, 90 rounds at most, the round by validation; the server's rate
from at least two on the first seed's validation (NeuMF: one, not tuned). Expected NDCG@10 among 99 negatives, test. By
speed: 1/8, 1/4, 1/2 or all of the width, the nearest to 1 / slowness at sigma 10. By memory: a quarter of the users at 1/4,
a quarter at 1/2; a window trains as much and holds the whole table, which would not fit. At the narrowest, whole:
everybody's private rows fitted to the frozen table at the narrowest width, and at the whole width. Axes: likewise at each
user's own width, after turning the table to its principal axes. ± standard deviation over seeds; groups of users compare
between rows of as many seeds.
"""

PARTIAL = """
Not everything has been run: {lacking} of {all} runs are missing, rows as well as seeds of the rows above. What has no ± is one
seed, and the seeds of the other rows spread by .002 to .004. `python simulations/widths.py` runs what is missing.
"""


def work(seeds: int) -> list[tuple[Arm, int]]:
    """All runs, the first seed's before the second's."""
    return [(arm, seed) for seed in range(seeds) for arm in arms() if seed < (arm.seeds or seeds)]


# ---- running ---------------------------------------------------------------------------------------------------------


def run(arm: Arm, seed: int, split: Split, rounds: int) -> dict[str, Any]:
    """Train, look now and then, and judge the round that validation prefers, in several ways."""
    changes = ["negatives=2", f"seed={seed}", *MODELS[arm.model]]
    simulation = prepare(read(CONFIG, changes).of("fedavg")[0], split)
    clients, plain, population = simulation.clients, simulation.recommender, simulation.fleet.population
    own, groups = widths(arm.widths, clients, seed), widths(arm.groups, clients, seed)
    rates = Given(own=tuple(own.tolist()))
    merge = replace(arm.merge, optimiser=Adam(arm.lr))
    strategy = replace(simulation.strategy, rates=rates, pruning=arm.pruning, merge=merge)
    if arm.tasks == "scaled":
        simulation.fleet.recommender = plain = scaled(plain)
    elif arm.tasks != "together":
        full = plain.layout.axes["latent"].size
        simulation.fleet.recommender = staged(plain, [round(c * full) for c in arm.cuts], arm.tasks == "alone")
    whole, narrowest = Submodel.full(plain.layout), Leading().carve({}, plain.layout, 0, 0, float(groups.min()))
    roster = Roster(np.arange(clients), clients, np.ones(clients))
    held = [Leading().carve({}, plain.layout, 0, 0, rate) for rate in widths(arm.groups, clients, seed).tolist()]
    served = [Submodel(s.held) for s in strategy.held(simulation.state, roster.clients, roster)[0]]
    state, best, found = simulation.state, 0.0, {}
    for number in range(1, rounds + 1):
        state, _ = one_round(strategy, state, simulation.fleet)
        if number % EVERY and number < rounds:
            continue
        simulation.fleet.settle()
        score = scorer(plain, state.model, population.private.values, served)
        value = float(np.nanmean(per_user(score, split, "validation")))
        if value > best:
            best, found = value, {"model": state.model, "private": population.copy(), "round": number}
        elif number - found["round"] >= PATIENCE:
            break
    model, kept = found["model"], found["private"]

    def by_group(model: Tensors, private: Tensors, served: Sequence[Submodel]) -> dict[str, float]:
        values = per_user(scorer(plain, model, private, served), split, "test")
        parts = {"all": values} | {f"{width:g}": values[groups == width] for width in np.unique(groups)}
        return {name: float(np.nanmean(part)) for name, part in parts.items()}

    views: dict[str, View] = {
        "narrowest": (model, kept.copy(), [narrowest] * clients),
        "whole": (model, kept.copy(), [whole] * clients),
    }
    if plain.name == "mf":
        axes, turned = torch.linalg.svd(model["item_embedding"], full_matrices=False)[2].T, kept.copy()
        turned.restart({"user_embedding": kept.private.values["user_embedding"] @ axes})
        views["axes"] = (model | {"item_embedding": model["item_embedding"] @ axes}, turned, held)
    refit(plain, views, held, strategy.objective)
    fitted = {name: by_group(table, people.private.values, at) for name, (table, people, at) in views.items()}
    return {"validation": best, "round": found["round"], "own": by_group(model, kept.private.values, served)} | fitted


def per_user(score: Scorer, split: Split, on: str) -> FloatArray:
    """Expected NDCG@10 of each user, NaN for who has no held-out item."""
    seen, held_out = (split.train, split.validation) if on == "validation" else (split.seen_before_test(), split.test)
    judged = quality(rank_held_out(score, seen, held_out))
    result = np.full(len(held_out), np.nan)
    result[judged.user] = judged.ndcg_expected
    return result


View = tuple[Tensors, Population, Sequence[Submodel]]
"""A table, private rows of its own, and what each client is served with."""


def refit(recommender: Recommender, views: Mapping[str, View], alike: Sequence[Submodel], objective: Objective) -> None:
    """Everybody's private rows fitted to frozen tables, on the device alone; all views see the same negatives."""
    layout, groups = recommender.layout, dict[bytes, list[int]]()
    for client, submodel in enumerate(alike):
        groups.setdefault(submodel.held_key, []).append(client)
    drawer = next(iter(views.values()))[1]
    for clients in groups.values():
        cuts = [(people, extract(table, layout, at[clients[0]]), private_columns(layout, at[clients[0]]))
                for table, people, at in views.values()]  # fmt: skip
        for places in drawer.stacks(clients, objective, STACK):
            part = [clients[place] for place in places]
            for step in range(STEPS):
                examples = drawer.draw(part, [step * len(alike) + client for client in part], objective, 0x5EED)
                for people, cut, columns in cuts:
                    private, frozen = people.take(examples.users, columns), received(layout, cut, examples)
                    private = train(recommender, frozen, private, examples, objective, frozen=True).private
                    people.put(examples.users, columns, private, examples.real_users)


def file_of(arm: Arm, seed: int, folder: Path) -> Path:
    """Where a run's result is kept."""
    return folder / f"{arm.model} {arm.groups} {arm.name} seed{seed}.json".replace("/", "of").replace(" ", "_")


def kept(arm: Arm, seed: int, split: Split, rounds: int, folder: Path) -> dict[str, Any]:
    """The result of a run, from its file if there is one."""
    file = file_of(arm, seed, folder)
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(run(arm, seed, split, rounds)))
    return json.loads(file.read_text())


def row(arm: Arm, results: Sequence[Mapping[str, Any]]) -> str:
    def cell(view: str, group: str = "all") -> str:
        return f"{fmean(r[view][group] for r in results):.4f}" if view in results[0] else ""

    spread = f" ± {stdev(r['own']['all'] for r in results):.4f}" if len(results) > 1 else ""
    by_width = " / ".join(cell("own", group)[1:] for group in results[0]["own"] if group != "all")
    cells = [f"{fmean(r['validation'] for r in results):.4f}", cell("own") + spread, by_width]
    cells += [cell("narrowest"), cell("whole"), cell("axes"), f"{fmean(r['round'] for r in results):.0f}", str(len(results))]
    return f"| {arm.name} | {' | '.join(cells)} |"


def table(found: Mapping[Arm, Sequence[Mapping[str, Any]]]) -> str:
    lines = []
    for model, groups in dict.fromkeys((arm.model, arm.groups) for arm in found):
        share = " / ".join(f"{rate:g}" for rate in np.unique(widths(groups, 943, 0)))
        lines += [
            f"**{model}, widths by {groups}**\n",
            f"| what | validation | NDCG@10 | of users of width {share} | at the narrowest | whole | axes | round | seeds |",
            "|---|---|---|---|---|---|---|---|---|",
            *(row(arm, results) for arm, results in found.items() if (arm.model, arm.groups) == (model, groups)),
            "",
        ]
    lacking = len(work(SEEDS)) - sum(map(len, found.values()))
    return "\n".join(lines) + NOTE + (PARTIAL.format(lacking=lacking, all=len(work(SEEDS))) if lacking > 0 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", action="append", help="part of a model's or an arm's name")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--finished", action="store_true", help="train nothing; the table of what has been run")
    parser.add_argument("--json", action="store_true", help="print the results and write no table")
    parser.add_argument("--out", type=Path, default=Path("results/widths"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds, rounds, out = (1, 6, arguments.out / "quick") if arguments.quick else (arguments.seeds, 90, arguments.out)
    todo = [(arm, seed) for arm, seed in work(seeds) if not arguments.finished or file_of(arm, seed, out).exists()]
    split = read_data(read(CONFIG))
    found: dict[Arm, list[dict[str, Any]]] = {}
    for arm, seed in todo:
        if not arguments.only or any(word in f"{arm.model} {arm.name}" for word in arguments.only):
            found.setdefault(arm, []).append(kept(arm, seed, split, rounds, out))
            print(f"{arm.model} {arm.groups} seed {seed}: {row(arm, found[arm][-1:])}", file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps([{"model": arm.model, "name": arm.name, "results": results} for arm, results in found.items()]))
    elif not (arguments.quick or arguments.only):
        (HERE / "tables" / "widths.md").write_text(table(found))
        panels: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for arm, results in found.items():
            panels.setdefault(f"{arm.model}, widths by {arm.groups}", {})[arm.name] = results
        drawings.widths(panels, HERE / "figures" / "widths.png")


if __name__ == "__main__":
    main()
