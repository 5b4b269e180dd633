"""What a rank does in this benchmark: make contenders, hold them against one process, take steps by the clock.

Everything returned is plain numbers and text. Knows neither ratios nor files.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor

from benchmarks.tensor.contenders import CONTENDERS, MODELS, Contender, Tensors
from benchmarks.tensor.counted import Counted
from benchmarks.tensor.model import Shape, batch_of, loss_of
from shardwise.launch import RankContext

__all__ = ["Timed", "missing_peer", "peak_bytes", "timed_steps"]

WARM_UP_STEPS = 2
MEMORY_STEPS = 3
TOLERANCE = 1e-5  # float32: sums over two ranks in another order


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One contender on one rank: seconds of every step, and bytes of a step by axis."""

    seconds: tuple[float, ...]
    nbytes: Mapping[str, int]


def missing_peer(context: RankContext, model: str, name: str, shape: Shape) -> str | None:
    """Why a contender cannot run here; None if it took a step."""
    torch.set_num_threads(1)
    try:
        contender = CONTENDERS[name](MODELS[model][0](shape), shape, context.rank)
        contender.step(batch_of(shape))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def timed_steps(context: RankContext, model: str, names: Sequence[str], shape: Shape, rounds: int) -> dict[str, Timed]:
    """Steps of every contender on this rank. Raises `AssertionError` where one computes wrongly."""
    torch.set_num_threads(1)
    whole, batch = MODELS[model][0](shape), batch_of(shape)
    loss, expected = _of_one_process(whole, batch)
    contenders = {name: CONTENDERS[name](copy.deepcopy(whole), shape, context.rank) for name in names}
    nbytes: dict[str, dict[str, int]] = {}
    for name, contender in contenders.items():
        _same(name, contender, batch, loss, expected)
        with Counted() as counted:
            contender.step(batch)
        nbytes[name] = contender.axes(counted)
        for _ in range(WARM_UP_STEPS):
            _timed(contender, batch)
    del whole, expected
    gc.collect()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            seconds[name].append(_timed(contenders[name], batch))
    for contender in contenders.values():
        contender.close()
    return {name: Timed(seconds=tuple(seconds[name]), nbytes=nbytes[name]) for name in names}


def peak_bytes(context: RankContext, model: str, name: str, shape: Shape) -> tuple[int, int, int]:
    """The peak resident set of this process in steps of one contender; what was resident before the model was made;
    and the peak until the steps began: the whole model, and what is needed to divide it."""
    torch.set_num_threads(1)
    _trim()
    before = _status("VmRSS")
    contender, batch = CONTENDERS[name](MODELS[model][0](shape), shape, context.rank), batch_of(shape)
    gc.collect()
    for _ in range(WARM_UP_STEPS + 1):
        _timed(contender, batch)
    _trim()
    making = _status("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # puts VmHWM back to what is resident now
    for _ in range(MEMORY_STEPS):
        _timed(contender, batch)
    return _status("VmHWM"), before, making


def _of_one_process(model: nn.Module, batch: Tensors) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    reference = copy.deepcopy(model)
    loss = loss_of(reference(**batch))
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.item()), {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}


def _timed(contender: Contender, batch: Tensors) -> float:
    for parameter in contender.parameters.values():
        parameter.grad = None
    dist.barrier()
    start = time.perf_counter()
    contender.step(batch)
    return time.perf_counter() - start


def _same(name: str, contender: Contender, batch: Tensors, loss: float, wholes: Tensors) -> None:
    """The contender's loss and gradients are those of one process."""
    got = contender.step(batch)
    assert abs(got - loss) <= TOLERANCE * abs(loss), f"{name}: loss {got}, one process {loss}"
    expected = contender.parts(wholes)
    parameters = contender.parameters
    assert set(parameters) == set(expected), f"{name}: parameters {sorted(set(parameters) ^ set(expected))}"
    scale = statistics.fmean(gradient.norm().item() for gradient in expected.values())
    for parameter, value in parameters.items():
        gradient = _local(value)
        assert gradient is not None, f"{name}: {parameter} has no gradient"
        error = (gradient - expected[parameter]).norm() / max(expected[parameter].norm().item(), 1e-3 * scale)
        assert error <= TOLERANCE, f"{name}: the gradient of {parameter} differs by {error:.1e} from one process"


def _local(parameter: nn.Parameter) -> torch.Tensor | None:
    """The gradient, laid out as the parameter is: DTensor may leave it otherwise."""
    if isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor):
        return parameter.grad.redistribute(placements=parameter.placements).to_local()
    return parameter.grad


def _trim() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(field: str) -> int:
    """Bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
