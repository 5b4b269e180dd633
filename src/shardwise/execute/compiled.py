"""Units compiled by torch.compile, each by itself: what stands around a unit (glue, casts, collectives) is not.

    switch ── recompute ── unshard ── casts ── [ compiled body ]        one graph a unit, shared by equal ones

A unit that cannot be compiled runs as it is, and `notes()` says which and why: one whose compilation fails; one that
draws random numbers (they are keyed by sample, in Python); one that runs inside a dispatch mode (emulated products,
selective recomputation). What ranks exchange inside a unit is left to Python, so that its graph has a gap there.
Knows unit names and bodies; refuses to know backends: `backend` is a name that torch.compile knows.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch

from shardwise.errors import ConfigError
from shardwise.execute.around import Body

__all__ = ["Compiled", "check_backend"]

# What exchanges tensors between ranks: not to be traced, whatever it looks like.
_EXCHANGES = (
    "shardwise.comm",
    "shardwise.parallel.tensor.collectives",
    "shardwise.parallel.tensor.divided_logits",
    "shardwise.parallel.tensor.processes",
    "shardwise.parallel.tensor.sequence",
    "shardwise.parallel.tensor.sequence_shard",
    "shardwise.parallel.expert.dispatch",
    "shardwise.parallel.expert.groups",
    "shardwise.parallel.context",
)
_GRAPHS = 64  # of one piece of code: units of one class that differ in a number have a graph each


def check_backend(backend: str) -> None:
    """Raises `ConfigError` for a name that torch.compile does not know."""
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(f"compile={backend!r} is no backend of torch.compile; use one of {', '.join(sorted(known))}")


@dataclasses.dataclass(slots=True)
class _Unit:
    """Why a unit's compiled body is not used, if so: for good, or in the calls so far."""

    failed: str = ""
    watched: str = ""
    calls: int = 0


class Compiled:
    """Wraps bodies of units (see `execute.around`). `backend` as in `torch.compile(backend=...)`."""

    def __init__(self, backend: str) -> None:
        import torch._dynamo as dynamo  # seconds, which nobody pays who does not compile

        check_backend(backend)
        self.backend = backend
        self._units: dict[str, _Unit] = {}
        self._failures = (dynamo.exc.TorchDynamoException, dynamo.exc.InternalTorchDynamoError)
        for module in _EXCHANGES:
            dynamo.trace_rules.add(module)
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _GRAPHS)

    def __call__(self, unit: str, body: Body) -> Body:
        """The body, compiled when it is called first."""
        compiled: Callable[..., Any] = torch.compile(body, backend=self.backend)
        state = self._units[unit] = _Unit()

        def run(*args: Any, **kwargs: Any) -> Any:
            if state.failed or _is_watched(state):
                return body(*args, **kwargs)
            try:
                with warnings.catch_warnings():  # torch's own, of what it looks at while it compiles
                    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
                    warnings.filterwarnings("ignore", category=UserWarning, module="torch._dynamo")
                    out = compiled(*args, **kwargs)
            except self._failures as error:
                state.failed = f"{type(error).__name__}: {_first_lines(error)}"
                return body(*args, **kwargs)
            state.calls += 1
            return out

        return run

    def notes(self) -> tuple[str, ...]:
        """Of the units that have been called: how many are compiled, and each that is not, by name, with the reason."""
        compiled = [unit for unit, state in self._units.items() if state.calls and not state.failed]
        others: dict[str, list[str]] = {}
        for unit, state in self._units.items():
            if unit not in compiled and (state.failed or state.watched):
                others.setdefault(state.failed or state.watched, []).append(unit)
        told = [f"not compiled: {', '.join(units)}: {why}" for why, units in others.items()]
        return (f"{len(compiled)} of {len(self._units)} units compiled by {self.backend}", *told)


def _is_watched(state: _Unit) -> bool:
    """Whether somebody watches operations in Python now, who would see none of a graph's."""
    if torch._C._len_torch_function_stack():
        state.watched = "it draws random numbers, which are keyed by sample"
        return True
    if torch._C._len_torch_dispatch_stack():
        state.watched = "a dispatch mode watches its operations (emulated products, selective recomputation)"
        return True
    return False


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:200] or "no reason given"
