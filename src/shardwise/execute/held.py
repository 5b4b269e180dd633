"""What one rank holds of a model that is laid out: parameters, what optimizers update of them, who saves what.

Everything that a layout divides is here told by name. Knows no schedule and no step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.describe.tensor import Slice
from shardwise.execute.divided_states import DividedStates
from shardwise.execute.norms import share_of, sum_of_squares
from shardwise.execute.place import Place
from shardwise.parallel.expert.install import DividedExperts
from shardwise.parallel.precision.numerics import Numerics
from shardwise.parallel.states import State
from shardwise.parallel.tensor.divided import Divided

__all__ = ["Held"]


class Held:
    """The share of one rank. `holders`: parameter -> the stages that have it; the rest is None where nothing is divided
    that way."""

    def __init__(
        self,
        model: nn.Module,
        *,
        place: Place,
        holders: Mapping[str, tuple[int, ...]],
        device: torch.device,
        divided: Divided | None,
        experts: DividedExperts | None,
        divided_states: DividedStates | None,
        numerics: Numerics,
    ) -> None:
        self.model = model
        self.place = place
        self.holders = dict(holders)
        self.divided = divided
        self.experts = experts
        self.numerics = numerics
        self._divided_states = divided_states
        self._device = device

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that this rank holds, by name."""
        return {
            name: p
            for name, p in self.model.named_parameters()
            if self.place.owns_any(self.holders[name]) and (self.experts is None or self.experts.holds(name))
        }

    @property
    def states(self) -> dict[str, State]:
        """What an optimizer updates here, by the name of the parameter; `updated()` is told behind every update."""
        own = {} if self._divided_states is None else self._divided_states.states
        return {
            name: own.get(name)
            or State(parameter=self.numerics.masters.of(name, parameter), shape=tuple(parameter.shape))
            for name, parameter in self.parameters.items()
            if parameter.requires_grad and (name in own or not self.divides_state(name))
        }

    def updated(self) -> None:
        """An optimizer has written into `states`: bring the values to where the next step reads them. Collective."""
        self.numerics.masters.cast()
        if self._divided_states is not None:
            self._divided_states.refresh()

    def accepts(self, norm: float) -> bool:
        """Whether the step with gradients of this norm is to be updated: not where scaled gradients overflowed. Asked
        once a step, of every rank; the loss scale of the next step follows."""
        return self.numerics.accepts(norm)

    def owns(self, name: str) -> bool:
        """Whether this rank is the one that saves the parameter, or its part of it: lowest stage, first replica that
        has it, and the first shard where all have the same."""
        first = self.place.expert if self.divides_experts(name) else 0
        return self.counts(name) and self.place.replica == first

    def divides_state(self, name: str) -> bool:
        """Whether replicas divide the state of a parameter: of its elements this rank may have some, or none."""
        return self._divided_states is not None and name in self._divided_states

    def part(self, name: str) -> State | None:
        """This rank's elements of a parameter whose state is divided, trained or not; None where it has none."""
        return None if self._divided_states is None else self._divided_states.held(name)

    def owns_part(self, name: str) -> bool:
        """Whether this rank saves its elements of a parameter whose state is divided: the first group of replicas."""
        first = self.place.expert if self.divides_experts(name) else 0
        return self.counts(name) and self.place.replica - self.place.part * self.place.ep == first

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Inside, `parameters` have all their values, also where replicas divide them between steps. Collective."""
        return contextlib.nullcontext() if self._divided_states is None else self._divided_states.whole()

    def values(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The value of every parameter of this rank, whole, one after another; of its master, where it has one.
        Collective."""
        if self._divided_states is not None:
            yield from self._divided_states.values()
        for name, parameter in self._updated_here():
            yield name, parameter.detach()

    def gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """The gradient of every parameter of this rank behind a step, whole, one after another. Collective."""
        if self._divided_states is not None:
            yield from self._divided_states.gradients()
        for name, parameter in self._updated_here():
            yield name, parameter.grad

    def divides_experts(self, name: str) -> bool:
        """Whether the parameter, or its part on this rank, is that of experts that other replicas do not have."""
        return self.experts is not None and self.experts.divides(name)

    def experts_of(self, name: str) -> Slice | None:
        """How a parameter is divided along its experts; None where it is not."""
        return None if self.experts is None else self.experts.slice_of(name)

    def counts(self, name: str) -> bool:
        """Whether this rank counts the parameter, or its part of it, in its replica's norm."""
        first = self.place.owner_of[self.holders[name][0]]
        if first != self.place.position or self.place.context != 0:
            return False
        return self.place.shard == 0 or self.part_of(name) is not None

    def part_of(self, name: str) -> Slice | None:
        """How a parameter is divided among the shards; None where each has it whole."""
        return None if self.divided is None else self.divided.part_of(name)

    # -- the norm -------------------------------------------------------------------------------

    def gradient_norm(self) -> float:
        """The Euclidean norm of all gradients, every parameter counted once on any layout."""
        squares = self._own_squares()
        if self.place.world_size > 1:
            dist.all_reduce(squares)
            squares /= self.place.dp
        return float(squares.sqrt().item())

    def _updated_here(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (name, self.numerics.masters.of(name, parameter))
            for name, parameter in self.parameters.items()
            if not self.divides_state(name)
        ]

    def _own_squares(self) -> torch.Tensor:
        """Of this rank's gradients, () in float64; their sum over all ranks is that of every replica."""
        own = [
            p.grad if self.divided is None else self.divided.counted(name, p.grad)
            for name, p in self._updated_here()
            if p.grad is not None and self.counts(name) and not self.divides_experts(name)
        ]
        squares = self._squares_of_share([gradient for gradient in own if gradient is not None])
        return squares + self._squares_of_experts() + self._squares_of_parts()

    def _squares_of_share(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """Of gradients that all replicas have alike: each reads its share of their elements, weighed by how many there
        are, so that the mean over all replicas counts each element once."""
        place = self.place
        shares = [share_of(gradient, place.replica, place.dp) for gradient in gradients]
        return sum_of_squares([share for share in shares if share.numel()]).to(self._device) * place.dp

    def _squares_of_parts(self) -> torch.Tensor:
        """Of what replicas divide, weighed so that the mean over all replicas counts each element once."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        states = {} if self._divided_states is None else self._divided_states.states
        for of_experts, weight in ((False, self.place.fsdp), (True, self.place.fsdp * self.place.ep)):
            own = [
                state.parameter.grad
                for name, state in states.items()
                if state.parameter.grad is not None and self.counts(name) and self.divides_experts(name) is of_experts
            ]
            total += sum_of_squares(own).to(total.device) * weight
        return total

    def _squares_of_experts(self) -> torch.Tensor:
        """Of experts that are divided, weighed so that the mean over all replicas counts each once."""
        own = [
            p.grad if self.divided is None else self.divided.counted(name, p.grad)
            for name, p in self._updated_here()
            if p.grad is not None and self.counts(name) and self.divides_experts(name)
        ]
        squares = sum_of_squares([gradient for gradient in own if gradient is not None]).to(self._device)
        return squares * self.place.ep

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients, as clipping does."""
        own = [state.parameter.grad for state in self.states.values() if state.parameter.grad is not None]
        if own:
            torch._foreach_mul_(own, factor)
