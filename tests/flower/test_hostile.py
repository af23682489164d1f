"""Malformed and hostile replies, through the real fleet: none of them reaches the model, and nobody else loses by them."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from flower_world import FlowerWorld, Tamper, flower_world
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from tampering import array, data, entry, extra, figure, instead, npy, pickled, repeated, setting, untouched, without, zipped
from world import copied, finite, recommender, same

from fedprune.codec import Codec
from fedprune.objective import Objective
from fedprune.strategy import Strategy
from fedprune.submodel import Submodel

BAD = 1
"""The client whose reports are tampered with."""
CLIENTS = 3
GIANT = 1 << 45


# ---- what they may send ----------------------------------------------------------------------------------------------

EVERYWHERE: dict[str, tuple[str, Tamper]] = {
    # identity
    "another ticket": ("tickets", setting("tickets", [9999])),
    "another client's ticket": ("tickets", setting("tickets", lambda old: [old[0] - 1])),
    "two tickets": ("tickets", setting("tickets", lambda old: [*old, old[0] + 1])),
    "the same ticket twice": ("tickets", setting("tickets", lambda old: old * 2)),
    "no tickets": ("tickets", setting("tickets", [])),
    "another version": ("server-round", setting("server-round", lambda old: old - 1)),
    "a later version": ("server-round", setting("server-round", lambda old: old + 1)),
    "another run": ("run", setting("run", "run-2")),
    "another format": ("format", setting("format", 99)),
    "a truth for a format": ("format", setting("format", True)),
    # arrays of another kind or size
    "float64": ("update", array("update", lambda v: v.astype(np.float64))),
    "float16": ("update", array("update", lambda v: v.astype(np.float16))),
    "whole numbers": ("update", array("update", lambda v: v.astype(np.int32))),
    "one entry short": ("update", array("update", lambda v: v[:-1])),
    "one entry long": ("update", array("update", lambda v: np.append(v, v[:1]))),
    "much too long": ("update", array("update", lambda v: np.tile(v, 50))),
    "no entries": ("update", array("update", lambda v: v[:0])),
    "two dimensions": ("update", array("update", lambda v: v[None])),
    "a scalar": ("update", array("update", lambda v: v.sum())),
    "bits as booleans": ("present", array("present", lambda v: np.unpackbits(v).astype(bool))),
    "a byte of bits short": ("present", array("present", lambda v: v[:-1])),
    "a byte of bits long": ("present", array("present", lambda v: np.append(v, v[:1]))),
    # values
    "NaN": ("update", entry("update", math.nan)),
    "all NaN": ("update", array("update", lambda v: v * math.nan)),
    "infinite": ("update", entry("update", math.inf)),
    "minus infinite": ("update", entry("update", -math.inf)),
    "huge": ("update", array("update", lambda v: np.full_like(v, 1e30))),
    "one huge entry": ("update", entry("update", 1e30)),
    "large": ("update", entry("update", -101.0)),
    "out of proportion": ("update", array("update", lambda v: 60 * v)),
    # rows
    "no row present": ("present", array("present", lambda v: 0 * v)),
    "changes what it says it left alone": ("update", untouched),
    "no stack": ("stack-clients", setting("stack-clients", [])),
    "an empty stack": ("stack-clients", setting("stack-clients", [0])),
    "a stack of two": ("stack-clients", setting("stack-clients", [2])),
    "more rows than items": ("stack-rows", setting("stack-rows", [10**9])),
    "no rows": ("stack-rows", setting("stack-rows", [0])),
    "rows of two stacks": ("stack-rows", setting("stack-rows", lambda old: old * 2)),
    # bytes
    "pickle in an array": ("update", data("update", pickled)),
    "a bare pickle": ("update", data("update", lambda _: pickle.dumps([1, 2]))),
    "cut off": ("update", data("update", lambda old: old[:-7])),
    "cut off in the header": ("update", data("update", lambda old: old[:40])),
    "no bytes": ("update", data("update", lambda _: b"")),
    "not an array file": ("update", data("update", lambda _: b"GIF89a" + bytes(90))),
    "an archive": ("update", data("update", zipped)),
    "a broken archive": ("update", data("update", lambda _: b"PK\x03\x04" + bytes(90))),
    "giant": ("update", data("update", lambda _: npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({GIANT},)}}"))),
    "giant squared": (
        "update", data("update", lambda _: npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({GIANT}, {GIANT})}}")),
    ),
    "negative shape": ("update", data("update", lambda _: npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-4,)}"))),
    "header that does not end": ("update", data("update", lambda _: npy("{'descr': '<f4', 'shape': ((("))),
    "header that is too deep": ("update", data("update", lambda _: npy("(" * 900))),
    "header with a strange type": (
        "update", data("update", lambda _: npy("{'descr': (1, 2, 3, 4), 'fortran_order': False, 'shape': (4,)}")),
    ),
    "header of another decade": (
        "update", data("update", lambda _: npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4L,)}")),
    ),
    "unknown serialisation": ("update", data("update", lambda old: old, stype="pickle")),
    # what must not be there
    "private rows": ("private", extra("private")),
    "an unknown array": ("gift", extra("gift")),
    # figures
    "examples 0": ("examples", figure("examples", [0])),
    "negative examples": ("examples", figure("examples", [-5])),
    "incredible examples": ("examples", figure("examples", [1 << 31])),
    "examples in pieces": ("examples", figure("examples", [1.5])),
    "examples of two": ("examples", figure("examples", [1, 2])),
    "examples not in a list": ("examples", figure("examples", 3)),
    "a lie about num-examples": ("num-examples", figure("num-examples", 10**6)),
    "negative num-examples": ("num-examples", figure("num-examples", -1)),
    "loss NaN": ("losses", figure("losses", [math.nan])),
    "negative loss": ("losses", figure("losses", [-1.0])),
    "mixed losses": ("losses", figure("losses", [0.5, 1])),
    "work 0": ("work", figure("work", [0.0])),
    "work above 1": ("work", figure("work", [1.5])),
    "work NaN": ("work", figure("work", [math.nan])),
    "work a truth": ("work", figure("work", [True])),
    "negative seconds": ("seconds-training", figure("seconds-training", -1.0)),
    "seconds NaN": ("seconds-training", figure("seconds-training", math.nan)),
    "seconds infinite": ("seconds-loading", figure("seconds-loading", math.inf)),
    "seconds in a list": ("seconds-teacher", figure("seconds-teacher", [1.0])),
    "negative download": ("seconds-download", figure("seconds-download", -1.0)),
    "speed NaN": ("upload-bytes-per-second", figure("upload-bytes-per-second", math.nan)),
    "joules without their parts": ("joules-loading", figure("joules-training", 1.0)),
    "negative watts": ("watts-idle", figure("watts-idle", -1.0)),
    # records
    "no arrays": ("arrays", instead("arrays", None)),
    "no config": ("config", instead("config", None)),
    "no metrics": ("metrics", instead("metrics", None)),
    "metrics for arrays": ("arrays", instead("arrays", MetricRecord({"update": [1.0]}))),
    "config for metrics": ("metrics", instead("metrics", ConfigRecord({"num-examples": 3}))),
    "arrays for a config": ("config", instead("config", MetricRecord({"format": 1}))),
    "empty content": ("config", lambda content: RecordDict()),
}  # fmt: skip
for _record, _names in {
    "arrays": ("update", "present"),
    "config": ("format", "server-round", "run", "tickets", "stack-clients", "stack-rows"),
    "metrics": ("num-examples", "examples", "losses", "work", "seconds-loading", "seconds-training", "seconds-teacher"),
}.items():
    EVERYWHERE |= {f"without {name}": (name, without(_record, name)) for name in _names}
TOUCHED: dict[str, tuple[str, Tamper]] = {
    "a row out of range": ("rows", entry("rows", 40)),
    "a row far out of range": ("rows", entry("rows", 2**31 - 1)),
    "a negative row": ("rows", entry("rows", -1)),
    "a row twice": ("rows", array("rows", repeated)),
    "rows as int64": ("rows", array("rows", lambda v: v.astype(np.int64))),
    "a row short": ("rows", array("rows", lambda v: v[:-1])),
    "without rows": ("rows", without("arrays", "rows")),
}
TABLE: dict[str, tuple[str, Tamper]] = {"fewer rows than the table": ("stack-rows", setting("stack-rows", [7]))}
OF_ARRAYS = {kind: case for kind, case in EVERYWHERE.items() if case[0] in ("update", "present", "stack-rows", "stack-clients")}
CASES = [
    pytest.param(field, tamper, model, rows, id=f"{kind}-{model}-{rows}")
    for model, rows, kinds in (
        ("mf", "table", EVERYWHERE | TABLE),
        ("neumf", "touched", OF_ARRAYS | TOUCHED),
        ("mf", "touched", TOUCHED),
        ("neumf", "table", TABLE),
    )
    for kind, (field, tamper) in kinds.items()
]


# ---- what must hold, whatever it is ----------------------------------------------------------------------------------


@cache
def _begun(model: str, rows: str) -> FlowerWorld:
    here = flower_world(Strategy(codec=Codec(rows)), model=model, clients=CLIENTS, takes=[2.0, 3.0, 4.0], poll=1.0)
    for _ in range(2):
        assert len(here.round().reports) == CLIENTS
    here.grid.sent.clear()
    return here


def begun(model: str = "mf", rows: str = "table") -> FlowerWorld:
    """After two honest rounds, so that the fleet knows what is usual."""
    return copy.deepcopy(_begun(model, rows))


def only_the_good_count(here: FlowerWorld, reason: str) -> str:
    """Go a round with client `BAD` at its worst, then one without; what the record says of it."""
    before = here.state
    kept = copied(before.model)
    done = here.round()
    (lost,) = done.lost
    assert (lost.order.client, lost.reason) == (BAD, reason)
    assert sorted(report.order.client for report in done.reports) == [0, 2]
    assert finite(here.state.model) and same(before.model, kept)
    assert same(here.state.model, here.merged(before, [r.order for r in done.reports])), "a bad report reached the model"
    assert not same(here.state.model, before.model)
    here.devices.tamper.clear()
    before, done = here.state, here.round()
    assert sorted(report.order.client for report in done.reports) == [0, 1, 2] and not done.lost
    assert same(here.state.model, here.merged(before, done.orders))
    return lost.detail


GATES: dict[str, tuple[str, Tamper]] = {
    "a gate above 1": ("gates", figure("gates", [1.01])),
    "a negative gate": ("gates", figure("gates", [-0.5])),
    "an infinite gate": ("gates", figure("gates", [math.inf])),
    "two gates": ("gates", figure("gates", [0.5, 0.5])),
    "no gates": ("gates", figure("gates", [])),
    "a gate not in a list": ("gates", figure("gates", 0.5)),
    "a truth for a gate": ("gates", figure("gates", [True])),
    "without gates": ("gates", without("metrics", "gates")),
}


@pytest.mark.parametrize(("field", "tamper"), GATES.values(), ids=GATES)
def test_a_bad_gate_is_refused(field: str, tamper: Tamper):
    here = flower_world(Strategy(objective=Objective(gate=True)), clients=CLIENTS)
    here.devices.tamper[BAD] = tamper
    assert f'field "{field}"' in only_the_good_count(here, "refused")


def test_a_gate_may_be_unknown_but_not_unasked():
    here = flower_world(Strategy(objective=Objective(gate=True)), clients=CLIENTS)
    here.devices.tamper[BAD] = figure("gates", [math.nan])
    gates = {report.order.client: report.gate for report in here.round().reports}
    assert math.isnan(gates.pop(BAD)) and all(0 <= gate <= 1 for gate in gates.values())
    here = begun()
    here.devices.tamper[BAD] = figure("gates", [0.5])
    assert 'field "gates" was not asked for' in only_the_good_count(here, "refused")


def fuller(rows: np.ndarray) -> np.ndarray:
    """Another row in the first one's place, with another number of entries."""
    rows[0] = next(row for row in range(40) if row not in rows and row % 8 != rows[0] % 8)
    return rows


MASKED: dict[str, tuple[str, Tamper]] = {
    "all entries": ("update", array("update", lambda v: np.append(v, v))),
    "an entry less": ("update", array("update", lambda v: v[:-1])),
    "NaN where there is one": ("update", entry("update", math.nan, at=-1)),
    "a row with another number of entries": ("update", array("rows", fuller)),
    "a row out of range": ("rows", entry("rows", 40)),
    "masks of its own": ("entries", extra("entries")),
}


@pytest.mark.parametrize(("field", "tamper"), MASKED.values(), ids=MASKED)
def test_a_bad_update_of_some_entries_is_refused(field: str, tamper: Tamper):
    """Every item row holds as many entries as its number modulo 8 says, so sizes follow from the rows."""
    layout = recommender("mf").layout
    there = np.arange(8)[None] <= np.arange(40)[:, None] % 8
    masked = replace(Submodel.full(layout), entries={"item_embedding": there})
    here = flower_world(Strategy(codec=Codec("touched")), clients=24)  # few users each, so that some rows stay untouched
    here.fleet.send([replace(here.order(client, client), submodel=masked) for client in (3, 4, 5)])
    here.devices.tamper[4] = tamper
    events = {event.order.client: event for event in (here.fleet.next() for _ in range(3))}
    for client in (3, 5):
        tensor = events[client].updates.tensors["item_embedding"][0]
        rows = events[client].updates.rows[0]
        assert bool((tensor[~torch.from_numpy(there)[rows]] == 0).all()) and bool(tensor.any())
    assert events[4].reason == "refused" and f'field "{field}"' in events[4].detail


def test_there_are_enough_cases():
    assert len(CASES) >= 100 and len(EVERYWHERE | TOUCHED | TABLE) >= 15


@pytest.mark.parametrize(("field", "tamper", "model", "rows"), CASES)
def test_a_bad_reply_is_refused_by_the_name_of_its_field(field: str, tamper: Tamper, model: str, rows: str):
    here = begun(model, rows)
    here.devices.tamper[BAD] = tamper
    assert f'field "{field}"' in (detail := only_the_good_count(here, "refused")) and f"client {BAD}" in detail


@pytest.mark.parametrize("code", [0, 1, 2, 5, 6, 7, 8])
def test_an_error_is_a_failure(code: int):
    here = begun()
    here.devices.tamper[BAD] = lambda content: Error(code, "for a reason")
    assert "for a reason" in only_the_good_count(here, "failed")


def test_more_seconds_than_have_passed_are_not_believed():
    here = begun()
    here.devices.tamper[BAD] = figure("seconds-training", 30.0)
    assert "30.0 s of work within 3.0 s" in only_the_good_count(here, "refused")


def test_before_anything_is_usual_only_the_absurd_is_refused():
    here = flower_world(clients=CLIENTS)
    here.devices.tamper[BAD] = array("update", lambda v: np.full_like(v, 1e30))
    assert 'field "update" changes an entry by' in only_the_good_count(here, "refused")


def test_updates_of_nothing_do_not_make_honest_ones_look_large():
    here = flower_world(clients=CLIENTS, poll=1.0)
    for client in range(CLIENTS):
        here.devices.tamper[client] = array("update", lambda v: 0 * v)
    before = here.state
    for _ in range(2):
        assert len(here.round().reports) == CLIENTS
    assert same(here.state.model, before.model)
    here.devices.tamper.clear()
    assert len(here.round().reports) == CLIENTS


# ---- replies that answer nothing, or once more -----------------------------------------------------------------------


class Echo:
    """Repeats the last replies of a grid, from another sender or to another message."""

    def __init__(self, here: FlowerWorld) -> None:
        self.here, self.original = here, here.grid.pull_messages
        self.kept: list[Message] = []
        here.grid.pull_messages = self  # type: ignore[method-assign]

    def __call__(self, ids: Any) -> list[Message]:
        replies = self.original(ids)
        self.kept += replies
        return replies


def test_the_same_reply_twice_counts_once():
    here = begun()
    echo = Echo(here)
    original = echo.original
    echo.original = lambda ids: [twice for reply in original(ids) for twice in (reply, reply)]
    before, done = here.state, here.round()
    assert sorted(r.order.client for r in done.reports) == [0, 1, 2] and not done.lost
    assert same(here.state.model, here.merged(before, done.orders))
    here.grid.again = list(echo.kept)  # and all of them again while the next round is on
    before, done = here.state, here.round()
    assert len(done.reports) == CLIENTS and {r.order.version for r in done.reports} == {before.version}
    assert same(here.state.model, here.merged(before, done.orders))


@pytest.mark.parametrize("answers", ["nothing", "unknown"])
def test_a_reply_to_a_message_that_was_never_sent_is_ignored(answers: str):
    here = begun()
    echo = Echo(here)
    here.round()
    strange = echo.kept[0]
    strange.metadata.__dict__["_reply_to_message_id"] = "" if answers == "nothing" else "f" * 64
    here.grid.again = [strange]
    before, done = here.state, here.round()
    assert len(done.reports) == CLIENTS and same(here.state.model, here.merged(before, done.orders))


def test_a_reply_in_another_client_s_name_answers_for_the_order_alone():
    here = begun()
    original = here.grid.pull_messages

    def disguised(ids: Any) -> list[Message]:
        replies = original(ids)
        for reply in replies:
            reply.metadata.__dict__["_src_node_id"] = 101
        return replies

    here.grid.pull_messages = disguised  # type: ignore[method-assign]
    before, done = here.state, here.round()
    assert sorted(r.order.client for r in done.reports) == [0, 1, 2]
    assert same(here.state.model, here.merged(before, done.orders))


def test_the_bad_are_in_the_books_with_what_they_were_sent():
    here = begun()
    here.devices.tamper[BAD] = entry("update", math.nan)
    (lost,) = here.round().lost
    assert lost.cost.bytes_down > 0 and lost.cost.joules is None and lost.cost.source == "measured"
    assert lost.cost.seconds.total == pytest.approx(3.0, abs=1.0)
