"""The models of this benchmark as runs, and a folder of safetensors for each. Knows no processes and no memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from shardwise.checkpoint.header import TensorSpec
from shardwise.checkpoint.tensor_file import write_tensors
from shardwise.layout import Layout, StageRule
from shardwise.trace.deferred import Blueprint, defer
from shardwise.train.model import model_factory
from shardwise.train.run_file import Run

__all__ = ["QUICK", "TINY_LLAMA", "Shape", "save_model", "written_run"]

_Table = Mapping[str, str | int | float | bool]
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama and of its batch; a micro-batch is one sequence."""

    name: str
    hidden: int
    blocks: int
    heads: int
    kv_heads: int
    width: int  # of the SwiGLU
    vocabulary: int
    sequence: int
    micro_batches: int = 4
    stages: int = 4


TINY_LLAMA = Shape(
    name="1.1B", hidden=2048, blocks=22, heads=32, kv_heads=4, width=5632, vocabulary=32000, sequence=128
)
QUICK = Shape(name="63M", hidden=768, blocks=8, heads=12, kv_heads=4, width=2048, vocabulary=8192, sequence=128)


def written_run(
    shape: Shape, folder: Path, *, weights: Path | None = None, balance: StageRule = StageRule.PARAMETERS
) -> str:
    """One SGD step in float32 as a run file; initial values from `weights`, else from the model's initialisation.

    Stages are balanced by `balance`: parameters where memory is the question, "cost" is what a run does by itself.
    """
    model: _Table = {} if weights is None else {"path": str(weights)}
    config: _Table = {
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.width,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    task: _Table = {
        "kind": "random_tokens",
        "vocabulary_size": shape.vocabulary,
        "sequence_length": shape.sequence,
        "num_train": 2 * shape.micro_batches,
        "num_held_out": 0,
    }
    training: _Table = {
        "steps": 1,
        "global_batch": shape.micro_batches,
        "optimizer": "sgd",
        "learning_rate": 0.01,
        "clip": 1.0,
    }
    layout = Layout(pp=shape.stages, micro_batches=shape.micro_batches, schedule="1f1b", stages=balance)
    top: _Table = {"folder": str(folder), "layout": str(layout)}
    tables = {"model": model, "model.config": config, "task": task, "training": training}
    return _lines(top) + "".join(f"\n[{name}]\n{_lines(table)}" for name, table in tables.items())


def save_model(run: Run, folder: Path) -> None:
    """The initial values of the run as `folder`/model.safetensors, made and written one tensor at a time."""
    folder.mkdir(parents=True)
    blueprint = defer(model_factory(run.model), seed=run.training.seed)
    tensors = [
        (_spec(name, parameter), lambda name=name: _made(blueprint, name))
        for name, parameter in blueprint.module.named_parameters()
    ]
    write_tensors(folder / "model.safetensors", tensors, block_bytes=_BLOCK_BYTES)


def _spec(name: str, parameter: torch.Tensor) -> TensorSpec:
    assert parameter.dtype is torch.float32
    return TensorSpec(key=name, dtype="float32", shape=tuple(parameter.shape))


def _made(blueprint: Blueprint, name: str) -> torch.Tensor:
    return blueprint.materialize([name])[name]


def _lines(table: _Table) -> str:
    """The lines of a TOML table; a plain value is written there as in JSON."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in table.items())
