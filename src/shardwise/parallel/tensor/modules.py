"""Parallel layers for models that are written with them: X·[W1 W2], X1·W1 + X2·W2, and a table divided by rows.

                       weight of rank t      input            output
    ColumnParallel     rows W_t              whole            its columns, or all of them (gather_output)
    RowParallel        columns W_t           its columns      whole: one all-reduce
    VocabParallel      rows of the table     whole ids        whole: one all-reduce

Initial values are those of the torch layer, drawn whole and then cut: equal on any number of ranks that draw from the
same generator. Knows a group of ranks; refuses to know plans, meshes and how the ranks came to be.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from shardwise.describe.tensor import Slice
from shardwise.errors import DataflowError, LayoutError
from shardwise.parallel.tensor.collectives import TensorGroup, copy_to, gather_from, reduce_from, scatter_to
from shardwise.parallel.tensor.lookup import joined, local_ids, range_of
from shardwise.parallel.tensor.slices import cut, spread

__all__ = ["ColumnParallelLinear", "RowParallelLinear", "VocabParallelEmbedding"]


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + b, of which every rank computes its columns.  x (..., in_features), y (..., local) or (..., out).

    x is the same on every rank; its gradient is summed over them. `part` says which outputs are whose, along dim 0 of
    the weight: by default one run for each rank, sizes that differ by one at most. Packed projections have a run of
    each part. With `gather_output` every rank gets all columns, otherwise its own. Raises `LayoutError` where `part`
    is of another size or number of ranks, or there are fewer outputs than ranks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: TensorGroup,
        bias: bool = True,
        gather_output: bool = False,
        part: Slice | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.part = _part(part, 0, out_features, group)
        self.group = group
        self.gather_output = gather_output
        self.in_features, self.out_features = in_features, out_features
        whole = _linear_values(in_features, out_features, bias, generator, device, dtype)
        self.weight = nn.Parameter(cut(whole[0], self.part, group.rank))  # (local, in_features)
        self.bias = None if whole[1] is None else nn.Parameter(cut(whole[1], self.part, group.rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.product(copy_to(x, self.group), self.bias)
        return gather_from(y, _last(self.part), self.group) if self.gather_output else y

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """What this rank computes by itself."""
        return F.linear(x, self.weight, bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, shard {self.group.rank} of {self.group.size}"


class RowParallelLinear(nn.Module):
    """y = Σ_t x_t W_tᵀ + b over the ranks t; the bias is added once.  x (..., local) or (..., in), y (..., out).

    With `input_is_divided` x holds this rank's columns, as `ColumnParallelLinear` makes them; otherwise x is whole
    and cut here. `part` says which inputs are whose, along dim 1 of the weight: that of the columns before. Raises
    `LayoutError` as `ColumnParallelLinear` does, and `DataflowError` for an input of another width.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: TensorGroup,
        bias: bool = True,
        input_is_divided: bool = True,
        part: Slice | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.part = _part(part, 1, in_features, group)
        self.group = group
        self.input_is_divided = input_is_divided
        self.in_features, self.out_features = in_features, out_features
        whole = _linear_values(in_features, out_features, bias, generator, device, dtype)
        self.weight = nn.Parameter(cut(whole[0], self.part, group.rank))  # (out_features, local)
        self.bias = None if whole[1] is None else nn.Parameter(whole[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = self.weight.shape[1] if self.input_is_divided else self.in_features
        if x.shape[-1] != width:
            given = "its own columns of the input" if self.input_is_divided else "the whole input"
            raise DataflowError(
                f"rank {self.group.rank} of {self.group.size} is given {given}, {width} of {self.in_features} "
                f"features, but these are {x.shape[-1]}; say input_is_divided={not self.input_is_divided}, or give "
                "both layers one `part`"
            )
        if not self.input_is_divided:
            x = scatter_to(x, _last(self.part), self.group)
        y = reduce_from(self.product(x), self.group)
        return y if self.bias is None else y + self.bias

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """What this rank computes by itself."""
        return F.linear(x, self.weight, bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, shard {self.group.rank} of {self.group.size}"


class VocabParallelEmbedding(nn.Module):
    """Rows of a table at ids, of which every rank holds some.  ids (...), integers; answer (..., embedding_dim).

    Any number of ids may be divided, odd ones too; nothing is padded. The row `padding_idx` starts at zero and gets no
    gradient. Ids outside of the table raise `IndexError` (on CPUs), as in `nn.Embedding`. Raises `LayoutError` where
    there are fewer ids than ranks.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        group: TensorGroup,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.part = _part(None, 0, num_embeddings, group, "ids")
        self.group = group
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else _id_of(padding_idx, num_embeddings)
        start, stop = range_of(self.part, group.rank)
        own = self.padding_idx is not None and start <= self.padding_idx < stop
        self.local_padding = self.padding_idx - start if own and self.padding_idx is not None else None
        whole = torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype)
        nn.init.normal_(whole, generator=generator)
        if self.padding_idx is not None:
            whole[self.padding_idx].zero_()
        self.weight = nn.Parameter(cut(whole, self.part, group.rank))  # (local, embedding_dim)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        local, elsewhere = local_ids(ids, self.part, self.group.rank)
        return joined(self.product(local), elsewhere, self.group)

    def product(self, ids: torch.Tensor) -> torch.Tensor:
        """This rank's rows at `ids` of its own."""
        return F.embedding(ids, self.weight, self.local_padding)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, shard {self.group.rank} of {self.group.size}"


def _part(part: Slice | None, dim: int, size: int, group: TensorGroup, what: str = "features") -> Slice:
    if size < group.size:
        raise LayoutError(
            f"every rank of a divided layer holds some of its {what}, and {size} are fewer than {group.size} ranks; "
            "use a smaller group, or torch's own layer"
        )
    if part is None:
        return spread(dim, size, group.size)
    if (part.dim, part.size, part.num_ranks) != (dim, size, group.size) or part.shared:
        raise LayoutError(
            f"a layer of {size} features on {group.size} ranks is divided along dim {dim} of its weight, every feature "
            f"on one rank, but the part divides {part.size} among {part.num_ranks} along dim {part.dim}"
            f"{', some of them on several' if part.shared else ''}; give a Slice that fits"
        )
    return part


def _last(part: Slice) -> Slice:
    """The same division of an activation's features."""
    return Slice(dim=-1, size=part.size, ranges=part.ranges)


def _linear_values(
    in_features: int,
    out_features: int,
    bias: bool,
    generator: torch.Generator | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Whole values, drawn as `nn.Linear` draws them (He et al. 2015 with a = √5: uniform up to 1 / √in_features)."""
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    weight = torch.empty(out_features, in_features, **options)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    if not bias:
        return weight, None
    bound = 1 / math.sqrt(in_features) if in_features > 0 else 0.0
    return weight, nn.init.uniform_(torch.empty(out_features, **options), -bound, bound, generator=generator)


def _id_of(padding_idx: int, num_embeddings: int) -> int:
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise LayoutError(f"padding_idx is one of the {num_embeddings} ids, but it is {padding_idx}; give an id")
    return padding_idx % num_embeddings
