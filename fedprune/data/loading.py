"""From a name or a path to interactions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from fedprune.data.fetch import find, verify
from fedprune.data.interactions import Interactions, arrange
from fedprune.data.sources import datasets
from fedprune.data.table import clean, read_table
from fedprune.errors import DataError, unknown
from fedprune.types import IntArray


def load(source: str | Path, *, min_interactions: int = 1) -> Interactions:
    """Read a data set: a known name, or a file of one's own.

    A known name wins over a file of that name; write `./ml-100k` for the file. Users and items are numbered in the
    order of their ids: as numbers if every id is one, else as text. Ids stay text, so leading zeros survive.

    Args:
        source: "ml-100k", "ta-feng", "ml-1m", "ml-25m", "ml-32m"; or the path of a .csv, .tsv, .parquet, .inter
            (RecBole atomic), .dat or .data (MovieLens) file with a user and an item per row, rating and time optional.
        min_interactions: k of the k-core: users and items with fewer rows are peeled off until none is left; 1 keeps
            all.

    Returns:
        Interactions whose `notes` say how many rows were dropped and why: a missing id, rating or timestamp; a pair the
        user already had; the k-core.

    Raises:
        DataError: whatever is wrong with the file, what it has, and what it needs.
    """
    known = {info.name: info for info in datasets()}
    if isinstance(source, str) and source in known:
        info = known[source]
        path = find(info)
        frame, name = read_table(path), info.name
        verify(info, frame, path)
    else:
        path = Path(source).expanduser()
        if isinstance(source, str) and not path.exists() and not path.suffix and path.name == source:
            raise DataError(unknown("data set", source, known) + " Or give the path of a file.")
        frame, name = read_table(path), path.stem
    frame, notes = clean(frame, name)
    user, user_ids = _numbered(frame["user"])
    item, item_ids = _numbered(frame["item"])
    return arrange(
        name,
        user,
        item,
        user_ids=user_ids,
        item_ids=item_ids,
        rating=frame["rating"].to_numpy() if "rating" in frame.columns else None,
        time=frame["time"].to_numpy() if "time" in frame.columns else None,
        notes=notes,
        min_interactions=min_interactions,
    )


def _numbered(ids: pl.Series) -> tuple[IntArray, list[str]]:
    distinct = ids.unique().sort()
    if distinct.str.contains(r"^(0|[1-9][0-9]{0,17})$").all():
        distinct = distinct.cast(pl.Int64).sort().cast(pl.String)
    return ids.cast(pl.Enum(distinct)).to_physical().to_numpy().astype(np.int64), distinct.to_list()
