"""shardwise: model parallelism for any PyTorch model. It plans itself, proves itself, and explains itself.

The public names are loaded when they are first used, so importing shardwise costs nothing and does nothing.
This file knows in which module each public name lives, and nothing else. A new name is one line in the table
and one in the block for type checkers; a test compares the two.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardwise.describe.cluster import Cluster as Cluster
    from shardwise.errors import ShardwiseError as ShardwiseError
    from shardwise.generate.run import generate as generate
    from shardwise.layout import Layout as Layout
    from shardwise.parallel.expert.plan_experts import plan_experts as plan_experts
    from shardwise.parallel.tensor.collectives import TensorGroup as TensorGroup
    from shardwise.parallel.tensor.cross_entropy import vocab_parallel_cross_entropy as vocab_parallel_cross_entropy
    from shardwise.parallel.tensor.modules import ColumnParallelLinear as ColumnParallelLinear
    from shardwise.parallel.tensor.modules import RowParallelLinear as RowParallelLinear
    from shardwise.parallel.tensor.modules import VocabParallelEmbedding as VocabParallelEmbedding
    from shardwise.parallel.tensor.plan_tensor import plan_tensor as plan_tensor
    from shardwise.parallel.tensor.processes import ProcessTensorGroup as ProcessTensorGroup
    from shardwise.plan.search_profile import search as search
    from shardwise.trace.deferred import defer as defer
    from shardwise.trace.profile import trace as trace
    from shardwise.trace.timing import measure as measure
    from shardwise.train.export import export as export
    from shardwise.train.run import train as train
    from shardwise.verify import Comparison as Comparison
    from shardwise.verify import verify as verify

__version__ = "0.1.0.dev0"

PUBLIC_NAMES = MappingProxyType(
    {
        "Cluster": "shardwise.describe.cluster",
        "ColumnParallelLinear": "shardwise.parallel.tensor.modules",
        "Comparison": "shardwise.verify",
        "Layout": "shardwise.layout",
        "ProcessTensorGroup": "shardwise.parallel.tensor.processes",
        "RowParallelLinear": "shardwise.parallel.tensor.modules",
        "ShardwiseError": "shardwise.errors",
        "TensorGroup": "shardwise.parallel.tensor.collectives",
        "VocabParallelEmbedding": "shardwise.parallel.tensor.modules",
        "defer": "shardwise.trace.deferred",
        "export": "shardwise.train.export",
        "generate": "shardwise.generate.run",
        "measure": "shardwise.trace.timing",
        "plan_experts": "shardwise.parallel.expert.plan_experts",
        "plan_tensor": "shardwise.parallel.tensor.plan_tensor",
        "search": "shardwise.plan.search_profile",
        "trace": "shardwise.trace.profile",
        "train": "shardwise.train.run",
        "verify": "shardwise.verify",
        "vocab_parallel_cross_entropy": "shardwise.parallel.tensor.cross_entropy",
    }
)


def __getattr__(name: str) -> object:
    if name not in PUBLIC_NAMES:
        raise AttributeError(f"module 'shardwise' has no attribute {name!r}; it has {sorted(PUBLIC_NAMES)}")
    value: object = getattr(import_module(PUBLIC_NAMES[name]), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC_NAMES})


class _Package(ModuleType):
    """Keeps `shardwise.trace` the public function although the import of a package `shardwise.trace` would,
    as every import of a submodule does, set that attribute to the package."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in PUBLIC_NAMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
