"""Starting ranks on this machine, and reading where another launcher has put this process.

It knows processes, sockets and the environment; it knows nothing of layouts, models or collectives. Names are loaded
when they are first used: whoever only asks where it was started does without torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwise.launch.context import RankContext as RankContext
    from shardwise.launch.context import context_of_world as context_of_world
    from shardwise.launch.context import init_process_group as init_process_group
    from shardwise.launch.environment import World as World
    from shardwise.launch.environment import read_world as read_world
    from shardwise.launch.launched import LaunchedRanks as LaunchedRanks
    from shardwise.launch.pool import RankPool as RankPool
    from shardwise.launch.ranks import run_ranks as run_ranks
    from shardwise.launch.starter import RankStarter as RankStarter

__all__ = [
    "LaunchedRanks",
    "RankContext",
    "RankPool",
    "RankStarter",
    "World",
    "context_of_world",
    "init_process_group",
    "read_world",
    "run_ranks",
]

_MODULES = MappingProxyType(
    {
        "LaunchedRanks": "launched",
        "RankContext": "context",
        "RankPool": "pool",
        "RankStarter": "starter",
        "World": "environment",
        "context_of_world": "context",
        "init_process_group": "context",
        "read_world": "environment",
        "run_ranks": "ranks",
    }
)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    setattr(sys.modules[__name__], name, value)
    return value
