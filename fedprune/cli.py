"""The command line: run, compare, report, compress, export, list, keys."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedprune import comparison, recommenders
from fedprune import compress as compressing
from fedprune.catalog import CATALOG
from fedprune.config import read
from fedprune.data import datasets
from fedprune.devices import CLASSES, DEVICES
from fedprune.errors import ConfigError, FedpruneError, unknown
from fedprune.export import export as export_run
from fedprune.record import RunRecord

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

Config = Annotated[Path, typer.Argument(help="a TOML file of settings; see configs/")]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a setting; may be repeated")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="where run folders, table and figure go")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on standard output and nothing else")]


@app.command()
def run(config: Config, set_: Changes = None, out: Out = Path("runs"), as_json: AsJson = False) -> None:
    """Run one strategy; run it again to go on where it stopped."""
    with _refusals():
        settings = read(config, set_ or [])
        summary = comparison.compare([settings], out, quiet=as_json, with_baselines=False).runs[0]
        _say(summary, as_json)


@app.command()
def compare(
    config: Config,
    strategies: Annotated[str, typer.Option(help="comma-separated; default: those of the settings file")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="seeds per strategy, counted up from the settings' seed")] = 1,
    set_: Changes = None,
    out: Out = Path("runs"),
    jobs: Annotated[int, typer.Option(min=0, help="runs at a time; 0: one per core")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run several strategies on the same data and fleet, and set them side by side with the usual baselines."""
    with _refusals():
        settings = read(config, set_ or [])
        names = [name.strip() for name in strategies.split(",") if name.strip()] or list(settings.strategies)
        if not names:
            raise ConfigError(f"nothing to compare: name --strategies a,b,c or set strategies in {config}")
        several = [
            settings.model_copy(update={"strategy": name, "seed": settings.seed + seed})
            for name in dict.fromkeys(names)
            for seed in range(seeds)
        ]
        result = comparison.compare(several, out, quiet=as_json, jobs=jobs)
        _say({"runs": result.runs, "baselines": result.baselines}, as_json)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="what --out named")], as_json: AsJson = False) -> None:
    """Table and figure of the finished runs in a folder, computed from their records."""
    with _refusals():
        result = comparison.report(folder, quiet=as_json)
        _say({"runs": result.runs, "baselines": result.baselines}, as_json)


@app.command()
def compress(
    source: Annotated[Path | None, typer.Argument(metavar="[RUN|TOML]", help="a run to compress, or settings")] = None,
    method: Annotated[str, typer.Option(help="sp-sad, lth-sad, ss-sad, or magnitude")] = "sp-sad",
    keep: Annotated[float, typer.Option(help="share of the parameters that is left")] = 0.33,
    data: Annotated[str | None, typer.Option(help="a known data set, or a file; default: the source's, or ml-100k")] = None,
    rounds: Annotated[
        int, typer.Option(min=4, help="of the student's last training; the dense one's: half as many again")
    ] = 40,
    set_: Changes = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="where models are kept")] = Path("compressed"),
    as_json: AsJson = False,
) -> None:
    """Prune a recommender on this machine, taught by its dense self; start it again and it goes on where it stopped."""
    with _refusals():
        run = source if source is not None and source.is_dir() else None
        changes = [*([f"data={data}"] if data else []), *(set_ or [])]
        if run is None:
            settings = read(source, changes, compressing.DEFAULTS)
        else:
            settings = read(None, changes, RunRecord(run).settings())
        console = Console(stderr=True)
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(),
            console=console, disable=as_json and not console.is_terminal,
        ) as progress:  # fmt: skip
            tasks: dict[str, TaskID] = {}

            def watch(name: str, number: int, of: int) -> None:
                if name not in tasks or number == 1:
                    tasks[name] = progress.add_task(name, total=of)
                progress.update(tasks[name], completed=number)

            recipe = compressing.Recipe(dense=rounds * 3 // 2, rounds=rounds)
            result = compressing.compress(settings, method, keep, out, run=run, recipe=recipe, watch=watch)
        _say(result, as_json)
        if not as_json:
            _beside({"dense": result["dense"], method: result["pruned"]})
            print(f"Written: {result['file']}")


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder, with run.json and model.safetensors")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="where compact.safetensors and export.json go")],
    width: Annotated[
        float, typer.Option("--width", metavar="RATE", help="the rate whose submodel it is; 1: the full width")
    ] = 1.0,
    client: Annotated[int | None, typer.Option(help="whose masks, where every client has its own")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="compact.onnx too; needs the extra onnx")] = False,
    as_json: AsJson = False,
) -> None:
    """A run's best model without what widths and masks take away; says what it and the dense one cost."""
    with _refusals():
        result = export_run(run_folder, out, width=width, client=client, with_onnx=onnx)
        _say(result, as_json)
        if not as_json:
            _beside({"dense": result["dense"], "exported": result["exported"]})
            print(f"Written: {', '.join(result['files'])}")


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(metavar="strategies|recommenders|datasets|devices")], as_json: AsJson = False
) -> None:
    """What there is to choose from."""
    with _refusals():
        tables = {
            "strategies": (("name", "what it does"), [(n, _first_line(row)) for n, row in CATALOG.items()]),
            "recommenders": (
                ("name", "what it is"),
                [(n, _first_line(r)) for n, r in recommenders.RECOMMENDERS.items()],
            ),
            "datasets": (
                ("name", "domain", "users", "items", "rows", "terms"),
                [(d.name, d.domain, d.users, d.items, d.rows, d.terms) for d in datasets()],
            ),
            "devices": (
                ("name", "GFLOP/s", "Mbit/s down", "Mbit/s up", "W idle", "W training", "source"),
                [
                    (
                        d.name,
                        d.flops / 1e9,
                        d.bytes_down * 8e-6,
                        d.bytes_up * 8e-6,
                        d.watts_idle,
                        d.watts_training,
                        d.source,
                    )
                    for d in DEVICES.values()
                ]
                + [
                    (f"linear, {name}", "", "", "", "", "", f"{a:.0%} download, {b:.0%} training, {c:.0%} upload")
                    for name, (a, b, c) in CLASSES.items()
                ]
                + [("phones", "", "", "", "", "", "inverse CDFs of 500,000 phones' capacities")],
            ),
        }
        if what not in tables:
            raise ConfigError(unknown("list", what, tables))
        heads, rows = tables[what]
        if as_json:
            print(json.dumps([dict(zip(heads, row, strict=True)) for row in rows]))
            return
        table = Table(*heads, box=None)
        for row in rows:
            table.add_row(*(f"{v:,g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v) for v in row))
        Console().print(table)


@app.command()
def keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where they go; what is there stays")],
    host: Annotated[list[str] | None, typer.Option(help="name or address of the server; may be repeated")] = None,
    device: Annotated[list[str] | None, typer.Option(help="name of a device; may be repeated")] = None,
) -> None:
    """Certificates and keys for a deployment on real devices; see fedprune/flower/README.md."""
    with _refusals():
        try:
            from fedprune.flower.keys import write_keys
        except ImportError as error:
            raise ConfigError(f"{error.name} is not installed; pip install 'fedprune[flower]'") from None
        made = write_keys(folder, host or [], device or [])
        print(f"{made.ca}: to every device, and to who runs `flwr`")
        print(f"{made.server_certificate}, {made.server_key}: stay on the server ({', '.join(made.hosts)})")
        for name in device or []:
            print(f"{made.private(name)}: to {name} alone; {made.public(name)}: is registered with the SuperLink")


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


def _say(result: object, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))


class _refusals:
    """Turns refusals into one line and exit code 2, and Ctrl-C into a word on how to go on."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FedpruneError):
            print(f"fedprune: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        if isinstance(error, KeyboardInterrupt):
            print("fedprune: stopped; the same command goes on from the last checkpoint.", file=sys.stderr)
            raise typer.Exit(130) from None


def _beside(models: Mapping[str, Mapping[str, Any]]) -> None:
    """What models cost and are worth, side by side; what none of them has is left out."""
    table = Table("", *models, box=None)
    for name, key, text in (
        ("parameters", "parameters", ",.0f"),
        ("bytes on disk", "file_bytes", ",.0f"),
        ("FLOPs per recommendation, zeros skipped", "flops", ",.0f"),
        ("ms per 1,000 recommendations", "latency_ms", ",.1f"),
        ("kernel", "kernel", ""),
        ("J per 1,000 recommendations", "joules", ",.3f"),
        ("joules are", "joules_source", ""),
        ("NDCG@10, full ranking", "ndcg10_full", ".4f"),
        ("HR@10, full ranking", "hr10_full", ".4f"),
        ("NDCG@10, expected 1+99", "ndcg10_expected", ".4f"),
        ("MSE of ratings", "mse", ".4f"),
        ("MAE of ratings", "mae", ".4f"),
    ):
        values = [model.get(key) for model in models.values()]
        if all(value is not None for value in values):
            table.add_row(name, *(format(value, text) for value in values))
    Console().print(table)


if __name__ == "__main__":
    app()
