"""What an order asks of its device: floating-point operations and bytes, its teacher's among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fedprune.axes import BYTES_PER_ENTRY, Layout
from fedprune.codec import Codec, sizes
from fedprune.exchange import PARTS
from fedprune.objective import Objective
from fedprune.spending import Plan
from fedprune.submodel import Submodel
from fedprune.types import Bytes, FloatArray

ITEM_BYTES = 4
"""An item number on a list that travels."""


@dataclass(frozen=True)
class Workload:
    """One order's.

    Attributes:
        training, teacher: FLOPs.
        down, up: bytes.
        parameters: entries of the submodel that go down.
    """

    training: float
    teacher: float
    down: Bytes
    up: Bytes
    parameters: int


def workload(
    layout: Layout,
    submodel: Submodel,
    objective: Objective,
    codec: Codec,
    *,
    examples: float,
    listed: int,
    rows: int,
    items: int,
    cached: bool = False,
) -> Workload:
    """Of a client with so many examples, so many further items on its teacher's lists, and so many item rows that travel.

    A teacher scores each example once per order. To list items, the device's own teacher scores the whole catalogue for each
    of its users, of which there are listed / top. A narrower self is one more forward and backward pass at its width, a gate
    one more forward pass. Who caches the model for orders to come downloads all its rows, whichever it needs now.

    Args:
        cached: the client has the model already, or all of it but what it trains.
    """
    each, teacher, moved = _per_example(layout, submodel, objective), 0.0, sizes(layout, submodel, rows, codec)
    taught, down, distillation = examples + listed, moved.down, objective.distillation
    if distillation is not None:
        full = layout.work(layout.full, layout.full).forward
        scored = taught + (items * listed / distillation.top if distillation.top else 0)
        match distillation.teacher:
            case "local":
                table = items if distillation.top else rows  # whoever lists items needs them all
                teacher, down = scored * full, sizes(layout, Submodel.full(layout), table, codec).down + moved.masks
            case "past":
                teacher = examples * layout.work(submodel.widths, submodel.widths).forward
            case "sent":
                down += round(BYTES_PER_ENTRY * taught + ITEM_BYTES * listed)
            case "given":
                teacher = scored * full
    if codec.refresh > 1:
        local = distillation is not None and distillation.teacher == "local"
        window = sizes(layout, Submodel(submodel.trained), rows, codec).down if submodel.is_window else 0
        whole = sizes(layout, Submodel.full(layout) if local else submodel, items, codec).down
        others = 0 if local else down - moved.down
        masks = moved.masks if local or cached else 0  # a submodel's bytes count its own
        down = others + masks + (window if cached else whole)
    judged = examples * layout.work(submodel.widths, submodel.widths).forward if objective.gate else 0.0
    return Workload(each * taught + judged, teacher, down, moved.up, moved.parameters)


def shares(layout: Layout, plans: Sequence[Plan], submodels: Sequence[Submodel]) -> FloatArray:
    """What each plan costs beside the last one, `[plans, parts]` (`exchange.PARTS`), for a client with 100 positives."""
    costs = []
    for plan, submodel in zip(plans, submodels, strict=True):
        examples, distillation = 100 * (1 + plan.objective.negatives), plan.objective.distillation
        load = workload(
            layout, submodel, plan.objective, plan.codec, examples=examples, items=layout.items,
            rows=min(examples, layout.items) if plan.codec.rows == "touched" else layout.items,
            listed=0 if distillation is None else distillation.top,
        )  # fmt: skip
        cost = {"download": load.down, "loading": 1, "teacher": load.teacher, "training": load.training, "upload": load.up}
        costs.append([cost[part] for part in PARTS])
    table = np.array(costs, float)
    return table / np.where(table[-1] > 0, table[-1], 1.0)


@lru_cache(maxsize=8192)
def _per_example(layout: Layout, submodel: Submodel, objective: Objective) -> float:
    work = layout.work(submodel.widths, submodel.trained_widths)
    alone = objective.private_steps * (work.forward + work.backward_inputs)
    own = objective.epochs * (work.total + alone)
    if objective.nested:
        narrow = {axis: max(1, round(objective.narrower * width)) for axis, width in submodel.widths.items()}
        own += objective.epochs * layout.work(narrow, narrow).total
    return own
