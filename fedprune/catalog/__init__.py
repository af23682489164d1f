"""The strategies we know, each a row: what it answers differently from FedAvg, and where it comes from.

What nobody has published is one `dataclasses.replace` away.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, Literal, get_args, get_type_hints

from fedprune.catalog.stragglers import (
    adaptcl,
    deadline,
    drop_weak,
    fedasync,
    fedavg,
    fedavg_tuned,
    fedbuff,
    fedmp,
    fedprox,
    fedprune,
    fjord,
    heterofl,
    learned_width,
    skip,
    smallest,
    window,
)
from fedprune.catalog.tickets import dpf, dpp, hermes, lotteryfl, lth_sad, prunefl, sp_sad, ss_sad, sub_fedavg
from fedprune.entries import Entries, KOfN
from fedprune.errors import ConfigError, unknown
from fedprune.merge import Merge
from fedprune.objective import Objective
from fedprune.strategy import Strategy

CATALOG: dict[str, Callable[..., Strategy]] = {
    row.__name__: row
    for row in (
        fedavg, fedavg_tuned, drop_weak, smallest, skip, fedbuff, fedasync, deadline, fedprox, heterofl, window, adaptcl,
        learned_width, fedmp, fjord, fedprune,
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
    try:
        return CATALOG[name](**settings)
    except ConfigError as error:
        raise ConfigError(f"strategy {name}: {error}") from None


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

    What belongs to the strategy stays: the proximal term, the time limit, how reports are weighted, a server optimiser that it
    names; and its teacher and its masks, unless the experiment has some of its own.
    """
    own = strategy.objective
    if objective.nested and isinstance(strategy.entries if entries is None else entries, KOfN):
        raise ConfigError("a narrower self and k of n entries do not go together; set nested to 0, or take another mask")
    return replace(
        strategy,
        objective=replace(
            objective,
            proximal=own.proximal,
            until=own.until,
            distillation=objective.distillation or own.distillation,
        ),
        entries=strategy.entries if entries is None else entries,
        codec=replace(strategy.codec, rows=rows),
        merge=replace(strategy.merge, optimiser=strategy.merge.optimiser or merge.optimiser),
    )
