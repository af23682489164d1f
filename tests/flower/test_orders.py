"""Orders that are not as they should be: a device refuses them by the name of the field, and stays as it was."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from flower_world import Tamper
from flwr.app import Array, ConfigRecord, MetricRecord, RecordDict
from tampering import array, data, entry, extra, instead, npy, pickled, setting, without, zipped
from world import recommender

from fedprune.codec import Codec
from fedprune.distill import Distillation
from fedprune.errors import FleetError
from fedprune.exchange import Order
from fedprune.flower import wire
from fedprune.objective import Objective
from fedprune.submodel import Submodel

LAYOUT = recommender("neumf").layout
MODEL = recommender("neumf").initial(1)


def order(ticket: int, submodel: Submodel) -> Order:
    return Order(ticket, ticket + 5, 3, 0.5, submodel, Objective(batch=7, until=2.0), Codec("touched"), MODEL, 1, 9.0)


def content() -> RecordDict:
    """Two orders of two submodels, one a window."""
    half = Submodel({name: np.arange(axis.size // 2) for name, axis in LAYOUT.prunable.items()})
    window = Submodel(Submodel.full(LAYOUT).held, {name: np.arange(2, 5) for name in LAYOUT.prunable})
    orders = [order(0, half), order(1, window)]
    return wire.write_orders(orders, LAYOUT, run="r", settings="{}", work=[1.0, 0.5], private=torch.zeros(3))


def masked() -> RecordDict:
    """Two orders of which the first lacks entries of an embedding and of the tower; 4 bits are padding."""
    half = Submodel({name: np.arange(axis.size // 2) for name, axis in LAYOUT.prunable.items()})
    there = {name: np.ones(LAYOUT.shape(name), bool) for name in ("item_tower", "hidden2_bias")}
    there["item_tower"][:, 0] = False
    orders = [order(0, replace(half, entries=there)), order(1, Submodel.full(LAYOUT))]
    return wire.write_orders(orders, LAYOUT, run="r", settings="{}")


def rounded() -> RecordDict:
    """Two orders of the same units, one as float32 and one as int8."""
    half = Submodel({name: np.arange(axis.size // 2) for name, axis in LAYOUT.prunable.items()})
    orders = [order(0, half), replace(order(1, half), codec=Codec(precision="int8"))]
    return wire.write_orders(orders, LAYOUT, run="r", settings="{}")


def taught() -> RecordDict:
    """An order with the whole model to learn from."""
    half = Submodel({name: np.arange(axis.size // 2) for name, axis in LAYOUT.prunable.items()})
    objective = Objective(distillation=Distillation(weight=0.5, top=3))
    return wire.write_orders([replace(order(0, half), objective=objective)], LAYOUT, run="r", settings="{}")


def new(name: str, value: object) -> Tamper:
    """A config entry that was not there, or another value, past Flower's own type checks."""

    def tamper(content: RecordDict) -> RecordDict:
        content["config"].__dict__["_data"][name] = value
        return content

    return tamper


def few(values: np.ndarray) -> np.ndarray:
    """Units of no axis."""
    return 0 * values


def untrainable(values: np.ndarray) -> np.ndarray:
    """The first submodel trains what it does not hold."""
    values[len(values) // 4 : len(values) // 2] = 255
    return values


def one_more(values: np.ndarray) -> np.ndarray:
    """A bit after the last entry."""
    values[-1] |= 1
    return values


HUGE = 1 << 50
MASKED: dict[str, tuple[str, Tamper]] = {
    "masks a byte short": ("entries", array("entries", lambda v: v[:-1])),
    "masks a byte long": ("entries", array("entries", lambda v: np.append(v, v[:1]))),
    "masks of nothing": ("entries", array("entries", lambda v: v[:0])),
    "masks as booleans": ("entries", array("entries", lambda v: np.unpackbits(v).astype(bool))),
    "masks as a pickle": ("entries", data("entries", pickled)),
    "masks giant": ("entries", data("entries", lambda _: npy(f"{{'descr':'|u1','fortran_order':False,'shape':({HUGE},)}}"))),
    "mask bits beyond": ("entries", array("entries", one_more)),
    "other entries than were sent": ("model", array("entries", lambda v: 0 * v)),
    "without masks": ("entries", without("arrays", "entries")),
    "masks of nobody": ("entries", without("config", "masked")),
    "without through": ("through", without("config", "through")),
    "through as a number": ("through", setting("through", [0, 1])),
    "through of one": ("through", setting("through", [True])),
    "an unknown tensor": ("masked", setting("masked", ["item_towr hidden2_bias", ""])),
    "a private tensor": ("masked", setting("masked", ["user_tower", ""])),
    "a tensor twice": ("masked", setting("masked", ["hidden2_bias hidden2_bias", ""])),
    "tensors in another order": ("masked", setting("masked", ["hidden2_bias item_tower", ""])),
    "another tensor": ("entries", setting("masked", ["item_tower hidden1_weight", ""])),
    "another's tensors": ("entries", setting("masked", lambda old: old[::-1])),
    "masked as one text": ("masked", setting("masked", "hidden2_bias")),
    "masked of one": ("masked", setting("masked", lambda old: old[:1])),
    "masked in numbers": ("masked", setting("masked", [1, 2])),
}
ROUNDED: dict[str, tuple[str, Tamper]] = {
    "codes too short": ("codes", array("codes", lambda v: v[:-1])),
    "codes in float32": ("codes", array("codes", lambda v: v.astype(np.float32))),
    "codes without a sign": ("codes", array("codes", lambda v: v.astype(np.uint8))),
    "without codes": ("codes", without("arrays", "codes")),
    "halves too long": ("halves", array("halves", lambda v: np.append(v, v[:1]))),
    "halves in float32": ("halves", array("halves", lambda v: v.astype(np.float32))),
    "halves NaN": ("halves", entry("halves", math.nan)),
    "halves infinite": ("halves", entry("halves", math.inf)),
    "without halves": ("halves", without("arrays", "halves")),
    "without model": ("model", without("arrays", "model")),
    "model of both": ("model", array("model", lambda v: np.append(v, v))),
    "one cut of two precisions": ("cuts", setting("cuts", [0, 0])),
    "a precision of the second that is none": ("codec", setting("1.codec.precision", "int4")),
    "a term of the second that is none": ("objective.speed", new("1.objective.speed", 1.0)),
    "the second without rows": ("codec.rows", without("config", "1.codec.rows")),
}
TAUGHT: dict[str, tuple[str, Tamper]] = {
    "an unknown kind of teacher": ("objective.distillation", setting("objective.distillation.teacher", "strict")),
    "a teacher in numbers": ("objective.distillation.teacher", setting("objective.distillation.teacher", 1)),
    "too much of a teacher": ("objective.distillation", setting("objective.distillation.weight", 1.5)),
    "a NaN of a teacher": ("objective.distillation.weight", setting("objective.distillation.weight", math.nan)),
    "half an item": ("objective.distillation.top", setting("objective.distillation.top", 0.5)),
    "fewer than no items": ("objective.distillation", setting("objective.distillation.top", -1)),
    "an unknown lesson": ("objective.distillation.song", new("objective.distillation.song", 1.0)),
    "an unknown task": ("objective", setting("objective.task", "guess")),
    "a task in numbers": ("objective.task", setting("objective.task", 3)),
    "a gate in numbers": ("objective.gate", setting("objective.gate", 1)),
    "nested below 0": ("objective", setting("objective.nested", -0.5)),
    "nothing narrower": ("objective", setting("objective.narrower", 1.0)),
    "a cut instead of the model": ("model", array("model", lambda v: v[: len(v) // 2])),
    "nobody to teach": ("model", new("objective.distillation.teacher", "given")),
}
CASES: dict[str, tuple[str, Tamper]] = {
    "another format": ("format", setting("format", 99)),
    "tickets as text": ("tickets", setting("tickets", "0, 1")),
    "tickets as fractions": ("tickets", setting("tickets", [0.0, 1.0])),
    "no tickets": ("tickets", setting("tickets", [])),
    "negative ticket": ("tickets", setting("tickets", [0, -1])),
    "a ticket twice": ("tickets", setting("tickets", [1, 1])),
    "negative client": ("clients", setting("clients", [5, -6])),
    "negative version": ("versions", setting("versions", [3, -3])),
    "a client too few": ("clients", setting("clients", [5])),
    "a truth for a version": ("versions", setting("versions", [True, True])),
    "rate above 1": ("rates", setting("rates", [0.5, 1.5])),
    "rate NaN": ("rates", setting("rates", [0.5, math.nan])),
    "rates as whole numbers": ("rates", setting("rates", [1, 1])),
    "work 0": ("work", setting("work", [1.0, 0.0])),
    "work above 1": ("work", setting("work", [1.0, 1.5])),
    "a cut that is not there": ("cuts", setting("cuts", [0, 2])),
    "a cut far away": ("cuts", setting("cuts", [0, HUGE])),
    "a negative cut": ("cuts", setting("cuts", [0, -1])),
    "one cut for two widths": ("cuts", setting("cuts", [0, 0])),
    "a submodel far away": ("submodels", setting("submodels", [0, HUGE])),
    "a submodel that is not there": ("submodels", setting("submodels", [0, 2])),
    "rows of another kind": ("codec", setting("codec.rows", "all")),
    "rows as a number": ("codec.rows", new("codec.rows", 1)),
    "precision of another kind": ("codec", setting("codec.precision", "int4")),
    "precision as a number": ("codec.precision", new("codec.precision", 8)),
    "no rows sampled": ("codec", setting("codec.sampled", 0.0)),
    "rows sampled without end": ("codec.sampled", new("codec.sampled", math.inf)),
    "a codec from the future": ("codec.entropy", new("codec.entropy", True)),
    "plans too few": ("plans", setting("plans", [0])),
    "a plan too far": ("plans", setting("plans", [0, 2])),
    "a plan that is not there": ("codec.rows", setting("plans", [0, 1])),
    "codes that nobody asked for": ("codes", extra("codes")),
    "halves that nobody asked for": ("halves", extra("halves")),
    "seed as text": ("seed", setting("seed", "one")),
    "negative seed": ("seed", setting("seed", -1)),
    "expires as text": ("expires", setting("expires", "soon")),
    "run as a number": ("run", setting("run", 7)),
    "settings as bytes": ("settings", setting("settings", b"{}")),
    "an unknown term": ("objective.kindness", new("objective.kindness", 1.0)),
    "lr as text": ("objective.lr", new("objective.lr", "fast")),
    "lr as a truth": ("objective.lr", new("objective.lr", True)),
    "lr infinite": ("objective.lr", new("objective.lr", math.inf)),
    "lr NaN": ("objective.lr", new("objective.lr", math.nan)),
    "half an epoch": ("objective.epochs", new("objective.epochs", 0.5)),
    "half a batch": ("objective.batch", new("objective.batch", 0.5)),
    "one beta": ("objective.betas", new("objective.betas", [0.9])),
    "betas as a number": ("objective.betas", new("objective.betas", 0.9)),
    "no epochs": ("objective", new("objective.epochs", 0)),
    "model NaN": ("model", entry("model", math.nan)),
    "model infinite": ("model", entry("model", -math.inf)),
    "model too short": ("model", array("model", lambda v: v[:-1])),
    "model too long": ("model", array("model", lambda v: np.append(v, v[:1]))),
    "model in double": ("model", array("model", lambda v: v.astype(np.float64))),
    "model in two dimensions": ("model", array("model", lambda v: v[None])),
    "model as a pickle": ("model", data("model", pickled)),
    "model in an archive": ("model", data("model", zipped)),
    "model cut off": ("model", data("model", lambda old: old[:-3])),
    "model giant": ("model", data("model", lambda _: npy(f"{{'descr':'<f4','fortran_order':False,'shape':({HUGE},)}}"))),
    "units of nothing": ("units", array("units", few)),
    "units a byte short": ("units", array("units", lambda v: v[:-1])),
    "units as booleans": ("units", array("units", lambda v: v > 0)),
    "trains what it does not hold": ("units", array("units", untrainable)),
    "private in double": ("private", array("private", lambda v: v.astype(np.float64))),
    "no arrays": ("arrays", instead("arrays", None)),
    "no config": ("config", instead("config", None)),
    "metrics for a config": ("config", instead("config", MetricRecord({"format": 1}))),
    "config for arrays": ("arrays", instead("arrays", ConfigRecord({}))),
    "nothing": ("config", lambda content: RecordDict()),
}
for _record, _names in {
    "arrays": ("model", "units"),
    "config": (
        "format",
        "run",
        "settings",
        "seed",
        "codec.rows",
        "codec.precision",
        "codec.sampled",
        "plans",
        "tickets",
        "clients",
        "versions",
        "rates",
        "cuts",
        "submodels",
        "work",
    ),
}.items():
    CASES |= {f"without {name}": (name, without(_record, name)) for name in _names}


@pytest.mark.parametrize(("field", "tamper"), CASES.values(), ids=CASES)
def test_a_bad_order_is_refused_by_the_name_of_its_field(field: str, tamper: Tamper):
    with pytest.raises(FleetError, match=f'field "{field}"'):
        wire.read_orders(tamper(content()), LAYOUT)


@pytest.mark.parametrize(("field", "tamper"), MASKED.values(), ids=MASKED)
def test_bad_masks_are_refused_by_the_name_of_their_field(field: str, tamper: Tamper):
    assert wire.read_orders(masked(), LAYOUT).orders[0].submodel.entries["hidden2_bias"].sum() == 4
    with pytest.raises(FleetError, match=f'field "{field}"'):
        wire.read_orders(tamper(masked()), LAYOUT)


@pytest.mark.parametrize(("field", "tamper"), ROUNDED.values(), ids=ROUNDED)
def test_bad_numbers_are_refused_by_the_name_of_their_array(field: str, tamper: Tamper):
    assert [o.codec.precision for o in wire.read_orders(rounded(), LAYOUT).orders] == ["float32", "int8"]
    with pytest.raises(FleetError, match=f'field "{field}"'):
        wire.read_orders(tamper(rounded()), LAYOUT)


@pytest.mark.parametrize(("field", "tamper"), TAUGHT.values(), ids=TAUGHT)
def test_bad_lessons_are_refused_by_the_name_of_their_field(field: str, tamper: Tamper):
    assert wire.read_orders(taught(), LAYOUT).orders[0].objective.distillation.top == 3
    with pytest.raises(FleetError, match=f'field "{field}"'):
        wire.read_orders(tamper(taught()), LAYOUT)


def test_the_untampered_order_is_fine():
    parcel = wire.read_orders(content(), LAYOUT)
    assert [o.ticket for o in parcel.orders] == [0, 1] and parcel.orders[0].objective == Objective(batch=7, until=2.0)


def test_optional_terms_may_be_missing():
    bare = content()
    for name in ("objective.batch", "objective.until", "expires", "objective.lr"):
        del bare["config"][name]
    (first, _) = wire.read_orders(bare, LAYOUT).orders
    assert first.objective == Objective() and first.expires is None


@pytest.mark.parametrize(
    ("name", "value"), [("basis", np.full((4, 2), np.nan)), ("basis", np.zeros((4, 3))), ("other", np.zeros((4, 2)))]
)
def test_arrays_of_other_messages_are_checked_too(name: str, value: np.ndarray):
    message = wire.write_numbers("r", "{}", arrays={name: value}, step="spread")
    with pytest.raises(FleetError, match='field "basis"'):
        wire.read_array(message, "basis", (4, 2), np.float64)
    with pytest.raises(FleetError, match='field "rank" is missing'):
        wire.read_config(message, "rank", int)
    with pytest.raises(FleetError, match='field "metrics" is missing'):
        wire.read_metric(message, "users")
    assert wire.read_config(message, "step", str) == "spread"


def test_what_is_read_is_the_receiver_s_own():
    message = wire.write_numbers("r", "{}", arrays={"basis": np.zeros((4, 2))})
    wire.read_array(message, "basis", (4, 2), np.float64)[:] = 5.0
    assert wire.read_array(message, "basis", (4, 2), np.float64).sum() == 0.0
    assert isinstance(message["arrays"]["basis"], Array)
