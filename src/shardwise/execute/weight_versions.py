"""Two versions of the weights of one rank, in turn under the same parameters. Knows tensors, no steps and no schedule.

    parameter ──► W(n)        forwards and backwards of a step see the version that the step is computed with
             └──► W(n-1)      an update writes W(n+1) over W(n-1), which nobody needs any more

A version is a set of buffers that is swapped under the parameters (`parameter.data`): whoever knows a parameter by its
identity (modules, optimizer, sums of gradients, ties) sees nothing of it. Autograd keeps the parameter itself for a
backward and not its value, so the version of a forward is shown again before its backward. What autograd keeps of a
value (a view, such as a transposed weight) stays right, because no buffer is written while a graph needs it; its
counters of writes are kept as they were, for they belong to the parameter and not to its buffers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from shardwise.errors import DataflowError

__all__ = ["WeightVersions"]


class WeightVersions:
    """Versions `newest - 1` and `newest` of `parameters`; the number of a version is that of the updates made of it.

    Both have the parameters' values at first. `show` and `renewing` change which one the parameters have.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, newest: int = 0) -> None:
        self._parameters = tuple(parameters)
        self._values = {
            newest - 1: [parameter.detach().clone() for parameter in self._parameters],
            newest: [parameter.data for parameter in self._parameters],
        }
        self.newest = newest
        self.shown = newest

    def show(self, version: int) -> None:
        """The parameters have the values of `version` from here on. Raises DataflowError if there is none."""
        if version == self.shown:
            return
        if version not in self._values:
            raise DataflowError(
                f"two versions of the weights are kept, {self.newest - 1} and {self.newest}, but {version} is asked "
                "for; apply the updates in between, or ask earlier"
            )
        for parameter, value in zip(self._parameters, self._values[version], strict=True):
            parameter.data = value
        self.shown = version

    def older(self) -> dict[int, torch.Tensor]:
        """id(parameter) -> its value in version `newest - 1`, to be read or written."""
        values = self._values[self.newest - 1]
        return {id(parameter): value for parameter, value in zip(self._parameters, values, strict=True)}

    @contextlib.contextmanager
    def renewing(self) -> Iterator[None]:
        """An update: in the block the parameters have a copy of the newest version, which becomes the newest one.

        No graph may need version `newest - 1` any more; those of the newest one go on to hold.
        """
        values = self._values.pop(self.newest - 1)
        if values:
            torch._foreach_copy_(values, self._values[self.newest])
        self.newest += 1
        self._values[self.newest] = values
        self.show(self.newest)
        with _unsafe_preserve_version_counter(self._parameters):
            yield
