"""Several runs side by side: in parallel processes, with progress, a table and a figure at the end."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fedprune.baselines import baselines
from fedprune.config import Settings, validated
from fedprune.errors import RecordError
from fedprune.record import RunRecord, write
from fedprune.report import figure, tables
from fedprune.simulation import read_data, run


@dataclass(frozen=True)
class Comparison:
    """Summaries of runs, and test quality of the baselines that every table carries."""

    runs: list[dict[str, Any]]
    baselines: dict[str, dict[str, float]]


def compare(
    several: Sequence[Settings], out: Path, *, quiet: bool = False, jobs: int = 0, with_baselines: bool = True
) -> Comparison:
    """Run all of them (finished ones are read, broken-off ones go on), then write table and figure into `out`.

    Args:
        jobs: processes at a time; 0: one per core.
        quiet: nothing on standard output, progress on standard error only where that is a terminal.

    Raises:
        FedpruneError: as `simulation.run`; data and settings are checked before anything is started.
    """
    several = [settings.only(settings.strategy) for settings in several]
    split = read_data(several[0])
    console = Console(stderr=True)
    if not quiet:
        for note in split.train.notes:
            console.print(f"[dim]{several[0].data}: {note}[/dim]", highlight=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = min(jobs or cores, len(several))
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"), TimeElapsedColumn(),
        console=console, disable=quiet and not console.is_terminal,
    ) as progress:  # fmt: skip
        if jobs == 1:
            runs = [_watched(settings, out, progress, split) for settings in several]
        else:
            runs = _in_parallel(several, out, jobs, max(1, cores // jobs), progress)
    compared = baselines(split, rank=several[0].latent) if with_baselines else {}
    if with_baselines:
        write(out / "baselines.json", json.dumps(compared, indent=1))
    folders = [out / settings.identity() / f"seed{settings.seed}" for settings in several]
    return _published(runs, compared, [RunRecord(folder) for folder in folders], out, quiet)


def report(out: Path, *, quiet: bool = False) -> Comparison:
    """Table and figure again, from the finished runs in a folder.

    Raises:
        RecordError: no finished run there.
    """
    if not out.is_dir():
        raise RecordError(f"no folder {out}; `fedprune compare ... --out {out}` makes it")
    records = [RunRecord(path.parent) for path in sorted(out.glob("*/seed*/run.json"))]
    finished = [(record, summary) for record in records if (summary := record.finished) is not None]
    if not finished:
        raise RecordError(f"no finished run in {out} ({len(records)} begun); start them again and they go on")
    path = out / "baselines.json"
    compared = json.loads(path.read_text()) if path.exists() else {}
    return _published([s for _, s in finished], compared, [r for r, _ in finished], out, quiet)


def _published(
    runs: list[dict[str, Any]],
    compared: Mapping[str, Mapping[str, float]],
    records: list[RunRecord],
    out: Path,
    quiet: bool,
) -> Comparison:
    """Write the files, say where they are, and show the table."""
    folders = {(record.folder.parent.name, summary["seed"]): record for summary, record in zip(runs, records, strict=True)}
    groups = {name: [folders[run["identity"], run["seed"]] for run in own] for name, own in tables.grouped(runs).items()}
    write(out / "table.md", tables.markdown(runs, compared))
    tables.csv(runs, out / "runs.csv")
    figure.draw(groups, out / "figure.png")
    figure.draw(groups, out / "figure.svg")
    if not quiet:
        console = Console()
        if not console.is_terminal:
            console = Console(width=120)
        console.print(tables.terminal(runs, compared))
        console.print(f"[dim]Written: {out / 'table.md'}, {out / 'runs.csv'}, {out / 'figure.png'}, {out / 'figure.svg'}[/dim]")
    return Comparison(runs, {name: dict(quality) for name, quality in compared.items()})


def _label(settings: Settings) -> str:
    return f"{settings.strategy}, seed {settings.seed}"


def _share(settings: Settings, event: Mapping[str, Any]) -> float:
    by_rounds = (event["version"] + 1) / settings.rounds
    by_time = event["ended"] / settings.virtual_seconds if settings.virtual_seconds else 0.0
    return min(1.0, max(by_rounds, by_time))


def _status(event: Mapping[str, Any]) -> str:
    return f"round {event['version'] + 1}, {event['ended']:,.0f} virtual s"


def _watched(settings: Settings, out: Path, progress: Progress, split: Any) -> dict[str, Any]:
    task = progress.add_task(_label(settings), total=1.0, status="")
    summary = run(
        settings, out, split=split,
        watch=lambda event: progress.update(task, completed=_share(settings, event), status=_status(event)),
    )  # fmt: skip
    progress.update(task, completed=1.0, status=f"{summary['rounds']} rounds")
    return summary


def _in_parallel(several: Sequence[Settings], out: Path, jobs: int, threads: int, progress: Progress) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(jobs, mp_context=context) as pool:
        news = manager.dict()
        tasks = {_label(s): progress.add_task(_label(s), total=1.0, status="waiting") for s in several}
        # Those listed last (the narrow models, by custom) go through the most rounds: started first, they leave the short
        # ones to fill the gaps.
        futures = [pool.submit(_work, s.model_dump(), str(out), threads, news) for s in reversed(several)][::-1]
        try:
            pending: set[Future] = set(futures)
            while pending:
                done, pending = wait(pending, timeout=0.3)
                for future in done:
                    future.result()  # a failure ends the comparison at once
                for label, (completed, status) in dict(news).items():
                    progress.update(tasks[label], completed=completed, status=status)
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            for process in list(pool._processes.values()):
                process.terminate()
            raise


def _work(values: dict[str, Any], out: str, threads: int, news: Any) -> dict[str, Any]:
    torch.set_num_threads(threads)
    settings = validated(values)

    def watch(event: Mapping[str, Any]) -> None:
        if "evaluation" in event or event["version"] % 10 == 0:
            news[_label(settings)] = (_share(settings, event), _status(event))

    summary = run(settings, Path(out), watch=watch)
    news[_label(settings)] = (1.0, f"{summary['rounds']} rounds")
    return summary
