"""A row may begin what the next one ends: forwards, messages and losses are handed on, and numbers are used again."""

from __future__ import annotations

import threading

import pytest
import torch

import awkward_models as awkward
from execute.test_engine import Mail, NoTransport, Pipeline, assert_gradients, row, wanted
from shardwise.execute.step_state import UnderWay
from shardwise.schedule.actions import Action

FIRST = [
    "0F0 0S1F0 0R1B0 0F1 0S1F1",
    "1R0F0 1R0F1 1F0 1B0 1S0B0",
]
SECOND = ["0R1B1 0B0 0B1", "1F1 1B1 1S0B1"]


def test_a_row_goes_on_where_the_one_before_ended() -> None:
    pipeline = Pipeline(awkward.Awkward(), rank=0, rank_of_stage=(0, 0), transport=NoTransport())
    between = UnderWay()
    for text in ("0F0 1F0 0F1", "1B0 1F1 0B0", "1B1 0B1"):
        losses, moments = pipeline.engine.run(row(text), pipeline.works, under_way=between)
        assert [str(moment.action) for moment in moments] == text.split()
    pipeline.close()
    assert [float(losses[m]) for m in (0, 1)] == pytest.approx(wanted()[0])
    assert_gradients(pipeline.model)
    assert not between.alive
    assert not between.incoming


def test_two_ranks_leave_messages_for_the_next_row_and_use_the_numbers_again() -> None:
    mail = Mail()
    pipelines = [Pipeline(awkward.Awkward(), rank=r, rank_of_stage=(0, 1), transport=mail.of(r)) for r in (0, 1)]
    between = [UnderWay(), UnderWay()]
    texts = [FIRST, SECOND]

    def run(rank: int) -> None:
        for text in texts * 3:
            pipelines[rank].engine.run(row(text[rank]), pipelines[rank].works, under_way=between[rank])

    first = threading.Thread(target=run, args=(0,))
    first.start()
    run(1)
    first.join(timeout=30)
    for pipeline in pipelines:
        pipeline.close()
    for name, gradient in wanted()[1].items():
        own = pipelines[0 if name.startswith(("layers.0", "layers.1")) else 1].model.get_parameter(name)
        if name.startswith("layers"):
            torch.testing.assert_close(own.grad, 3 * gradient, rtol=1e-5, atol=1e-6)


def test_whoever_asks_is_told_ahead_of_every_action() -> None:
    pipeline = Pipeline(awkward.Awkward(), rank=0, rank_of_stage=(0, 0), transport=NoTransport())
    told: list[str] = []
    has_gradient: list[bool] = []

    def before(action: Action) -> None:
        told.append(str(action))
        has_gradient.append(pipeline.model.get_parameter("layers.0.linear.weight").grad is not None)

    pipeline.engine.run(row("0F0 1F0 1B0 0B0"), pipeline.works, before_action=before)
    pipeline.close()
    assert told == ["0F0", "1F0", "1B0", "0B0"]
    assert has_gradient == [False, False, False, False]
