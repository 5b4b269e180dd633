"""Live bytes: counted when storages are made, resized and gone; without a device nothing is computed."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from shardwise.errors import ModelError
from shardwise.verify.rehearse_memory import LiveBytes, RehearsalMode, fake_parameter

CPU = torch.device("cpu")
KIB = 1024


def fake_of(numel: int) -> tuple[FakeTensorMode, torch.Tensor]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return mode, fake_parameter(mode, torch.empty(numel, device="meta"))


def test_what_is_made_counts_until_it_goes_and_views_count_once() -> None:
    live = LiveBytes(CPU)
    live.begin()
    with RehearsalMode(live):
        a = torch.zeros(256)
        b = a * 2
        view = b.view(16, 16)
        assert live.alive == 2 * KIB
        del b
        assert live.alive == 2 * KIB
        del view
        assert live.alive == KIB
    assert live.peak.nbytes == 2 * KIB


def test_the_peak_is_looked_at_behind_the_same_operation_of_the_next_step() -> None:
    live = LiveBytes(CPU)
    kept = torch.zeros(256)
    live.adopt([kept])

    def step() -> None:
        a = kept + 1
        b = a + 1
        del a
        b.sum()

    seen: list[dict[int, int]] = []
    with RehearsalMode(live):
        live.begin()
        step()
        peak = live.peak
        live.begin(stop_at=peak.at, look=lambda sizes, stays: seen.append({key: sizes[key] for key in stays}))
        step()
    assert peak.nbytes == 3 * KIB
    assert seen == [{kept.untyped_storage()._cdata: KIB}]


def test_memory_that_comes_and_goes_behind_a_parameter_is_followed() -> None:
    live = LiveBytes(CPU)
    flat = torch.zeros(256)
    live.adopt([flat], resized=True)
    with RehearsalMode(live):
        flat.untyped_storage().resize_(0)
        one = torch.zeros(1)
        assert live.alive == one.nbytes
        flat.untyped_storage().resize_(KIB)
        two = torch.zeros(1)
        assert live.alive == KIB + one.nbytes + two.nbytes


def test_what_touches_a_fake_tensor_is_fake_and_the_rest_is_real() -> None:
    mode, weight = fake_of(4)
    with RehearsalMode(LiveBytes(CPU), mode):
        real = torch.ones(4) + 1
        mixed = weight * real
        unwritten = torch.empty(4)
    assert isinstance(mixed, FakeTensor)
    assert isinstance(unwritten, FakeTensor)
    assert not isinstance(real, FakeTensor)
    assert real.tolist() == [2.0] * 4


def test_a_model_that_looks_at_what_it_counts_is_refused() -> None:
    mode, weight = fake_of(4)
    with RehearsalMode(LiveBytes(CPU), mode):
        assert float(weight.sum()) == 1.0  # a norm, a loss
        with pytest.raises(ModelError, match="rehearse it where there is a device"):
            bool((weight > 0).any())
