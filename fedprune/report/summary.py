"""A run in one table row, computed from its events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedprune.errors import RecordError
from fedprune.exchange import PARTS

QUALITY = ("hr10_full", "ndcg10_full", "hr10_expected", "ndcg10_expected")


SAME_TICKET = 1e-6
"""Shares of entries that differ by less are one ticket."""


def ticket_of(event: Mapping[str, Any]) -> float:
    """The share of the entries that a ticket has left by this round; 1.0 without one. Only equal shares are comparable."""
    return event.get("entries", {}).get("ticket", 1.0)


def summarise(
    events: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], unequal: Mapping[str, float | None] | None = None
) -> dict[str, Any]:
    """What a run came to.

    Test quality is read at the round that validation chose (best NDCG@10 in the exact 1+99 protocol), among those with the
    final ticket where a mask shrinks on the way. Times, energy and
    bytes are totals over the whole run, the warm start included; `seconds_to_target` is when an evaluation first met it.

    Args:
        unequal: how unequal clients were before and after (`experiment.spread`, `experiment.settled`).

    Returns:
        The keys of the README's table of summary keys; None where a figure does not exist (no target, unknown joules).
    """
    rounds = [event for event in events if event["version"] >= 0]
    evaluated = [event for event in events if "evaluation" in event]
    if not evaluated:
        raise RecordError("the run was never evaluated: no device could be asked; start it again when some are there")
    final = min(ticket_of(event) for event in evaluated)
    comparable = [event for event in evaluated if ticket_of(event) <= final + SAME_TICKET]
    best = max(comparable, key=lambda e: e["evaluation"]["validation"]["ndcg10_expected"])
    test = best["evaluation"]["test"]
    target = settings.get("target")
    reached = [e for e in comparable if target is not None and e["evaluation"]["validation"]["ndcg10_expected"] >= target]
    seconds = {part: sum(e["seconds"].get(part, 0.0) for e in events) for part in (*PARTS, "waiting")}
    reports = sum(e["reports"] for e in rounds)
    known = all(e["joules"] is not None and None not in e["joules"].values() for e in events)
    total = sum(seconds.values())
    return {
        "strategy": settings["strategy"],
        "seed": settings["seed"],
        "rounds": len(rounds),
        "virtual_seconds": events[-1]["ended"],
        "warm_start_seconds": events[0]["ended"] if events[0]["version"] < 0 else 0.0,
        "joules": sum(sum(e["joules"].values()) for e in events) if known else None,
        "bytes_down": sum(e["bytes_down"] for e in events),
        "bytes_up": sum(e["bytes_up"] for e in events),
        "flops": sum(e["flops"] for e in events),
        "reports": reports,
        "lost": sum(e["lost"] for e in rounds),
        "waiting_share": seconds["waiting"] / total if total else 0.0,
        "mean_rate": sum(e["mean_rate"] * e["reports"] for e in rounds if e["reports"]) / reports if reports else None,
        "mean_round_seconds": (rounds[-1]["ended"] - rounds[0]["began"]) / len(rounds) if rounds else None,
        "kept_entries": best.get("entries", {}).get("kept"),
        "best_round": best["version"] + 1,
        "seconds_to_best": best["ended"],
        "target": target,
        "seconds_to_target": reached[0]["ended"] if reached else None,
        "validation_ndcg10_expected": best["evaluation"]["validation"]["ndcg10_expected"],
        **{key: test.get(key) for key in QUALITY},
        **{f"{key}_slow": test.get(f"{key}_slow") for key in QUALITY},
        **{f"{key}_limited": test.get(f"{key}_limited") for key in QUALITY},
        **{f"{key}_global": test.get(f"{key}_global") for key in QUALITY},
        **{f"{key}_draw": test.get(f"{key}_draw") for key in ("hr10", "ndcg10")},
        **(unequal or {}),
        "source": "modelled" if all(e["source"] == "modelled" for e in rounds) else "measured",
    }
