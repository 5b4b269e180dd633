"""A model of some blocks is timed beside its kernels, and its memory at the peak of a step beside a count of it."""

from __future__ import annotations

from shardwise.describe.kernels import KernelKind, Phase
from shardwise.execute.probe_model import counted_model, model_kernels, model_run
from shardwise.execute.process_memory import forget_peak, peak_resident_bytes, proportional_bytes, resident_bytes


def test_more_tokens_have_more_that_comes_and_goes_and_the_same_states() -> None:
    few, many = (counted_model(tokens) for tokens in (16, 64))
    assert few[0] == many[0]
    assert 2 * few[1] < many[1] < many[0]


def test_a_process_holds_more_than_the_tensors_of_a_model_at_the_peak_of_a_step() -> None:
    found = model_run(16)
    assert found.peak.measured > found.peak.states + found.peak.passing > 0
    assert 0 < found.forward_s < 60
    assert 0 < found.backward_s < 60


def test_a_backward_has_twice_the_products_of_a_forward() -> None:
    forward, backward = model_kernels(16)
    flops = [sum(k.flops * k.count for k in part if k.kind is KernelKind.MATMUL) for part in (forward, backward)]
    assert flops[1] == 2 * flops[0] > 0
    assert {kernel.phase for kernel in forward} == {Phase.FORWARD}


def test_a_peak_is_of_what_follows_and_a_share_is_no_more_than_the_whole() -> None:
    forget_peak()
    assert 0 < proportional_bytes() <= resident_bytes() * 1.01
    block = bytearray(64 << 20)
    held = resident_bytes()
    del block
    assert peak_resident_bytes() >= held * 0.99
