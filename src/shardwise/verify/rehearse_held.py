"""What a program and its optimizer hold at a moment, as storages: which line each byte alive belongs to.

    parameters   their memory at rest, own parts where replicas divide them; masters: float32 values of 16-bit ones
    gradients    of parameters and states, and memory that had them when the step before ended
    optimizer    what it remembers          activations    what autograd has saved and nobody else holds
    buffers      parameters gathered, and what else stays from step to step: received, to be reduced, of the model
    transient    the rest, logits too

Knows programs; refuses to know how bytes are counted.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch

from shardwise.execute.program import Program
from shardwise.plan.lines import MemoryLines

__all__ = ["Holdings", "lines_of"]

_ORDER = ("parameters", "masters", "gradients", "optimizer", "buffers", "activations")


class Holdings:
    """Of one rank."""

    def __init__(self, program: Program, optimizer: torch.optim.Optimizer | None) -> None:
        self._program = program
        self._optimizer = optimizer
        self._saved: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._had_gradients: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def freed(self) -> list[torch.Tensor]:
        """Parameters whose memory comes and goes."""
        parameters = self._program.parameters
        return [parameter for name, parameter in parameters.items() if self._program.divides_state(name)]

    def all(self) -> list[torch.Tensor]:
        """What there is between steps."""
        tensors: list[torch.Tensor] = [*self._program.parameters.values(), *self._program.model.buffers()]
        return [*tensors, *self._own(), *self._remembered()]

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Inside, what autograd saves is noted."""

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            self._saved[storage._cdata] = weakref.ref(storage)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def end_step(self) -> None:
        """A step has ended; its gradients are there still."""
        self._had_gradients = {
            storage._cdata: weakref.ref(storage)
            for storage in (gradient.untyped_storage() for gradient in self._gradients())
        }
        self._saved = {key: saved for key, saved in self._saved.items() if saved() is not None}

    def kinds(self) -> dict[str, set[int]]:
        """Storages by line, as it is now; one that is several is the first of them."""
        parameters, states = self._program.parameters, self._program.states
        at_rest = {name: p for name, p in parameters.items() if not self._is_gathered(name)}
        own = [state.parameter for name, state in states.items()]
        narrow = {name: p.dtype for name, p in parameters.items()}
        masters = [state.parameter for name, state in states.items() if state.parameter.dtype != narrow[name]]
        wide = _keys(masters)
        return {
            "parameters": _keys([*at_rest.values(), *own, *self._own()]) - wide,
            "masters": wide,
            "gradients": _keys(self._gradients()) | _alive(self._had_gradients),
            "optimizer": _keys(self._remembered()),
            "buffers": _keys([*self._whole(), *self._program.model.buffers()]),
            "activations": _alive(self._saved),
        }

    def _is_gathered(self, name: str) -> bool:
        """Whether this rank's own elements are apart from the parameter."""
        part = self._program.part(name) if self._program.divides_state(name) else None
        parameter = self._program.parameters[name]
        if not self._program.divides_state(name):
            return False
        return part is None or part.parameter.untyped_storage()._cdata != parameter.untyped_storage()._cdata

    def _own(self) -> list[torch.Tensor]:
        parts = [self._program.part(name) for name in self._program.parameters]
        states = self._program.states.values()
        return [*(part.parameter for part in parts if part is not None), *(state.parameter for state in states)]

    def _gradients(self) -> list[torch.Tensor]:
        """At rest: of what replicas divide, of the own parts."""
        parameters = self._program.parameters
        held = [parameter for name, parameter in parameters.items() if not self._program.divides_state(name)]
        return [tensor.grad for tensor in [*held, *self._own()] if tensor.grad is not None]

    def _whole(self) -> list[torch.Tensor]:
        """What replicas divide, while it is whole here: parameters and their gradients."""
        parameters = self._program.parameters
        divided = [parameter for name, parameter in parameters.items() if self._program.divides_state(name)]
        gathered = [parameter for name, parameter in parameters.items() if self._is_gathered(name)]
        return [*gathered, *(parameter.grad for parameter in divided if parameter.grad is not None)]

    def _remembered(self) -> list[torch.Tensor]:
        if self._optimizer is None:
            return []
        return [value for state in self._optimizer.state.values() for value in state.values() if torch.is_tensor(value)]


def lines_of(kinds: Mapping[str, set[int]], sizes: Mapping[int, int], stays: Collection[int]) -> MemoryLines:
    """Bytes of every line, from the storages of each and the bytes of all; `stays`: those that were there before."""
    left = dict(sizes)
    found = {kind: float(sum(left.pop(key) for key in kinds.get(kind, ()) if key in left)) for kind in _ORDER}
    found["buffers"] += sum(left.pop(key) for key in stays if key in left)
    return MemoryLines(**found, transient=float(sum(left.values())))


def _keys(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _alive(noted: Mapping[int, weakref.ref[torch.UntypedStorage]]) -> set[int]:
    return {key for key, storage in noted.items() if storage() is not None}
