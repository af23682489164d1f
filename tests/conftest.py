"""One thread per test run: the tensors are tiny, and sums keep their order."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What starts real deployments takes minutes: left out, and said so, unless it is asked for."""
    if config.getoption("-m"):
        return
    for item in items:
        for marker in ("deploy", "ray"):
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"marked {marker}: `make test-deploy` runs it"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
