"""What a rank does with a test: finds it by name, runs it, and looks at what it left behind."""

from __future__ import annotations

import linecache
import re
import reprlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import FrameType, TracebackType
from typing import cast

import pytest
import torch
import torch.distributed as dist
from _pytest.config import apply_warning_filters

from shardwise.launch import RankContext
from shardwise.launch.environment import environment_snapshot
from shardwise.testing.leaks import Observation, left_behind, observe

__all__ = ["NamedTest", "Verdict", "run_named_test"]

_NAME = re.compile(r"\b[A-Za-z_]\w*\b")
_SET_BY_LIBRARIES = frozenset({"TORCHINDUCTOR_CACHE_DIR"})  # once, when they are first imported
_MAX_SHOWN = 400  # characters of one local value


@dataclass(frozen=True, kw_only=True)
class NamedTest:
    """module, name: where the undecorated function is; warning_filters: as in pytest's ini file."""

    module: str
    name: str
    values: dict[str, object]
    warning_filters: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a rank says of a test that did not fail: the reason if it skipped, and what it left behind."""

    skipped: str | None
    left_behind: tuple[str, ...]


def run_named_test(context: RankContext, test: NamedTest) -> Verdict:
    """Runs the test on this rank; its exception goes on to whoever called."""
    decorated = getattr(import_module(test.module), test.name)
    function = cast(Callable[..., None], decorated.__wrapped__)
    torch.manual_seed(0)
    before = _observe()
    skipped = None
    with warnings.catch_warnings():
        apply_warning_filters(test.warning_filters, ())
        try:
            function(context, **test.values)
        except pytest.skip.Exception as reason:
            skipped = str(reason)
        except AssertionError as error:
            _explain(error)
            raise
    return Verdict(skipped=skipped, left_behind=tuple(left_behind(before, _observe())))


def _observe() -> Observation:
    groups = len(dist.distributed_c10d._world.pg_map)
    settings: dict[str, object] = {
        "number of process groups": groups,
        "default dtype": torch.get_default_dtype(),
        "gradients enabled": torch.is_grad_enabled(),
        "torch threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }
    environment = {n: v for n, v in environment_snapshot().items() if n not in _SET_BY_LIBRARIES}
    return observe(environment, settings)


def _explain(error: AssertionError) -> None:
    """Adds the values of the names on the line that failed: pytest rewrites no assertion on a rank."""
    trace = cast(TracebackType, error.__traceback__)
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame: FrameType = trace.tb_frame
    line = linecache.getline(frame.f_code.co_filename, trace.tb_lineno)
    shorten = reprlib.Repr()
    shorten.maxother = _MAX_SHOWN
    names = dict.fromkeys(_NAME.findall(line))
    shown = [f"{name} = {shorten.repr(frame.f_locals[name])}" for name in names if name in frame.f_locals]
    if shown:
        error.add_note("where " + "\n      ".join(shown))
