"""Strategies against stragglers: who trains, how much of the model, how often, and when the server stops waiting."""

from __future__ import annotations

from fedprune.codec import Codec
from fedprune.errors import ConfigError
from fedprune.gather import Gather
from fedprune.merge import Adam, Average, Merge
from fedprune.objective import Objective
from fedprune.pruning import Importance, Leading, Window
from fedprune.rates import FJORD, Bandit, ByCapability, EqualTime, Fixed, Learned
from fedprune.selection import KeepBusy, Strongest, Uniform
from fedprune.spending import Mix
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


def skip(*, pace: float = 1.0, precision: str = "float32", cohort: int | None = None) -> Strategy:
    """Whole model, but a device s times slower than the fastest reports every s-th round, with weight s.

    The server closes a round when `pace` times its first own report's time has passed; later reports count in the round they
    arrive in, weighted by how many merges they span, so that each device's data weighs the same over time. Presumes
    no known speeds. Not from a paper: the plainest semi-asynchronous scheme, and the honest rival of pruning. Equals fedavg
    when all devices are equally fast.
    """
    return Strategy(
        "skip",
        selector=Uniform(cohort),
        spending=Mix(precision=precision),
        gather=Gather(pace=pace, late="keep"),
        merge=Merge(weights="period"),
    )


def fedavg_tuned(
    *,
    negatives: int | None = 3,
    precision: str = "int8",
    lr_private: float | None = 0.08,
    server_lr: float | None = 0.015,
    refresh: int = 1,
    cohort: int | None = None,
) -> Strategy:
    """`fedavg` with cheap reports: fewer negatives, tuned rates, int8 rows both ways. What `fedprune` is to be compared with.

    No heterogeneity handling at all, and most of the speed-up over `fedavg` as it is usually configured. Equals fedavg where
    the settings say the same.
    """
    return Strategy(
        "fedavg_tuned",
        selector=Uniform(cohort),
        spending=Mix(negatives=negatives, precision=precision, lr_private=lr_private),
        codec=Codec(refresh=refresh),
        merge=Merge(optimiser=Adam(server_lr) if server_lr is not None else None),
    )


def fedprune(
    *,
    negatives: int | None = 3,
    precision: str = "auto",
    lr_private: float | None = 0.08,
    stride: float = 0.4,
    server_lr: float | None = 0.015,
    share: float = 0.4,
    worth: float = 1.4,
    damp: float = 0.0,
    refresh: int = 1,
    cohort: int | None = None,
) -> Strategy:
    """Ours: cheap reports, a beat that is learned from measured times, and nobody waits.

    The whole model, wherever it fits into a device's memory. The server merges as soon as `share` of the clients have reported
    as far as the learned times say (`Learned`), and asks everybody again who becomes free in between; a device that
    reports every p-th merge counts p-fold and takes p^stride times as long steps on its private rows. Where waiting for all
    costs less than a factor of `worth`, it waits for all. Equals fedavg_tuned, at its rates, when all devices are alike.
    """
    return Strategy(
        "fedprune",
        selector=KeepBusy(cohort),
        rates=Learned(aim="beat", share=share, worth=worth),
        spending=Mix(negatives=negatives, precision=precision, lr_private=lr_private, stride=stride),
        codec=Codec(refresh=refresh),
        gather=Gather(pace=3.0, late="keep", beat=True, refill=REFILL),
        merge=Merge(
            weights="period", damp=damp, scaling=0.5, among=cohort, optimiser=Adam(server_lr) if server_lr is not None else None
        ),
    )


REFILL = 16
"""Reports after which who has become free is asked again."""


def fedbuff(*, buffer: int = 10, discount: float = 0.5, refill: int = 1, cohort: int | None = None) -> Strategy:
    """Asynchronous clients; the server takes a step when `buffer` updates are in, the stale ones discounted.

    Nguyen et al. 2022, arXiv:2106.06639, algorithm 1: w <- w + lr/K sum_i s(tau_i) d_i with s(tau) = (1 + tau)^-1/2. Differs
    from the paper: an item row is divided by those who touched it, not by K, and a client is not asked twice for one version.
    `refill` asks again after so many reports; `cohort` is the paper's concurrency M. The step is the experiment's server
    optimiser's. Equals fedavg at buffer = cohort on equal devices.
    """
    return Strategy(
        "fedbuff",
        selector=KeepBusy(cohort),
        gather=Gather(count=buffer, late="keep", refill=refill),
        merge=Merge(discount=discount),
    )


def fedasync(*, mixing: float = 0.6, power: float = 0.5, cohort: int | None = None) -> Strategy:
    """Every report is merged as it comes: x <- (1 - a) x + a x_k, a = mixing (1 + staleness)^-power.

    Xie et al. 2019, arXiv:1903.03934, algorithm 1 with the polynomial s. Differs from the paper: entries that the client did
    not train, other users' item rows above all, keep their values. `cohort` clients are at work at a time; the server keeps a
    model for each. Equals fedavg at mixing 1 with one client at work.
    """
    if not 0 < mixing <= 1:
        raise ConfigError(f"mixing is {mixing}; it must be in (0, 1], and 1 takes every report's model as it is")
    return Strategy(
        "fedasync",
        selector=KeepBusy(cohort),
        gather=Gather(count=1, late="keep"),
        merge=Merge(discount=power, mixing=True, optimiser=Average(mixing)),
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


def heterofl(*, grid: int = 8, powers: bool = True, damp: float = 0.0, cohort: int | None = None) -> Strategy:
    """Nested narrower models by known capability; each coordinate is averaged over those who hold it.

    Diao et al. 2021, arXiv:2010.01264. Differs from the paper: no batch norm here, so neither its static form nor the scaler
    that goes with it; levels follow from known speeds. Equals fedavg when all devices are equally fast.

    With `damp` above 0, ours, what few devices hold moves less (`Merge.damp`), which mends most of what mixing widths costs a
    model that is too wide.
    """
    return Strategy(
        "heterofl",
        selector=Uniform(cohort),
        rates=ByCapability(grid, powers),
        pruning=Leading(),
        merge=Merge(damp=damp),
    )


def window(*, grid: int = 8, refresh: int = 1, cohort: int | None = None) -> Strategy:
    """Score with everything, train a rotating window of one's own, weighted by 1/coverage. Equals fedavg on equal devices.

    With `refresh` above 1 what is not trained comes from a cache that is refreshed every so many versions.
    """
    return Strategy(
        "window",
        selector=Uniform(cohort),
        rates=ByCapability(grid),
        pruning=Window(),
        codec=Codec(refresh=refresh),
        merge=Merge(weights="coverage"),
    )


def adaptcl(
    *, interval: int = 2, step: float = 0.2, floor: Rate = 0.0625, grid: int = 16, degree: int = 1, moving: bool = False,
    workers: bool = False, cohort: int | None = None,
) -> Strategy:  # fmt: skip
    """Narrower models until everybody is as fast as the fastest, learned from measured times.

    AdaptCL-style, after Zhou et al. 2021, arXiv:2106.14126; see `EqualTime` and `Importance` for what is ours. Merging is by
    unit, over those who hold it, or with `workers` over all who reported. A `moving` target races to the bottom; it is here to
    show that. Sparse training is the experiment's (`sparse`). Equals fedavg while all
    times are equal; with `workers`, a fedavg that merges over the cohort.
    """
    return Strategy(
        "adaptcl",
        selector=Uniform(cohort),
        rates=EqualTime(interval, step, floor=floor, grid=grid, degree=degree, anchor="moving" if moving else "reference"),
        pruning=Importance(),
        merge=Merge(over="cohort" if workers else "holders"),
    )


def learned_width(*, floor: Rate = 0.0625, damp: float = 0.0, cohort: int | None = None) -> Strategy:
    """Narrower models, in the time under which most is trained per second; rates by our own model of time (`Learned`).

    What `adaptcl` is for, without its ratchet: what was taken is given back, and noise prunes nobody. Equals fedavg on equal
    devices.
    """
    return Strategy(
        "learned_width",
        selector=Uniform(cohort),
        rates=Learned(floor=floor),
        pruning=Importance(),
        merge=Merge(damp=damp),
    )


def fedmp(*, width: float = 0.0625, explore: float = 0.3, floor: Rate = 0.0625, cohort: int | None = None) -> Strategy:
    """Narrower models, rates by a bandit per client; who lacks an entry votes for its old value (R2SP).

    FedMP-style, after Jiang et al. 2022 (ICDE); see `Bandit` for what is ours. At floor 1 it equals a fedavg that merges over
    the cohort, where an item row that few touched moves less.
    """
    return Strategy(
        "fedmp",
        selector=Uniform(cohort),
        rates=Bandit(width=width, explore=explore, floor=floor),
        pruning=Importance(),
        merge=Merge(over="cohort"),
    )


def fjord(*, cohort: int | None = None) -> Strategy:
    """Nested narrower models in five tiers by known capability, with self-distillation where the experiment sets `nested`.

    FjORD-style, after Horvath et al. 2021, arXiv:2102.13451. Differs from the paper: a client trains its own tier's width (and
    half of it, with `nested`), not a width drawn per batch. Equals fedavg when all devices are equally fast.
    """
    return Strategy("fjord", selector=Uniform(cohort), rates=ByCapability(tiers=FJORD), pruning=Leading())
