"""Exchanges between workers: what is due after a step, summed over workers and given to the rule.

    every = 8, two fragments      step      4     8    12    16    20
                                  fragment  1     0     1     0     1        and all of them at the last step

The sums of a stale rule travel in a thread while the next round is computed. Knows steps, fragments and counterparts;
refuses to know what a step is, and what a rule does.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from shardwise.comm.collective import ALL_REDUCE, Collective
from shardwise.parallel.states import State
from shardwise.train.asynchronous.fragment import fragments_of
from shardwise.train.asynchronous.rule import Rule

__all__ = ["Outer"]

_NO_TOKENS = 1e-9  # what a worker weighs that has trained on none


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class Travelling:
    """A sum on its way, or arrived: of what workers have done, times their tokens, and of the tokens."""

    weighed: torch.Tensor
    tokens: torch.Tensor  # (workers,), the sum in its first element
    future: Future[None] | None = None

    def mean(self) -> torch.Tensor:
        """Over workers, weighed by their tokens. Waits."""
        if self.future is not None:
            self.future.result()
            self.future = None
        return self.weighed / self.tokens[0].to(self.weighed.dtype)


class Outer:
    """The exchanges of one rank's `states` with its counterparts, which hold the same.

    `group` adds what workers have done, through what `compress` makes of it for the tensors of some shapes; one thread
    uses it, one call behind the other. `updated()` is called behind every write to the states. Every fragment is
    exchanged each `every` steps. Close it.
    """

    def __init__(
        self,
        states: Mapping[str, State],
        rule: Rule,
        *,
        group: Collective,
        every: int,
        num_fragments: int = 1,
        compress: Callable[[Collective, Sequence[Sequence[int]]], Collective] | None = None,
        updated: Callable[[], None] = lambda: None,
    ) -> None:
        self.rule = rule
        self.every = every
        self.fragments = fragments_of(states, num_fragments)
        self.travelling: dict[int, Travelling] = {}  # by fragment, of a stale rule
        self._group = group
        self._sums = [group if compress is None else compress(group, each.shapes) for each in self.fragments]
        self._updated = updated
        self._thread = ThreadPoolExecutor(1, "exchange") if rule.stale else None
        for fragment in self.fragments:
            fragment.begin(rule)

    @property
    def sent_bytes(self) -> int:
        """Bytes that this rank has handed over to be summed over workers, so far, as they travel. Halves of a sum (an
        exchange of parts, a gather) count half."""
        sent = self._group.sent_bytes
        return (sum(sent.values()) + sent.get(ALL_REDUCE, 0)) // 2

    def step_done(self, step: int, *, tokens: float, last: bool) -> bool:
        """The optimizer has made step number `step`, with the gradients of so many tokens. Exchanges what is due, all
        where it is the `last`, and tells whether something was. Collective."""
        for fragment in self.fragments:
            fragment.tokens += tokens
            fragment.steps += 1
        due = [index for index in range(len(self.fragments)) if last or self._is_due(index, step)]
        for index in due:
            self._end_round(index, settles=last)
        if due:
            self._updated()
        return bool(due)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the states are the weights that all workers together stand for. Collective."""
        try:
            with contextlib.ExitStack() as stack:
                for index, fragment in enumerate(self.fragments):
                    settled = {name: tensor.clone() for name, tensor in fragment.kept.items()}
                    self.rule.settle(settled, self.mean_of(index))
                    stack.enter_context(fragment.showing(settled["start"]))
                self._updated()
                yield
        finally:
            self._updated()

    def mean_of(self, index: int) -> torch.Tensor | None:
        """What a fragment waits for; None where that is nothing."""
        return self.travelling[index].mean() if index in self.travelling else None

    def close(self) -> None:
        """End the thread; what travels is waited for."""
        if self._thread is not None:
            self._thread.shutdown()

    def _is_due(self, index: int, step: int) -> bool:
        return (step + 1 - index * self.every // len(self.fragments)) % self.every == 0

    def _end_round(self, index: int, *, settles: bool) -> None:
        fragment = self.fragments[index]
        if not fragment.num_elements:
            return
        if fragment.steps:
            now = fragment.read()
            own = fragment.kept["start"] - now
            before = self.mean_of(index)
            travelling = self._sum(index, own)
            self.rule.end_round(fragment.kept, now=now, own=own, mean=before if self.rule.stale else travelling.mean())
            if self.rule.stale:
                fragment.kept["sent"] = own
                self.travelling[index] = travelling
            fragment.tokens, fragment.steps = 0.0, 0
        if settles:
            self.rule.settle(fragment.kept, self.mean_of(index))
            self.travelling.pop(index, None)
            fragment.kept.pop("sent", None)
        fragment.write(fragment.kept["start"])

    def _sum(self, index: int, own: torch.Tensor) -> Travelling:
        """What all workers have done, on its way; each weighs as much as it has trained on tokens a step."""
        fragment, sums = self.fragments[index], self._sums[index]
        tokens = torch.zeros(self._group.size, dtype=torch.float64)
        tokens[0] = max(_NO_TOKENS, fragment.tokens / fragment.steps)
        weighed = sums.empty(own.numel(), own.dtype)
        torch.mul(own, float(tokens[0]), out=weighed)

        def travel() -> None:
            self._group.all_reduce(tokens).wait()
            sums.all_reduce(weighed).wait()

        future = None if self._thread is None else self._thread.submit(travel)
        if future is None:
            travel()
        return Travelling(weighed=weighed, tokens=tokens, future=future)
