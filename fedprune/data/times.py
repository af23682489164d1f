"""Times as numbers that sort: seconds since 1970 for dates, the file's own numbers otherwise."""

from __future__ import annotations

import polars as pl

from fedprune.errors import DataError

FORMATS = (
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.f%#z",
    "%Y-%m-%d %H:%M:%S%.f%#z",
    "%Y-%m-%d %H:%M",
    "%Y-%m-%d",
    "%Y/%m/%d %H:%M:%S%.f",
    "%Y/%m/%d",
    "%m/%d/%Y %H:%M:%S%.f",
    "%m/%d/%Y %H:%M",
    "%m/%d/%Y",
    "%d/%m/%Y %H:%M:%S%.f",
    "%d/%m/%Y %H:%M",
    "%d/%m/%Y",
    "%d.%m.%Y %H:%M:%S",
    "%d.%m.%Y %H:%M",
    "%d.%m.%Y",
)
"""Tried in this order; the one that understands most rows is taken, the earlier one of two equals."""


def numbers_of(column: pl.Series, name: str) -> tuple[pl.Series, list[str]]:
    """Turn a column of times into numbers; what cannot be understood becomes null.

    Args:
        column: numbers, dates, or text of either kind.
        name: of the file, for the error.

    Returns:
        int64 or float64 of the same length, and a sentence for each assumption.

    Raises:
        DataError: there are texts, but not one is a number or a date.
    """
    if column.dtype.is_temporal():
        return _seconds(column.cast(pl.Datetime("us"))), []
    if column.dtype.is_integer():
        return column.cast(pl.Int64), []
    if column.dtype.is_float():
        return _finite(column.cast(pl.Float64)), []
    text = column.cast(pl.String).str.strip_chars()
    text = text.set(text.is_in(["", "nan", "NaN", "null", "NULL", "None"]), None)
    wanted = len(text) - text.null_count()
    whole = text.cast(pl.Int64, strict=False)
    if len(whole) - whole.null_count() == wanted:
        return whole, []  # integers stay integers: nanoseconds do not fit into a float64
    best, count, chosen = _finite(text.cast(pl.Float64, strict=False)), 0, ""
    count = len(best) - best.null_count()
    for pattern in FORMATS:
        if count == wanted:
            break
        parsed = _parse(text, pattern)
        understood = len(parsed) - parsed.null_count()
        if understood > count:
            best, count, chosen = parsed, understood, pattern
    if wanted and not count:
        example = text.drop_nulls()[0]
        raise DataError(
            f'{name}: "{example}" is no time that can be understood; write numbers (seconds since 1970) or dates such '
            "as 2024-01-31 or 2024-01-31T12:00:00, or leave the column out."
        )
    if not chosen.startswith("%m/%d"):
        return best, []
    other = _parse(text, chosen.replace("%m/%d", "%d/%m"))
    if len(other) - other.null_count() < count:
        return best, []
    return best, ["Dates are read as month/day/year; day/month/year would fit as well."]


def _parse(text: pl.Series, pattern: str) -> pl.Series:
    return _seconds(text.str.to_datetime(pattern, strict=False, time_unit="us"))


def _seconds(moments: pl.Series) -> pl.Series:
    return moments.dt.timestamp("us").cast(pl.Float64) / 1e6


def _finite(values: pl.Series) -> pl.Series:
    return values.set(~values.is_finite().fill_null(False), None)
