"""Starting ranks on this machine, and reading where another launcher has put this process.

It knows processes, sockets and the environment; it knows nothing of layouts, models or collectives.
"""

from __future__ import annotations

from shardwise.launch.context import RankContext, context_of_world, init_process_group
from shardwise.launch.environment import World, read_world
from shardwise.launch.pool import RankPool
from shardwise.launch.ranks import run_ranks
from shardwise.launch.starter import RankStarter

__all__ = [
    "RankContext",
    "RankPool",
    "RankStarter",
    "World",
    "context_of_world",
    "init_process_group",
    "read_world",
    "run_ranks",
]
