"""The strategies we know, each a row: what it answers differently from FedAvg, and where it comes from.

What nobody has published is one `dataclasses.replace` away.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from fedprune.errors import ConfigError, unknown
from fedprune.gather import Gather
from fedprune.merge import Merge
from fedprune.objective import Objective
from fedprune.pruning import Importance, Leading, Window
from fedprune.rates import ByCapability, EqualTime, Fixed
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


CATALOG: dict[str, Callable[..., Strategy]] = {
    row.__name__: row for row in (fedavg, drop_weak, smallest, skip, deadline, fedprox, heterofl, window, adaptcl)
}


def build(name: str, **settings: Any) -> Strategy:
    """A strategy of the catalog by its name.

    Raises:
        ConfigError: an unknown name or setting, or a setting that the strategy needs and did not get.
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
    return CATALOG[name](**settings)


def trained_with(
    strategy: Strategy, objective: Objective, merge: Merge, *, rows: Literal["table", "touched"] = "table"
) -> Strategy:
    """The same strategy with an experiment's objective, server optimiser and wire, keeping what the strategy itself decides.

    What belongs to the strategy stays: the proximal term, the time limit, and how reports are weighted.
    """
    return replace(
        strategy,
        objective=replace(objective, proximal=strategy.objective.proximal, until=strategy.objective.until),
        codec=replace(strategy.codec, rows=rows),
        merge=replace(merge, over=strategy.merge.over, weights=strategy.merge.weights),
    )
