"""A unit divided in place: local tensors, one copy for a shared input, biases once, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from parallel.tensor.blocks import Block, hand_plan
from shardwise.errors import ModelError
from shardwise.launch import RankContext
from shardwise.parallel.hold import hold
from shardwise.parallel.tensor.install import shard_unit
from shardwise.parallel.tensor.processes import ProcessTensorGroup
from shardwise.parallel.tensor.slices import cut
from shardwise.parallel.tensor.sums import sum_partial
from shardwise.testing import on_ranks
from shardwise.trace.absent import Absent


class Counting:
    """A group of one rank that says it is the first of two, and counts the sums."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.sums = 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sums += 1
        return tensor


def test_parameters_become_parts_under_their_names() -> None:
    block = Block()
    names = [name for name, _ in block.named_parameters()]
    whole = block.gate_up.weight.detach().clone()
    shard_unit(block, hand_plan(), Counting())

    assert [name for name, _ in block.named_parameters()] == names
    assert torch.equal(block.gate_up.weight, cut(whole, hand_plan().slices["gate_up.weight"], 0))
    assert (block.gate_up.out_features, block.down.in_features, block.attention.num_heads) == (32, 16, 2)


def test_layers_that_read_one_tensor_share_a_copy() -> None:
    block, group = Block(), Counting()
    shard_unit(block, hand_plan(), group)
    y = block(torch.randn(2, 3, 16, requires_grad=True))

    assert group.sums == 2  # behind o and down
    y.sum().backward()
    assert group.sums == 4  # before {q, k, v} and gate_up


def test_nothing_is_kept_of_a_call() -> None:
    block = Block()
    sharding = shard_unit(block, hand_plan(), Counting())
    block(torch.randn(2, 3, 16, requires_grad=True))

    assert sharding._copied is None


def test_off_shows_the_whole_unit_without_values() -> None:
    block = Block()
    whole = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    sharding = shard_unit(block, hand_plan(), Counting())
    local = dict(block.named_parameters())

    with sharding.off():
        assert {name: tuple(parameter.shape) for name, parameter in block.named_parameters()} == whole
        assert isinstance(block.down.weight, Absent | torch.nn.Parameter)
        assert (block.down.in_features, block.attention.num_heads) == (32, 4)
    assert all(block.get_parameter(name) is parameter for name, parameter in local.items())
    assert (block.down.in_features, block.attention.num_heads) == (16, 2)


def test_absent_parameters_become_absent_parts() -> None:
    block = Block()
    hold(block, [])
    shard_unit(block, hand_plan(), Counting())

    assert block.down.weight.shape == (16, 16)
    with pytest.raises(Exception, match="parameter down.weight"):
        block.down.weight + 1


def test_close_gives_the_forwards_back() -> None:
    block = Block()
    sharding = shard_unit(block, hand_plan(), Counting())
    sharding.close()

    assert not any("forward" in vars(module) for module in block.modules())
    assert block.attention.num_heads == 4


def test_a_plan_of_another_unit_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"Linear has no 'attention.o.weight'"):
        shard_unit(torch.nn.Linear(2, 2), hand_plan(), Counting())


@on_ranks(2)
def test_two_processes_compute_what_one_does(rank: RankContext) -> None:
    process_group = dist.new_group([0, 1])
    group = ProcessTensorGroup(process_group)
    torch.manual_seed(0)
    whole = Block().double()
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    part, plan = copy.deepcopy(whole), hand_plan()
    shard_unit(part, plan, group)
    inputs = [x.clone().requires_grad_(True) for _ in range(2)]
    outputs = [block(given) for block, given in zip((whole, part), inputs, strict=True)]
    for y in outputs:
        y.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in part.named_parameters() if parameter.grad is not None}
    sum_partial(gradients, plan, group)

    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None
        expected = cut(parameter.grad, plan.slices[name], rank.rank) if name in plan.slices else parameter.grad
        torch.testing.assert_close(gradients[name], expected)
    dist.destroy_process_group(process_group)
