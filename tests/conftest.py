"""Fixtures of the whole suite: warm ranks, and a check that no test leaves a thread or a variable behind."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from shardwise.testing import left_behind, observe

pytest_plugins = ["shardwise.testing.plugin"]

# set by pytest itself for each test, and by libraries once, when they are first imported
# torch._dynamo sets the last one when a fake tensor mode is first used
NOT_OURS = frozenset({"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"})


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in NOT_OURS}


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    before = observe(environment())
    yield
    leaks = left_behind(before, observe(environment()))
    assert leaks == []
