"""Pipeline stages of a case, run one after another in this process, and the run of one device that they are held to."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import time
from collections import Counter as Count
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.coverage.case import Case
from benchmarks.coverage.outcome import TOLERANCE, Gradients, Outcome, followed_share, gradients_of, worst_error
from shardwise.describe.profile import ModelProfile
from shardwise.errors import ShardwiseError
from shardwise.execute.in_process import run_in_process
from shardwise.layout import Layout
from shardwise.plan.cut import Cut, cut_stages
from shardwise.plan.partition import place
from shardwise.trace.capture import Captured, capture, own
from shardwise.trace.count import Counter
from shardwise.trace.objective import objective
from shardwise.trace.profile import profile_of
from shardwise.trace.randomness import Scope
from shardwise.trace.record import Recorder
from shardwise.trace.tape import Tape

__all__ = ["Alone", "Staged", "run_stages", "verify_stages"]

_SCOPE = Scope(seed=3, step=5, micro_batch=0, samples=(0, 1), place="glue", call=0)


@dataclasses.dataclass(frozen=True, slots=True)
class Staged:
    """A recorded case and where it is cut."""

    tape: Tape
    cut: Cut
    sizes: tuple[int, ...]  # unit calls of each stage


class Alone:
    """A case on one device, computed once: its recording, its loss and gradients."""

    def __init__(self, case: Case) -> None:
        self.case = case

    @functools.cached_property
    def recorded(self) -> tuple[Captured, ModelProfile]:
        """Recorded with fake parameters. Raises as `trace` does."""
        counters: list[Counter] = []

        def watch(recorder: Recorder) -> contextlib.AbstractContextManager[None]:
            counters.append(Counter())
            return counters[-1].watching(recorder)

        captured = capture(self.case.model, self.case.batch, loss=self.case.loss, scope=_SCOPE, watch=watch)
        return captured, profile_of(self.case.model, captured, counters[-1])

    def staged(self, num_stages: int) -> Staged:
        """Cut where the work is balanced."""
        captured, profile = self.recorded
        if num_stages == 1:
            placed = {call.index: 0 for call in captured.tape.flow.calls}
        else:
            placed = dict(place(profile, Layout(pp=num_stages)))
        held = Count(placed.values())
        sizes = tuple(held[stage] for stage in range(num_stages))
        return Staged(captured.tape, cut_stages(captured.tape.flow, placed, num_stages), sizes)

    @functools.cached_property
    def result(self) -> tuple[float, Gradients]:
        """Loss and gradients, which the layouts are held to. The model is left as it was."""
        if self.draws:
            return _kept(self.case.model, lambda: run_stages(self.case, self.staged(1)))
        return _kept(self.case.model, lambda: _plain(self.case))

    def shaken(self, seed: int = 0) -> tuple[float, Gradients]:
        """Loss and gradients of weights that differ in about their last bit: what of `result` rounding decides."""
        model, generator = copy.deepcopy(self.case.model), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    signs = (torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1).to(parameter.dtype)
                    parameter.mul_(1 + signs * torch.finfo(parameter.dtype).eps)
        return Alone(dataclasses.replace(self.case, model=model)).result

    @property
    def draws(self) -> bool:
        """Whether the model draws random numbers: one device then draws those that stages draw."""
        return self.recorded[0].tape.random

    @property
    def reference(self) -> str:
        """How `result` came to be, in words."""
        return "one stage with keyed draws: the model draws random numbers" if self.draws else "the model as it is"


def verify_stages(alone: Alone, num_stages: int = 2) -> Outcome:
    """Trace, cut by cost, run stage after stage; loss and gradients beside those of the model as it is."""
    started = time.monotonic()
    units, sizes = 0, tuple[int, ...]()
    try:
        staged = alone.staged(num_stages)
        units, sizes = len(staged.tape.units), staged.sizes
        wanted = alone.result
        got = _kept(alone.case.model, lambda: run_stages(alone.case, staged))
    except ShardwiseError as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Outcome(proven=False, units=units, stages=sizes, seconds=time.monotonic() - started, reason=reason)
    except Exception as error:
        reason = f"crash, {type(error).__name__}: {' '.join(str(error).split())}"
        return Outcome(proven=False, units=units, stages=sizes, seconds=time.monotonic() - started, reason=reason)
    worst, where = worst_error(got, wanted)
    proven = worst <= TOLERANCE
    return Outcome(
        proven=proven,
        wrong=not proven,
        units=units,
        stages=sizes,
        gradient_error=worst,
        followed=followed_share(wanted[1]),
        reference=alone.reference,
        seconds=time.monotonic() - started,
        reason="" if proven else f"error {worst:.1e} at {where}",
    )


def run_stages(case: Case, staged: Staged) -> float:
    """The loss; gradients are left in the model's parameters."""
    batch = _Fresh(case.batch, len(staged.cut.order))
    return float(run_in_process(case.model, batch, tape=staged.tape, cut=staged.cut, loss=case.loss, scope=_SCOPE))


class _Fresh(Mapping[str, Any]):
    """A batch that every reader gets a copy of: a forward may write into its inputs, and every rank has its own.

    The copies are made beforehand, since a stage watches whatever is computed while it runs.
    """

    def __init__(self, batch: Mapping[str, Any], num_readers: int) -> None:
        self._copies = [own(batch) for _ in range(num_readers)]
        self._readings: Count[str] = Count()

    def __getitem__(self, name: str) -> Any:
        self._readings[name] += 1
        return self._copies[min(self._readings[name], len(self._copies)) - 1][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._copies[0])

    def __len__(self) -> int:
        return len(self._copies[0])


def _plain(case: Case) -> float:
    loss = objective(case.model, own(case.batch), case.loss)
    torch.autograd.backward([loss])
    return float(loss.detach())


def _kept(model: Any, run: Callable[[], float]) -> tuple[float, Gradients]:
    """Loss and gradients of `run`; the model is left as it was."""
    buffers = copy.deepcopy(dict(model.named_buffers()))
    try:
        value = run()
        return value, gradients_of(model)
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
