"""Single operations by the clock, as the kernels that a price is made of, on one rank alone and on all at once.

Knows which operations are measured; refuses to know what is fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from shardwise.describe.kernels import Phase
from shardwise.trace.probe_case import Case, seconds_of
from shardwise.trace.probe_memory import between, launch, stream, update
from shardwise.trace.probe_products import attention, batched, product

__all__ = ["cases", "seconds_of_all"]

# (m, n, k): tokens, outputs, inputs of a linear
_SHAPES = (
    (64, 64, 64),
    (128, 128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (1024, 1024, 1024),
    (128, 512, 128),
    (512, 192, 768),
    (256, 8192, 128),  # a vocabulary
    (2048, 256, 64),
    (32, 1024, 512),  # few tokens: the weight is read for little work
    (64, 1024, 256),
)
_OF_A_GPU = ((1024, 1024, 1024), (4096, 4096, 4096), (8192, 8192, 8192), (4096, 16384, 4096), (8192, 1024, 8192))
_QUICK = ((64, 64, 64), (256, 256, 256), (512, 512, 512))
_STREAMS = (1 << 12, 1 << 16, 1 << 20, 1 << 24)  # elements of float32: 16 KiB to 64 MiB a tensor
_BETWEEN = (1 << 15, 1 << 18)  # elements of what stands between products
_UPDATED = (1 << 19, 1 << 22)  # parameters


def cases(device: torch.device, *, quick: bool = False) -> Iterator[Case]:
    """What is measured, the same on every rank."""
    on_gpu = device.type == "cuda"
    shapes = _QUICK if quick else (*_SHAPES, *(_OF_A_GPU if on_gpu else ()))
    yield launch(device)
    for shape in shapes:
        for phase in Phase:
            yield product(shape, phase, torch.float32, device)
    for dtype in (torch.bfloat16,) if quick or not on_gpu else (torch.bfloat16, torch.float16):
        for shape in shapes[-1:] if quick else (shapes if on_gpu else shapes[1:5]):
            yield product(shape, Phase.FORWARD, dtype, device)
    yield batched(16, 128, 128, 32, device)
    for tokens, width in ((128, 32),) if quick else ((128, 32), (256, 64), (1024, 64)):
        yield from attention(8, tokens, width, torch.bfloat16 if on_gpu else torch.float32, device)
    for numel in _STREAMS[1::2] if quick else _STREAMS:
        yield stream(numel, device)
    for numel in _UPDATED[:1] if quick else _UPDATED:
        yield update(numel, device)
    for numel in _BETWEEN[:1] if quick else _BETWEEN:
        yield from between(numel, device)


def seconds_of_all(
    device: torch.device,
    *,
    window_s: float,
    quick: bool = False,
    first: bool = True,
    together: Callable[[], None] | None = None,
    shared: float = 1.0,
) -> list[tuple[float, float]]:
    """Of one kernel of every case, in their order: where one rank computes it alone, and where all do at once.

    `together` waits for all ranks; without it there is one. The `first` rank computes alone; the others' first number
    is 0. Ranks that share a core with others take `shared` times as long a window: it has turns of all.
    """
    found = []
    for case in cases(device, quick=quick):
        run = case.make()
        run()
        if together is not None:
            together()
        alone_s = seconds_of(run, device, window_s=window_s) if first else 0.0
        at_once_s = alone_s
        if together is not None:
            together()
            at_once_s = seconds_of(run, device, window_s=window_s * shared)
        count = case.count(run)
        found.append((alone_s / count, at_once_s / count))
    return found
