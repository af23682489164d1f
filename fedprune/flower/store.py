"""What a device keeps on its own disk: private rows, their optimiser's moments, and how fast it was.

Flower runs every message in a fresh process and forgets a node's state when its SuperNode restarts, so it is all in files. An
order begins from the rows that the last one left. If the server asks for the last ticket again (it was killed and went on from
its checkpoint), the order begins where it began the first time. With `checkpoint = 1`, as deployments should have it, no more
than one order per device is ever repeated; with rarer checkpoints, private rows are ahead of the server by some orders.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from fedprune.population import MOMENTS, Population
from fedprune.record import save, write
from fedprune.types import IntArray, Tensors, Ticket


def home(node_config: Mapping[str, Any]) -> Path:
    """The folder that `state` of a SuperNode's --node-config names, else one in Flower's own."""
    flower = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser()
    return Path(str(node_config.get("state", flower / "fedprune"))).expanduser()


@dataclass(frozen=True)
class Store:
    """One client's files of one run.

    Args:
        folder: of the run; created when something is kept, for its owner's eyes only.
        users: ids of those whose rows these are, in the population's order. Rows are found again by them.
        kind: "" for the rows that are trained; "listening" for those that only listen (`serving.listen`).
    """

    folder: Path
    client: int
    users: tuple[str, ...] = ()
    kind: str = ""

    @property
    def _rows(self) -> Path:
        return self.folder / f"client{self.client}{self.kind}.safetensors"

    @property
    def _facts(self) -> Path:
        return self.folder / f"client{self.client}.json"

    def load(self, population: Population, users: IntArray, ticket: Ticket | None = None) -> None:
        """Put kept rows into the population; without any, its own initial ones stay.

        Args:
            ticket: about to be worked on.
        """
        if not self._rows.exists():
            return
        with safe_open(self._rows, "pt") as file:
            last, ids = int(file.metadata()["ticket"]), json.loads(file.metadata()["users"])
            which = "before" if ticket == last else "after"
            names = [name for name in file.keys() if name.startswith(which)]  # noqa: SIM118 - not a dict
            rows = {name.removeprefix(which + "."): file.get_tensor(name) for name in names}
        place = {user: number for number, user in enumerate(ids)}
        pairs = [(own, place[user]) for own, user in zip(users.tolist(), self.users, strict=True) if user in place]
        if pairs:  # a user who is new keeps the initial rows
            own, kept = (list(numbers) for numbers in zip(*pairs, strict=True))
            _put(population, np.array(own), {name: tensor[kept] for name, tensor in rows.items()})

    def keep(self, before: Tensors, population: Population, users: IntArray, ticket: Ticket) -> None:
        """Write the rows as they are now, and as they were `before` this ticket, in one step."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tensors = {f"before.{name}": tensor for name, tensor in before.items()}
        tensors |= {f"after.{name}": tensor for name, tensor in rows_of(population, users).items()}
        save(self._rows, tensors, {"ticket": str(ticket), "users": json.dumps(self.users)})

    def facts(self) -> dict[str, Any]:
        """What else is known: the catalogue, the device's speed, its idle power."""
        return json.loads(self._facts.read_text()) if self._facts.exists() else {}

    def note(self, **facts: Any) -> None:
        """Add to the facts."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write(self._facts, json.dumps(self.facts() | facts))


def rows_of(population: Population, users: IntArray) -> Tensors:
    """Private rows of these users, with their moments; copies."""
    at, private = torch.from_numpy(users), population.private
    rows = {f"{moment}/{n}": t[at].clone() for moment in MOMENTS for n, t in getattr(private, moment).items()}
    return rows | {"steps": private.steps[at].clone()}


def _put(population: Population, users: IntArray, rows: Tensors) -> None:
    at = torch.from_numpy(users)
    for moment in MOMENTS:
        for name, tensor in getattr(population.private, moment).items():
            tensor[at] = rows[f"{moment}/{name}"]
    population.private.steps[at] = rows["steps"]
