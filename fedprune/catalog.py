"""The strategies we know, each a row: what it answers differently from FedAvg, and where it comes from.

What nobody has published is one `dataclasses.replace` away.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, Literal, get_args, get_type_hints

from fedprune.distill import Distillation
from fedprune.entries import Entries, Feedback, KOfN, Lottery, Personal, Salient
from fedprune.errors import ConfigError, unknown
from fedprune.gather import Gather
from fedprune.merge import Merge
from fedprune.objective import Objective
from fedprune.pruning import Importance, Leading, Whole, Window
from fedprune.rates import ByCapability, EqualTime, Fixed, RateLearner
from fedprune.selection import Strongest, Uniform
from fedprune.strategy import Strategy
from fedprune.types import Rate, Seconds


def fedavg(*, cohort: int | None = None) -> Strategy:
    """Everybody trains the whole model; the server waits for all.

    McMahan et al. 2017, arXiv:1602.05629, algorithm 1. Differs from the paper: an item row is averaged over those who trained
    it, all with the same weight (Perifanis & Efraimidis 2022); `Merge(weights="examples")` is the paper's weighting.
    """
    return Strategy("fedavg", selector=Uniform(cohort))


def drop_weak(*, share: float = 0.5, cohort: int | None = None) -> Strategy:
    """Only the fastest `share` of the devices train. What including the weak ones has to beat. Equals fedavg at share 1."""
    return Strategy("drop_weak", selector=Strongest(share, cohort))


def smallest(*, rate: Rate = 0.0, cohort: int | None = None) -> Strategy:
    """Everybody trains the width that the weakest device carries (rate 0: the smallest there is). Equals fedavg at rate 1."""
    return Strategy("smallest", selector=Uniform(cohort), rates=Fixed(rate), pruning=Leading())


def skip(*, pace: float = 1.0, cohort: int | None = None) -> Strategy:
    """Whole model, but a device s times slower than the fastest reports every s-th round, with weight s.

    The server closes a round when `pace` times its first own report's time has passed; later reports count in the round they
    arrive in, weighted by how many merges they span, so that each device's data weighs the same over time. Presumes
    no known speeds. Not from a paper: the plainest semi-asynchronous scheme, and the honest rival of pruning. Equals fedavg
    when all devices are equally fast.
    """
    return Strategy(
        "skip",
        selector=Uniform(cohort),
        gather=Gather(pace=pace, late="keep"),
        merge=Merge(weights="period"),
    )


def deadline(*, within: Seconds, cohort: int | None = None) -> Strategy:
    """Whoever has not reported `within` seconds is not waited for.

    Bonawitz et al. 2019, arXiv:1902.01046, section 2.2. Differs from the paper: no over-selection. Equals fedavg at infinity.
    """
    return Strategy("deadline", selector=Uniform(cohort), gather=Gather(within=within))


def fedprox(*, within: Seconds, mu: float = 0.1, cohort: int | None = None) -> Strategy:
    """A deadline that the slow meet with partial work, held near the received model by a proximal term.

    Li et al. 2020, arXiv:1812.06127, algorithm 2: h_k(w; w_t) = F_k(w) + mu/2 ||w - w_t||^2. Differs from the paper: partial
    work is a share of the examples that follows from the device's speed, where the paper draws a random number of epochs.
    Equals fedavg at mu 0 and an infinite deadline.
    """
    return Strategy(
        "fedprox",
        selector=Uniform(cohort),
        objective=Objective(proximal=mu, until=within),
        gather=Gather(within=within),
    )


def heterofl(*, grid: int = 8, powers: bool = True, cohort: int | None = None) -> Strategy:
    """Nested narrower models by known capability; each coordinate is averaged over those who hold it.

    Diao et al. 2021, arXiv:2010.01264. Differs from the paper: no batch norm here, so neither its static form nor the scaler
    that goes with it; levels follow from known speeds. Equals fedavg when all devices are equally fast.
    """
    return Strategy("heterofl", selector=Uniform(cohort), rates=ByCapability(grid, powers), pruning=Leading())


def window(*, grid: int = 8, cohort: int | None = None) -> Strategy:
    """Score with everything, train a rotating window of one's own, weighted by 1/coverage. Equals fedavg on equal devices."""
    return Strategy(
        "window",
        selector=Uniform(cohort),
        rates=ByCapability(grid),
        pruning=Window(),
        merge=Merge(weights="coverage"),
    )


def adaptcl(
    *, interval: int = 2, step: float = 0.2, floor: Rate = 0.0625, grid: int = 16, cohort: int | None = None
) -> Strategy:
    """Narrower models until everybody is as fast as the fastest, learned from measured times; by-unit merging.

    AdaptCL-style, after Zhou et al. 2021, arXiv:2106.14126; see `EqualTime` and `Importance` for what is ours. Equals fedavg
    while all times are equal.
    """
    return Strategy(
        "adaptcl",
        selector=Uniform(cohort),
        rates=EqualTime(interval, step, floor=floor, grid=grid),
        pruning=Importance(),
    )


# ---- what a client learns: tickets and teachers ----------------------------------------------------------------------

SAD = Distillation(weight=0.5, relation=0.05)
"""What clients of the three models below hear from the global model: its scores, and its item embeddings' similarities, the
analogue of a self-attention map. The weights are ours."""


def sp_sad(*, rate: Rate | None = None, grid: int = 8, taught: bool = True, cohort: int | None = None) -> Strategy:
    """Structured pruning, taught by the dense model: the most important units, as many as each device carries (or `rate`).

    SP-SAD-style, after Rajaram et al. 2024, arXiv:2401.10484, who name three models and publish no details: structured
    pruning, lottery tickets, and both, each tuned by attention-guided distillation from the dense teacher. What they do here
    is ours. Equals `heterofl` by importance without its teacher.
    """
    return Strategy(
        "sp_sad",
        selector=Uniform(cohort),
        rates=_capable(rate, grid),
        pruning=Importance(),
        objective=Objective(distillation=SAD if taught else None),
    )


def lth_sad(
    *, keep: float = 1 / 3, every: int = 15, rewind: int = 5, taught: bool = True, cohort: int | None = None
) -> Strategy:
    """A lottery ticket of the whole model, pruned step by step and rewound, taught by the dense model. See `sp_sad`.

    Saves upload and storage, not time.
    """
    return Strategy(
        "lth_sad",
        selector=Uniform(cohort),
        pruning=Whole(),
        entries=Lottery(keep, every=every, rewind=rewind),
        objective=Objective(distillation=SAD if taught else None),
    )


def ss_sad(
    *,
    keep: float = 0.5,
    rate: Rate | None = None,
    grid: int = 8,
    every: int = 15,
    rewind: int = 5,
    taught: bool = True,
    cohort: int | None = None,
) -> Strategy:
    """Structured first, for time; inside it a lottery ticket, for upload; taught by the dense model. See `sp_sad`."""
    return Strategy(
        "ss_sad",
        selector=Uniform(cohort),
        rates=_capable(rate, grid),
        pruning=Importance(),
        entries=Lottery(keep, every=every, rewind=rewind),
        objective=Objective(distillation=SAD if taught else None),
    )


def dpf(
    *, keep: float | None = None, every: int = 2, ramp: int = 0, until: int | None = None, grid: int = 8,
    through: bool = False, cohort: int | None = None,
) -> Strategy:  # fmt: skip
    """The server keeps the dense model; devices get its largest entries, chosen anew every other round.

    Dynamic pruning with feedback (`entries.Feedback`), on the server. `keep` None: as much as each device's capability says.
    Equals fedavg at keep 1.
    """
    return Strategy(
        "dpf",
        selector=Uniform(cohort),
        rates=ByCapability(grid) if keep is None else Fixed(1.0),
        pruning=Whole(),
        entries=Feedback(keep, every=every, ramp=ramp, until=until, through=through),
    )


def dpp(*, keep: float = 1 / 3, noise: float = 0.001, over: int = 100, cohort: int | None = None) -> Strategy:
    """Every row keeps k of its n entries, and which ones is learned (`entries.KOfN`)."""
    return Strategy("dpp", selector=Uniform(cohort), pruning=Whole(), entries=KOfN(keep, noise=noise, over=over))


def lotteryfl(*, keep: float = 0.3, step: float = 0.2, above: float = 0.5, cohort: int | None = None) -> Strategy:
    """A ticket per client, pruned when it does well on the client's own held-out items. LotteryFL-style, see `Personal`.

    Li et al. 2020, arXiv:2008.03371. Overlapping entries are averaged over those who hold them. Equals fedavg at keep 1.
    """
    return Strategy("lotteryfl", selector=Uniform(cohort), pruning=Whole(), entries=Personal(keep, step, above))


def sub_fedavg(
    *, keep: float = 0.3, step: float = 0.1, above: float = 0.5, distance: float = 1e-4, cohort: int | None = None
) -> Strategy:
    """As `lotteryfl`, in smaller steps, and only where training has changed what would be pruned. Sub-FedAvg-style.

    Vahidian et al. 2021, arXiv:2105.00562. Equals fedavg at keep 1.
    """
    entries = Personal(keep, step, above, distance)
    return Strategy("sub_fedavg", selector=Uniform(cohort), pruning=Whole(), entries=entries)


def hermes(*, keep: float = 0.5, step: float = 0.2, above: float = 0.5, cohort: int | None = None) -> Strategy:
    """Whole columns pruned per client; only what all participants retain is merged. Hermes-style.

    Li et al. 2021 (MobiCom). Differs from the paper: what is not merged keeps the server's value instead of being personal, and
    pruned columns are masked, so that its speed-up is not modelled; the paper averages over all participants of a round,
    here an item row is common if all who touched it retain it. Equals fedavg at keep 1.
    """
    entries = Personal(keep, step, above, by="columns")
    return Strategy("hermes", selector=Uniform(cohort), pruning=Whole(), entries=entries, merge=Merge(over="common"))


def prunefl(*, keep: float = 0.1, every: int = 50, decrease: float = 0.3, cohort: int | None = None) -> Strategy:
    """One mask for all, of the entries with the largest gradients in a dense round. PruneFL-style, see `Salient`.

    Jiang et al. 2019, arXiv:1909.12326. Equals fedavg until the first reconfiguration.
    """
    return Strategy("prunefl", selector=Uniform(cohort), pruning=Whole(), entries=Salient(keep, every, decrease))


def _capable(rate: Rate | None, grid: int) -> RateLearner:
    return ByCapability(grid) if rate is None else Fixed(rate)


CATALOG: dict[str, Callable[..., Strategy]] = {
    row.__name__: row
    for row in (
        fedavg, drop_weak, smallest, skip, deadline, fedprox, heterofl, window, adaptcl,
        sp_sad, lth_sad, ss_sad, dpf, dpp, lotteryfl, sub_fedavg, hermes, prunefl,
    )
}  # fmt: skip


def build(name: str, **settings: Any) -> Strategy:
    """A strategy of the catalog by its name.

    Raises:
        ConfigError: an unknown name or setting, one of another type or out of range, or one that is needed and not given.
    """
    if name not in CATALOG:
        raise ConfigError(unknown("strategy", name, CATALOG))
    parameters = inspect.signature(CATALOG[name]).parameters
    for key in settings:
        if key not in parameters:
            raise ConfigError(f"strategy {name}: {unknown('setting', key, parameters)}")
    missing = [k for k, p in parameters.items() if p.default is inspect.Parameter.empty and k not in settings]
    if missing:
        raise ConfigError(f'strategy {name} needs "{missing[0]}"; set it as {name}.{missing[0]}=...')
    wanted = get_type_hints(CATALOG[name])
    for key, value in settings.items():
        if not _fits(value, kinds := get_args(wanted[key]) or (wanted[key],)):
            words = " or ".join(WORDS[kind] for kind in kinds)
            raise ConfigError(f"strategy {name}: {key} is {value!r}; it must be {words}")
    return CATALOG[name](**settings)


WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "none"}
"""What settings may be."""


def _fits(value: object, kinds: Collection[type]) -> bool:
    if value is None or isinstance(value, bool | str):
        return type(value) in kinds
    return (int in kinds and isinstance(value, numbers.Integral)) or (float in kinds and isinstance(value, numbers.Real))


def trained_with(
    strategy: Strategy,
    objective: Objective,
    merge: Merge,
    *,
    rows: Literal["table", "touched"] = "table",
    entries: Entries | None = None,
) -> Strategy:
    """The same strategy with an experiment's objective, server optimiser and wire, keeping what the strategy itself decides.

    What belongs to the strategy stays: the proximal term, the time limit, how reports are weighted; and its teacher and its
    masks, unless the experiment has some of its own.
    """
    own = strategy.objective
    if objective.nested and isinstance(strategy.entries if entries is None else entries, KOfN):
        raise ConfigError("a narrower self and k of n entries do not go together; set nested to 0, or take another mask")
    return replace(
        strategy,
        objective=replace(
            objective, proximal=own.proximal, until=own.until, distillation=objective.distillation or own.distillation
        ),
        entries=strategy.entries if entries is None else entries,
        codec=replace(strategy.codec, rows=rows),
        merge=replace(merge, over=strategy.merge.over, weights=strategy.merge.weights),
    )
