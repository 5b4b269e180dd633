"""One rank among its counterparts in other workers: what it exchanges, tells and is told.

Made from a run's options behind everything else of a rank. Knows workers and a program; refuses to know a loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from shardwise.comm.compress.make import compressing
from shardwise.comm.outside import OutsideCollective
from shardwise.comm.point_to_point import Waitable
from shardwise.errors import LayoutError
from shardwise.execute.program import Program
from shardwise.launch.worker import Worker
from shardwise.layout import Communication
from shardwise.train.asynchronous.delayed import DelayedAveraging
from shardwise.train.asynchronous.diloco import DiLoCo
from shardwise.train.asynchronous.eager_diloco import EagerDiLoCo
from shardwise.train.asynchronous.local_sgd import LocalSGD
from shardwise.train.asynchronous.outer import Outer
from shardwise.train.asynchronous.outer_sgd import OuterSGD
from shardwise.train.asynchronous.rule import Rule
from shardwise.train.technique_tables import AsynchronousOptions

__all__ = ["Numbers", "Workers", "rule_of"]

_STRAGGLER_S = 3600.0  # that workers wait for the slowest at most


def rule_of(options: AsynchronousOptions, *, num_workers: int) -> Rule:
    """The rule of a run."""
    outer = OuterSGD(rate=options.outer_learning_rate, momentum=options.outer_momentum, nesterov=options.nesterov)
    match options.method:
        case "local-sgd":
            return LocalSGD()
        case "delayed":
            return DelayedAveraging()
        case "diloco":
            return DiLoCo(outer)
        case "eager-diloco":
            return EagerDiLoCo(outer, num_workers)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Numbers:
    """Loss times weight, weight and norm of several steps, (steps, 3), summed over `num_workers`; on their way."""

    summed: torch.Tensor
    num_workers: int
    work: Waitable

    def wait(self) -> list[tuple[float, float, float]]:
        """Of each step: the mean loss of all tokens, their weight, and the mean norm of workers."""
        self.work.wait()
        rows = self.summed.tolist()
        return [(loss / weight if weight else 0.0, weight, norm / self.num_workers) for loss, weight, norm in rows]


class Workers:
    """This rank's counterparts. Collective to make; close it."""

    def __init__(self, worker: Worker, options: AsynchronousOptions) -> None:
        self.index = worker.index
        self.count = worker.count
        self.options = options
        self._store = worker.store
        self._few = OutsideCollective(worker.store, "few", rank=worker.index, size=worker.count, timeout_s=_STRAGGLER_S)
        self._stack = contextlib.ExitStack()

    def outer_of(self, program: Program) -> Outer:
        """Exchanges the states of `program`, from the values that they have. Raises LayoutError where counterparts hold
        others."""
        held = {name: (state.shape, state.start, state.parameter.numel()) for name, state in program.states.items()}
        told = self.values(held)
        if any(each != told[0] for each in told):
            raise LayoutError(
                "counterparts in several workers hold the same parameters, but stages were cut in different ways; "
                'drop balance = "measured", or give stages'
            )
        group = OutsideCollective(self._store, "sums", rank=self.index, size=self.count, timeout_s=_STRAGGLER_S)
        outer = Outer(
            program.states,
            rule_of(self.options, num_workers=self.count),
            group=group,
            every=self.options.every,
            num_fragments=self.options.fragments,
            compress=compressing(Communication(gradients=self.options.wire)),
            updated=program.updated,
        )
        self._stack.callback(outer.close)
        return outer

    def values(self, own: Any) -> list[Any]:
        """What each worker gave. Collective."""
        return self._few.values(own)

    def of_first(self, own: Any) -> Any:
        """What worker 0 gave. Collective."""
        return self._few.values(own if self.index == 0 else None)[0]

    def numbers(self, steps: Sequence[tuple[float, float, float]]) -> Numbers:
        """Loss, weight and norm of some steps, on their way to everyone. Collective, for the same steps."""
        flat = torch.zeros(3 * len(steps) * self.count, dtype=torch.float64)  # a multiple of the workers
        summed = flat[: 3 * len(steps)].view(-1, 3)
        summed.copy_(
            torch.tensor([(loss * weight, weight, norm) for loss, weight, norm in steps], dtype=torch.float64).view(
                -1, 3
            )
        )
        return Numbers(summed=summed, num_workers=self.count, work=self._few.all_reduce(flat))

    def close(self) -> None:
        """End what exchanges."""
        self._stack.close()
