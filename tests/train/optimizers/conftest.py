"""One process that starts the ranks of all verifications."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardwise.launch import RankStarter
from shardwise.verify.sides import run_side


@pytest.fixture(scope="session")
def starter() -> Iterator[RankStarter]:
    preload = [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gpt2", "mixtral")]
    with RankStarter(preload=(run_side.__module__, *preload)) as starter:
        yield starter
