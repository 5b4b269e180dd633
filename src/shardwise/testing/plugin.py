"""pytest fixtures for `on_ranks`: `pytest_plugins = ["shardwise.testing.plugin"]` in the top `conftest.py`.

It is loaded in every session, so it imports torch only when the first test on ranks is set up.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest

from shardwise.testing.decorator import RunsTests

__all__ = ["pytest_configure", "rank_pools", "rank_preload"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ranks: runs on several ranks through shardwise.testing.on_ranks")


@pytest.fixture(scope="session")
def rank_preload() -> tuple[str, ...]:
    """Modules that all ranks find imported; override it in your `conftest.py` to name slow ones."""
    return ()


@pytest.fixture(scope="session")
def rank_pools(request: pytest.FixtureRequest, rank_preload: tuple[str, ...]) -> Iterator[RunsTests]:
    """The session's warm ranks."""
    filters = request.config.getini("filterwarnings")
    pools = import_module("shardwise.testing.pools").RankPools(preload=rank_preload, warning_filters=filters)
    try:
        yield pools
    finally:
        pools.close()
