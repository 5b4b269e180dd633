"""The layouts, and how each is verified. Here: pipeline stages, run one after another in this process.

The sentence that is checked: same model, same batch, one device beside the layout, equal loss and gradients.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections import Counter as Count
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.coverage.case import Case
from benchmarks.coverage.outcome import TOLERANCE, Gradients, Outcome, gradients_of, worst_error
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

__all__ = ["layouts", "verify_stages"]

_SCOPE = Scope(seed=3, step=5, micro_batch=0, samples=(0, 1), place="glue", call=0)


def layouts() -> dict[str, Callable[[Case], Outcome] | None]:
    """Layout -> how it is verified; None: not yet, the table says so."""
    return {"pp2": verify_stages, "tp2": None, "tp2_pp2": None}


def verify_stages(case: Case, num_stages: int = 2) -> Outcome:
    """Trace, cut by cost, run stage after stage; loss and gradients beside those of the model as it is."""
    started = time.monotonic()
    model, units = case.model, 0
    stages: tuple[int, ...] = ()
    try:
        captured, cut, stages = _cut(case, num_stages)
        units = len(captured.tape.units)
        reference = "the model as it is"
        if captured.tape.random:
            wanted = _run(case, captured, _cut_by_hand(captured, 1))
            reference = "one stage with keyed draws: the model draws random numbers"
        else:
            wanted = _kept(model, lambda: _plain(case))
        got = _run(case, captured, cut)
    except ShardwiseError as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Outcome(proven=False, units=units, stages=stages, seconds=time.monotonic() - started, reason=reason)
    except Exception as error:
        reason = f"crash, {type(error).__name__}: {' '.join(str(error).split())}"
        return Outcome(proven=False, units=units, stages=stages, seconds=time.monotonic() - started, reason=reason)
    worst, where = worst_error(got, wanted)
    proven = worst <= TOLERANCE
    return Outcome(
        proven=proven,
        wrong=not proven,
        units=units,
        stages=stages,
        gradient_error=worst,
        reference=reference,
        seconds=time.monotonic() - started,
        reason="" if proven else f"error {worst:.1e} at {where}",
    )


def _cut(case: Case, num_stages: int) -> tuple[Captured, Cut, tuple[int, ...]]:
    counters: list[Counter] = []

    def watch(recorder: Recorder) -> contextlib.AbstractContextManager[None]:
        counters.append(Counter())
        return counters[-1].watching(recorder)

    captured = capture(case.model, case.batch, loss=case.loss, scope=_SCOPE, watch=watch)
    profile = profile_of(case.model, captured, counters[-1])
    placed = place(profile, Layout(pp=num_stages))
    held = Count(placed.values())
    return captured, cut_stages(captured.tape.flow, placed, num_stages), tuple(held[s] for s in range(num_stages))


def _cut_by_hand(captured: Captured, num_stages: int) -> Cut:
    flow = captured.tape.flow
    return cut_stages(flow, {call.index: 0 for call in flow.calls}, num_stages)


def _run(case: Case, captured: Captured, cut: Cut) -> tuple[float, Gradients]:
    def stages() -> torch.Tensor:
        return run_in_process(
            case.model, _Fresh(case.batch, len(cut.order)), tape=captured.tape, cut=cut, loss=case.loss, scope=_SCOPE
        )

    return _kept(case.model, stages)


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


def _plain(case: Case) -> torch.Tensor:
    loss = objective(case.model, own(case.batch), case.loss)
    torch.autograd.backward([loss])
    return loss.detach()


def _kept(model: Any, run: Callable[[], torch.Tensor]) -> tuple[float, Gradients]:
    """Loss and gradients of `run`; the model is left as it was."""
    buffers = copy.deepcopy(dict(model.named_buffers()))
    try:
        value = float(run())
        return value, gradients_of(model)
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
