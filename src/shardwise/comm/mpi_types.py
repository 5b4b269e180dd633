"""How MPI is told of tensors: what it moves, what it can add, and the sums that it has not got.

Bytes are moved as unsigned numbers of as many bits. Sums of 16-bit floats are operations of ours, because MPI (3.1) has
no such type: each addition is torch's, rounded once, as gloo does it. So are extremes of floats, for which MPI says
nothing about NaN: where a rank has one, the result is NaN. Bools are combined as truth values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from shardwise.errors import TransferError

__all__ = ["MpiTypes", "memory_of", "name_of"]

_NAMES = {
    dist.ReduceOp.SUM: "sum",
    dist.ReduceOp.AVG: "mean",
    dist.ReduceOp.PRODUCT: "product",
    dist.ReduceOp.MIN: "minimum",
    dist.ReduceOp.MAX: "maximum",
    dist.ReduceOp.BAND: "and",
    dist.ReduceOp.BOR: "or",
    dist.ReduceOp.BXOR: "xor",
}
_TORCH: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "product": torch.mul,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
}
_OF_MPI = {
    "sum": "SUM",
    "product": "PROD",
    "minimum": "MIN",
    "maximum": "MAX",
    "and": "BAND",
    "or": "BOR",
    "xor": "BXOR",
}
_OF_BOOLS = {
    "sum": "LOR",
    "product": "LAND",
    "minimum": "LAND",
    "maximum": "LOR",
    "and": "LAND",
    "or": "LOR",
    "xor": "LXOR",
}
_TYPES = {
    torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.int8: "INT8_T", torch.uint8: "UINT8_T",
    torch.int16: "INT16_T", torch.int32: "INT32_T", torch.int64: "INT64_T", torch.bool: "C_BOOL",
}  # fmt: skip
_NARROW = (torch.bfloat16, torch.float16)
_OF_SIZE = {1: "UINT8_T", 2: "UINT16_T", 4: "UINT32_T", 8: "UINT64_T", 16: "C_DOUBLE_COMPLEX"}


def name_of(op: Any) -> str:
    """Of a reduction of torch.distributed. Raises `TransferError` for one that MPI does not get here."""
    for known, name in _NAMES.items():
        if op == known:
            return name
    raise TransferError(f"over MPI ranks combine by {', '.join(_NAMES.values())}, but got {op}; use one of these")


class MpiTypes:
    """Datatypes and operations of one module of mpi4py; operations are made when they are first needed."""

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._made: dict[tuple[torch.dtype, str], Any] = {}

    def moved(self, dtype: torch.dtype) -> Any:
        """The type by which elements are moved."""
        return getattr(self._mpi, _OF_SIZE[dtype.itemsize])

    def reduced(self, dtype: torch.dtype, name: str) -> tuple[Any, Any]:
        """The type and the operation by which elements are combined. Raises `TransferError` where there are none."""
        name = "sum" if name == "mean" else name
        if dtype == torch.bool:
            return self._mpi.C_BOOL, getattr(self._mpi, _OF_BOOLS[name])
        ours = dtype in _NARROW or (dtype.is_floating_point and name in ("minimum", "maximum"))
        if name in ("and", "or", "xor") and dtype.is_floating_point:
            raise TransferError(f"bits of floats are not combined, but got {name} of {dtype}; use integers")
        if dtype not in _TYPES and not ours:
            known = ", ".join(str(each).removeprefix("torch.") for each in (*_TYPES, *_NARROW))
            raise TransferError(f"over MPI ranks combine {known}, but got {dtype}; convert it first")
        if ours:
            return self.moved(dtype), self._operation(dtype, name)
        return getattr(self._mpi, _TYPES[dtype]), getattr(self._mpi, _OF_MPI[name])

    def _operation(self, dtype: torch.dtype, name: str) -> Any:
        if (dtype, name) not in self._made:
            combine = _TORCH[name]

            def into(theirs: Any, ours: Any, _datatype: Any) -> None:
                total = torch.frombuffer(ours, dtype=dtype)
                combine(total, torch.frombuffer(theirs, dtype=dtype), out=total)

            self._made[dtype, name] = self._mpi.Op.Create(into, commute=True)
        return self._made[dtype, name]


def memory_of(mpi: Any, tensor: torch.Tensor) -> Any:
    """The bytes of a dense tensor in the host's memory, as mpi4py takes them. Raises `TransferError` for another."""
    if tensor.device.type != "cpu":
        raise TransferError(
            f'MPI moves tensors of the host\'s memory, but got one on {tensor.device}; use backend = "nccl" on GPUs'
        )
    return mpi.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)
