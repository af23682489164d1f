"""Strategies by what a client learns: tickets of the model, and from teachers."""

from __future__ import annotations

from fedprune.distill import Distillation
from fedprune.entries import Feedback, KOfN, Lottery, Personal, Salient
from fedprune.merge import Merge
from fedprune.objective import Objective
from fedprune.pruning import Importance, Whole
from fedprune.rates import ByCapability, Fixed, RateLearner
from fedprune.selection import Uniform
from fedprune.strategy import Strategy
from fedprune.types import Rate

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
