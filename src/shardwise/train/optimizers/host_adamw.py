"""AdamW whose moments live on the host: an update visits them a chunk at a time.

    chunk i     value, gradient ──► host │ AdamW on the host's processors │ value ──► device
    chunk i+1                     value, gradient ──► host │ …             copies run beside the update

The same numbers as torch's fused AdamW on a CPU (Loshchilov and Hutter, ICLR 2019); as ZeRO-Offload does (Ren et al.
2021, arXiv:2101.06840). On a CPU nothing is copied, and the moments are in mapped files. Knows parameters and room for
moments; refuses to know who divides them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from shardwise.train.optimizers.host_room import Room

__all__ = ["CHUNK_BYTES", "HostAdamW"]

CHUNK_BYTES = 32 * 2**20
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(slots=True)
class _Visit:
    """Values and gradients of a chunk on the host, and when they are there."""

    values: list[torch.Tensor]
    gradients: list[torch.Tensor]
    arrived: Any = None


class HostAdamW(torch.optim.Optimizer):
    """`state[parameter]` has the moments, on the host, in the parameter's shape."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        lr: float = 0.0,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": epsilon, "weight_decay": 0.0})
        self._chunk_bytes = chunk_bytes
        self._device: torch.device = self.param_groups[0]["params"][0].device
        self._room = Room(self._device)
        self._made: dict[tuple[torch.Tensor, str], torch.Tensor] = {}
        on_device = self._device.type != "cpu"
        self._stream = torch.cuda.Stream(self._device) if on_device else None  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "a step computes no loss"
        for group in self.param_groups:
            chunks = list(self._chunks([p for p in group["params"] if p.grad is not None]))
            coming = self._fetch(chunks[0]) if chunks else None
            for number, chunk in enumerate(chunks):
                assert coming is not None
                visit, coming = coming, self._fetch(chunks[number + 1]) if number + 1 < len(chunks) else None
                self._update(group, chunk, visit)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _chunks(self, parameters: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        chunk: list[torch.Tensor] = []
        for parameter in parameters:
            chunk.append(parameter)
            if sum(each.nbytes for each in chunk) >= self._chunk_bytes:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _fetch(self, chunk: Sequence[torch.Tensor]) -> _Visit:
        gradients = [parameter.grad for parameter in chunk if parameter.grad is not None]
        if self._stream is None:
            return _Visit(list(chunk), gradients)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            there = [torch.empty(each.shape, dtype=each.dtype, pin_memory=True).copy_(each, non_blocking=True)
                     for each in (*chunk, *gradients)]  # fmt: skip
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)
        return _Visit(there[: len(chunk)], there[len(chunk) :], arrived)

    def _update(self, group: dict[str, Any], chunk: Sequence[torch.Tensor], visit: _Visit) -> None:
        if visit.arrived is not None:
            visit.arrived.synchronize()
        means, squares = ([self._moment(parameter, each) for parameter in chunk] for each in _MOMENTS)
        steps = [self._steps(parameter) for parameter in chunk]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            visit.values,
            visit.gradients,
            means,
            squares,
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                for parameter, value in zip(chunk, visit.values, strict=True):
                    parameter.copy_(value, non_blocking=True)
        for each in (*means, *squares):
            self._room.leave(each)

    def _moment(self, parameter: torch.Tensor, name: str) -> torch.Tensor:
        """On the host; what a checkpoint has put elsewhere is moved there."""
        own = self.state[parameter]
        known = self._made.get((parameter, name))
        if known is None or own.get(name) is not known:
            made = self._room.zeros(parameter.numel(), parameter.dtype).view(parameter.shape)
            if name in own:
                made.copy_(own[name])
            own[name] = self._made[parameter, name] = known = made
        return known

    def _steps(self, parameter: torch.Tensor) -> torch.Tensor:
        own = self.state[parameter]
        own["step"] = own["step"].cpu() if "step" in own else torch.tensor(0.0)
        counted: torch.Tensor = own["step"]
        return counted
