"""The ServerApp: the same experiment that `fedprune run` does in process, with Flower's nodes doing the work.

    flwr run . local --run-config 'config="configs/silos.toml" strategies="fedavg,adaptcl" set="rounds=20"'

`config` is a settings file, in the app or anywhere on the server; `set` changes settings, separated by spaces (quoted as in a
shell); `strategies` names those to run one after another (none: the file's `strategy`); `out` is where run folders go;
`clock` is "virtual" (device table; what a simulation does by default), "wall" (measured; what a deployment does), or "auto";
`wait-seconds` is how long a deployment waits for its devices, `order-seconds` how long for an answer to an order. A run that
was stopped goes on if it is started again with the same run-config.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, UserConfig
from flwr.serverapp import Grid, ServerApp

from fedprune.config import Settings, read
from fedprune.errors import ConfigError, FedpruneError, unknown
from fedprune.flower.compat import is_simulated
from fedprune.flower.deployment import deploy, say
from fedprune.flower.nodes import Nodes
from fedprune.flower.shard import OnNodes
from fedprune.simulation import run

app = ServerApp()
DEFAULTS: UserConfig = {
    "config": "configs/silos.toml", "set": "", "strategies": "", "out": "runs", "clock": "auto", "wait-seconds": 300.0,
    "order-seconds": 3600.0,
}  # fmt: skip
"""For apps of one's own that use this ServerApp: they declare the keys that their users may change."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Read the settings, run the strategies, print what they came to."""
    _speak_up()
    try:
        run_all(grid, context.run_config)
    except FedpruneError as error:
        print(f"fedprune: {error}", flush=True)  # Flower's traceback follows, and the run counts as failed
        raise


def run_all(grid: Grid, config: UserConfig) -> None:
    """All strategies that the run-config names, one after another."""
    config = DEFAULTS | config
    clock = str(config["clock"])
    if clock not in ("auto", "virtual", "wall"):
        raise ConfigError(unknown("clock", clock, ("auto", "virtual", "wall")))
    virtual = is_simulated(grid) if clock == "auto" else clock == "virtual"
    if virtual:
        torch.set_num_threads(1)
    settings = read(_found(str(config["config"])), shlex.split(str(config["set"])))
    names = [name.strip() for name in str(config["strategies"]).split(",") if name.strip()] or [settings.strategy]
    out = Path(str(config["out"])).expanduser().absolute()
    print(f"fedprune: runs go to {out}", flush=True)
    for name in names:
        settings.only(name)  # refused before anything has run
    for name in names:
        summary = one(grid, settings.only(name), out, virtual, _seconds(config, "wait"), _seconds(config, "order"))
        print(f"fedprune: {name}: {json.dumps(summary)}", flush=True)


def one(grid: Grid, settings: Settings, out: Path, virtual: bool, wait: float, order: float) -> dict[str, Any]:
    """Run one strategy."""
    watch: Callable[[dict[str, Any]], None] = lambda event: print(f"{settings.strategy}: {say(event)}", flush=True)  # noqa: E731
    if virtual:
        return run(settings, out, watch=watch, trainer=OnNodes(Nodes(grid), settings))
    return deploy(settings, out, grid, wait_seconds=wait, order_seconds=order, watch=watch)


def _seconds(config: UserConfig, name: str) -> float:
    value = config[f"{name}-seconds"]
    if not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"{name}-seconds is {value!r}; it must be a number above 0")
    return float(value)


def _speak_up() -> None:
    """Flower shows what is printed; what the package logs goes there too."""
    ours = logging.getLogger("fedprune")
    ours.setLevel(logging.INFO)
    if not ours.handlers:
        ours.addHandler(logging.StreamHandler(sys.stdout))
        ours.handlers[0].setFormatter(logging.Formatter("fedprune: %(message)s"))


def _found(name: str) -> Path:
    """A settings file: as it is, or in the app, which Flower unpacks somewhere of its own."""
    path = Path(name).expanduser()
    return path if path.exists() else Path(__file__).parents[2] / name
