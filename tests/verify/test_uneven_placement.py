"""Ranks that own different numbers of stages, as a search for unequal devices places them, train as one device does."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import make

from shardwise.launch import RankStarter
from shardwise.schedule import Costs
from shardwise.schedule.search_placements import search_placements
from shardwise.verify import verify

TOLERANCE = 1e-5  # what float32 leaves of sums taken in another order


@pytest.mark.parametrize("name, layout", [("gpt2", ""), ("llama", ",dp=2")])
def test_three_stages_on_one_rank_and_one_on_the_other_are_one_device(
    name: str, layout: str, tmp_path: Path, starter: RankStarter
) -> None:
    found = search_placements(Costs.uniform(4), num_micro_batches=4, num_ranks=2, speeds=(1.0, 0.4), seconds=0.2)
    assert [len(stages) for stages in found.schedule.ranks] == [3, 1]
    path = tmp_path / "searched.json"
    path.write_text(found.schedule.to_json())
    example = make(name)
    comparison = verify(
        example.model,
        example.batch,
        layout=f"pp=2,chunks=2,micro_batches=4,schedule={path}{layout}",
        loss=example.loss,
        starter=starter,
        steps=2,
        timeout_s=60,
    )
    assert comparison.equal, str(comparison)
    assert comparison.gradient_error <= TOLERANCE
