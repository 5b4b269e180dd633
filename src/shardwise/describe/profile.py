"""What one model costs, call by call: parameters, flops, bytes kept for backward, and the dataflow.

Counts of one forward and backward of one traced batch. Knows numbers and names; refuses to know tensors,
devices, layouts and how the numbers were got: counted, measured or written by hand.

    ModelProfile ─┬─ units   what is held    (parameters)
                  ├─ calls   what is run     (flops, bytes; one of each node `unit#call` of the flow)
                  ├─ glue    what is run between the units
                  └─ flow    who reads what
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Any

from shardwise.describe.flow import Dataflow, NodeKind
from shardwise.describe.kernel_lists import Lists, lists_from, with_lists
from shardwise.describe.kernels import Exchange, Kernel
from shardwise.errors import ModelError

__all__ = [
    "CallProfile",
    "GlueProfile",
    "ModelProfile",
    "ParameterProfile",
    "UnitProfile",
    "bytes_per_element",
]

_ODD_SIZES = MappingProxyType({"bool": 1, "complex32": 4, "complex64": 8, "complex128": 16})


def bytes_per_element(dtype: str) -> int:
    """`"bfloat16"` -> 2. Raises `ModelError` for a name that tells no size."""
    if dtype in _ODD_SIZES:
        return _ODD_SIZES[dtype]
    digits = dtype.partition("_")[0].lstrip("abcdefghijklmnopqrstuvwxyz")  # float8_e4m3fn -> 8
    if not digits.isdigit() or int(digits) % 8:
        raise ModelError(f'a dtype is named as in torch, but got {dtype!r}; use a name such as "float32"')
    return int(digits) // 8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ParameterProfile:
    """One parameter. `trainable` ones have a gradient and optimizer state."""

    shape: tuple[int, ...]
    dtype: str
    trainable: bool = True

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.num_elements * bytes_per_element(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitProfile:
    """A module that is placed whole. A tied parameter stands in each of its units, under one name."""

    name: str
    class_name: str
    parameters: Mapping[str, ParameterProfile]

    @cached_property
    def num_parameters(self) -> int:
        return _count(self.parameters.values())

    @cached_property
    def parameter_bytes(self) -> int:
        return _bytes(self.parameters.values())


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CallProfile:
    """One call of a unit. Flops are counted with a multiply and an add as two.

    saved_bytes: unique storages made in the call that somebody keeps for backward; parameters are not among
    them. A storage belongs to the call that makes it, also where a later one saves it: summed over calls
    nothing counts twice.
    weight_flops: what of the backward makes gradients of parameters; None: nobody counted.
    weight_bytes: what those gradients are made of, inputs and gradients of outputs, which a backward that puts them off
    keeps; None: nobody counted.
    product_flops, product_bytes: of the products with weights, and their results: what a unit need not compute again
    where it keeps them; None: nobody counted.
    transient_bytes: the most that is alive while its forward or backward runs, besides what is kept then for the
    backward of it and of what ran before; None: nobody watched.
    kernels, exchanges: operation by operation, forward and backward; empty: nobody listed them.
    """

    node: int
    unit: str
    call: int
    forward_flops: int
    backward_flops: int
    saved_bytes: int
    output_bytes: int
    dtype: str
    forward_s: float | None = None  # seconds by the clock, where measured
    backward_s: float | None = None
    weight_flops: int | None = None
    weight_bytes: int | None = None
    product_flops: int | None = None
    product_bytes: int | None = None
    transient_bytes: int | None = None
    kernels: tuple[Kernel, ...] = ()
    exchanges: tuple[Exchange, ...] = ()

    def __post_init__(self) -> None:
        _not_negative(
            f"{self.unit}#{self.call}",
            (self.forward_flops, self.backward_flops, self.saved_bytes, self.output_bytes),
            (self.forward_s or 0.0, self.backward_s or 0.0, self.weight_flops or 0, self.weight_bytes or 0),
            (self.product_flops or 0, self.product_bytes or 0, self.transient_bytes or 0),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GlueProfile:
    """An operation between units that costs something; every stage that needs it computes it."""

    node: int
    forward_flops: int
    backward_flops: int
    saved_bytes: int
    transient_bytes: int | None = None
    kernels: tuple[Kernel, ...] = ()

    def __post_init__(self) -> None:
        _not_negative(f"glue {self.node}", (self.forward_flops, self.backward_flops, self.saved_bytes), ())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """All that planning knows of a model. Raises `ModelError` unless the calls are those of the flow."""

    model_class: str
    units: tuple[UnitProfile, ...]
    calls: tuple[CallProfile, ...]
    flow: Dataflow
    glue: tuple[GlueProfile, ...] = ()
    glue_parameters: Mapping[str, ParameterProfile] = dataclasses.field(default_factory=dict)  # in no unit
    tied: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # name -> its other names
    buffer_bytes: int = 0

    def __post_init__(self) -> None:
        given = [(call.node, call.unit, call.call) for call in self.calls]
        flow = [(node.index, node.name, node.call) for node in self.flow.calls]
        if given != flow:
            wrong = next((pair for pair in zip(given, flow, strict=False) if pair[0] != pair[1]), None)
            raise ModelError(
                f"a profile has one entry for every unit call of its dataflow, in order: {len(given)} "
                f"entries, {len(flow)} calls, first difference {wrong}; trace the model again"
            )
        unknown = sorted({call.unit for call in self.calls} - {unit.name for unit in self.units})
        if unknown:
            raise ModelError(f"calls are of the {len(self.units)} units, but {unknown} are none; add them")
        stray = [part.node for part in self.glue if not self._is_glue(part.node)]
        if stray:
            raise ModelError(f"glue entries belong to glue nodes, but {stray} are none; drop them")

    def _is_glue(self, node: int) -> bool:
        return 0 <= node < len(self.flow.nodes) and self.flow.nodes[node].kind is not NodeKind.CALL

    @cached_property
    def parameters(self) -> Mapping[str, ParameterProfile]:
        """Every parameter once, by the name it has in `model.named_parameters()`."""
        return {**{k: v for unit in self.units for k, v in unit.parameters.items()}, **self.glue_parameters}

    @cached_property
    def num_parameters(self) -> int:
        return _count(self.parameters.values())

    @cached_property
    def parameter_bytes(self) -> int:
        return _bytes(self.parameters.values())

    @cached_property
    def unread(self) -> tuple[str, ...]:
        """Parameters that neither a unit nor the glue reads in this forward: no stage holds them."""
        read = {name for node in self.flow.nodes for name in node.parameters}
        return tuple(name for name in self.parameters if name not in read)

    @cached_property
    def parts(self) -> tuple[CallProfile | GlueProfile, ...]:
        """Everything that costs something: calls, then glue."""
        return (*self.calls, *self.glue)

    @cached_property
    def forward_flops(self) -> int:
        """Of units and glue, one traced batch."""
        return sum(part.forward_flops for part in self.parts)

    @cached_property
    def backward_flops(self) -> int:
        return sum(part.backward_flops for part in self.parts)

    @cached_property
    def saved_bytes(self) -> int:
        """Kept for backward by one traced batch on one device."""
        return sum(part.saved_bytes for part in self.parts)

    def __str__(self) -> str:
        counts = f"{len(self.units)} units, {len(self.calls)} calls"
        return f"{self.model_class}: {self.num_parameters} parameters, {counts}"

    def to_json(self) -> str:
        """JSON text; the inverse of `from_json`."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["units"] = [
            {"name": unit.name, "class_name": unit.class_name, "parameters": _plain(unit.parameters)}
            for unit in self.units
        ]
        table = Lists()
        fields["calls"] = [table.plain(call) for call in self.calls]
        fields["glue"] = [table.plain(part) for part in self.glue]
        fields["lists"] = table.lists
        fields["glue_parameters"] = _plain(self.glue_parameters)
        return json.dumps({**fields, "flow": self.flow.to_json()})

    @classmethod
    def from_json(cls, text: str) -> ModelProfile:
        """The profile that `to_json` wrote. Raises `ModelError`."""
        try:
            data: dict[str, Any] = json.loads(text)
            lists = lists_from(data.get("lists", ()))
            units = [{**unit, "parameters": _parameters(unit["parameters"])} for unit in data["units"]]
            return cls(
                model_class=str(data["model_class"]),
                units=tuple(UnitProfile(**unit) for unit in units),
                calls=tuple(CallProfile(**with_lists(call, lists)) for call in data["calls"]),
                flow=Dataflow.from_json(data["flow"]),
                glue=tuple(GlueProfile(**with_lists(part, lists)) for part in data["glue"]),
                glue_parameters=_parameters(data["glue_parameters"]),
                tied={name: tuple(others) for name, others in data["tied"].items()},
                buffer_bytes=int(data["buffer_bytes"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise ModelError(
                "a profile in JSON has the fields of ModelProfile, but reading it failed with "
                f"{type(error).__name__}: {str(error)[:200]}; compare with the output of ModelProfile.to_json"
            ) from error


def _plain(parameters: Mapping[str, ParameterProfile]) -> dict[str, list[object]]:
    return {name: [list(p.shape), p.dtype, p.trainable] for name, p in parameters.items()}


def _parameters(data: Mapping[str, Any]) -> dict[str, ParameterProfile]:
    return {
        name: ParameterProfile(shape=tuple(shape), dtype=str(dtype), trainable=bool(trainable))
        for name, (shape, dtype, trainable) in data.items()
    }


def _count(parameters: Iterable[ParameterProfile]) -> int:
    return sum(parameter.num_elements for parameter in parameters)


def _bytes(parameters: Iterable[ParameterProfile]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def _not_negative(what: str, counts: Iterable[int], seconds: Iterable[float], more: Iterable[int] = ()) -> None:
    for number in (*counts, *seconds, *more):
        if not number >= 0:
            raise ModelError(f"what {what} costs is 0 or more, but got {number}; measure or count it again")
