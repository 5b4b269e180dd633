"""Updates that are made one step late, while the next step runs: gradients put aside, summed, and applied in time.

    put_aside   behind the last backward of a step: replicas begin to sum its gradients; the next step begins with none
    exchange    some actions later: the sums are there; the norm, the loss and what ranks tell travel
    apply       ahead of the first forward that reads the new weights: the update, over the version nobody needs

Knows gradients, versions of weights and who sums what. Refuses to know schedules, and optimizers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.execute.moments import Moments
from shardwise.execute.place import Place
from shardwise.execute.weight_versions import WeightVersions
from shardwise.parallel.gradients import GradientSum
from shardwise.parallel.tensor.divided import Divided

__all__ = ["Computed", "Finished", "LateUpdates", "Update"]

Update = Callable[[int, float], None]  # (step, norm of its gradients): `.grad` -> parameters, both in place
Gradients = list[torch.Tensor | None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Computed:
    """A step whose backwards are done on this rank; `loss` is this rank's part."""

    step: int
    loss: float
    weight: float
    seconds: float
    moments: Moments
    sent_bytes: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A step whose update has been made. Loss, weight, norm and `told` are the same on every rank."""

    step: int
    loss: float  # mean over the global batch, with the weights that the step was computed with
    weight: float
    norm: float
    told: tuple[float, ...]  # the number that each rank gave
    seconds: float  # of its window
    moments: Moments
    sent_bytes: Mapping[str, int]


@dataclasses.dataclass(kw_only=True, slots=True)
class _Behind:
    """A step that has been computed and waits for its update."""

    computed: Computed
    gradients: Gradients
    numbers: torch.Tensor | None = None  # squares of gradients, loss, and what each rank tells
    travelling: dist.Work | None = None


class LateUpdates:
    """The updates of one rank's `parameters`, one behind the other; at most one step is behind.

    `squares()` are those of the gradients that this rank counts, their sum over all ranks `dp` times that of the global
    batch. `tell()` is a number that all ranks are told.
    """

    def __init__(
        self,
        *,
        place: Place,
        parameters: Mapping[str, nn.Parameter],
        gradients: GradientSum | None,
        divided: Divided | None,
        squares: Callable[[], torch.Tensor],
        group: dist.ProcessGroup | None,
        device: torch.device,
        first_step: int,
        update: Update,
        tell: Callable[[], float],
    ) -> None:
        self._place = place
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self._trained = tuple(self._parameters.values())
        self._sums = gradients
        self._divided = divided
        self._squares = squares
        self._group = group
        self._device = device
        self._update = update
        self._tell = tell
        self.versions = WeightVersions(self._trained, newest=first_step)
        self._behind: _Behind | None = None
        self._finished: list[Finished] = []

    @property
    def older(self) -> dict[str, torch.Tensor]:
        """The weights of the version before the newest, by name."""
        values = self.versions.older()
        return {name: values[id(parameter)] for name, parameter in self._parameters.items()}

    def finished(self) -> list[Finished]:
        """The steps whose updates have been made since the last call."""
        found, self._finished = self._finished, []
        return found

    def put_aside(self, computed: Computed) -> None:
        """All gradients of a step are in the parameters: from here on those of the next one are summed apart."""
        if self._sums is not None:  # what replicas and other stages hold too is taken from the parameters, and travels
            self._sums.begin(self._place.stages)
            for stage in self._place.stages:
                self._sums.end(stage)
        self._behind = _Behind(computed=computed, gradients=self._replaced([None] * len(self._trained)))

    def exchange(self) -> None:
        """Sum the gradients of the step behind; its norm and loss, and what ranks tell, travel from here on."""
        behind = self._behind
        assert behind is not None
        of_next = self._replaced(behind.gradients)
        if self._sums is not None:
            self._sums.finish()
        if self._divided is not None and self._divided.shares:
            self._divided.sum_shared(self._parameters)
        world = self._place.world_size
        numbers = torch.zeros(2 + world, dtype=torch.float64, device=self._device)
        numbers[0] = self._squares() / self._place.dp
        numbers[1] = behind.computed.loss
        numbers[2 + self._place.rank] = self._tell()
        behind.numbers = numbers
        if world > 1:
            behind.travelling = dist.all_reduce(numbers, group=self._group, async_op=True)
        behind.gradients = self._replaced(of_next)

    def apply(self) -> None:
        """The update of the step behind, if there is one: from the newest weights, with its gradients."""
        behind, self._behind = self._behind, None
        if behind is None:
            return
        assert behind.numbers is not None
        if behind.travelling is not None:
            behind.travelling.wait()
        squares, loss, *told = behind.numbers.tolist()
        norm = squares**0.5
        computed = behind.computed
        of_next = self._replaced(behind.gradients)
        with self.versions.renewing():
            self._update(computed.step, norm)
        self._replaced(of_next)
        self._finished.append(
            Finished(
                step=computed.step,
                loss=loss,
                weight=computed.weight,
                norm=norm,
                told=tuple(told),
                seconds=computed.seconds,
                moments=computed.moments,
                sent_bytes=computed.sent_bytes,
            )
        )

    def _replaced(self, gradients: Gradients) -> Gradients:
        """Gives the parameters other gradients; returns those that they had."""
        had: Gradients = []
        for parameter, gradient in zip(self._trained, gradients, strict=True):
            had.append(parameter.grad)
            parameter.grad = gradient
        return had
