"""What all wrappers that lose something share: what was left out is added to what comes next (error feedback).

    sent_t = C(g_t + e_t)      e_{t+1} = g_t + e_t - sent_t      so  sent_1 + … + sent_t = g_1 + … + g_t - e_{t+1}

(Seide et al. 2014; Stich et al. 2018, arXiv:1809.07599; Karimireddy et al. 2019, arXiv:1901.09847.) A sum that is not
finite, as behind an overflow, is thrown away by who asked for it: what was left is forgotten with it, on all ranks. A
wrapper is for one tensor of always the same length. Knows flat tensors; refuses to know parameters.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Final

import torch

from shardwise.comm.collective import Collective
from shardwise.comm.point_to_point import Waitable
from shardwise.errors import TransferError

__all__ = ["Lossy", "Then", "is_finite"]


@dataclasses.dataclass(slots=True, eq=False)
class Then:
    """Something under way, and what is to be done behind it, once."""

    work: Waitable
    then: Callable[[], None]
    done: bool = False

    def wait(self) -> None:
        """For the first, then do the second."""
        if not self.done:
            self.work.wait()
            self.then()
            self.done = True


class Lossy(abc.ABC):
    """A `Collective` whose sums are compressed. Gathers and exchanges travel as they are: they are of values, whose
    errors nobody would make up for."""

    def __init__(self, inner: Collective) -> None:
        self._inner: Final = inner
        self._left: torch.Tensor | None = None
        self._last: Then | None = None
        self._wires: dict[str, torch.Tensor] = {}
        self.saved_bytes = 0  # of what was handed over, counted as `sent_bytes` of a sum

    @property
    def rank(self) -> int:
        return self._inner.rank

    @property
    def size(self) -> int:
        return self._inner.size

    @property
    def sent_bytes(self) -> Mapping[str, int]:
        return self._inner.sent_bytes

    @abc.abstractmethod
    def all_reduce(self, flat: torch.Tensor) -> Waitable:
        """See `Collective`."""

    def reduce_scatter(self, flat: torch.Tensor, out: torch.Tensor) -> Waitable:
        """See `Collective`: part of a whole sum, where that is the cheaper way."""
        own = flat[self.rank * out.numel() : (self.rank + 1) * out.numel()]
        return Then(self.all_reduce(flat), lambda: None if own.data_ptr() == out.data_ptr() else _copy(own, out))

    def all_gather(self, own: torch.Tensor, flat: torch.Tensor) -> Waitable:
        """See `Collective`."""
        return self._inner.all_gather(own, flat)

    def all_to_all(self, flat: torch.Tensor, out: torch.Tensor) -> Waitable:
        """See `Collective`."""
        return self._inner.all_to_all(flat, out)

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Collective`."""
        return self._inner.empty(numel, dtype)

    def left_out(self, numel: int) -> torch.Tensor:
        """What this rank has not sent yet, of a tensor of `numel`; its sum over the ranks is what steps have lost."""
        return torch.zeros(numel) if self._left is None else self._left[:numel].clone()

    def _begun(self, work: Waitable, then: Callable[[], None]) -> Then:
        self._last = Then(work, then)
        return self._last

    def _wire(self, name: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory to send from, the same in every call; what was under way in it is waited for."""
        if self._last is not None and not self._last.done:
            self._last.wait()
        if name not in self._wires or self._wires[name].numel() != numel:
            self._wires[name] = self._inner.empty(numel, dtype)
        return self._wires[name]

    def _with_left(self, flat: torch.Tensor, numel: int | None = None) -> torch.Tensor:
        """What this rank has to send, in float32: the tensor, and what was left of those before; zeros up to `numel`.
        Whatever of it is sent is to be taken away from it."""
        numel = flat.numel() if numel is None else numel
        if self._left is None:
            self._left = torch.zeros(numel, dtype=torch.float32, device=flat.device)
        if self._left.numel() != numel:
            raise TransferError(
                f"a compressed sum is of one tensor, step by step, but {flat.numel()} elements come behind "
                f"{self._left.numel()}; use a wrapper for each"
            )
        self._left[: flat.numel()].add_(flat)
        return self._left

    def _forget_what_is_not_finite(self) -> None:
        if self._left is not None and not is_finite(self._left):
            self._left.nan_to_num_(0.0, 0.0, 0.0)


def is_finite(values: torch.Tensor) -> bool:
    """Whether all are, by one sum."""
    return bool(torch.isfinite(values.sum(dtype=torch.float32)))


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)
