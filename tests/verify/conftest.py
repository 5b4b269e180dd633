"""One process that starts the ranks of all verifications: it has imported torch and the models' modules once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shardwise.launch import RankPool, RankStarter
from shardwise.verify.sides import run_side

ARCHITECTURES = ("bert", "t5", "clip", "bart", "wav2vec2", "llama", "mixtral", "albert", "resnet")


@pytest.fixture(scope="session")
def starter() -> Iterator[RankStarter]:
    preload = [f"transformers.models.{name}.modeling_{name}" for name in ARCHITECTURES]
    with RankStarter(preload=(run_side.__module__, *preload)) as starter:
        yield starter


@pytest.fixture(scope="session")
def one(starter: RankStarter) -> Iterator[RankPool]:
    """A rank by itself."""
    with RankPool(1, starter=starter, num_threads=1) as pool:
        yield pool
