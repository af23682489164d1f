"""Devices that bring their own data: found by the catalogue, or named in the error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from files import interactions
from flwr.app import Context, Error, Message, RecordDict
from test_deployment import Lab, a_known_speed, settings

from fedprune.errors import FleetError
from fedprune.flower import client_app

__all__ = ["a_known_speed"]


def own_files(folder: Path) -> dict[int, dict[str, Any]]:
    """The same interactions, cut by user: 14 users, one user, and the others, who also know what the catalogue does not."""
    lines = interactions(folder).read_text().splitlines()[1:]
    cut: list[list[str]] = [[], [], ["u29,strange,5", "u28,stranger,6"]]
    for line in lines:
        number = int(line.split(",")[0][1:])
        cut[0 if number < 14 else 1 if number == 14 else 2].append(line)
    for client, part in enumerate(cut):
        (folder / f"own{client}.csv").write_text("\n".join(["user,item,timestamp", *part]) + "\n")
    items = sorted({line.split(",")[1] for line in lines})
    (folder / "items.txt").write_text("\n".join(items) + "\n")
    return {client: {"data": str(folder / f"own{client}.csv")} for client in range(3)}


@pytest.mark.parametrize("strategy", ["fedavg", "heterofl"])
def test_devices_bring_their_own_files(tmp_path: Path, strategy: str):
    lab = Lab(tmp_path, own_files(tmp_path), clients=3)
    chosen = settings(tmp_path, "silos=3", f'catalogue="{tmp_path / "items.txt"}"', f"strategy={strategy}")
    summary = lab.run(chosen.model_copy(update={"data": "nowhere"}))
    assert summary["rounds"] == 4 and summary["reports"] == 12 and summary["lost"] == 0
    (begin, *_, last) = [event for event in lab.events() if "evaluation" in event]
    assert begin["evaluation"]["test"]["users"] == last["evaluation"]["test"]["users"] == 30
    assert len(lab.rows(1)["after.values/user_embedding"]) == 1


def test_a_missing_file_is_named(tmp_path: Path):
    config = own_files(tmp_path)
    config[2]["data"] = str(tmp_path / "not-here.csv")
    lab = Lab(tmp_path, config, clients=3)
    with pytest.raises(FleetError, match=r"2 of 3 clients are there .* missing: \[2\]; node 102: .*not-here\.csv"):
        lab.run(settings(tmp_path, "silos=3", f'catalogue="{tmp_path / "items.txt"}"'))


def test_a_file_without_an_item_of_the_catalogue_is_named(tmp_path: Path):
    config = own_files(tmp_path)
    (tmp_path / "own1.csv").write_text("user,item\nu1,strange\n")
    lab = Lab(tmp_path, config, clients=3)
    with pytest.raises(FleetError, match=r"node 101: .*own1\.csv: none of its 1 rows"):
        lab.run(settings(tmp_path, "silos=3", f'catalogue="{tmp_path / "items.txt"}"'))


def test_a_node_without_partition_id_is_told_how_to_start(tmp_path: Path):
    lab = Lab(tmp_path)
    original = lab.answer

    def bare(node: int, message: Message) -> RecordDict | Error:
        if node != 103:
            return original(node, message)
        try:
            return client_app.app(message, Context(7, node, {"state": str(tmp_path)}, RecordDict(), {})).content
        except FleetError as error:
            return Error(2, str(error))

    lab.answer = bare  # type: ignore[method-assign]
    with pytest.raises(FleetError, match=r"missing: \[3\]; node 103: .*partition-id is None; start the SuperNode"):
        lab.run(settings(tmp_path))
