"""A comparison says what it leaves out: steps of a schedule without a flush are run by themselves."""

from __future__ import annotations

import pytest
from models import make

from shardwise.launch import RankStarter
from shardwise.verify import verify


@pytest.mark.parametrize("schedule, said", [("pipedream-2bw", True), ("1f1b", False)])
def test_steps_that_overlap_in_training_are_compared_one_by_one_and_that_is_said(
    schedule: str, said: bool, starter: RankStarter
) -> None:
    example = make("gpt2")
    layout = f"pp=2,micro_batches=4,schedule={schedule}"
    comparison = verify(example.model, example.batch, layout=layout, loss=example.loss, starter=starter, timeout_s=60)
    assert comparison.equal, str(comparison)
    assert ("docs/asynchronous.md" in str(comparison)) is said
