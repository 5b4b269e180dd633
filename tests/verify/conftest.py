"""A rank by itself, for all verifications."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardwise.launch import RankPool, RankStarter


@pytest.fixture(scope="session")
def one(starter: RankStarter) -> Iterator[RankPool]:
    """A rank by itself."""
    with RankPool(1, starter=starter, num_threads=1) as pool:
        yield pool
