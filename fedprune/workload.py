"""What an order asks of its device: floating-point operations and bytes, its teacher's among them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fedprune.axes import BYTES_PER_ENTRY, Layout
from fedprune.codec import sizes
from fedprune.objective import Objective
from fedprune.submodel import Submodel
from fedprune.types import Bytes

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
    layout: Layout, submodel: Submodel, objective: Objective, *, examples: float, listed: int, rows: int, items: int
) -> Workload:
    """Of a client with so many examples, so many further items on its teacher's lists, and so many item rows that travel.

    A teacher scores each example once per order. To list items, the device's own teacher scores the whole catalogue for each
    of its users, of which there are listed / top. A narrower self is one more forward and backward pass at its width, a gate
    one more forward pass.
    """
    each, teacher, moved = _per_example(layout, submodel, objective), 0.0, sizes(layout, submodel, rows)
    taught, down, distillation = examples + listed, moved.down, objective.distillation
    if distillation is not None:
        full = layout.work(layout.full, layout.full).forward
        scored = taught + (items * listed / distillation.top if distillation.top else 0)
        match distillation.teacher:
            case "local":
                table = items if distillation.top else rows  # whoever lists items needs them all
                teacher, down = scored * full, layout.bytes(layout.full, table) + moved.masks
            case "past":
                teacher = examples * layout.work(submodel.widths, submodel.widths).forward
            case "sent":
                down += round(BYTES_PER_ENTRY * taught + ITEM_BYTES * listed)
            case "given":
                teacher = scored * full
    judged = examples * layout.work(submodel.widths, submodel.widths).forward if objective.gate else 0.0
    return Workload(each * taught + judged, teacher, down, moved.up, moved.parameters)


@lru_cache(maxsize=8192)
def _per_example(layout: Layout, submodel: Submodel, objective: Objective) -> float:
    work = layout.work(submodel.widths, submodel.trained_widths)
    alone = objective.private_steps * (work.forward + work.backward_inputs)
    own = objective.epochs * (work.total + alone)
    if objective.nested:
        narrow = {axis: max(1, round(objective.narrower * width)) for axis, width in submodel.widths.items()}
        own += objective.epochs * layout.work(narrow, narrow).total
    return own
