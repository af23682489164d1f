"""Other people's files as one table: text ids, numeric ratings and times, whatever the columns are called."""

from __future__ import annotations

import io
from pathlib import Path

import polars as pl

from fedprune.data.times import numbers_of
from fedprune.errors import DataError

NAMES = {
    "user": "user userid uid customer customerid visitor visitorid reviewer reviewerid member memberid account accountid",
    "item": "item itemid iid movie movieid product productid article articleid track trackid song songid artist "
    "artistid book bookid isbn parentasin asin business businessid game gameid news newsid poi poiid",
    "rating": "rating ratings stars score overall",
    "time": "timestamp time unixtimestamp unixreviewtime datetime date transactiondt transactiondate createdat eventtime",
}
"""What a column may be called, best name first; case, underscores, hyphens and RecBole's `:type` do not count."""
SUFFIXES = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".data": "\t", ".dat": "::", ".parquet": ""}
HEADERLESS = ("user_id", "item_id", "rating", "timestamp")
"""Columns of MovieLens' ratings.dat and u.data."""
NO_ID = ("", "nan", "NaN", "null", "NULL", "None")
"""Texts that other programs write for a missing id."""


def read_table(path: Path) -> pl.DataFrame:
    """Read a file of interactions, untouched but for the names of its columns.

    Args:
        path: `.csv` (comma, semicolon or tab), `.tsv`, `.inter` (RecBole atomic), `.parquet`, `.dat` (MovieLens, `::`)
            or `.data` (MovieLens, tabs); the last two have no header.

    Returns:
        One row per row of the file, in its order: `user` and `item` (text, null where missing) and, where the file has
        them, `rating` and `time` as the file writes them.

    Raises:
        DataError: no such file, a folder, an unknown kind of file, an unreadable or empty one, a column missing.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in SUFFIXES)[:5]
        raise DataError(f"{path} is a folder; give a file" + (f" in it: {', '.join(inside)}." if inside else "."))
    if not path.exists():
        raise DataError(f"there is no file {path}; give the path of a file, or the name of a known data set.")
    if suffix not in SUFFIXES:
        raise DataError(f'{path.name} ends in "{suffix}"; files that can be read end in {", ".join(SUFFIXES)}.')
    try:
        frame = pl.read_parquet(path) if suffix == ".parquet" else _read_text(path, suffix)
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError, pl.exceptions.PanicException) as error:
        if isinstance(error, pl.exceptions.NoDataError):
            raise DataError(f"{path} is empty; it needs a header and at least one row per interaction.") from error
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} cannot be read as {suffix[1:]} (UTF-8, one row per interaction): {first}") from error
    return _named(frame, path)


def clean(frame: pl.DataFrame, name: str) -> tuple[pl.DataFrame, list[str]]:
    """Drop the rows that say nothing, and turn ratings and times into numbers.

    Returns:
        `user`, `item` (text), `rating` (float64, where there is one), `time` (int64 or float64, where there is one),
        without nulls and in file order; and a sentence for each thing that was dropped or assumed.

    Raises:
        DataError: no row at all, or no time that can be understood.
    """
    if frame.is_empty():
        raise DataError(f"{name} has a header but no rows; it needs one row per interaction.")
    notes = []
    rows = frame.height
    frame = frame.with_columns(pl.col("user", "item").cast(pl.String).str.strip_chars())
    frame = frame.with_columns(
        pl.when(pl.col(column).is_in(NO_ID)).then(None).otherwise(pl.col(column)).alias(column) for column in ("user", "item")
    )
    if "rating" in frame.columns:
        rating = frame["rating"].cast(pl.Float64, strict=False)
        frame = frame.with_columns(rating.set(~rating.is_finite().fill_null(False), None).alias("rating"))
    if "time" in frame.columns:
        time, assumed = numbers_of(frame["time"], name)
        frame = frame.with_columns(time.alias("time"))
        notes += assumed
    else:
        notes.append("No timestamps: the order of the file is taken for the order of time.")
    for columns, missing in (
        (["user", "item"], "the user or item id is missing"),
        (["rating"], "the rating is missing or not a number"),
        (["time"], "the timestamp is missing or cannot be understood"),
    ):
        before = frame.height
        if set(columns) <= set(frame.columns):
            frame = frame.drop_nulls(columns)
        if dropped := before - frame.height:
            notes.append(f"{dropped:,} of {rows:,} rows dropped: {missing}.")
    return frame, notes


def _read_text(path: Path, suffix: str) -> pl.DataFrame:
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    separator = SUFFIXES[suffix]
    if separator == "::":  # polars separates by single bytes only
        content, separator = content.replace(b"::", b"\t"), "\t"
    headerless = suffix in (".dat", ".data")
    if not headerless:
        header = content.split(b"\n", 1)[0]
        counts = {mark: header.count(mark.encode()) for mark in (separator, ";", "\t", ",")}
        if not counts[separator]:  # spreadsheets of many countries write semicolons into a .csv
            separator = max(counts, key=lambda mark: counts[mark])
    # Quotes mean something in CSV only: a RecBole or MovieLens id may hold one.
    quote = '"' if suffix == ".csv" else None
    frame = pl.read_csv(
        io.BytesIO(content), separator=separator, has_header=not headerless, infer_schema=False, quote_char=quote
    )
    if headerless:
        if frame.width < 2:
            raise DataError(f"{path} has {frame.width} column; {suffix} files hold {', '.join(HEADERLESS)}.")
        return frame.select(pl.col(column).alias(name) for column, name in zip(frame.columns, HEADERLESS, strict=False))
    return frame


def _named(frame: pl.DataFrame, path: Path) -> pl.DataFrame:
    found: dict[str, str] = {}
    for column in reversed(frame.columns):  # of two equal names the first one wins
        found[column.split(":")[0].strip().lower().replace("_", "").replace("-", "").replace(" ", "")] = column
    chosen = {role: next((found[name] for name in names.split() if name in found), None) for role, names in NAMES.items()}
    if missing := [role for role in ("user", "item") if chosen[role] is None]:
        raise DataError(
            f"{path} has no column for the {' and the '.join(missing)}; it has "
            f"{', '.join(map(repr, frame.columns))} and needs user_id and item_id (customer_id, movie_id, product_id "
            "are understood; rating and timestamp are optional)."
        )
    frame = frame.select(pl.col(column).alias(role) for role, column in chosen.items() if column is not None)
    for role in ("user", "item"):
        kind = frame[role].dtype
        if kind.is_nested() or kind == pl.Binary:
            raise DataError(f"{path}: column {chosen[role]!r} holds {kind}; ids must be text or numbers.")
        if kind.is_float():  # another program turned integer ids into floats to make room for NaN
            ids = frame[role].fill_nan(None)
            whole = ids.cast(pl.Int64, strict=False)
            frame = frame.with_columns((whole if (whole == ids).fill_null(True).all() else ids).alias(role))
    return frame.with_columns(pl.col("user", "item").cast(pl.String))
