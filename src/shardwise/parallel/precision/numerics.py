"""In which dtypes one rank computes a step: casts, masters, the loss scale and emulation, as the `Precision` says.

    trace      traced(): the model looks as it will be (16-bit parameters without values)
    lay out    take():   values become masters, parameters 16-bit
    a step     running() around forwards and backwards; the loss times `scale`; settle() behind them; updated()

Knows a model's parameters by name; refuses to know groups and optimizers: that all ranks skip the same steps follows
from the norm that all of them are told.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn

from shardwise.layout import Precision
from shardwise.parallel.precision.casts import Casts
from shardwise.parallel.precision.emulated import Emulated
from shardwise.parallel.precision.float8 import check_float8, to_float8
from shardwise.parallel.precision.kept import kept_modules, narrow_names
from shardwise.parallel.precision.loss_scale import FIRST, LossScale
from shardwise.parallel.precision.masters import Masters
from shardwise.trace.absent import Absent, absent_parameter

__all__ = ["Numerics"]

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.bfloat16}


class Numerics:
    """What `precision` asks for of `model`, whose parameters are in float32 still; `close()` takes it out again.

    Raises `ConfigError` for names of modules that there are not, for parameters in 16 bits, and for float8 on a device
    without it.
    """

    def __init__(
        self, model: nn.Module, precision: Precision | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.precision = precision or Precision()
        if self.precision.compute == "float8":
            check_float8(torch.device(device))
        self.model = model
        self._casts: Casts | None = None
        self._exempt: list[nn.Module] = []  # from float8
        self.masters = Masters()
        dtype = _DTYPES.get(self.precision.compute)
        self._emulated = Emulated(dtype) if self.precision.emulate and dtype is not None else None
        if self.precision.is_narrow and dtype is not None:
            kept = list(kept_modules(model, self.precision.keep).values())
            self.masters = Masters(narrow_names(model, kept), dtype)
            head = head_of(model)
            self._casts = Casts(model, dtype, kept=kept, head=head if self.precision.logits == "float32" else None)
            self._exempt = [*kept, *([] if head is None else [head])]
        self.loss_scale = _loss_scale(self.precision)

    @property
    def scale(self) -> float:
        """What the loss of the step under way is multiplied by for the backward."""
        return 1.0 if self.loss_scale is None else self.loss_scale.value

    def accepts(self, norm: float) -> bool:
        """Whether the update of a step is made whose gradients have this norm; told once a step, alike on all ranks."""
        return self.loss_scale is None or self.loss_scale.accepts(norm)

    @contextlib.contextmanager
    def traced(self) -> Iterator[None]:
        """The model as it will be computed with: narrow parameters in 16 bits, without values."""
        if self._casts is None:
            yield
            return
        undo = self._narrow_tables(lambda parameter: True)
        try:
            with self._casts.learning():
                yield
        finally:
            for module, leaf, parameter in undo:
                module._parameters[leaf] = parameter

    def take(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """This rank's parameters have their values: they become masters, the parameters narrow. Absent ones, too."""
        self.masters.take(parameters)
        self._narrow_tables(lambda parameter: isinstance(parameter.data, Absent))
        if self.precision.compute == "float8":
            to_float8(self.model, exempt=self._exempt)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around the forwards and backwards of a step."""
        with contextlib.ExitStack() as stack:
            if self._casts is not None:
                stack.enter_context(self._casts.on())
            if self._emulated is not None:
                stack.enter_context(self._emulated)
            if self.precision.deterministic:
                stack.enter_context(_deterministic())
            yield

    def settle(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Behind a step's backwards and sums: the gradients of `parameters` are those of the loss, not of the scaled
        one."""
        if self.scale != 1.0:
            gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, 1.0 / self.scale)

    def to_state(self) -> dict[str, object]:
        """What a checkpoint keeps besides tensors."""
        return {} if self.loss_scale is None else {"loss_scale": self.loss_scale.to_state()}

    def from_state(self, state: Mapping[str, object]) -> None:
        """Go on from what a checkpoint kept; nothing where it kept nothing. Raises `CheckpointError`."""
        saved = state.get("loss_scale")
        if self.loss_scale is not None and isinstance(saved, Mapping):
            self.loss_scale.from_state(saved)

    def close(self) -> None:
        """The model's forwards as they were, parameters in float32 where their masters are here."""
        self.masters.put_back()
        if self._casts is not None:
            self._casts.close()

    def _narrow_tables(self, wanted: Any) -> list[tuple[nn.Module, str, nn.Parameter]]:
        """Narrow parameters for which `wanted` become absent 16-bit ones; what they were, and where."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        made: dict[int, nn.Parameter] = {}
        undo: list[tuple[nn.Module, str, nn.Parameter]] = []
        for module in self.model.modules():
            for leaf, parameter in list(module._parameters.items()):
                name = "" if parameter is None else names[id(parameter)]
                if parameter is None or name not in self.masters.names or not wanted(parameter):
                    continue
                if id(parameter) not in made:
                    made[id(parameter)] = absent_parameter(
                        name=name,
                        shape=parameter.shape,
                        dtype=self.masters.dtype,
                        device=parameter.device,
                        requires_grad=parameter.requires_grad,
                    )
                undo.append((module, leaf, parameter))
                module._parameters[leaf] = made[id(parameter)]
        return undo


def head_of(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits: what a transformers model says it is, else the last one with a matrix."""
    said = getattr(model, "get_output_embeddings", None)
    head = said() if callable(said) else None
    if isinstance(head, nn.Module):
        return head
    layers = [m for m in model.modules() if any(p is not None and p.dim() >= 2 for p in m._parameters.values())]
    return layers[-1] if layers else None


def _loss_scale(precision: Precision) -> LossScale | None:
    if not precision.scales_loss:
        return None
    given = precision.loss_scale
    first = float(given) if isinstance(given, int | float) else FIRST
    return LossScale(first, dynamic=precision.scale_is_dynamic, window=precision.loss_scale_window)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
