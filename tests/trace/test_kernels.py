"""Every operation of a forward and backward is a kernel: what it multiplies or moves, when, and what grows with the
samples."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator

import pytest
import torch
import torch.nn as nn
from models import make

from shardwise.describe.kernels import Kernel, KernelKind, Phase
from shardwise.describe.profile import ModelProfile
from shardwise.execute.batches import select
from shardwise.trace.kernels import mirrored
from shardwise.trace.profile import trace

torch.set_num_threads(1)
FLOAT = 4


class Two(nn.Module):
    """A product, what works on every element, a product without a trained weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.last = nn.Linear(16, 4, bias=False).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unit = Two()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.unit(x).sum()


def of_unit() -> list[Kernel]:
    (call,) = trace(Whole(), (torch.randn(6, 8),), units=("unit",)).calls
    return list(call.kernels)


def kernel(phase: Phase, shape: tuple[int, ...], nbytes: int, batch: int, dims: tuple[int, ...] = (1,)) -> Kernel:
    flops = 2 * shape[0] * shape[1] * shape[2] * shape[3]
    return Kernel(
        kind=KernelKind.MATMUL,
        phase=phase,
        dtype="float32",
        flops=flops,
        nbytes=nbytes * FLOAT,
        shape=shape,
        batch_dims=dims,
        batch_bytes=batch * FLOAT,
    )


def test_products_know_their_shape_their_phase_and_what_belongs_to_the_batch() -> None:
    found = [each for each in of_unit() if each.kind is KernelKind.MATMUL]
    x, hidden, out, first, last = 6 * 8, 6 * 16, 6 * 4, 8 * 16, 16 * 4
    assert found == [
        kernel(Phase.FORWARD, (1, 6, 16, 8), x + hidden + first + 16, x + hidden),  # with a bias
        kernel(Phase.FORWARD, (1, 6, 4, 16), hidden + out + last, hidden + out),
        kernel(Phase.INPUT, (1, 6, 16, 4), 4 * 0 + 1 + last + hidden, 1 + hidden),  # a sum's gradient is one number
        kernel(Phase.WEIGHT, (1, 16, 8, 6), hidden + x + first, hidden + x, dims=(3,)),
    ]


def test_everything_else_moves_what_it_reads_and_writes_once() -> None:
    hidden = 6 * 16 * FLOAT
    moved = [(each.phase, each.nbytes) for each in of_unit() if each.kind is KernelKind.MEMORY]
    assert moved == [
        (Phase.FORWARD, 2 * hidden),  # relu
        (Phase.INPUT, 3 * hidden),  # its gradient, of what it gave
        (Phase.WEIGHT, hidden + 16 * FLOAT),  # of the bias
    ]


def test_what_an_expanded_tensor_shows_is_read_once() -> None:
    class Adds(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x[:1].expand(6, 8)

    model = nn.Sequential(nn.Linear(8, 8, bias=False), Adds())
    profile = trace(model, (torch.randn(6, 8),), loss=lambda out, batch: out.mean(), units=("0",))
    assert 4 * (48 + 8 + 48) in [kernel.nbytes for part in profile.glue for kernel in part.kernels]


def kernels(profile: ModelProfile) -> Iterator[Kernel]:
    yield from (kernel for part in profile.parts for kernel in part.kernels)


def flops(found: Iterable[Kernel], *, forward: bool) -> int:
    """As if causal attention computed what its mask hides, which is how a profile counts it."""
    total = 0
    for each in found:
        if (each.phase is Phase.FORWARD) != forward:
            continue
        own = each.flops
        if each.kind is KernelKind.ATTENTION:
            batch, queries, keys, width, values = each.shape
            own = 2 * batch * queries * keys * ((width + values) if forward else (3 * width + 2 * values))
            assert each.flops in (own, own * (queries + 1) // (2 * keys))
        total += own * each.count
    return total


MODELS = ["llama", "bert", "mixtral", "t5", "resnet", "mamba", "unet", "whisper", "deepseek_v3", "tied"]


@pytest.mark.parametrize("name", MODELS)
def test_the_flops_of_kernels_are_those_of_the_profile(name: str) -> None:
    example = make(name)
    profile = trace(example.model, example.batch, loss=example.loss)
    assert flops(kernels(profile), forward=True) == profile.forward_flops
    assert flops(kernels(profile), forward=False) == profile.backward_flops
    for call in profile.calls:
        weight = sum(k.flops * k.count for k in call.kernels if k.phase is Phase.WEIGHT)
        assert weight == call.weight_flops


@pytest.mark.parametrize("name", MODELS)
def test_kernels_of_other_numbers_of_samples_are_scaled_ones(name: str) -> None:
    example = make(name)
    small = trace(example.model, select(example.batch, range(4), size=8), loss=example.loss)
    large = trace(example.model, example.batch, loss=example.loss)
    twice = [dataclasses.replace(each.scaled(2.0), count=each.count) for each in kernels(small)]
    assert products(twice) == products(kernels(large))
    moved, expected = (sum(k.nbytes * k.count for k in each) for each in (twice, list(kernels(large))))
    assert moved == pytest.approx(expected, rel=0.01)  # masks and positions that are made from nothing


def products(found: Iterable[Kernel]) -> collections.Counter[tuple[object, ...]]:
    counts: collections.Counter[tuple[object, ...]] = collections.Counter()
    for each in found:
        if each.kind is not KernelKind.MEMORY:
            counts[each.kind, each.phase, each.shape, each.flops, each.nbytes] += each.count
    return counts


def test_blocks_that_are_alike_share_their_kernels_also_in_json() -> None:
    example = make("llama")
    profile = trace(example.model, example.batch)
    layers = [call.kernels for call in profile.calls if "layers" in call.unit]
    assert all(each is layers[0] for each in layers)
    text = profile.to_json()
    assert ModelProfile.from_json(text) == profile
    assert text.count('"attention"') == 2  # forward and backward of all layers


def test_a_backward_that_nobody_saw_is_taken_as_twice_the_forward() -> None:
    found = [each for each in of_unit() if each.phase is Phase.FORWARD]
    assert sum(each.flops * each.count for each in mirrored(found)) == 2 * sum(k.flops * k.count for k in found)
