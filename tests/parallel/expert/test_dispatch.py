"""Rows travel to their rank and back; gradients take the way back, also where a rank sends nothing."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from parallel.expert.models import EXPERTS, WIDTH, Block, ListedMix, StackedExperts
from shardwise.describe.expert import ExpertPlan, Listed, Stacked
from shardwise.errors import DataflowError
from shardwise.parallel.expert.dispatch import after, anchor, bring_back, send_to
from shardwise.parallel.expert.groups import ExpertGroup, on_expert_threads
from shardwise.parallel.expert.install import DividedExperts
from shardwise.parallel.expert.load import Loads
from shardwise.parallel.expert.stacked import stacked_forward

SENT = ((1, 2), (0, 3))  # rows from rank r to rank 0 and 1
RECEIVED = ((1, 0), (2, 3))


def test_rows_of_several_types_arrive_as_they_were_sent() -> None:
    def work(group: ExpertGroup) -> tuple[torch.Tensor, ...]:
        sent, received = SENT[group.rank], RECEIVED[group.rank]
        rows = torch.arange(sum(sent) * 3, dtype=torch.float64).view(-1, 3) + 100 * group.rank
        halves = (torch.arange(sum(sent)) + 10.0 * group.rank).half()[:, None]
        numbers = (torch.arange(sum(sent), dtype=torch.int32) + 10 * group.rank)[:, None]
        arrived, _ = send_to([rows, halves, numbers], anchor(rows), group, sent, received)
        return arrived

    (rows0, halves0, numbers0), (rows1, _, numbers1) = on_expert_threads(2, work)
    assert rows0.tolist() == [[0, 1, 2]]
    assert halves0.tolist() == [[0]]
    assert numbers0.tolist() == [[0]]
    assert rows1[:, 0].tolist() == [3, 6, 100, 103, 106]
    assert numbers1.flatten().tolist() == [1, 2, 10, 11, 12]


def test_gradients_come_back_to_where_the_rows_were() -> None:
    """Rank 0 squares what it gets, rank 1 multiplies by five."""

    def work(group: ExpertGroup) -> tuple[torch.Tensor, torch.Tensor]:
        sent, received = SENT[group.rank], RECEIVED[group.rank]
        rows = (torch.arange(sum(sent) * 2, dtype=torch.float64).view(-1, 2) + 1).requires_grad_()
        (arrived,), tie = send_to([rows], anchor(rows), group, sent, received)
        made = arrived * arrived if group.rank == 0 else arrived * 5
        back, tie = bring_back(made, tie, group, received, sent)
        after(back, tie).sum().backward()
        return rows.detach(), rows.grad

    (rows, gradient), (_, other) = on_expert_threads(2, work)
    assert torch.equal(gradient, torch.cat([2 * rows[:1], torch.full_like(rows[1:], 5)]))
    assert torch.equal(other, torch.full((3, 2), 5.0, dtype=torch.float64))


def test_a_rank_without_rows_takes_part_in_the_backward() -> None:
    def work(group: ExpertGroup) -> torch.Tensor | None:
        sent, received = ((0, 2), (0, 0))[group.rank], ((0, 0), (2, 0))[group.rank]
        rows = torch.ones(sum(sent), 2, requires_grad=True)
        weight = torch.tensor(3.0, requires_grad=True)
        (arrived,), tie = send_to([rows], anchor(rows), group, sent, received)
        made = arrived * weight if len(arrived) else arrived.detach()
        back, tie = bring_back(made, tie, group, received, sent)
        after(torch.zeros(2, 2) if not len(back) else back, tie).sum().backward()
        return rows.grad if group.rank == 0 else weight.grad

    gradient, of_weight = on_expert_threads(2, work)
    assert torch.equal(gradient, torch.full((2, 2), 3.0))
    assert float(of_weight) == 4.0


def test_bytes_that_stay_on_a_rank_are_not_counted() -> None:
    def work(group: ExpertGroup) -> int:
        rows = torch.zeros(sum(SENT[group.rank]), 4)
        send_to([rows], anchor(rows), group, SENT[group.rank], RECEIVED[group.rank])
        return group.sent_bytes

    assert on_expert_threads(2, work) == [2 * 16, 0]


def test_ranks_that_are_at_different_layers_are_told_so() -> None:
    """A layer that one rank leaves out would pair with another one: its number does not fit."""

    def work(group: ExpertGroup) -> torch.Tensor:
        module = StackedExperts()
        experts = Stacked(
            module="", num_experts=5, parameters=(), rows="tokens", index="chosen", weights="gates", attributes=()
        )
        loads = Loads()
        loads.declare("blocks.3.mix", 5)
        forward = stacked_forward(module, experts, group, loads, layer="blocks.3.mix", number=group.rank)
        return forward(torch.zeros(2, WIDTH), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))

    with pytest.raises(DataflowError, match=r"this one is at blocks.3.mix .*LayerDrop"):
        on_expert_threads(2, work)


def test_a_rank_without_tokens_takes_part() -> None:
    def work(group: ExpertGroup) -> tuple[torch.Size, list[int], torch.Tensor]:
        torch.manual_seed(0)
        module = StackedExperts()
        plan = ExpertPlan(ep=2, units={"": (stacked(),)}, reasons={})
        divided = DividedExperts(module, plan, group)
        rows = torch.ones(3 * group.rank, WIDTH, requires_grad=True)
        out = module(rows, torch.zeros(3 * group.rank, 2, dtype=torch.int64), torch.ones(3 * group.rank, 2))
        out.sum().backward()
        return out.shape, divided.loads.take()[""].tolist(), module.up.grad

    (of_none, nothing, gradient), (of_three, rows, no_gradient) = on_expert_threads(2, work)
    assert of_none == (0, WIDTH)
    assert of_three == (3, WIDTH)
    assert nothing == [0] * (EXPERTS + 1)
    assert rows == [6, 0, 0, 0, 0, 0]
    assert float(gradient.abs().sum()) > 0
    assert float(no_gradient.abs().sum()) == 0


def stacked() -> Stacked:
    return Stacked(
        module="",
        num_experts=EXPERTS,
        parameters=("up", "down", "bias"),
        rows="tokens",
        index="chosen",
        weights="gates",
        attributes=("count",),
    )


@pytest.mark.parametrize("checkpointed", [False, True])
def test_experts_at_the_end_of_a_list_that_a_rank_leaves_out_are_exchanged_again_in_a_checkpoint(
    checkpointed: bool,
) -> None:
    """A checkpoint stops to compute again behind the last tensor that its backward needs: not before the others come.

    rank 0 chooses experts 0 and 1, rank 1 chooses 3 and 4.
    """
    members = tuple(f"mix.experts.{i}" for i in range(EXPERTS))
    plan = ExpertPlan(ep=2, units={"": (Listed(module="mix.experts", members=members, caller="mix"),)}, reasons={})

    def work(group: ExpertGroup) -> dict[str, torch.Tensor | None]:
        torch.manual_seed(0)
        block = Block(ListedMix)
        with torch.no_grad():
            block.mix.router.bias[: 2 if group.rank == 0 else 3] += 100.0 * (1 - 2 * group.rank)
        DividedExperts(block, plan, group)
        x = torch.randn(4, WIDTH).requires_grad_()
        out = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        out.sum().backward()
        return {name: parameter.grad for name, parameter in block.named_parameters()}

    first, last = on_expert_threads(2, work)
    given = [{name for name, gradient in each.items() if gradient is not None} for each in (first, last)]
    assert {name.split(".")[2] for name in given[0] if ".experts." in name} == {"0", "1"}
    assert {name.split(".")[2] for name in given[1] if ".experts." in name} == {"3", "4"}
