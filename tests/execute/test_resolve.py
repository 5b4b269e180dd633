"""A row is resolved once: peers, values, keys and hand-overs are looked up before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn

from shardwise.execute.action_table import Backward, Forward, Post, SendGradients, SendValues, Table
from shardwise.execute.batches import MicroBatch
from shardwise.execute.flows import Flow, Flows
from shardwise.execute.resolve import Keys, resolve
from shardwise.execute.row_plan import Op, plan_of
from shardwise.schedule.actions import parse_row
from shardwise.trace.capture import capture
from shardwise.trace.install import Switch, installed
from shardwise.trace.randomness import Scope

PLACEMENT = {("0", 0): 0, ("1", 0): 1, ("2", 0): 2}


@pytest.fixture
def flow() -> Iterator[Flow]:
    """Three stages of one layer each, the last one's output is the loss."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1), nn.Flatten(0), _Sum())
    switch = Switch()
    x = torch.ones(2, 4)
    tape = capture(model, (x,), units=("0", "1", "2")).tape
    with installed({name: model.get_submodule(name) for name in tape.units}, switch):
        flows = Flows(model, switch=switch, placement=PLACEMENT, num_stages=3, loss=None, units=("0", "1", "2"))
        micro_batch = MicroBatch(index=0, samples=(0, 1), inputs=(x,), weight=2.0)
        yield flows.flow_of(micro_batch, Scope(seed=0, step=0, micro_batch=0, samples=(0, 1), place="glue", call=0))


class _Sum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum()


def table(text: str, flow: Flow, *, keys: Keys, rank: int, owners: tuple[int, ...], grad: bool = True) -> Table:
    run: dict[Op, Any] = dict.fromkeys(Op, lambda state, entry: None)
    return resolve(plan_of(parse_row(text)), [flow], run=run, rank=rank, rank_of_stage=owners, keys=keys, grad=grad)


def entries(made: Table) -> list[Any]:
    return [entry for _, entry, _, _ in made.entries]


def test_a_value_has_the_same_key_where_it_is_received_read_and_answered(flow: Flow) -> None:
    made = table("1R0F0 1F0 1S2F0 1R2B0 1B0 1S0B0", flow, keys=Keys(), rank=1, owners=(10, 1, 12))
    post, forward, send, post_gradient, backward, answer = entries(made)
    assert isinstance(post, Post)
    assert isinstance(forward, Forward)
    assert isinstance(send, SendValues)
    assert isinstance(backward, Backward)
    assert isinstance(answer, SendGradients)
    assert [message.key for message in post.messages] == [arrival.key for arrival in forward.inputs]
    assert [message.key for message in post_gradient.messages] == [arrival.key for arrival in backward.gradients]
    assert [message.key for message in answer.messages] == [key for _, key in backward.made]
    assert send.forward == forward.key == backward.key
    assert ([m.peer for m in post.messages], [m.peer for m in send.messages]) == ([10], [12])
    assert all(message.confirmed for message in send.messages)  # its gradient tells that it has arrived
    assert [str(action) for action in made.actions] == ["1F0", "1B0"]


def test_stages_of_one_rank_hand_over(flow: Flow) -> None:
    made = table("0F0 1F0", flow, keys=Keys(), rank=0, owners=(0, 0, 1))
    first, second = entries(made)
    assert [key for _, key in first.handed] == [arrival.key for arrival in second.inputs]
    assert [arrival.local for arrival in second.inputs] == [True]
    assert second.handed == ()


def test_without_gradients_nothing_waits_for_one(flow: Flow) -> None:
    made = table("1R0F0 1F0 1S2F0", flow, keys=Keys(), rank=1, owners=(0, 1, 2), grad=False)
    _, forward, send = entries(made)
    assert not any(message.confirmed for message in send.messages)
    assert not any(arrival.differentiable for arrival in forward.inputs)


def test_rows_that_go_on_where_another_ended_share_keys(flow: Flow) -> None:
    keys = Keys()
    (forward,) = entries(table("0F0", flow, keys=keys, rank=0, owners=(0, 1, 2)))
    post, backward = entries(table("0R1B0 0B0", flow, keys=keys, rank=0, owners=(0, 1, 2)))
    assert backward.key == forward.key
    assert [message.key for message in post.messages] == [arrival.key for arrival in backward.gradients]


def test_the_last_forward_of_a_row_is_marked(flow: Flow) -> None:
    made = table("0F0 1F0 2F0 2B0 1B0 0B0", flow, keys=Keys(), rank=0, owners=(0, 0, 0))
    assert [last for _, _, _, last in made.entries] == [False, False, True, False, False, False]
    assert [entry.has_loss for entry in entries(made)[:3]] == [False, False, True]
