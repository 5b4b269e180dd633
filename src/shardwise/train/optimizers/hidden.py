"""Which parameters are hidden matrices: weights of two dims and more, but for embeddings, heads and tables.

Muon is for these (Jordan et al. 2024): what maps tokens to vectors and back is no map between hidden vectors. Knows a
laid-out model; gives the same names on every rank of any layout.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn as nn

from shardwise.execute.program import Program
from shardwise.parallel.tensor.modules import VocabParallelEmbedding
from shardwise.parallel.tensor.slices import whole_shape

__all__ = ["global_shape", "hidden_matrices"]


def hidden_matrices(program: Program) -> frozenset[str]:
    """Names of parameters on this rank: matrices, stacks of matrices (experts), convolutions.

    The head is what the last unit with parameters holds, where it is a single layer.
    """
    names = {id(parameter): name for name, parameter in program.model.named_parameters()}
    left_out = {
        names[id(parameter)]
        for module in program.model.modules()
        if isinstance(module, nn.Embedding | VocabParallelEmbedding)
        for parameter in module.parameters(recurse=False)
    }
    left_out |= _head(program, names)
    here = program.parameters
    return frozenset(
        name
        for name, parameter in here.items()
        if name not in left_out and _is_matrix(global_shape(program, name, tuple(parameter.shape)))
    )


def global_shape(program: Program, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter on one device, of which this rank has `shape`."""
    part, experts = program.part_of(name), program.experts_of(name)
    if part is not None:
        shape = whole_shape(shape, part, program.place.shard)
    if experts is not None:
        shape = whole_shape(shape, experts, program.place.expert)
    return shape


def _is_matrix(shape: tuple[int, ...]) -> bool:
    """At least two rows and columns; of three dims a stack of several."""
    if len(shape) == 3:
        return min(shape) > 1
    return len(shape) >= 2 and shape[0] > 1


def _head(program: Program, names: Mapping[int, str]) -> set[str]:
    for node in reversed(program.tape.flow.calls):
        module = program.model.get_submodule(node.name)
        held = list(module.parameters())
        if held:
            return {names[id(parameter)] for parameter in held} if not any(module.children()) else set()
    return set()
