"""Every error that shardwise raises on purpose. Each message gives the rule, the numbers and the repair.

ShardwiseError
├── ConfigError         a run file, an option or an argument is wrong
├── LayoutError         a layout breaks a rule
├── ScheduleError       a schedule is incomplete, out of order or deadlocks
├── ModelError          a model cannot be traced or split as asked; the unit is named
├── BatchError          a batch cannot be split into micro-batches without being told how
├── DataflowError       a recorded dataflow is contradicted while running; unit and edge are named
├── CheckpointError     a checkpoint is missing, damaged or does not fit the model
├── TransferError       what arrived is not what the edge promised, or a peer is gone
└── LaunchError         ranks could not be started, or one of them died
"""

from __future__ import annotations

__all__ = [
    "BatchError",
    "CheckpointError",
    "ConfigError",
    "DataflowError",
    "LaunchError",
    "LayoutError",
    "ModelError",
    "ScheduleError",
    "ShardwiseError",
    "TransferError",
]


class ShardwiseError(Exception):
    """Base of every error raised on purpose; the command line prints these without a traceback."""


class ConfigError(ShardwiseError):
    """A run file, an option or an argument is wrong."""


class LayoutError(ShardwiseError):
    """A layout breaks a rule."""


class ScheduleError(ShardwiseError):
    """A schedule is incomplete, out of order or deadlocks."""


class ModelError(ShardwiseError):
    """A model cannot be traced or split as asked; the message names the unit."""


class BatchError(ShardwiseError):
    """A batch cannot be split into micro-batches without being told how."""


class DataflowError(ShardwiseError):
    """A recorded dataflow is contradicted while running; the message names unit and edge."""


class CheckpointError(ShardwiseError):
    """A checkpoint is missing, damaged or does not fit the model."""


class TransferError(ShardwiseError):
    """What arrived is not what the edge promised, or a peer is gone."""


class LaunchError(ShardwiseError):
    """Ranks could not be started, or one of them died."""
