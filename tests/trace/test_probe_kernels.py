"""What is timed is what its kernel says: the same products, the same attention, the same bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.describe.kernels import KernelKind, Phase
from shardwise.describe.measured import TINY, UPDATE
from shardwise.trace.count import flops_of
from shardwise.trace.probe_case import seconds_of
from shardwise.trace.probe_kernels import cases, seconds_of_all

CPU = torch.device("cpu")
QUICK = list(cases(CPU, quick=True))


class Flops(TorchDispatchMode):
    """Of everything that runs inside, as a trace counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.total += flops_of(func, args, kwargs or {}, out)
        return out


def named(case) -> str:
    return f"{case.what or case.kernel.kind} {case.kernel.phase} {case.kernel.dtype} {case.kernel.shape}"


@pytest.mark.parametrize("case", QUICK, ids=named)
def test_a_case_computes_the_flops_of_its_kernel(case) -> None:
    run = case.make()
    with Flops() as counted:
        run()
    share = 0.5 if case.kernel.kind is KernelKind.ATTENTION else 1.0  # the half that a causal mask leaves
    if case.what != TINY:
        assert case.kernel.flops == share * counted.total


def test_all_three_products_of_a_linear_are_there_and_other_dtypes() -> None:
    products = [case.kernel for case in cases(CPU) if case.kernel.kind is KernelKind.MATMUL]
    assert {kernel.phase for kernel in products} == set(Phase)
    assert {kernel.dtype for kernel in products} == {"float32", "bfloat16"}
    m, n, k = 256, 8192, 128
    shapes = {kernel.phase: kernel.shape for kernel in products if sorted(kernel.shape) == sorted((1, m, n, k))}
    assert shapes == {Phase.FORWARD: (1, m, n, k), Phase.INPUT: (1, m, k, n), Phase.WEIGHT: (1, n, k, m)}


def test_updates_are_measured_on_what_fits_a_cache_and_what_does_not() -> None:
    updates = [case for case in cases(CPU) if case.what == UPDATE]
    assert [case.kernel.nbytes for case in updates] == [36 << 19, 36 << 22]
    updates[0].make()()


def test_a_stream_fits_no_cache() -> None:
    assert max(case.kernel.nbytes for case in cases(CPU) if case.what.startswith("sum of")) >= 100 << 20


def test_seconds_are_of_one_run() -> None:
    ran = 0

    def run() -> None:
        nonlocal ran
        ran += 1

    seconds = seconds_of(run, CPU, window_s=0.002)
    assert 0 < seconds < 0.002
    assert ran * seconds > 0.0005


def test_a_rank_that_computes_first_is_timed_alone_and_with_the_others() -> None:
    waited = []
    alone = seconds_of_all(CPU, window_s=1e-4, quick=True, together=lambda: waited.append(1))
    other = seconds_of_all(CPU, window_s=1e-4, quick=True, first=False, together=lambda: waited.append(1))
    assert len(alone) == len(other) == len(QUICK)
    assert len(waited) == 4 * len(QUICK)
    assert all(first > 0 and second > 0 for first, second in alone)
    assert all(first == 0 and second > 0 for first, second in other)
    assert all(math.isfinite(seconds) for pair in alone for seconds in pair)
