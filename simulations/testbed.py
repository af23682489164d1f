"""Four truly unequal devices on this machine: own network, own bandwidth, own share of a CPU; FedAvg against AdaptCL.

    sudo .venv/bin/python simulations/testbed.py                       # about 25 minutes; writes tables/testbed.md
    sudo .venv/bin/python simulations/testbed.py --rounds 3 --json     # a look; one JSON object on standard output

A SuperLink with TLS and SuperNode authentication, and four registered SuperNodes, each in a network namespace behind a token
bucket and inside a CPU quota (`lab.py`). All seconds are measured: by the devices (loading, training), by their SuperNodes
(download, upload), by the server (rounds). Everything is taken down at the end, and on Ctrl-C; run folders stay in --out, and
the same command goes on from them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer
from lab import Limits, lab, missing

from fedprune.config import read
from fedprune.errors import ConfigError, FedpruneError, FleetError
from fedprune.flower.keys import write_keys
from fedprune.flower.staging import Scene, SuperLink, stage

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "testbed.toml"
ROUNDS = 8
DEVICES = {
    "fast": Limits(cpus=0.8, download=40e6, upload=40e6),
    "good": Limits(cpus=0.4, download=20e6, upload=10e6),
    "fair": Limits(cpus=0.25, download=8e6, upload=4e6),
    "slow": Limits(cpus=0.15, download=2e6, upload=1e6),
}
ENVIRONMENT = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "1"}  # Flower's default; looking more often takes a slow device's time


def main(
    strategies: Annotated[str, typer.Option(help="run one after another, on the same devices")] = "fedavg,adaptcl",
    rounds: Annotated[int, typer.Option(min=2)] = ROUNDS,
    out: Annotated[Path, typer.Option(help="run folders, logs")] = Path("results/testbed"),
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, and no table is written")] = False,
) -> None:
    """Stage the devices, run the strategies, compare their measured times."""
    if lacking := missing():
        print("testbed: cannot run here: " + " ".join(lacking), file=sys.stderr)
        raise typer.Exit(2)
    try:
        changes = {"rounds": rounds} | dict(split(change) for change in set_ or [])
        run_all(strategies, changes, out.resolve(), quiet=as_json)
    except FedpruneError as error:
        print(f"testbed: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    settings = read(CONFIG, [f"{key}={value}" for key, value in changes.items()])
    names = [name.strip() for name in strategies.split(",")]
    result = compared({name: out / "runs" / settings.only(name).identity() / "seed0" for name in names})
    if as_json:
        print(json.dumps(result))
        return
    text = markdown(result)
    if (names, rounds, set_) == (["fedavg", "adaptcl"], ROUNDS, None):
        (HERE / "tables" / "testbed.md").write_text(text)
    print(text)


def split(change: str) -> tuple[str, str]:
    """`key=value`."""
    key, equals, value = change.partition("=")
    if not equals:
        raise ConfigError(f'--set {change}: write it as key=value, as in "epochs=4"')
    return key, value


def run_all(strategies: str, changes: dict[str, Any], out: Path, quiet: bool) -> None:
    """One deployment, the strategies one after another in it."""
    keys = write_keys(out / "keys", ["10.73.0.1"], list(DEVICES))
    with tempfile.TemporaryDirectory(prefix="testbed-") as scratch, lab(DEVICES) as place, stage(Path(scratch)) as scene:
        link = scene.superlink(host=place.server.address, prefix=place.server.prefix, keys=keys, auth=True)
        for number, name in enumerate(DEVICES):
            link.register(keys.public(name))
            scene.supernode(
                link, name, {"partition-id": number, "state": str(out / "devices")}, key=keys.private(name),
                prefix=place.devices[name].prefix, script="fedprune-supernode", environment=ENVIRONMENT,
            )  # fmt: skip
        link.wait_online(len(DEVICES), 120)
        config = {
            "config": str(CONFIG), "strategies": strategies, "out": str(out / "runs"),
            "set": " ".join(f"{key}={value}" for key, value in changes.items()),
        }  # fmt: skip
        followed(scene, link, config, out, quiet)


def followed(scene: Scene, link: SuperLink, config: dict[str, Any], out: Path, quiet: bool) -> None:
    """Run, and say what the server says about its rounds."""
    run = link.run(HERE.parent, config)
    said = 0
    while run.running:
        time.sleep(1.0)
        lines = run.printed().splitlines()
        for line in lines[said:]:
            if not quiet and (": round " in line or "fedprune:" in line):
                print(line[:160], flush=True)
        said = len(lines)
    out.mkdir(parents=True, exist_ok=True)
    (out / "server.log").write_text(run.printed())
    for staged in scene.started:
        (out / f"{staged.name}.log").write_text(staged.printed())
    if '"strategy": "' + config["strategies"].split(",")[-1] + '"' not in run.printed():
        why = [line for line in run.printed().splitlines() if "Error: " in line] or ["no reason is in the log"]
        raise FleetError(f"the run failed: {why[-1]}; see {out / 'server.log'}")


def compared(folders: dict[str, Path]) -> dict[str, Any]:
    """Measured times and quality of finished runs: of the last three rounds, where the learner has aligned."""
    strategies = list(folders)
    names, result = list(DEVICES), {"update_seconds": {}, "first_update_seconds": {}, "parts": {}, "sum_of_rounds": {}}
    result |= {"rates": {}, "quality": {}, "spread_before": None, "spread_after": {}, "furthest_from_fastest": {}}
    for strategy in strategies:
        folder = folders[strategy]
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        rounds = [event for event in events if event["version"] >= 0]
        ledger = pl.concat([pl.read_parquet(part) for part in sorted((folder / "ledger").glob("*.parquet"))])
        ledger = ledger.filter(~pl.col("discarded")).with_columns(
            seconds=pl.sum_horizontal(f"seconds_{part}" for part in ("download", "loading", "training", "teacher", "upload"))
        )
        last = ledger.filter(pl.col("version") >= len(rounds) - 3)
        first = ledger.filter(pl.col("version") == 0)
        per_device = last.group_by("client").agg(
            pl.col("seconds").median(), pl.col("rate").last(), pl.col("^seconds_.*$").median()
        )
        rows = {row["client"]: row for row in per_device.to_dicts()}
        result["update_seconds"][strategy] = {names[c]: rows[c]["seconds"] for c in sorted(rows)}
        result["first_update_seconds"][strategy] = {names[r["client"]]: r["seconds"] for r in first.sort("client").to_dicts()}
        result["parts"][strategy] = {
            names[c]: {k.removeprefix("seconds_"): v for k, v in rows[c].items() if k.startswith("seconds_")}
            for c in sorted(rows)
        }
        result["rates"][strategy] = {names[c]: rows[c]["rate"] for c in sorted(rows)}
        result["sum_of_rounds"][strategy] = sum(event["ended"] - event["began"] for event in rounds)
        seconds = list(result["update_seconds"][strategy].values())
        result["spread_after"][strategy] = max(seconds) / min(seconds)
        fast = seconds[0]  # the fastest device, which keeps the whole model and sets the target
        result["furthest_from_fastest"][strategy] = max(abs(own / fast - 1) for own in seconds)
        summary = json.loads((folder / "summary.json").read_text())
        result["quality"][strategy] = {
            key: summary[key] for key in ("ndcg10_full", "ndcg10_expected", "hr10_full", "best_round")
        }
        result["rounds"] = len(rounds)
    if "fedavg" in strategies:
        before = list(result["first_update_seconds"]["fedavg"].values())
        result["spread_before"] = max(before) / min(before)
        base = result["sum_of_rounds"]["fedavg"]
        result["speedup"] = {name: base / seconds for name, seconds in result["sum_of_rounds"].items()}
    return result


def markdown(result: dict[str, Any]) -> str:
    """The table that is committed."""
    lines = [
        "# Testbed: four real devices of unequal speed on one machine", "",
        "Written by `simulations/testbed.py`. Every figure is measured. Devices: "
        + "; ".join(f"{n}: {d.cpus:g} CPU, {d.download / 1e6:g}/{d.upload / 1e6:g} Mbit/s" for n, d in DEVICES.items()) + ".",
        f"{result['rounds']} rounds each; update seconds are medians of the last three.", "",
        "| strategy | device | rate | update, s | loading | training | download | upload | first update, s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for strategy, devices in result["update_seconds"].items():
        for name, seconds in devices.items():
            part = result["parts"][strategy][name]
            lines.append(
                f"| {strategy} | {name} | {result['rates'][strategy][name]:.3f} | {seconds:.1f} | {part['loading']:.1f} | "
                f"{part['training']:.1f} | {part['download']:.1f} | {part['upload']:.1f} | "
                f"{result['first_update_seconds'][strategy][name]:.1f} |"
            )
    lines += [
        "",
        "| strategy | slowest / fastest update | from the fastest device | sum of rounds, s | speed-up | NDCG@10 | 1+99 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for strategy, seconds in result["sum_of_rounds"].items():
        quality, speedup = result["quality"][strategy], "–"
        if "speedup" in result:
            speedup = f"{result['speedup'][strategy]:.2f}"
        spread, away = result["spread_after"][strategy], result["furthest_from_fastest"][strategy]
        lines.append(
            f"| {strategy} | {spread:.2f} | {away:.0%} | {seconds:.0f} | {speedup} | "
            f"{quality['ndcg10_full']:.4f} | {quality['ndcg10_expected']:.4f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
