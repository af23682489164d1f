"""From a name or a path to interactions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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


def load_own(path: Path, catalogue: Sequence[str]) -> Interactions:
    """Read a device's own file, with items numbered as the catalogue lists them.

    Args:
        path: as in `load`; one user is enough.
        catalogue: ids of all items that the model knows. Rows of other items are left out, and `notes` says how many.

    Raises:
        DataError: whatever is wrong with the file, or nothing of it is in the catalogue.
    """
    frame, notes = clean(read_table(path), path.stem)
    known = frame.filter(pl.col("item").is_in(list(catalogue)))
    if strange := len(frame) - len(known):
        notes = [*notes, f"{strange:,} of {len(frame):,} rows dropped: their item is not in the catalogue."]
    if not len(known):
        raise DataError(f"{path}: none of its {len(frame):,} rows is about an item of the catalogue ({len(catalogue):,} items)")
    user, user_ids = _numbered(known["user"])
    number = {item: place for place, item in enumerate(catalogue)}
    there = arrange(
        path.stem,
        user,
        np.array([number[item] for item in known["item"]], np.int64),
        user_ids=user_ids,
        item_ids=list(catalogue),
        rating=known["rating"].to_numpy() if "rating" in known.columns else None,
        time=known["time"].to_numpy() if "time" in known.columns else None,
        notes=notes,
        least=1,
    )
    renumbered = np.array([number[item] for item in there.item_ids], np.int64)
    return replace(there, item=renumbered[there.item], item_ids=tuple(catalogue))


def _numbered(ids: pl.Series) -> tuple[IntArray, list[str]]:
    distinct = ids.unique().sort()
    if distinct.str.contains(r"^(0|[1-9][0-9]{0,17})$").all():
        distinct = distinct.cast(pl.Int64).sort().cast(pl.String)
    return ids.cast(pl.Enum(distinct)).to_physical().to_numpy().astype(np.int64), distinct.to_list()
