"""What runs while a forward is recorded: a glue function or a unit call, and what it has touched so far.

Plain state that the modes fill and that the tape is written from. Refuses to know functions, dataflows and tapes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from shardwise.trace.tape import Place

__all__ = ["DataDependent", "GlueLooks", "GlueOp", "HookedModule", "Running", "Touched", "UnitCall", "as_numpy"]

DataDependent = (DataDependentOutputException, DynamicOutputShapeException)


def as_numpy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """`FakeTensor.numpy` while a forward is recorded: it looks at values, as `tolist` does, and is told as such."""
    if torch.overrides._get_current_function_mode() is not None:  # type: ignore[no-untyped-call]
        return torch.Tensor.numpy(tensor, *args, **kwargs)  # which is asked first
    raise DataDependentOutputException(torch.Tensor.numpy)  # type: ignore[arg-type]


class GlueLooks(Exception):  # noqa: N818  it is a finding, not a fault
    """Glue looked at a value that a unit computed; `module` is the innermost open module, empty for the model;
    `in_loss` if it was the loss."""

    def __init__(self, module: str, what: str, *, in_loss: bool = False) -> None:
        super().__init__(what)
        self.module = module
        self.in_loss = in_loss


@dataclasses.dataclass(slots=True)
class Touched:
    """What a node reads: values of the dataflow, parameters and buffers by name."""

    values: set[int] = dataclasses.field(default_factory=set)
    parameters: set[str] = dataclasses.field(default_factory=set)
    buffers: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(slots=True)
class GlueOp:
    """A glue function while it runs."""

    touched: Touched = dataclasses.field(default_factory=Touched)
    written: list[torch.Tensor] = dataclasses.field(default_factory=list)
    born: dict[int | None, torch.Tensor] = dataclasses.field(default_factory=dict)  # storages made by the function
    dispatched: bool = False  # an operation below was given tensors
    random: bool = False


@dataclasses.dataclass(slots=True)
class HookedModule:
    """A call, inside a unit, of a module that has forward hooks."""

    module: str
    arguments: object
    output: object


@dataclasses.dataclass(slots=True)
class UnitCall:
    """A unit call while its body runs, and what is known of it afterwards."""

    node: int
    unit: str
    arguments: list[object]
    touched: Touched = dataclasses.field(default_factory=Touched)
    hooked: list[HookedModule] = dataclasses.field(default_factory=list)
    promoted: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)  # value -> tensor
    left: dict[int, Place] = dataclasses.field(default_factory=dict)  # id(tensor) -> where it is left
    random: bool = False
    changes: bool = False
    for_real: bool = False  # the body is run on random real numbers


class Running:
    """Where the forward is: in the glue, inside a glue function, inside a unit, or over."""

    def __init__(self) -> None:
        self.phase = "forward"
        self.call: UnitCall | None = None
        self.op: GlueOp | None = None
        self.open_modules: list[str] = []  # glue modules that are running, outermost first

    @property
    def in_glue(self) -> bool:
        """Whether the model's own code between units runs, and no torch function of it."""
        return self.call is None and self.op is None and self.phase == "forward"

    @property
    def unit_node(self) -> int | None:
        """The node of the unit call that runs."""
        return None if self.call is None else self.call.node
