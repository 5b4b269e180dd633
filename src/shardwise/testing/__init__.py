"""What shardwise's own tests use, for yours too: tests on several ranks in tens of milliseconds.

Load the fixtures with `pytest_plugins = ["shardwise.testing.plugin"]` in your top `conftest.py`. Importing
this package does not import torch, so that tests which need no ranks stay quick.
"""

from __future__ import annotations

from shardwise.testing.decorator import on_ranks
from shardwise.testing.leaks import Observation, left_behind, observe

__all__ = ["Observation", "left_behind", "observe", "on_ranks"]
