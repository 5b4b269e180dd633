"""The counters of `benchmarks.context`: what is saved for backward, what is alive, each storage once."""

from __future__ import annotations

import torch

from benchmarks.context.counted import LiveBytes, saved_bytes


def test_a_storage_that_is_saved_twice_counts_once_and_what_was_there_before_does_not() -> None:
    weight = torch.ones(8, 8, requires_grad=True)
    x = torch.ones(4, 8)
    with saved_bytes([weight, x]) as saved:
        hidden = x @ weight  # saves x and weight, which were there
        (hidden * hidden).sum()  # saves hidden twice
    assert saved.total == hidden.nbytes


def test_views_of_one_storage_count_whole_and_once() -> None:
    x = torch.ones(4, 8, requires_grad=True)
    with saved_bytes([x]) as saved:
        hidden = x + 1
        (hidden[:, :4] * hidden[:, 4:]).sum()
    assert saved.total == hidden.nbytes


def test_the_peak_is_of_what_is_alive_at_once() -> None:
    with LiveBytes([]) as live:
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second.view(10, 100) * 2  # a view is no new storage
        del second
        fourth = third + 1
    assert live.peak == 2 * 4000
    assert live.now == third.nbytes + fourth.nbytes
    del third, fourth
    assert live.now == 0


def test_tensors_that_are_asked_for_a_shape_take_nothing() -> None:
    with LiveBytes([]) as live:
        torch.empty(1000, device="meta").view(10, 100)
    assert live.peak == 0
