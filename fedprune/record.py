"""Run folders: what happened, one line per round, and a checkpoint from which a killed run goes on to the same end.

<out>/<strategy>-<hash>/seed0/
    run.json          settings and versions
    events.jsonl      one line per round, with an evaluation where there was one; every reported number is computed from it
    ledger/*.parquet  one row per client-round: seconds and joules by part, bytes, rate, staleness, discarded
    state.safetensors the last checkpoint; removed when the run is finished
    model.safetensors the global model of the best round by validation; under pruning/ and entries/ what its masks follow from
    summary.json      written last: its presence says that the run is finished
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedprune.energy import above_idle
from fedprune.errors import RecordError
from fedprune.exchange import PARTS, Cost, Lost, Report
from fedprune.strategy import Round, ServerState
from fedprune.types import FloatArray, Memory, Tensors, Version


@dataclass(frozen=True)
class Kept:
    """The best model of a run, its version, and what the choice of units and of entries remembered then."""

    model: Tensors
    version: Version
    pruning: Memory
    entries: Memory


@dataclass(frozen=True)
class Snapshot:
    """What a fleet needs to go on from here: tensors, and what JSON can hold."""

    tensors: Tensors
    about: Mapping[str, Any]


class RunRecord:
    """One run's folder.

    Lines and ledger rows are held back until the next checkpoint, and those after the last one are dropped on resuming: what
    is on disk is always a state that the run really was in.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines: list[str] = []
        self._rows: list[dict[str, list]] = []

    @property
    def about(self) -> dict[str, Any]:
        """What `begin` wrote when the run began."""
        return json.loads((self.folder / "run.json").read_text())

    def settings(self) -> dict[str, Any]:
        """The run's, as a table.

        Raises:
            RecordError: this is no run's folder.
        """
        try:
            return self.about["settings"]
        except (FileNotFoundError, KeyError, json.JSONDecodeError):
            raise RecordError(f"{self.folder} is no run's folder: it has no run.json; `fedprune run` makes one") from None

    @property
    def finished(self) -> dict[str, Any] | None:
        """The summary, if the run has ended."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text()) if path.exists() else None

    def begin(self, about: Mapping[str, Any]) -> None:
        """Create the folder, or check that it is of the same run.

        Raises:
            RecordError: the folder holds a run on other data, or does not say on which (its name already says that the
                settings are the same).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "run.json"
        if path.exists():
            if self.about.get("data") != about["data"]:
                raise RecordError(
                    f"{self.folder} holds a run on other data than {about['settings']['data']} now has, or does not say on "
                    "which; name another --out, or delete that folder"
                )
        else:
            write(path, json.dumps(about, indent=1))

    def add(self, event: Mapping[str, Any], ledger: dict[str, list] | None = None) -> None:
        """Note a round."""
        self._lines.append(json.dumps(event))
        if ledger is not None:
            self._rows.append(ledger)

    def checkpoint(self, state: ServerState, fleet: Snapshot, extra: Mapping[str, Any]) -> None:
        """Write what was noted, then the state that it led to, each in one step."""
        if any(rows["client"] for rows in self._rows):
            columns = {name: [v for rows in self._rows for v in rows[name]] for name in self._rows[0]}
            (self.folder / "ledger").mkdir(exist_ok=True)
            target = self.folder / "ledger" / f"{state.version:06d}.parquet"
            pl.DataFrame(columns, schema=LEDGER).write_parquet(target.with_suffix(".new"))
            os.replace(target.with_suffix(".new"), target)
        with (self.folder / "events.jsonl").open("a") as file:
            file.write("".join(line + "\n" for line in self._lines))
            file.flush()
            os.fsync(file.fileno())
        self._lines, self._rows = [], []
        save_state(self.folder / "state.safetensors", state, fleet, extra)

    def resume(self, fresh: ServerState) -> tuple[ServerState, Snapshot, dict[str, Any]] | None:
        """The state of the last checkpoint, with everything noted after it dropped; None if there is none."""
        path = self.folder / "state.safetensors"
        if not path.exists():
            (self.folder / "events.jsonl").unlink(missing_ok=True)
            for part in (self.folder / "ledger").glob("*"):
                part.unlink()
            return None
        state, fleet, extra = load_state(path, fresh)
        kept = [line for line in self._complete_lines() if json.loads(line)["version"] < state.version]
        write(self.folder / "events.jsonl", "".join(line + "\n" for line in kept))
        for part in (self.folder / "ledger").glob("*"):
            if part.suffix != ".parquet" or int(part.stem) > state.version:
                part.unlink()
        return state, fleet, extra

    def keep_model(self, state: ServerState) -> None:
        """Replace the best model, and what its strategy remembered: from that follows what each device held of it."""
        save(self.folder / "model.safetensors", state.model | _memories(state, MASKING), _about({"version": state.version}))

    def kept_model(self) -> Kept:
        """The best model so far.

        Raises:
            RecordError: there is none yet, or none with its masks, or the file is damaged.
        """
        path = self.folder / "model.safetensors"
        if not path.exists():
            raise RecordError(f"{self.folder} has no model.safetensors yet; start the run again, and it goes on to its first")
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("fedprune", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, ValueError) as error:
            raise RecordError(f"{path} is damaged ({error}); delete the run's folder and run it again") from None
        if "version" not in about:
            raise RecordError(f"{path} was written without its masks, by an earlier fedprune; run it again into another --out")
        memories = {p: {n: t.numpy() for n, t in _group(tensors, p).items()} for p in MASKING}
        return Kept({n: t for n, t in tensors.items() if "/" not in n}, about["version"], **memories)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Mark the run as finished."""
        write(self.folder / "summary.json", json.dumps(summary, indent=1))
        (self.folder / "state.safetensors").unlink(missing_ok=True)

    def events(self) -> list[dict[str, Any]]:
        """All rounds so far."""
        return [json.loads(line) for line in self._complete_lines()]

    def report_seconds(self, since: Version) -> FloatArray:
        """Median seconds of each client's reports that were merged from this version on, `[clients that have any]`."""
        files = sorted((self.folder / "ledger").glob("*.parquet"))
        if not files:
            return np.zeros(0)
        seconds = pl.sum_horizontal([f"seconds_{part}" for part in PARTS]).alias("seconds")
        merged = pl.scan_parquet(files).filter((pl.col("version") >= since) & ~pl.col("discarded"))
        return merged.select("client", seconds).group_by("client").median().sort("client").collect()["seconds"].to_numpy()

    def _complete_lines(self) -> list[str]:
        path = self.folder / "events.jsonl"
        text = path.read_text() if path.exists() else ""
        return text.split("\n")[: text.count("\n")]


# ---- one round as a line and as rows ---------------------------------------------------------------------------------


def line(happened: Round) -> dict[str, Any]:
    """A round's sums: seconds and joules by part over all its clients, discarded ones included."""
    done = [(r.cost, r.waited) for r in happened.reports] + [(entry.cost, 0.0) for entry in happened.lost]
    seconds = {part: float(sum(getattr(c.seconds, part) for c, _ in done)) for part in PARTS}
    seconds["waiting"] = float(sum(w for _, w in done))
    joules: dict[str, float | None] | None = {part: _sum(_joules(c, part) for c, _ in done) for part in PARTS}
    joules["waiting"] = _sum(None if c.watts_waiting is None else c.watts_waiting * w for c, w in done)
    if all(value is None for value in joules.values()):
        joules = None
    reports = happened.reports
    refused = [entry.detail for entry in happened.lost if entry.reason in ("refused", "failed")]
    return {
        "version": happened.version,
        "began": happened.began,
        "ended": happened.ended,
        "asked": len(happened.orders),
        "reports": len(reports),
        "lost": len(happened.lost),
        **({"refused": refused} if refused else {}),
        **({"entries": dict(happened.facts)} if happened.facts else {}),
        "mean_rate": float(np.mean([r.order.rate for r in reports])) if reports else None,
        "mean_staleness": float(np.mean([r.staleness for r in reports])) if reports else None,
        "slowest_update": max((r.cost.seconds.total for r in reports), default=None),
        "fastest_update": min((r.cost.seconds.total for r in reports), default=None),
        "loss": float(np.average([r.loss for r in reports], weights=[r.examples for r in reports])) if reports else None,
        "examples": sum(r.examples for r in reports),
        "flops": float(sum(c.flops for c, _ in done)),
        "bytes_down": sum(c.bytes_down for c, _ in done),
        "bytes_up": sum(c.bytes_up for c, _ in done),
        "seconds": seconds,
        "joules": joules,
        "source": "modelled" if all(c.source == "modelled" for c, _ in done) else "measured",
    }


def _joules(cost: Cost, part: str) -> float | None:
    """None where nobody measured them."""
    value = math.nan if cost.joules is None else getattr(cost.joules, part)
    return None if math.isnan(value) else float(value)


def _above_idle(cost: Cost) -> float | None:
    """Joules of the measured parts beyond what the device would have drawn at rest meanwhile; None where that is unknown."""
    known = {part: joules for part in PARTS if (joules := _joules(cost, part)) is not None}
    if not known:
        return None
    return above_idle(sum(known.values()), sum(getattr(cost.seconds, part) for part in known), cost.watts_waiting)


def _sum(values: Iterable[float | None]) -> float | None:
    """None if one is unknown."""
    values = list(values)
    known = [value for value in values if value is not None]
    return float(sum(known)) if len(known) == len(values) else None


def ledger_rows(happened: Round) -> dict[str, list]:
    """One row per client-round, as columns."""
    entries: list[tuple[Report | Lost, bool]] = [(report, False) for report in happened.reports]
    entries += [(lost, True) for lost in happened.lost]
    columns: dict[str, list] = {"version": [happened.version] * len(entries)}
    columns["client"] = [e.order.client for e, _ in entries]
    columns["ticket"] = [e.order.ticket for e, _ in entries]
    columns["rate"] = [e.order.rate for e, _ in entries]
    columns["discarded"] = [discarded for _, discarded in entries]
    columns["reason"] = [e.reason if isinstance(e, Lost) else None for e, _ in entries]
    columns["detail"] = [e.detail or None if isinstance(e, Lost) else None for e, _ in entries]
    columns["staleness"] = [e.staleness if isinstance(e, Report) else None for e, _ in entries]
    columns["examples"] = [e.examples if isinstance(e, Report) else None for e, _ in entries]
    waited = [e.waited if isinstance(e, Report) else 0.0 for e, _ in entries]
    for part in PARTS:
        columns[f"seconds_{part}"] = [getattr(e.cost.seconds, part) for e, _ in entries]
    columns["seconds_waiting"] = waited
    for part in PARTS:
        columns[f"joules_{part}"] = [_joules(e.cost, part) for e, _ in entries]
    columns["joules_waiting"] = [
        None if e.cost.watts_waiting is None else e.cost.watts_waiting * w for (e, _), w in zip(entries, waited, strict=True)
    ]
    columns["joules_above_idle"] = [_above_idle(e.cost) for e, _ in entries]
    for name in ("watts_waiting", "bytes_down", "bytes_up", "flops", "parameters", "source"):
        columns[name] = [getattr(e.cost, name) for e, _ in entries]
    return columns


LEDGER = (
    {"version": pl.Int64, "client": pl.Int64, "ticket": pl.Int64, "rate": pl.Float64, "discarded": pl.Boolean}
    | {"reason": pl.String, "detail": pl.String, "staleness": pl.Int64, "examples": pl.Int64}
    | {f"seconds_{part}": pl.Float64 for part in (*PARTS, "waiting")}
    | {f"joules_{part}": pl.Float64 for part in (*PARTS, "waiting")}
    | {
        "joules_above_idle": pl.Float64,
        "watts_waiting": pl.Float64,
        "bytes_down": pl.Int64,
        "bytes_up": pl.Int64,
        "flops": pl.Float64,
        "parameters": pl.Int64,
        "source": pl.String,
    }
)
"""Columns of the ledger."""


# ---- checkpoints -----------------------------------------------------------------------------------------------------


MEMORIES = ("selection", "rates", "spending", "pruning", "entries", "cached")
"""What the parts of a strategy remember."""
MASKING = ("pruning", "entries")
"""Those of them that a submodel follows from."""


def save_state(path: Path, state: ServerState, fleet: Snapshot, extra: Mapping[str, Any]) -> None:
    """Everything a run needs to go on, in one file: the server, and what its fleet gave to be kept."""
    tensors: Tensors = {f"model/{n}": t for n, t in state.model.items()}
    tensors |= {f"optimiser/{n}": t for n, t in state.optimiser.items()}
    tensors |= _memories(state, MEMORIES) | {f"base/{n}": t for n, t in state.base.items()}
    tensors |= {f"fleet/{n}": t for n, t in fleet.tensors.items()}
    about = {"version": state.version, "ticket": state.ticket, "fleet": fleet.about, "extra": dict(extra)}
    save(path, tensors, _about(about))


def load_state(path: Path, fresh: ServerState) -> tuple[ServerState, Snapshot, dict[str, Any]]:
    """The server of a checkpoint, its fleet's part, and what else was kept."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["fedprune"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict

    memories: dict[str, Any] = {p: {n: t.numpy() for n, t in _group(tensors, p).items()} for p in MEMORIES}
    model, optimiser = _group(tensors, "model"), _group(tensors, "optimiser")
    memories["base"] = _group(tensors, "base")
    state = ServerState(model, fresh.layout, fresh.seed, about["version"], about["ticket"], optimiser, **memories)
    return state, Snapshot(_group(tensors, "fleet"), about["fleet"]), about["extra"]


def _group(tensors: Tensors, prefix: str) -> Tensors:
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + "/")}


def _memories(state: ServerState, parts: Sequence[str]) -> Tensors:
    return {f"{p}/{n}": torch.from_numpy(np.array(array)) for p in parts for n, array in getattr(state, p).items()}


def _about(values: Mapping[str, Any]) -> dict[str, str]:
    return {"fedprune": json.dumps(values)}


def save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file in one step."""
    new = path.with_suffix(".new")
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, new, metadata)
    with new.open("rb+") as file:
        os.fsync(file.fileno())  # or a power cut may leave the new name on an empty file
    os.replace(new, path)


def write(path: Path, text: str) -> None:
    """Write a text file in one step."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)
