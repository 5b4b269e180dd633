"""Fixtures of the whole suite: warm ranks, and a check that no test leaves a thread or a variable behind.

All ranks are forked from one process, which has imported what most of them need: a rank by itself takes seconds to
import torch's compiler and the models of transformers, and there are dozens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from shardwise.testing import left_behind, observe
from shardwise.testing.decorator import RunsTests

if TYPE_CHECKING:
    from shardwise.launch import RankStarter  # which imports torch

pytest_plugins = ["shardwise.testing.plugin", "tests.side_by_side"]

# set by pytest itself for each test, and by libraries once, when they are first imported
# torch._dynamo sets the last one when a fake tensor mode is first used
# scikit-learn, which seqeval imports, sets the KMP ones
NOT_OURS = frozenset({"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"})


ARCHITECTURES = ("bert", "t5", "clip", "bart", "wav2vec2", "llama", "mixtral", "albert", "resnet", "gpt2")


@pytest.fixture(scope="session")
def rank_preload() -> tuple[str, ...]:
    models = [f"transformers.models.{name}.modeling_{name}" for name in ARCHITECTURES]
    return ("torch._dynamo", "shardwise.train.run", "shardwise.verify.sides", *models)


@pytest.fixture(scope="session")
def starter(rank_pools: RunsTests) -> RankStarter:
    """For ranks that a test starts itself."""
    return rank_pools.starter


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in NOT_OURS}


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    before = observe(environment())
    yield
    leaks = left_behind(before, observe(environment()))
    assert leaks == []
